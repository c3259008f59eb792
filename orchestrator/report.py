"""Figures and one self-contained HTML page from the folder of a training run.

Everything is read back from the files the run left (`metrics.jsonl`, `plans/*.json`, `summary.json`,
`config.yaml`), so a report can be made at any time: after the run, while it trains, or after it was killed.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from orchestrator.figures import BLUE, GREY, PALETTE, SKY, VERMILION, colours_of, figure_of, style
from orchestrator.page import write_page
from orchestrator.run_folder import Json, Recorded, read_run, total_bounds

SMOOTH_FROM = 200  # training-loss points above which a running mean is drawn over them
CAPTIONS = {
    "loss": "Training and held-out loss. Dashed lines: truncations, with the state dimension before → after.",
    "state_dims": "State dimension of each layer.",
    "hsv_drift": "How far spectra moved between probes and, where it is known, how many of the kept states stayed. "
    "A ring marks a cut.",
    "hsv_spectra": "Hankel singular values at every probe, largest first. A dot marks the rank of a cut.",
}


def write_report(run: Path) -> Path:
    """Draw `loss.png`, `state_dims.png`, `hsv_spectra.png` and `hsv_drift.png` into `run/figures`, and write
    `run/report.html`, one page that needs no other file and no network.

    Returns its path. Raises UserError where `run` is not the folder of a run or a file in it is broken.
    """
    recorded = read_run(run)
    figures = {
        "loss": _loss(recorded),
        "state_dims": _state_dims(recorded),
        "hsv_spectra": _spectra(recorded),
        "hsv_drift": _drift(recorded),
    }
    return write_page(
        run,
        "report.html.j2",
        figures,
        CAPTIONS,
        name=recorded.summary.get("name") or run.resolve().name,
        run=recorded,
        bounds=total_bounds([cut for cut in recorded.cuts if not cut["rolled_back"]]),
        dims=[list(known.values()) for known in _dims_over_steps(recorded).values()],
    )


def _style(axes: Axes, x_label: str, y_label: str) -> None:
    style(axes, x_label, y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _series(rows: list[Json], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _loss(run: Recorded) -> Figure:
    figure = figure_of(4.6, "Loss")
    axes = figure.add_subplot()
    _style(axes, "optimizer step", "loss")
    steps, losses = _series(run.rows, "train_loss")
    if (count := len(steps)) <= SMOOTH_FROM:
        axes.plot(steps, losses, color=BLUE, linewidth=1, label="training")
    else:
        axes.plot(steps, losses, color=SKY, alpha=0.6, linewidth=0.8, label="training")
        window = np.ones(2 * min(500, max(5, count // 200)) + 1)
        mean = np.convolve(losses, window, "same") / np.convolve(np.ones(count), window, "same")
        axes.plot(steps, mean, color=BLUE, linewidth=1.2, label=f"training, mean of {len(window):,} points")
    steps, losses = _series(run.rows, "val_loss")
    marker = "o" if len(steps) <= 60 else ""
    axes.plot(steps, losses, color=VERMILION, marker=marker, markersize=4, label="held-out")
    axes.legend(frameon=False, loc="upper right")
    _mark_cuts(axes, run.cuts)
    return figure


def _mark_cuts(axes: Axes, cuts: list[Json]) -> None:
    """Vertical lines with labels above the axes, pushed apart so that cuts close together stay readable."""
    labels = [
        f"{_range(cut['dims_before'])}→{_range(cut['dims_after'])}{', rolled back' if cut['rolled_back'] else ''}"
        for cut in cuts
    ]
    upright = len(cuts) > 6
    gap = 0.024 if upright else 0.02 + 0.009 * max(map(len, labels), default=0)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high)
    places = [(cut["step"] - low) / (high - low) for cut in cuts]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else 1.0)
    for cut, label, place in zip(cuts, labels, places, strict=True):
        axes.axvline(cut["step"], color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        axes.annotate(
            label, xy=(cut["step"], 1), xycoords=axes.get_xaxis_transform(),
            xytext=(place, 1.05), textcoords="axes fraction",
            ha="center", va="bottom", rotation=90 if upright else 0, fontsize=9, color="#333333",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _range(dims: Sequence[int]) -> str:
    return str(min(dims)) if min(dims) == max(dims) else f"{min(dims)}–{max(dims)}"


def _dims_over_steps(run: Recorded) -> dict[int, dict[int, int]]:
    """Layer -> step -> state dimension from that step on, with the first and the last step of the run."""
    dims: dict[int, dict[int, int]] = {}
    first, last = run.rows[0]["step"], run.rows[-1]["step"]
    for i, initial in enumerate(run.summary.get("initial_dims") or []):
        dims[i] = {first: initial}
    for plan in run.plans:
        for layer in plan["layers"]:
            dims.setdefault(layer["layer"], {first: layer["dim_before"]})[plan["step"]] = layer["dim_after"]
    # What the run measured outranks what was planned: a cut may have been rolled back.
    for row in run.rows:
        for key, value in row.items():
            if key.startswith("d_state_"):
                dims.setdefault(int(key.removeprefix("d_state_")), {})[row["step"]] = value
    for i, final in enumerate(run.summary.get("final_dims") or []):
        dims.setdefault(i, {})[last] = final
    for known in dims.values():
        known.setdefault(last, known[max(known)])
    return {layer: dict(sorted(dims[layer].items())) for layer in sorted(dims)}


def _state_dims(run: Recorded) -> Figure:
    figure = figure_of(4.2, "State dimension per layer")
    axes = figure.add_subplot()
    _style(axes, "optimizer step", "state dimension (states)")
    dims = _dims_over_steps(run)
    colours = colours_of(len(dims))
    for i, (layer, known) in enumerate(dims.items()):
        steps, values = list(known), list(known.values())
        # Layers often coincide: lines that get thinner keep the ones below in sight.
        width = 1.5 + (0.6 * (len(dims) - 1 - i) if len(dims) <= len(PALETTE) else 0)
        label = f"layer {layer}: {values[0]} → {values[-1]}"
        axes.step(steps, values, where="post", linewidth=width, color=colours[i], label=label)
    axes.set_ylim(0, 1.06 * max((max(known.values()) for known in dims.values()), default=1))
    if dims:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, ncols=1 + len(dims) // 20)
    return figure


def _spectra(run: Recorded) -> Figure:
    spectra = [(plan["step"], layer) for plan in run.plans for layer in plan["layers"]]
    indices = sorted({layer["layer"] for _, layer in spectra})
    if not indices:
        return figure_of(0.5, "No probe yet: no Hankel singular values")
    columns = {1: 1, 2: 2, 4: 2}.get(len(indices), 3)
    lines = -(-len(indices) // columns)
    height = 3.4 if columns == 1 else 2.5
    figure = figure_of(0.9 + height * lines, "Hankel singular values (HSVs) at each probe")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    panels = dict(zip(indices, grid.flat, strict=False))
    for axes in grid.flat[len(indices) :]:
        axes.set_visible(False)
    for position, (index, axes) in enumerate(panels.items()):
        lowest = position >= len(indices) - columns
        _style(axes, "rank (1 = largest)" if lowest else "", "" if position % columns else "HSV")
        axes.set_yscale("log")
        axes.tick_params(labelbottom=lowest)
        axes.set_title(f"layer {index}", loc="left", fontsize=10)
    steps = [plan["step"] for plan in run.plans]
    span = 1.1 * max(1, steps[-1] - steps[0])  # the end of the colour map is too pale for white
    colours = {step: matplotlib.colormaps["viridis"]((step - steps[0]) / span) for step in steps}
    scored = False
    for step, layer in spectra:
        axes, rank = panels[layer["layer"]], layer["dim_after"]
        own, deciding = (
            np.array([value if value > 0 else np.nan for value in layer[key]]) for key in ("spectrum", "score_spectrum")
        )
        axes.plot(np.arange(1, len(own) + 1), own, color=colours[step], linewidth=1.4)
        if not np.array_equal(own, deciding, equal_nan=True):
            scored = True
            axes.plot(np.arange(1, len(deciding) + 1), deciding, "--", color=colours[step], linewidth=1)
        if rank < layer["dim_before"] and rank <= len(deciding):
            axes.plot(rank, deciding[rank - 1], "o", color=colours[step], markeredgecolor="white")
    positive = np.array(
        [value for _, layer in spectra for value in layer["spectrum"] + layer["score_spectrum"] if value > 0]
    )
    if len(positive):
        # Values below rounding error say nothing and would flatten the part that matters.
        grid[0, 0].set_ylim(0.5 * max(positive.min(), 1e-10 * positive.max()), 2 * positive.max())
    shown = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, 8)}
    handles = [Line2D([], [], color=colours[step], label=f"step {step:,}") for step in sorted(shown)]
    if scored:
        handles.append(Line2D([], [], color=GREY, linestyle="--", label="what the score ranks by"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _drift(run: Recorded) -> Figure:
    steps = [plan["step"] for plan in run.plans]
    if len(steps) < 2:
        return figure_of(0.5, "Fewer than two probes: nothing to compare")
    figure = figure_of(4.2, "From probe to probe")
    # Greedy elimination takes one of several states that can stand for each other: it has no overlap to show.
    compared = any(layer["overlap"] is not None for plan in run.plans for layer in plan["layers"])
    panels = {"drift": "spectrum that moved"} | ({"overlap": "kept states that stayed"} if compared else {})
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    layers = range(len(run.plans[0]["layers"]))
    colours = colours_of(len(layers))
    for axes, (key, name) in zip(grid, panels.items(), strict=True):
        _style(axes, "optimizer step", f"share of the {name}")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        for i in layers:
            found = [plan["layers"][i] for plan in run.plans]
            values = np.array([np.nan if layer[key] is None else layer[key] for layer in found])
            axes.plot(steps, values, ".-", color=colours[i], linewidth=1.2, label=f"layer {i}")
            cut = np.array([layer["dim_after"] < layer["dim_before"] for layer in found])
            axes.plot(np.array(steps)[cut], values[cut], "o", color=colours[i], markerfacecolor="none", markersize=9)
        axes.set_ylim(0, 1.05 if key == "overlap" else None)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9, ncols=1 + len(layers) // 20)
    return figure
