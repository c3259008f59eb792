"""Which trials of a sweep do not come to their end, judged by what their folders hold.

So a sweep that was interrupted is judged as one that was not. Under ASHA every trial ends at the rung, and the search
has the best go on from there; median stopping is Ray Tune's scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.config import RunConfig
from orchestrator.run_folder import Json, write_whole
from orchestrator.space import Point, Space
from orchestrator.trial import FOLDER, Sweep
from orchestrator.trial_folder import (
    OBJECTIVES,
    OUTCOME,
    POINT,
    PROMOTED,
    PRUNED,
    measurements,
    measurements_of_ended,
    status_of,
    trials_of,
)

Pruning = Literal["none", "asha", "median"]
# A trial is first judged after this share of the training. Under ASHA one of so many goes on.
GRACE, REDUCTION = 0.25, 4


def first_judged(space: Space, config: RunConfig, points: Sequence[Point]) -> int:
    """The step from which trials are judged, when all have been cut: beside one that has not, every cut looks bad."""
    return max(int(GRACE * config.train.steps), space.latest_cut(config, points)) + 1


def rung_of(grace: int, eval_every: int) -> int:
    """The step of the first evaluation from which trials are judged."""
    return -(-grace // eval_every) * eval_every


def at_rung(trial: Path, objective: str, rung: int) -> float | None:
    """What a trial had at the rung, if it has come so far."""
    return next((row[objective] for row in measurements(trial, objective) if row["step"] == rung), None)


def promoted(sweep: Path) -> list[Path]:
    """The folders of the trials that do not end at the rung, but for those that have failed."""
    return [trial for trial in trials_of(sweep) if (trial / PROMOTED).exists() and status_of(trial)[0] != "failed"]


def promote(sweep: Path, objective: str, rung: int, trial_id: str) -> Point | None:
    """Have the best of the trials that wait at the rung go on, if enough are there to choose among; its point.

    `trial_id` is what Ray Tune calls it from now on.

    ASHA (Li et al., MLSys 2020, algorithm 2) with the delay of Hyper-Tune (Li et al., VLDB 2022, D-ASHA): one goes on
    when REDUCTION have come to the rung, or failed, for each that does. Without the delay all go on who are among the
    best quarter at any time, which of few trials are many more than a quarter.
    """
    trials = trials_of(sweep)
    statuses = {trial: status_of(trial)[0] for trial in trials}
    going_on = promoted(sweep)
    judged = [trial for trial in trials if statuses[trial] != "running" or trial in going_on]
    if REDUCTION * (len(going_on) + 1) > len(judged):
        return None
    waiting = {trial: at_rung(trial, objective, rung) for trial in trials if statuses[trial] == "pruned"}
    values = {trial: value for trial, value in waiting.items() if value is not None}
    assert values.keys() == waiting.keys(), "who waits at the rung has come to it"
    best = (min if OBJECTIVES[objective] == "min" else max)(values, key=values.__getitem__, default=None)
    if best is None:
        return None
    note = json.loads((best / POINT).read_text())
    # Whoever takes up this point next goes on here. Until the last of these three it waits as before.
    write_whole(best / POINT, json.dumps(note | {"trial_id": trial_id, "start": None}) + "\n")
    (best / OUTCOME).unlink(missing_ok=True)
    (best / PRUNED).rename(best / PROMOTED)
    point: Point = note["point"]
    return point


def scheduler_of(pruning: Pruning, sweep: Sweep, points: Sequence[Point], objective: str) -> TrialScheduler:
    """What Ray Tune judges trials at these points by."""
    if pruning != "median":
        return FIFOScheduler()
    base = sweep.base
    grace = first_judged(sweep.space, base, points)
    which: dict[str, Any] = {"time_attr": "step", "metric": objective, "mode": OBJECTIVES[objective]}
    return MedianRule(base.storage, grace, base.train.steps, **which)


class MedianRule(MedianStoppingRule):  # type: ignore[misc]
    """As long as there are too few trials to judge by, a trial goes on: Ray Tune has nothing to pause it with."""

    def __init__(self, sweep: Path, grace: int, steps: int, **which: Any) -> None:
        super().__init__(grace_period=grace, **which)
        self._sweep, self._steps = sweep, steps
        ended = measurements_of_ended(sweep, which["metric"])
        judged = {name: self._after_the_cuts(rows) for name, rows in ended.items()}
        self._results |= {name: rows for name, rows in judged.items() if rows}

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["step"] < self._grace_period:
            return str(self.CONTINUE)  # Ray Tune would count it, and what was not cut yet looks best
        if trial not in self._results:
            rows = measurements(self._sweep / result[FOLDER], self._metric)
            self._results[trial] = self._after_the_cuts([row for row in rows if row["step"] < result["step"]])
        decision: str = super().on_trial_result(controller, trial, result)
        ends = result["step"] >= self._steps
        return self.CONTINUE if ends or decision == self.PAUSE else decision

    def _after_the_cuts(self, rows: Sequence[Json]) -> list[Json]:
        return [row for row in rows if row["step"] >= self._grace_period]
