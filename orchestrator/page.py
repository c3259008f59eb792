"""Pages that need no other file and no network: a template, and its figures within."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from orchestrator.run_folder import write_whole

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)


def write_page(
    folder: Path, template: str, figures: Mapping[str, Figure], captions: Mapping[str, str], **values: Any
) -> Path:
    """Draw `figures/NAME.png` for every figure, and write `report.html` with them and `values`; the page's path."""
    (folder / "figures").mkdir(exist_ok=True)
    shown = []
    for name, figure in figures.items():
        image = folder / "figures" / f"{name}.png"
        FigureCanvasAgg(figure).print_png(image)
        shown.append((captions[name], base64.b64encode(image.read_bytes()).decode()))
    page = folder / "report.html"
    write_whole(page, TEMPLATES.get_template(template).render(figures=shown, **values))
    return page
