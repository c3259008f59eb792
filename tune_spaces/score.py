"""What ranks the states of a selective layer (Mamba-1, Mamba-2), and what share of them is left."""

from typing import Any

from tune_spaces.knobs import Choice, Float

KNOBS = {
    "score": Choice(("hankel", "averaged", "ghost", "greedy"), "The spectrum that states are ranked by."),
    "share": Float(0.05, 0.5, "Share of the states that each layer keeps in the end.", log=True),
}


def settings(score: str, share: float) -> dict[str, Any]:
    return {
        "truncation.window": {"events": 4, "end": 0.1},
        "truncation.target": {"fraction": share},
        "truncation.score": score,
    }
