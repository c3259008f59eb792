"""How far to cut, in the first tenth of training: a share of the scan's cost, of every layer or of all together."""

from typing import Any

from tune_spaces.knobs import Choice, Float

KNOBS = {
    "share": Float(0.05, 0.5, "Share of the states, or of the scan's cost, that is left in the end.", log=True),
    "together": Choice((False, True), "Whether layers share one budget, and are cut where it costs least."),
}


def settings(share: float, together: bool) -> dict[str, Any]:
    target = {"budget": {"cost": share}, "allocation": "global"} if together else {"fraction": share}
    return {"truncation.window": {"events": 4, "end": 0.1}, "truncation.target": target}
