"""What a sweep has come to: a table of its trials, the Pareto fronts, what mattered, and one HTML page.

Everything is read back from the trials' folders; the page needs `sweep.json`, which a sweep leaves when it has ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from orchestrator.collection import write_rows
from orchestrator.comparison_report import COMPARISON
from orchestrator.errors import UserError
from orchestrator.figures import BLUE, GREEN, GREY, VERMILION, figure_of, style
from orchestrator.page import write_page
from orchestrator.run_folder import Json, metrics_so_far, read_json, write_whole
from orchestrator.space import Space, optuna_space
from orchestrator.trial import AGAIN, OUTCOME, POINT, final, measured, status_of
from orchestrator.trunk import TRUNK

SUMMARY = "sweep.json"
FEWEST = 4  # trials from which importances say anything
CAPTIONS = {
    "pareto_train_seconds": "Held-out loss against the time spent in training. The line joins the trials that no other "
    "beats in both.",
    "pareto_states": "Held-out loss against the states that are left, of all layers together.",
    "knobs": "Held-out loss against each knob: what the others were differs from point to point.",
    "importance": "Share of each knob in what tells the best trials from the others (PED-ANOVA).",
}


# What a held-out loss is set against: whether a trial is on the Pareto front, is a column for each.
AGAINST = ("train_seconds", "states")
# Of every trial, beside its knobs and objectives.
COLUMNS = (
    "trial",
    "status",
    "first_cut",
    "trunk_step",
    "last_step",
    "final_dims",
    "error",
    *(f"front_{x}" for x in AGAINST),
)

BASELINES = ((VERMILION, "s", "--"), (GREEN, "^", ":"))  # how they are drawn: full size, from scratch


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
    trunk: str = TRUNK
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


def best_so_far(folder: Path, objective: str, mode: str) -> tuple[str, float] | None:
    """The finished trial that is best in one objective, and its value there."""
    finished = [trial for trial in trials_of(folder) if status_of(trial)[0] == "finished"]
    values = {trial.name: final(read_json(trial / "summary.json", "truncations"))[objective] for trial in finished}
    best = (min if mode == "min" else max)(values, key=values.__getitem__, default=None)
    return (best, values[best]) if best is not None else None


def best_of(found: Sequence[Outcome], objective: str, mode: str) -> Outcome:
    """The finished trial that is best in one objective."""
    sign = 1 if mode == "min" else -1
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


def pareto(rows: Sequence[Json], x: str, y: str) -> list[Json]:
    """The finished trials that no other one beats in both, by `x`; less is better."""
    front: list[Json] = []
    for row in sorted((row for row in rows if row["status"] == "finished"), key=lambda row: (row[x], row[y])):
        if not front or row[y] < front[-1][y]:
            front.append(row)
    return front


def write_sweep_report(
    folder: Path,
    objectives: Mapping[str, str],
    space: Space,
    steps: int,
    baselines: Mapping[str, Json],
) -> Json:
    """Write `trials.parquet`, the figures, `sweep.json` and `report.html`; what `sweep.json` holds.

    `objectives` are those of the search with their modes, the first one choosing the best; `steps` are a run's;
    `baselines` are summaries of runs to compare with.
    """
    found = outcomes(folder)
    name, mode = next(iter(objectives.items()))
    best = best_of(found, name, mode)
    trained = steps_trained(found)
    naive = steps_alone(found, steps)
    rows = _of_equal_columns([outcome.row() for outcome in found])
    fronts = {x: [row["trial"] for row in pareto(rows, x, "val_loss")] for x in AGAINST}
    rows = [row | {f"front_{x}": row["trial"] in front for x, front in fronts.items()} for row in rows]
    summary: Json = {
        "name": folder.name,
        "space": space.name,
        "objectives": list(objectives),
        "best": {"trial": best.trial, "point": best.point, "final_dims": best.final_dims} | best.objectives,
        "trials": rows,
        "front": fronts["train_seconds"],
        "baselines": {what: final(run) | {"final_dims": run["final_dims"]} for what, run in baselines.items()},
        "importance": importance(found, name, mode, space),
        "steps_trained": trained,
        "steps_naive": naive,
        "share": trained / naive,
    }
    write_whole(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    write_rows(folder / "trials.parquet", rows)
    render(folder)
    return summary


def render(folder: Path) -> Path:
    """Draw the figures and the page again from `sweep.json`; the page's path.

    Raises:
        UserError: the folder is not one of a sweep that has ended.
    """
    path = folder / SUMMARY
    if not path.exists():
        raise UserError(
            f"{folder} has no {SUMMARY} and no {COMPARISON}: a sweep's page is drawn when it has ended, and a "
            "comparison's when its first run has"
        )
    summary = read_json(path, "trials", "objectives", "importance")
    figures = {
        "pareto_train_seconds": _pareto(summary, "train_seconds", "seconds of training"),
        "pareto_states": _pareto(summary, "states", "states in all layers"),
        "knobs": _knobs(summary),
    }
    if summary["importance"]:
        figures["importance"] = _importance(summary["importance"])
    return write_page(folder, "sweep.html.j2", figures, CAPTIONS, sweep=summary)


def importance(found: Sequence[Outcome], objective: str, mode: str, space: Space) -> dict[str, float]:
    """The share of each knob in an objective; nothing where the trials are too few."""
    finished = [outcome for outcome in found if outcome.status == "finished"]
    if len(finished) < FEWEST or len(space.knobs) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    distributions = optuna_space(space)
    for outcome in finished:
        value = outcome.objectives[objective]
        study.add_trial(optuna.trial.create_trial(params=outcome.point, distributions=distributions, value=value))
    return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()))


def _of_equal_columns(rows: Sequence[Json]) -> list[Json]:
    """What a trial has not come to, None, in the order of the one that has most."""
    longest = max(rows, key=len)
    return [{name: row.get(name) for name in longest} for row in rows]


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
    trunk, trunk_step = str(branch.get("trunk", TRUNK)), int(branch.get("step", 0))
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


def _pareto(summary: Json, x: str, label: str) -> Figure:
    figure = figure_of(4.6)
    axes = figure.add_subplot()
    style(axes, label, "held-out loss")
    rows = summary["trials"]
    for status, colour, filled in (("finished", BLUE, True), ("pruned", GREY, False)):
        points = [row for row in rows if row["status"] == status and None not in (row[x], row["val_loss"])]
        face = colour if filled else "none"
        _scatter(axes, points, x, status, color=colour, marker="o", facecolors=face)
    front = pareto(rows, x, "val_loss")
    axes.plot([row[x] for row in front], [row["val_loss"] for row in front], color=BLUE, linewidth=1, zorder=1)
    for (what, baseline), (colour, marker, _) in zip(summary["baselines"].items(), BASELINES, strict=False):
        _scatter(axes, [baseline], x, what, color=colour, marker=marker, s=70)
    axes.legend(frameon=False)
    return figure


def _knobs(summary: Json) -> Figure:
    """The finished trials, a panel a knob, with the baselines' losses as lines."""
    knobs = list(summary["best"]["point"])
    figure = figure_of(3.6)
    finished = [row for row in summary["trials"] if row["status"] == "finished"]
    for axes, knob in zip(figure.subplots(1, len(knobs), sharey=True, squeeze=False)[0], knobs, strict=True):
        style(axes, knob, "held-out loss" if knob == knobs[0] else "")
        values = [row[knob] for row in finished]
        numbers = all(type(value) in (int, float) for value in values)
        axes.scatter(values if numbers else list(map(str, values)), [row["val_loss"] for row in finished], color=BLUE)
        for (what, baseline), (colour, _, dashes) in zip(summary["baselines"].items(), BASELINES, strict=False):
            axes.axhline(baseline["val_loss"], color=colour, linestyle=dashes, linewidth=1, zorder=1, label=what)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def _scatter(axes: Axes, points: Sequence[Mapping[str, float]], x: str, label: str, **style: Any) -> None:
    if points:
        axes.scatter([p[x] for p in points], [p["val_loss"] for p in points], label=label, zorder=2, **style)


def _importance(shares: Mapping[str, float]) -> Figure:
    figure = figure_of(0.8 + 0.4 * len(shares))
    axes = figure.add_subplot()
    style(axes, "share of importance", "")
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=BLUE, zorder=2)
    return figure
