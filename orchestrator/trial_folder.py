"""What the folders of a sweep's trials say: where each was tried, how it has ended, and what it measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.run_folder import Json, metrics_so_far, read_json, write_whole

# In a trial's folder: where it was tried, how its process has ended it, and that the sweep's pruning has, or has had it
# go on to its end.
POINT, OUTCOME, PRUNED, PROMOTED = "point.json", "outcome.json", "pruned", "promoted"
# What a sweep that is continued trains (again): a trial that its end has interrupted, and one that has failed.
AGAIN = ("running", "failed")
OBJECTIVES = {"val_loss": "min", "val_accuracy": "max", "states": "min", "train_seconds": "min"}


@dataclass(frozen=True)
class Outcome:
    """One trial: where it was tried, how it ended, and what it measured last."""

    trial: str
    point: dict[str, Any]
    status: str
    error: str | None
    objectives: dict[str, float]
    first_cut: int | None
    trunk_step: int
    """After which it begins; 0 where it shares nothing."""
    last_step: int
    final_dims: list[int]
    trunk: str = ""
    """What it begins with, if `trunk_step` is more than 0."""

    def row(self) -> Json:
        """For the table: every knob, every objective."""
        steps = {"first_cut": self.first_cut, "trunk_step": self.trunk_step, "last_step": self.last_step}
        end = {"final_dims": self.final_dims, "error": self.error}
        return {"trial": self.trial, "status": self.status} | self.point | self.objectives | steps | end


def trials_of(folder: Path) -> list[Path]:
    """The folders of a sweep's trials, in their order."""
    return sorted(path for path in folder.glob("trial-*") if (path / POINT).exists())


def statuses(folder: Path) -> list[str]:
    """Of every trial that has begun: finished, pruned, failed or running."""
    return [status_of(trial)[0] for trial in trials_of(folder)]


def left_open(folder: Path) -> list[tuple[Path, str]]:
    """Folder and Ray Tune's id of every trial whose process has not said how it ended, or that ended without a page."""
    return [(trial, _begun(trial)["trial_id"]) for trial in trials_of(folder) if _is_open(trial)]


def measurements(trial: Path, objective: str) -> list[Json]:
    """The rows of a trial's metrics that have an objective, by step."""
    return [row for row in metrics_so_far(trial) if objective in row]


def measurements_of_ended(folder: Path, objective: str) -> dict[str, list[Json]]:
    """By name, those of every trial that has finished or was pruned, if there are any."""
    found = {trial.name: measurements(trial, objective) for trial in trials_of(folder) if _has_ended(trial)}
    return {name: rows for name, rows in found.items() if rows}


def outcomes(folder: Path) -> list[Outcome]:
    """All trials of a sweep, in their order."""
    return [_outcome(trial) for trial in trials_of(folder)]


def best_so_far(folder: Path, objective: str) -> tuple[str, float] | None:
    """The finished trial that is best in one objective, and its value there."""
    finished = [trial for trial in trials_of(folder) if status_of(trial)[0] == "finished"]
    values = {trial.name: final(read_json(trial / "summary.json", "truncations"))[objective] for trial in finished}
    best = (min if OBJECTIVES[objective] == "min" else max)(values, key=values.__getitem__, default=None)
    return (best, values[best]) if best is not None else None


def best_of(found: Sequence[Outcome], objective: str) -> Outcome:
    """The finished trial that is best in one objective."""
    sign = 1 if OBJECTIVES[objective] == "min" else -1
    return min((o for o in found if o.status == "finished"), key=lambda o: sign * o.objectives[objective])


def steps_trained(found: Sequence[Outcome]) -> int:
    """Of all trunks, as far as a trial needed them, and of the trials from there."""
    trunks = {outcome.trunk for outcome in found}
    shared = sum(max(outcome.trunk_step for outcome in found if outcome.trunk == trunk) for trunk in trunks)
    return shared + sum(outcome.last_step - outcome.trunk_step for outcome in found)


def steps_alone(found: Sequence[Outcome], steps: int) -> int:
    """What they would have trained each for itself and to its end, which is step `steps` for those that were pruned.

    One that failed would have come as far alone; others have ended at their own last step, which a space may set.
    """
    return sum(steps if outcome.status == "pruned" else outcome.last_step for outcome in found)


def conclude(folder: Path, status: str, error: str | None = None) -> None:
    """Leave in a trial's folder how it has ended: finished, failed or stopped."""
    write_whole(folder / OUTCOME, json.dumps({"status": status, "error": error}) + "\n")


def status_of(folder: Path) -> tuple[str, str | None]:
    """How a trial has ended, finished, pruned or failed, or that it is running; and its error, where it has one.

    One that was stopped with its sweep goes on with it; one that has finished before it heard that it was pruned has.
    """
    found: dict[str, Any] = {"status": "running", "error": None}
    with suppress(FileNotFoundError):
        found = json.loads((folder / OUTCOME).read_text())
    if found["status"] != "finished" and (folder / PRUNED).exists():
        return "pruned", None
    return "running" if found["status"] == "stopped" else found["status"], found["error"]


def measured(metrics: Mapping[str, float]) -> dict[str, float]:
    """What can be an objective, of an evaluation's metrics."""
    return {key: value for key, value in metrics.items() if key in OBJECTIVES}


def final(summary: Mapping[str, Any]) -> dict[str, float]:
    """The objectives of a run that has ended."""
    found = {"val_loss": summary["val_loss_final"], "val_accuracy": summary["val_accuracy_final"]}
    found |= {"states": sum(summary["final_dims"]), "train_seconds": summary["train_seconds"]}
    return {key: value for key, value in found.items() if value is not None}


def _is_open(trial: Path) -> bool:
    early = status_of(trial)[0] in ("pruned", "failed")
    return not (trial / OUTCOME).exists() or (early and not (trial / "report.html").exists())


def _has_ended(trial: Path) -> bool:
    return status_of(trial)[0] not in AGAIN


def _begun(trial: Path) -> Json:
    """Ray Tune's id of a trial and its point, as noted when it began."""
    noted: Json = json.loads((trial / POINT).read_text())
    return noted


def _outcome(trial: Path) -> Outcome:
    status, error = status_of(trial)
    point = _begun(trial)["point"]
    branch = json.loads((trial / "branch.json").read_text()) if (trial / "branch.json").exists() else {}
    trunk, trunk_step = branch.get("trunk", ""), branch.get("step", 0)
    rows = metrics_so_far(trial)
    last_step = max((row["step"] for row in rows if "train_loss" in row), default=trunk_step)
    if status == "finished":
        summary = read_json(trial / "summary.json", "truncations")
        cuts = [cut["step"] for cut in summary["truncations"] if not cut["rolled_back"]]
        first = min(cuts, default=None)
        dims = summary["final_dims"]
        return Outcome(trial.name, point, status, None, final(summary), first, trunk_step, last_step, dims, trunk)
    # Up to its beginning they are the trunk's.
    held_out = [row for row in rows if "val_loss" in row and row["step"] > trunk_step]
    objectives = measured(held_out[-1]) if held_out else {}
    objectives = {name: value for name, value in objectives.items() if math.isfinite(value)}
    first = next((row["step"] for row in held_out if "val_loss_before" in row), None)
    dims = [int(value) for key, value in sorted(held_out[-1].items()) if key.startswith("d_state_")] if held_out else []
    return Outcome(trial.name, point, status, error, objectives, first, trunk_step, last_step, dims, trunk)
