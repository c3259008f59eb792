"""The folder of a run, read back from what the run has written so far.

`metrics.jsonl`, `plans/*.json`, `summary.json` and `config.yaml` say everything, so a run can be looked at while
it trains, after it ended, and after it was killed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression.plan import TruncationPlan
from orchestrator.errors import UserError

Json = dict[str, Any]
# What a file is called until it is whole.
PARTIAL = ".partial"


@dataclass(frozen=True)
class Recorded:
    """The folder of a run, read."""

    rows: list[Json]  # of metrics.jsonl: one per step, ascending
    plans: list[Json]  # one per probe, ascending
    cuts: list[Json]  # as under `truncations` in summary.json
    summary: Json  # empty while the run is unfinished
    config: str


def read_run(folder: Path) -> Recorded:
    """Everything in a run's folder.

    Raises:
        UserError: it is not the folder of a run, or a file in it is broken.
    """
    rows = read_metrics(folder)
    order = ("step", "attempt", "event")
    written = [read_json(path, *order, "digest", "layers") for path in folder.glob("plans/*.json")]
    written.sort(key=lambda plan: [plan[key] for key in order])
    # A restarted attempt plans the same step again: the latest attempt is what was carried out.
    plans = list({plan["step"]: plan for plan in written}.values())
    # Nothing is cut any more after a cut that was taken back, so what lies behind it was taken back too.
    end = min((row["step"] for row in rows if "rolled_back" in row), default=math.inf)
    plans = [plan for plan in plans if plan["step"] <= end]
    if (folder / "summary.json").is_file():
        summary = read_json(folder / "summary.json", "truncations")
        cuts = summary["truncations"]
    else:
        summary, measured = {}, {row["step"]: row for row in rows}
        cuts = [_cut(plan, measured.get(plan["step"], {})) for plan in plans]
        cuts = [cut for cut in cuts if cut["dims_before"] != cut["dims_after"]]
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return Recorded(rows, plans, cuts, summary, text)


def total_bounds(cuts: Sequence[Json]) -> list[float | None]:
    """Per layer, the error bounds of these cuts added up; None where a cut of the layer has none."""
    by_layer = zip(*(cut["error_bounds"] for cut in cuts), strict=True)
    return [None if None in bounds else sum(bounds) for bounds in by_layer]


def read_metrics(folder: Path) -> list[Json]:
    """One row per step of `metrics.jsonl`, ascending, each with `step` and what was measured there.

    Raises:
        UserError: the file is missing, holds no row, or a line of it is broken.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} has no metrics.jsonl: expected the folder of a training run")
    rows = metrics_so_far(folder)
    if not rows:
        raise UserError(f"{path} holds no complete row: expected one JSON object a line")
    return rows


def read_json(path: Path, *keys: str) -> Json:
    """A JSON object of a run, a sweep or a comparison, which has at least these keys.

    Raises:
        UserError: it is missing, broken, or lacks one of them.
    """
    try:
        content: Json = json.loads(path.read_bytes())
        if absent := [key for key in keys if key not in content]:
            raise ValueError(f"without {', '.join(absent)}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is broken ({error}): expected a JSON object with {', '.join(keys)}") from error
    return content


def metrics_so_far(folder: Path) -> list[Json]:
    """As `read_metrics`, of a run that may not have measured anything yet."""
    path = folder / "metrics.jsonl"
    rows: dict[int, Json] = {}
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break  # the run was killed, or is at this moment, in the middle of this line
            raise UserError(f"{path}, line {number}: expected a JSON object with a `step`") from error
        rows[step] = completed(rows.get(step, {}), row)
    return [rows[step] for step in sorted(rows)]


def completed(known: Mapping[str, Any], row: Mapping[str, Any]) -> Json:
    """What is known of a step, with another row of it, unless it was trained again: every training has its loss."""
    return dict(row) if "train_loss" in row and "train_loss" in known else {**known, **row}


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, complete or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())  # or a name may outlive a power failure that its content does not
    partial.rename(path)


def next_attempt(folder: Path) -> int:
    """A number for a group of workers that no earlier group of this run has had, from 1."""
    path = folder / "attempt"
    number = int(path.read_text()) + 1 if path.exists() else 1
    write_whole(path, f"{number}\n")
    return number


def write_plan(folder: Path, plan: TruncationPlan) -> None:
    write_whole(plan_path(folder, plan), plan.to_json() + "\n")


def drop_plans_after(folder: Path, step: int) -> None:
    """Delete the plans of later steps, which are about to be trained again."""
    for path in folder.glob("plans/step-*-attempt-*.json"):
        if int(path.stem.split("-")[1]) > step:
            path.unlink()


def ray_log(folder: Path) -> Path:
    """What Ray, DeepSpeed and the workers have said during a run, or during a sweep or comparison outside its runs."""
    return folder / "logs" / "ray.log"


def plan_path(folder: Path, plan: TruncationPlan) -> Path:
    return folder / "plans" / f"step-{plan.step:08d}-attempt-{plan.attempt}.json"


def _cut(plan: Json, row: Json) -> Json:
    """The entry that summary.json would hold; how long the cut took is known there alone."""
    columns = {
        "dims_before": "dim_before",
        "dims_after": "dim_after",
        "mass_kept": "mass_kept",
        "error_bounds": "error_bound",
        "output_errors": "output_error",
    }
    per_layer = {name: [layer[key] for layer in plan["layers"]] for name, key in columns.items()}
    losses = {key: row.get(key) for key in ("val_loss_before", "val_loss_after")}
    return {"step": plan["step"], "digest": plan["digest"], "rolled_back": "rolled_back" in row, **per_layer, **losses}
