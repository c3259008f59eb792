"""The truncation plan: what exactly is cut, the same object on every worker.

Shapes: N states before, R states after.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAN_FORMAT = 3
DTYPES = {"float64": "<f8", "complex128": "<c16"}


@dataclass(frozen=True)
class StateSelection:
    """Keep these state indices (ascending) and drop the others.

    With `fold_RN`, float64, the output projection of what is kept becomes C' = fold C of all.
    """

    kept: tuple[int, ...]
    fold_RN: Tensor | None = None


@dataclass(frozen=True)
class StateRotation:
    """Project the state of a scalar recurrence: z = left h with h ~ right z and left right = I, all float64."""

    left_RN: Tensor
    right_NR: Tensor


@dataclass(frozen=True)
class StateTransform:
    """Project the state: z = left h with h ~ right z, left right = I, and diagonal dynamics afterwards."""

    left_RN: Tensor  # complex128
    right_NR: Tensor  # complex128
    eigenvalues_R: Tensor  # complex128

    @property
    def ancestors_R(self) -> Tensor:
        """The old state that each new one has most of: the largest participation factor, int64."""
        return (self.left_RN * self.right_NR.T).abs().argmax(dim=1)


Reduction = StateSelection | StateRotation | StateTransform
REDUCTIONS: dict[str, type[Reduction]] = {
    "selection": StateSelection,
    "rotation": StateRotation,
    "transform": StateTransform,
}


@dataclass(frozen=True)
class LayerPlan:
    """What one layer loses, why, and what that costs."""

    layer: int
    dim_before: int
    dim_after: int
    reduction: Reduction | None
    spectrum: tuple[float, ...]
    """All HSVs in descending order, whatever score ranked the states."""
    score_spectrum: tuple[float, ...]
    """What decided how many states are kept, in descending order: the HSVs, or the spectrum of a score of its own."""
    order: tuple[int, ...]
    """States in the order in which they would be kept; empty where states are combined instead of chosen."""
    mass_kept: float
    """The kept states' share of the score's spectrum."""
    drift: float | None
    """Share of the spectrum that moved since the last probe (`hankel.spectrum_drift`); None at the first.

    As far as both go, the largest HSVs are compared: after a cut by another score, which keeps other states, that too
    looks like movement.
    """
    overlap: float | None
    """Share of the states kept now that would have been kept at the last probe; None where that is not known."""
    quiet: int
    """Probes in succession, this one included, at which the ranking was at rest; only `stable` counts them."""
    error_bound: float | None
    """LTI layers: 2 x the sum of the discarded HSVs, which the H-infinity error of balanced truncation does not
    exceed (Antoulas 2005, theorem 7.9) before the reduced system is rounded to float32 weights. Zero where nothing is
    cut; None for selective layers and ablations."""
    output_error: float | None
    """Measured: norm of the change of the layer's output over that of the output, on held-out tokens and their
    padding."""
    reason: str


@dataclass(frozen=True)
class TruncationPlan:
    """One probe's outcome for all layers. It truncates when at least one layer shrinks."""

    step: int
    attempt: int
    event: int
    layers: tuple[LayerPlan, ...]

    @property
    def truncates(self) -> bool:
        return self.dims_after != self.dims_before

    @property
    def dims_before(self) -> tuple[int, ...]:
        return tuple(layer.dim_before for layer in self.layers)

    @property
    def dims_after(self) -> tuple[int, ...]:
        return tuple(layer.dim_after for layer in self.layers)

    def certified(self, output_errors: Sequence[float]) -> TruncationPlan:
        """The plan with what was measured of each layer, relative to its output."""
        layers = zip(self.layers, output_errors, strict=True)
        return replace(self, layers=tuple(replace(layer, output_error=error) for layer, error in layers))

    def remembered(self) -> TruncationPlan:
        """What the next probe is compared with: without projections and foldings, which may be large."""
        kept = (
            StateSelection(cut.kept) if isinstance(cut := layer.reduction, StateSelection) else None
            for layer in self.layers
        )
        layers = zip(self.layers, kept, strict=True)
        return replace(self, layers=tuple(replace(layer, reduction=reduction) for layer, reduction in layers))

    def content(self) -> dict[str, Any]:
        """The plan as plain JSON values, arrays as base64 of their little-endian bytes."""
        return {
            "format": PLAN_FORMAT,
            "step": self.step,
            "attempt": self.attempt,
            "event": self.event,
            "layers": [vars(layer) | {"reduction": _reduction_content(layer.reduction)} for layer in self.layers],
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the content, as 64 hexadecimal digits; equal on any machine for an equal plan."""
        canonical = json.dumps(self.content(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(self.content() | {"digest": self.digest}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> TruncationPlan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: unknown format, or the content does not match the digest.
        """
        content = json.loads(text)
        if content.get("format") != PLAN_FORMAT:
            raise ValueError(f"plan format {content.get('format')!r} is not {PLAN_FORMAT}")
        plan = cls(
            content["step"],
            content["attempt"],
            content["event"],
            tuple(_layer_from_content(layer) for layer in content["layers"]),
        )
        if plan.digest != content["digest"]:
            raise ValueError(f"plan of step {plan.step} does not match its digest {content['digest'][:12]}")
        return plan


def _layer_from_content(content: dict[str, Any]) -> LayerPlan:
    lists = {key: tuple(content[key]) for key in ("spectrum", "score_spectrum", "order")}
    return LayerPlan(**content | lists | {"reduction": _reduction_from_content(content["reduction"])})


def _reduction_content(reduction: Reduction | None) -> dict[str, Any] | None:
    if reduction is None:
        return None
    kind = next(name for name, cls in REDUCTIONS.items() if isinstance(reduction, cls))
    parts = {key: _encode(part) if isinstance(part, Tensor) else part for key, part in vars(reduction).items()}
    return {"kind": kind} | parts


def _reduction_from_content(content: dict[str, Any] | None) -> Reduction | None:
    if content is None:
        return None
    parts = {key: _decode(part) for key, part in content.items() if key != "kind"}
    return REDUCTIONS[content["kind"]](**parts)


def _encode(array: Tensor) -> dict[str, Any]:
    data = array.detach().cpu().numpy()
    content = base64.b64encode(data.astype(DTYPES[str(data.dtype)]).tobytes()).decode()
    return {"shape": list(data.shape), "dtype": str(data.dtype), "base64": content}


def _decode(part: Any) -> Any:
    if isinstance(part, dict):
        data = np.frombuffer(base64.b64decode(part["base64"]), dtype=DTYPES[part["dtype"]])
        return torch.from_numpy(data.reshape(part["shape"]).copy())
    return tuple(part) if isinstance(part, list) else part
