"""When to cut: one cut, at any time between 5 and 40 % of training. How far is the config's own target."""

from typing import Any

from tune_spaces.knobs import Float

KNOBS = {"at": Float(0.05, 0.4, "Share of the steps after which the cut comes.")}


def settings(at: float) -> dict[str, Any]:
    return {"truncation.window": {"events": 1, "start": 0.0, "end": at}}
