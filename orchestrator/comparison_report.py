"""What a comparison has come to: a table in Markdown, one in Parquet, and a figure of quality against time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orchestrator.collection import ASKED, REQUEST, write_rows
from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.errors import UserError
from orchestrator.figures import PALETTE, figure_of, style
from orchestrator.run_folder import read_json, write_whole
from orchestrator.terminal import count, dims

COMPARISON, PAGE = "comparison.parquet", "comparison.md"
METHODS = {
    "full": "full size to the end",
    "hankel": "truncated while it trains, as the config says",
    "scratch": "trained at the reached dimensions from the first step",
    "random": "truncated at the same probes in equal ratios, to states drawn at random",
    "smallest": "truncated at the same probes in equal ratios, to what has the smallest Hankel singular values",
    "magnitude": "trained at full size, then pruned by the magnitude of weights and fine-tuned",
    "distill": "the reached dimensions from the first step, taught by the full-size model",
    "hsv_regularized": "trained with a penalty on Hankel singular values, truncated at the end without more training",
    "nuclear_regularized": "the same with dense Lyapunov solves, which make no use of what an LRU is",
}
MARKERS = "osD^vP*Xh"
MEANINGS = (
    "- time: of steps, probes, and cuts with their certificates, not of other evaluations, checkpoints and starts; "
    "relative to full size, by seed; distill's with its teacher's, magnitude's with its fine-tuning",
    "- tokens/s: after the last cut, where steps follow it",
)


@dataclass(frozen=True)
class Row:
    """One run of a comparison. `train_seconds`: with those of other runs that the method cannot do without."""

    method: str
    size: str
    seed: int
    error: str | None
    val_loss: float
    val_accuracy: float | None
    final_dims: list[int]
    train_seconds: float
    parameters: int
    tokens_per_s: float | None
    """None where the metrics are gone with their machine."""

    @classmethod
    def failed(cls, method: str, size: str, seed: int, error: str) -> Row:
        return cls(method, size, seed, error, float("nan"), None, [], float("nan"), 0, None)

    @property
    def run(self) -> tuple[str, str, int]:
        """What tells it from the others."""
        return self.method, self.size, self.seed

    @property
    def named(self) -> str:
        return f"{self.method} {self.size}".strip()

    def told(self) -> str:
        """For a person who waits."""
        if self.error is not None:
            return f"{self.named}: failed: {self.error}"
        quality = f"accuracy {self.val_accuracy:.1%}" if self.val_accuracy is not None else f"loss {self.val_loss:.4f}"
        return f"{self.named}: {quality}, states {dims(self.final_dims)}, {self.train_seconds:.0f} s"


def read_comparison(folder: Path) -> list[Row]:
    """The rows that `write_comparison` has left in a folder, if it has.

    Raises:
        UserError: its file is damaged, or of another version.
    """
    path = folder / COMPARISON
    try:
        return read_rows(path) if path.exists() else []
    except UserError as error:
        raise UserError(f"{error}; without it the same comparison writes it anew") from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a comparison in a Parquet file.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        return [Row(**row) for row in pq.read_table(path).to_pylist()]
    except (pa.ArrowInvalid, TypeError) as error:
        raise UserError(f"{path} is damaged, or of another version ({error})") from error


def together(earlier: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """These rows, and what was asked for earlier and is not among them."""
    runs = {row.run for row in rows}
    return [*rows, *(row for row in earlier if row.run not in runs)]


def write_comparison(folder: Path, rows: Sequence[Row], methods: Mapping[str, str]) -> str:
    """Write `comparison.parquet` with a row a run, `comparison.md` and `figures/comparison.png`; what the page says.

    `methods` has the order of the table and a line about each method.
    """
    write_rows(folder / COMPARISON, [asdict(row) for row in rows])
    table = markdown(rows, methods)
    words = [f"- {method}: {about}" for method, about in methods.items() if method in {row.method for row in rows}]
    words += [f"- failed: {row.named}, seed {row.seed}: {row.error}" for row in rows if row.error is not None]
    words += _of_another_size(rows)
    text = "\n".join([table, "", *words, *MEANINGS, ""])
    write_whole(folder / PAGE, text)
    (folder / "figures").mkdir(exist_ok=True)
    draw(folder / "figures" / "comparison.png", rows, methods)
    return text


def render(folder: Path) -> Path:
    """Write the page and the figure of the comparison in `folder` again, from its rows; the page."""
    config = parse_config(read_json(folder / REQUEST, *ASKED)["config"])
    write_comparison(folder, read_comparison(folder), described(config))
    return folder / PAGE


def described(config: RunConfig) -> dict[str, str]:
    """A line about each method of a comparison with this config."""
    rule = config.truncation_rule
    assert rule is not None
    how = ", with compensation" if rule.compensate else ""
    cut = {"hankel": f"{METHODS['hankel']} (score: {rule.score}){how}"}
    return METHODS | cut | {method: METHODS[method] + how for method in ("random", "smallest")}


def draw(path: Path, rows: Sequence[Row], methods: Mapping[str, str]) -> None:
    """Write a figure of quality against training time, with a point a method and size."""
    FigureCanvasAgg(_figure(rows, methods)).print_png(path)


def _of_another_size(rows: Sequence[Row]) -> list[str]:
    """A line about each run that was to end with as many states as truncation, and has not: no cut was safe there."""
    asked = {(row.size, row.seed): sum(row.final_dims) for row in rows if row.method == "hankel"}
    return [
        f"- of another size: {row.named}, seed {row.seed}: {sum(row.final_dims)} states instead of {states}"
        for row in rows
        if row.method not in ("full", "hankel")
        and row.error is None
        and sum(row.final_dims) != (states := asked[row.size, row.seed])
    ]


def markdown(rows: Sequence[Row], methods: Mapping[str, str]) -> str:
    """One line a method and size: means over all seeds, with the standard deviation of the quality.

    Where a seed has failed there is no mean over all, and the last column says over how many it is.
    """
    accuracy = any(row.val_accuracy is not None for row in rows)
    head = [
        "method",
        "tolerance",
        "accuracy" if accuracy else "held-out loss",
        "states",
        "time",
        "parameters",
        "tokens/s",
    ]
    lines = [f"| {' | '.join(head)} | seeds |", "|---" * (len(head) + 1) + "|"]
    for method, size, found in _groups(rows, methods):
        asked = sum((row.method, row.size) == (method, size) for row in rows)
        seeds = str(asked) if len(found) == asked else f"{len(found)} of {asked}, else failed"
        if not found:
            lines.append(f"| {method} | {size} |" + " |" * (len(head) - 2) + f" {seeds} |")
            continue
        states = " ".join(
            f"{round(statistics.mean(layer), 1):g}" for layer in zip(*(r.final_dims for r in found), strict=True)
        )
        cells = [
            method,
            size,
            _quality(found),
            states,
            f"{statistics.mean(_ratio(row, rows) for row in found):.2f}",
            count(statistics.mean(row.parameters for row in found)),
            _speed(found),
            seeds,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(rows: Sequence[Row], methods: Mapping[str, str]) -> list[tuple[str, str, list[Row]]]:
    """Method, size and the rows of seeds that did not fail, in the order of `methods`."""
    sizes = list(dict.fromkeys((row.method, row.size) for row in rows))
    return [
        (method, size, [r for r in rows if (r.method, r.size) == (method, size) and r.error is None])
        for method, size in sorted(sizes, key=lambda pair: list(methods).index(pair[0]))
    ]


def _quality(found: Sequence[Row]) -> str:
    if found[0].val_accuracy is not None:
        values, form = [100 * (row.val_accuracy or 0.0) for row in found], "{:.1f} %"
    else:
        values, form = [row.val_loss for row in found], "{:.4f}"
    spread = f" ± {form.format(statistics.stdev(values)).removesuffix(' %')}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def _speed(found: Sequence[Row]) -> str:
    known = [row.tokens_per_s for row in found if row.tokens_per_s is not None]
    return count(statistics.mean(known)) if known else "–"


def _ratio(row: Row, rows: Sequence[Row]) -> float:
    """Time as a multiple of what full size took with the same seed."""
    [full] = [other for other in rows if other.method == "full" and other.seed == row.seed]
    return row.train_seconds / full.train_seconds


def _figure(rows: Sequence[Row], methods: Mapping[str, str]) -> Figure:
    figure = figure_of(4.6)
    axes = figure.add_subplot()
    accuracy = any(row.val_accuracy is not None for row in rows)
    style(axes, "training time, as a multiple of full size", "held-out accuracy" if accuracy else "held-out loss")
    present = [method for method in methods if method in {row.method for row in rows}]
    several = len({row.size for row in rows} - {""}) > 1
    for place, method in enumerate(present):
        points = {
            size: (
                statistics.mean(_ratio(row, rows) for row in found),
                statistics.mean((row.val_accuracy if accuracy else row.val_loss) or 0.0 for row in found),
            )
            for name, size, found in _groups(rows, methods)
            if name == method and found
        }
        if points:
            x, y = zip(*points.values(), strict=True)
            colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
            # Hollow: what lies on another point does not hide it.
            axes.scatter(x, y, s=50, facecolors="none", edgecolors=colour, marker=marker, label=method, zorder=2)
            # Slanted: sizes of one method often end close together.
            slanted: dict[str, Any] = {"xytext": (3, 3), "textcoords": "offset points", "rotation": 45}
            for size, point in points.items():
                if several and size:
                    axes.annotate(size, point, **slanted, fontsize="small", color=colour)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
