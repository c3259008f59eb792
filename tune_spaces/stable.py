"""Cut each layer when its ranking rests: how quiet is quiet, for how long, and by when at the latest."""

from typing import Any

from tune_spaces.knobs import Float, Integer

KNOBS = {
    "drift": Float(0.03, 0.3, "Largest share of the HSV mass that may move between quiet probes.", log=True),
    "patience": Integer(1, 4, "Quiet probes in succession before a layer is cut."),
    "deadline": Float(0.15, 0.5, "Share of the steps at which every layer is cut, quiet or not."),
}


def settings(drift: float, patience: int, deadline: float) -> dict[str, Any]:
    return {
        "truncation.stable": {"probes": 10, "start": 0.05, "drift": drift, "patience": patience, "deadline": deadline}
    }
