"""What a smaller model may do faster: learning rate and batch from the cut on, with the time of the cut."""

from typing import Any

from tune_spaces.knobs import Choice, Float

KNOBS = {
    "at": Float(0.05, 0.4, "Share of the steps after which the cut comes."),
    "lr_factor": Float(0.5, 2.0, "Learning rate after the cut, as a multiple.", log=True),
    "batch_factor": Choice((1, 2), "Sequences per step after the cut, as a multiple."),
}


def settings(at: float, lr_factor: float, batch_factor: int) -> dict[str, Any]:
    return {
        "truncation.window": {"events": 1, "start": 0.0, "end": at},
        "truncation.lr_factor": lr_factor,
        "truncation.batch_factor": batch_factor,
    }
