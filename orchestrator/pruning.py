"""Which trials of a sweep are stopped early: Ray Tune's schedulers, which here judge by what the folders hold.

So a sweep that was interrupted is judged as one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.config import RunConfig
from orchestrator.run_folder import Json
from orchestrator.space import Point, Space
from orchestrator.sweep_report import measurements, measurements_of_ended
from orchestrator.trial import FOLDER, OBJECTIVES

Pruning = Literal["none", "asha", "median"]
# A trial is first judged after this share of the training, and the best quarter goes on.
GRACE, REDUCTION = 0.25, 4


def first_judged(space: Space, config: RunConfig, points: Sequence[Point]) -> int:
    """The step from which trials are judged, when all have been cut: beside one that has not, every cut looks bad."""
    return max(int(GRACE * config.train.steps), space.latest_cut(config, points)) + 1


def scheduler_of(pruning: Pruning, base: RunConfig, grace: int, objective: str) -> TrialScheduler:
    """What judges trials by an objective from step `grace` on. `base.storage` is the sweep's folder."""
    if pruning == "none":
        return FIFOScheduler()
    which: dict[str, Any] = {"time_attr": "step", "metric": objective, "mode": OBJECTIVES[objective]}
    kind = Halving if pruning == "asha" else MedianRule
    return kind(base.storage, grace, base.train.steps, **which)


class Halving(ASHAScheduler):  # type: ignore[misc]
    """One rung, at which each trial is judged by what it had there, be it in an earlier start of the sweep."""

    def __init__(self, sweep: Path, grace: int, steps: int, **which: Any) -> None:
        super().__init__(
            max_t=max(grace, steps - 1),  # at the last step there is nothing left to stop
            grace_period=grace,
            reduction_factor=REDUCTION,
            stop_last_trials=False,
            **which,
        )
        self._sweep, self._grace, self._steps = sweep, grace, steps
        ended = measurements_of_ended(sweep, self._metric)
        [(_, recorded)] = self._brackets[0]._rungs
        recorded |= {
            name: self._metric_op * self._at_the_rung(rows) for name, rows in ended.items() if rows[-1]["step"] >= grace
        }

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["step"] >= self._steps:
            return str(self.CONTINUE)  # to its own end
        decision: str = super().on_trial_result(controller, trial, self._judged(result))
        return decision

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(controller, trial, self._judged(result))

    def _judged(self, result: dict[str, Any]) -> dict[str, Any]:
        """With the objective as it was at the rung, once it has been there."""
        if result["step"] < self._grace:
            return result
        rows = measurements(self._sweep / result[FOLDER], self._metric)
        return result | {self._metric: self._at_the_rung([*rows, result])}

    def _at_the_rung(self, rows: Sequence[Json]) -> float:
        return float(next(row[self._metric] for row in rows if row["step"] >= self._grace))


class MedianRule(MedianStoppingRule):  # type: ignore[misc]
    """As long as there are too few trials to judge by, a trial goes on: Ray Tune has nothing to pause it with."""

    def __init__(self, sweep: Path, grace: int, steps: int, **which: Any) -> None:
        super().__init__(grace_period=grace, **which)
        self._sweep, self._grace, self._steps = sweep, grace, steps
        ended = measurements_of_ended(sweep, which["metric"])
        judged = {name: self._after_the_cuts(rows) for name, rows in ended.items()}
        self._results |= {name: rows for name, rows in judged.items() if rows}

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["step"] < self._grace:
            return str(self.CONTINUE)  # Ray Tune would count it, and what was not cut yet looks best
        if trial not in self._results:
            rows = measurements(self._sweep / result[FOLDER], self._metric)
            self._results[trial] = self._after_the_cuts([row for row in rows if row["step"] < result["step"]])
        decision: str = super().on_trial_result(controller, trial, result)
        ends = result["step"] >= self._steps
        return self.CONTINUE if ends or decision == self.PAUSE else decision

    def _after_the_cuts(self, rows: Sequence[Json]) -> list[Json]:
        return [row for row in rows if row["step"] >= self._grace]
