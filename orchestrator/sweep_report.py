"""What a sweep has come to: a table of its trials, the Pareto fronts, what mattered, and one HTML page.

Everything is read back from its trials' folders; the page needs `sweep.json`, which a sweep leaves when it has ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from orchestrator.run_folder import Json, read_json, write_whole
from orchestrator.space import Space, optuna_space
from orchestrator.trial_folder import OBJECTIVES, Outcome, best_of, final, outcomes, steps_alone, steps_trained

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


def pareto(rows: Sequence[Json], x: str, y: str) -> list[Json]:
    """The finished trials that no other one beats in both, by `x`; less is better."""
    front: list[Json] = []
    for row in sorted((row for row in rows if row["status"] == "finished"), key=lambda row: (row[x], row[y])):
        if not front or row[y] < front[-1][y]:
            front.append(row)
    return front


def write_sweep_report(
    folder: Path,
    objectives: Sequence[str],
    space: Space,
    steps: int,
    baselines: Mapping[str, Json],
) -> Json:
    """Write `trials.parquet`, the figures, `sweep.json` and `report.html`; what `sweep.json` holds.

    `objectives` are those of the search, the first one choosing the best; `steps` are a run's; `baselines` are
    summaries of runs to compare with.
    """
    found = outcomes(folder)
    best = best_of(found, objectives[0])
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
        "baselines": {what: final(run) | {"final_dims": run["final_dims"]} for what, run in baselines.items()},
        "importance": importance(found, objectives[0], space),
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


def importance(found: Sequence[Outcome], objective: str, space: Space) -> dict[str, float]:
    """The share of each knob in an objective; nothing where the trials are too few."""
    finished = [outcome for outcome in found if outcome.status == "finished"]
    if len(finished) < FEWEST or len(space.knobs) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if OBJECTIVES[objective] == "min" else "maximize")
    distributions = optuna_space(space)
    for outcome in finished:
        value = outcome.objectives[objective]
        study.add_trial(optuna.trial.create_trial(params=outcome.point, distributions=distributions, value=value))
    return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()))


def _of_equal_columns(rows: Sequence[Json]) -> list[Json]:
    """What a trial has not come to, None, in the order of the one that has most."""
    longest = max(rows, key=len)
    return [{name: row.get(name) for name in longest} for row in rows]


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
