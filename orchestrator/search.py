"""What a sweep tries next: points that Optuna proposes, and trials that ASHA has go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from orchestrator.pruning import at_rung, promote
from orchestrator.space import Point, optuna_space
from orchestrator.trial import FOLDER, STOPPING, Sweep
from orchestrator.trial_folder import AGAIN, OBJECTIVES, Outcome


class Search(OptunaSearch):  # type: ignore[misc]
    """`left` points of Optuna's; before each, where there is one, a trial that ASHA has go on; none once a signal came.

    Ray Tune takes one that goes on for another trial. Optuna does not hear of it: it learns what all had at the rung.
    """

    def __init__(self, sweep: Sweep, left: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._folder, self._rung, self._left = sweep.base.storage, sweep.rung, left
        self._running: set[str] = set()
        self._going_on: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        if (self._folder / STOPPING).exists():
            return Searcher.FINISHED
        point = promote(self._folder, self.metric[0], self._rung, trial_id) if self._rung is not None else None
        if point is not None:
            self._going_on.add(trial_id)
        elif self._left > 0:
            self._left -= 1
            point = super().suggest(trial_id)
        else:
            # What is running may be the one that another waits for.
            return None if self._running else Searcher.FINISHED
        self._running.add(trial_id)
        return point

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.discard(trial_id)
        if trial_id in self._going_on:
            return
        if result and self._rung is not None:  # one that an earlier start had go on has come to its end
            [objective] = self.metric
            value = at_rung(self._folder / result[FOLDER], objective, self._rung)
            assert value is not None, "who has ended well under ASHA has come to the rung"
            result = result | {objective: value}
        super().on_trial_complete(trial_id, result, error)


def searcher(
    sweep: Sweep, objectives: Sequence[str], points: Sequence[Point], begun: Sequence[Outcome], left: int
) -> Searcher:
    """What proposes `left` points and knows what came of those that have ended: first those that begin once more."""
    space = sweep.space
    modes = [OBJECTIVES[objective] for objective in objectives]
    directions = ["minimize" if mode == "min" else "maximize" for mode in modes]
    storage, distributions = optuna.storages.InMemoryStorage(), optuna_space(space)
    study = optuna.create_study(storage=storage, study_name=space.name, directions=directions)
    again, fresh = [], list(points)
    for outcome in begun:
        if outcome.point in fresh:
            fresh.remove(outcome.point)
        if sweep.rung is not None:
            known = [at_rung(sweep.base.storage / outcome.trial, objectives[0], sweep.rung)]
        else:
            known = [outcome.objectives.get(objective) for objective in objectives]
        values = [value for value in known if value is not None and math.isfinite(value)]
        if outcome.status in AGAIN:
            again.append(outcome.point)
        elif len(values) == len(objectives):
            study.add_trial(optuna.trial.create_trial(params=outcome.point, distributions=distributions, values=values))
    return Search(
        sweep,
        left,
        space=distributions,
        metric=list(objectives),
        mode=modes,
        points_to_evaluate=again + fresh or None,
        storage=storage,
        study_name=space.name,
        # As NumPy takes them; what is drawn at random must not be drawn again.
        seed=(sweep.base.seed + len(begun)) % 2**32,
    )
