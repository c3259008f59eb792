"""The truncation plan: what exactly is cut, the same object on every worker.

Shapes: N states before, R states after.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compression.gramians import LTISystem, SelectiveMoments, Statistics
from compression.hankel import BalancingFactors, balancing_factors, selective_hankel
from compression.ranking import Target, choose_rank

PLAN_FORMAT = 1
# Beyond this condition number of the eigenvectors the diagonal form of the reduced system, whose weights are
# float32, is wrong by more than its certificate: the reduction is nearly defective.
LARGEST_CONDITION = 1e4


@dataclass(frozen=True)
class StateSelection:
    """Keep these state indices (ascending) and drop the others."""

    kept: tuple[int, ...]


@dataclass(frozen=True)
class StateTransform:
    """Project the state: z = left h with h ~ right z, left right = I, and diagonal dynamics afterwards."""

    left_RN: Tensor  # complex128
    right_NR: Tensor  # complex128
    eigenvalues_R: Tensor  # complex128


@dataclass(frozen=True)
class LayerPlan:
    """What one layer loses, why, and what that costs.

    `spectrum` holds all HSVs in descending order; `error_bound` is 2 x the sum of the discarded ones for LTI
    layers (the H-infinity error of balanced truncation, Antoulas 2005, theorem 7.9) and None otherwise.
    """

    layer: int
    dim_before: int
    dim_after: int
    reduction: StateSelection | StateTransform | None
    spectrum: tuple[float, ...]
    mass_kept: float
    error_bound: float | None
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

    def content(self) -> dict[str, Any]:
        """The plan as plain JSON values, arrays as base64 of their little-endian bytes."""
        return {
            "format": PLAN_FORMAT,
            "step": self.step,
            "attempt": self.attempt,
            "event": self.event,
            "layers": [_layer_content(layer) for layer in self.layers],
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


def plan_truncation(
    statistics: Sequence[Statistics],
    target: Target,
    initial_dims: Sequence[int],
    step: int,
    attempt: int,
    event: int,
    events: int,
) -> TruncationPlan:
    """Rank every layer's states and decide what each keeps at probe `event` of `events`.

    Raises:
        ValueError: a layer's statistics are not finite, or an LTI layer is not stable; names the layer.
    """
    layers = []
    for layer, (layer_statistics, initial_dim) in enumerate(zip(statistics, initial_dims, strict=True)):
        try:
            layers.append(_plan_layer(layer, layer_statistics, target, initial_dim, event, events))
        except ValueError as error:
            raise ValueError(f"layer {layer} at step {step}: {error}") from error
    return TruncationPlan(step, attempt, event, tuple(layers))


def keep_everything(dims: Sequence[int], step: int, attempt: int, event: int, reason: str) -> TruncationPlan:
    """A plan without a cut and without spectra, for a probe that could not be completed."""
    layers = (LayerPlan(i, dim, dim, None, (), 1.0, None, reason) for i, dim in enumerate(dims))
    return TruncationPlan(step, attempt, event, tuple(layers))


def _plan_layer(
    layer: int, statistics: Statistics, target: Target, initial_dim: int, event: int, events: int
) -> LayerPlan:
    dim = statistics.d_state
    reduction: StateSelection | StateTransform | None = None
    if isinstance(statistics, SelectiveMoments):
        sigma_N, order_N = selective_hankel(statistics).sort(descending=True, stable=True)
        rank, reason = choose_rank(sigma_N, target, initial_dim, event, events)
        if rank < dim:
            reduction = StateSelection(tuple(sorted(order_N[:rank].tolist())))
        error_bound = None
    else:
        factors = balancing_factors(statistics)
        sigma_N = factors.sigma_N
        rank, reason = choose_rank(sigma_N, target, initial_dim, event, events)
        if rank < dim:
            if factors.numerical_rank < rank:
                rank = factors.numerical_rank
                reason += f"; no more than {rank} states carry anything"
            reduction = balanced_truncation(statistics, factors, rank)
            safe_rank = dim if reduction is None else reduction.eigenvalues_R.numel()
            if safe_rank != rank:
                reason += f"; rank {rank} is not safe to diagonalise, {safe_rank} is"
                rank = safe_rank
        error_bound = 2 * float(sigma_N[rank:].sum())
    total = float(sigma_N.sum())
    mass_kept = float(sigma_N[:rank].sum()) / total if total > 0 else 1.0
    return LayerPlan(layer, dim, rank, reduction, tuple(sigma_N.tolist()), mass_kept, error_bound, reason)


def balanced_truncation(system: LTISystem, factors: BalancingFactors, rank: int) -> StateTransform | None:
    """Square-root balanced truncation to `rank` states, at most the numerical rank, diagonalised; complex128.

    A reduced system that is nearly defective falls back to the next larger rank that is safe; None when there is
    none below the present dimension.
    """
    for r in range(rank, min(factors.numerical_rank + 1, system.d_state)):
        root_R = factors.sigma_N[:r].sqrt()
        right_NR = factors.L_P_NN @ factors.Vh_NN.mH[:, :r] / root_R
        left_RN = (factors.L_Q_NN @ factors.U_NN[:, :r] / root_R).mH
        eigenvalues_R, vectors_RR = torch.linalg.eig(left_RN @ (system.eigenvalues_N[:, None] * right_NR))
        if float(torch.linalg.cond(vectors_RR)) < LARGEST_CONDITION and float(eigenvalues_R.abs().max()) < 1:
            left_RN = torch.linalg.solve(vectors_RR, left_RN)
            return StateTransform(left_RN, right_NR @ vectors_RR, eigenvalues_R)
    return None


def _layer_content(layer: LayerPlan) -> dict[str, Any]:
    selection = layer.reduction if isinstance(layer.reduction, StateSelection) else None
    transform = layer.reduction if isinstance(layer.reduction, StateTransform) else None
    return {
        "layer": layer.layer,
        "dim_before": layer.dim_before,
        "dim_after": layer.dim_after,
        "kept": list(selection.kept) if selection else None,
        "left": _encode(transform.left_RN) if transform else None,
        "right": _encode(transform.right_NR) if transform else None,
        "eigenvalues": _encode(transform.eigenvalues_R) if transform else None,
        "spectrum": list(layer.spectrum),
        "mass_kept": layer.mass_kept,
        "error_bound": layer.error_bound,
        "reason": layer.reason,
    }


def _layer_from_content(content: dict[str, Any]) -> LayerPlan:
    reduction: StateSelection | StateTransform | None = None
    if content["kept"] is not None:
        reduction = StateSelection(tuple(content["kept"]))
    elif content["left"] is not None:
        reduction = StateTransform(*(_decode(content[part]) for part in ("left", "right", "eigenvalues")))
    return LayerPlan(
        content["layer"],
        content["dim_before"],
        content["dim_after"],
        reduction,
        tuple(content["spectrum"]),
        content["mass_kept"],
        content["error_bound"],
        content["reason"],
    )


def _encode(array: Tensor) -> dict[str, Any]:
    data = array.detach().cpu().numpy().astype("<c16")
    return {"shape": list(data.shape), "complex128": base64.b64encode(data.tobytes()).decode()}


def _decode(content: dict[str, Any]) -> Tensor:
    data = np.frombuffer(base64.b64decode(content["complex128"]), dtype="<c16").reshape(content["shape"])
    return torch.from_numpy(data.copy())
