"""From Hankel singular values to the number of states each layer keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

# Below this relative gain a cut costs more (a rebuild) than it saves (CompreSSM, arXiv 2510.02823, appendix B).
SMALLEST_GAIN = 0.05


class Target(BaseModel):
    """How far to truncate: by a tolerance on the HSV mass, to a fixed dimension, or to the smaller of both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of the summed HSVs that each cut may discard, in (0, 1)."
    )
    dim: Annotated[int, Field(ge=1)] | None = Field(
        None, description="State dimension after the last cut, reached over the events in equal ratios."
    )

    @model_validator(mode="after")
    def _has_a_target(self) -> Target:
        if self.tolerance is None and self.dim is None:
            raise ValueError("needs tolerance, dim, or both")
        return self


def rank_within_tolerance(sigma_N: Tensor, tolerance: float) -> int:
    """Smallest rank whose leading HSVs sum to at least (1 - tolerance) of all; `sigma_N` descending."""
    mass_N = sigma_N.cumsum(0)
    return int((mass_N < (1 - tolerance) * mass_N[-1]).sum()) + 1


def choose_rank(sigma_N: Tensor, target: Target, initial_dim: int, event: int, events: int) -> tuple[int, str]:
    """States to keep at cut `event` of `events` (from 1), and the reason in words.

    A fixed dimension is approached geometrically from `initial_dim`, so that each cut removes the same share.
    Never below 1. The present dimension where no state carries anything yet, and where a cut would shrink it by
    less than 5 %, unless that is what the last event still needs to reach the fixed dimension.
    """
    dim = sigma_N.numel()
    if float(sigma_N[0]) == 0:
        return dim, "kept: no state carries anything yet"
    rank, reason = dim, ""
    if target.tolerance is not None:
        rank = rank_within_tolerance(sigma_N, target.tolerance)
        reason = f"tolerance {target.tolerance:g}"
    if target.dim is not None:
        step_dim = max(1, round(initial_dim * (target.dim / initial_dim) ** (event / events)))
        if step_dim < rank:
            rank, reason = step_dim, f"dim {target.dim}, event {event} of {events}"
    reaches_dim = event == events and target.dim is not None and rank <= target.dim < dim
    if rank > (1 - SMALLEST_GAIN) * dim and not reaches_dim:
        return dim, f"kept: rank {rank} would shrink it by less than {SMALLEST_GAIN:.0%}"
    return rank, reason
