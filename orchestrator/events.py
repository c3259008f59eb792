"""What driver and workers tell each other: the job on the way out, events of rank 0 on the way back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compression.plan import TruncationPlan
from orchestrator.config import RunConfig


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker: train up to and including step `until`.

    A checkpoint follows each step of `save_after`, besides those that are due by the config.
    """

    config: RunConfig
    folder: Path
    coordinator: Any
    until: int
    save_after: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Measured:
    """Metrics of one step (from 1)."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class CutRecord:
    """One truncation as `summary.json` lists it. `seconds`: from the probe's start to the rebuilt engine, with the
    certificate and without a guard's checkpoint.

    Per layer: dimensions, the share of the spectrum that is kept, the bound on the error of LTI layers, and the
    measured relative error of the output (`LayerPlan`).
    """

    step: int
    dims_before: list[int]
    dims_after: list[int]
    mass_kept: list[float]
    error_bounds: list[float | None]
    output_errors: list[float]
    seconds: float
    digest: str
    val_loss_before: float
    val_loss_after: float
    rolled_back: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Probed:
    """A probe's plan as carried out and as it is remembered; `cut` is None where nothing was truncated."""

    plan: TruncationPlan
    cut: CutRecord | None


@dataclass(frozen=True)
class RolledBack:
    """The guard has returned the run to the state before the cut at `step`."""

    step: int
    reason: str


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint."""

    step: int
    path: str


@dataclass(frozen=True)
class Reserved:
    """Ray's placement group of workers that are about to start."""

    group: Any


@dataclass(frozen=True)
class Started:
    """A group of workers begins after `step`, which is 0 unless there was a checkpoint; its cuts are those so far."""

    step: int
    checkpoint: str | None
    cuts: list[CutRecord]
    dims: list[int]
    parameters: int
    scans: str


@dataclass(frozen=True)
class Stopped:
    """The workers have ended after `step`, which is saved: it was their last, or the driver asked them to."""

    step: int


@dataclass(frozen=True)
class Lost:
    """The group of workers is gone, and why; Ray Train starts another."""

    reason: str


Event = Lost | Measured | Probed | Reserved | RolledBack | Saved | Started | Stopped
