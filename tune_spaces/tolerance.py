"""Let the spectrum decide: what each of four cuts may discard, when the window closes, each layer alone or together."""

from typing import Any

from tune_spaces.knobs import Choice, Float

KNOBS = {
    "tolerance": Float(0.005, 0.2, "Share of the spectrum's sum that a cut may discard.", log=True),
    "end": Float(0.05, 0.4, "Share of the steps at which the last of the four cuts comes."),
    "allocation": Choice(("layer", "global"), "Each layer on its own, or one ranking of all layers' states."),
}


def settings(tolerance: float, end: float, allocation: str) -> dict[str, Any]:
    window = {"events": 4, "start": end / 2, "end": end}
    return {"truncation.window": window, "truncation.target": {"tolerance": tolerance, "allocation": allocation}}
