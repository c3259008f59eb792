"""How all figures look: colours, sizes, axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which vanishes on white, and two more.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8C510A", "#999999")
BLUE, VERMILION, GREEN, SKY, GREY = PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[5], "#6b6b6b"


def figure_of(height: float, title: str = "") -> Figure:
    """An empty figure as wide as all others, `height` inches high."""
    figure = Figure(figsize=(9, height), dpi=200, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def colours_of(lines: int) -> Sequence[Any]:
    """A colour for each of so many lines: the palette's, or where there are more, in the order of a colour map."""
    return PALETTE if lines <= len(PALETTE) else list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, lines)))


def style(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, a faint grid, and no frame above and to the right."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
