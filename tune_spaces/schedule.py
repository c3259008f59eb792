"""When to cut and how far: a window of one to four cuts, and the states that each layer keeps in the end."""

from typing import Any

from tune_spaces.knobs import Choice, Float, Integer

KNOBS = {
    "start": Float(0.05, 0.35, "Share of the steps before the window opens."),
    "length": Float(0.01, 0.05, "Share of the steps from there to the last cut."),
    "events": Choice((1, 2, 4), "Cuts in the window."),
    "dim": Integer(2, 32, "States per layer in the end.", log=True),
}


def settings(start: float, length: float, events: int, dim: int) -> dict[str, Any]:
    window = {"events": events, "start": start, "end": start + length}
    return {"truncation.window": window, "truncation.target": {"dim": dim}}
