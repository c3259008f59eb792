"""What the selective layers, Mamba-1 and Mamba-2, have in common.

Shapes: D channels (d_inner), N d_state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compression.gramians import SelectiveMoments
from models.layer import TruncatableLayer


class SelectiveLayer(TruncatableLayer):
    """A mixer whose statistics are what its scan adds to `_moments`, between start and finish."""

    statistics_need_tokens = True

    rotates = False
    """Whether a cut may combine states instead of choosing among them."""

    d_inner: int
    D: Tensor
    _moments: SelectiveMoments | None = None

    def start_statistics(self) -> None:
        self._moments = SelectiveMoments.zeros(self.d_inner, self.d_state, self.D.device)
        self._moments.rotates = self.rotates

    def finish_statistics(self) -> SelectiveMoments:
        assert self._moments is not None, "start_statistics comes first"
        moments, self._moments = self._moments, None
        return moments.from_vector(moments.to_vector().cpu())


def initial_dt_bias(size: int) -> Tensor:
    """What softplus turns into time steps that are log-uniform in [1e-3, 1e-1], (size,) (mamba_simple.py)."""
    dt = (torch.rand(size) * (math.log(1e-1) - math.log(1e-3)) + math.log(1e-3)).exp()
    return dt + torch.log(-torch.expm1(-dt))
