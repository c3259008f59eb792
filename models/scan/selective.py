"""Mamba-1's selective scan: the one function that a layer calls, whatever computes it.

Shapes: B batch, L time, D channels (d_inner), N state.
"""

from __future__ import annotations

from torch import Tensor

from compression.gramians import SelectiveMoments
from models.scan import selective_cpu, selective_torch
from models.scan.backends import choose


def selective_scan(
    x_BLD: Tensor,
    r_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    z_BLD: Tensor,
    moments: SelectiveMoments | None = None,
) -> Tensor:
    """The recurrence of Mamba (arXiv 2312.00752, eq. 2 and 4) with what surrounds it in a block.

        dt = softplus(r)    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t    out_t = (C_t h_t + D x_t) silu(z_t)

    All tensors share one floating dtype, which the result (B, L, D) has too. With `moments`, the sums of this batch
    are added to it; that changes neither result nor gradients.
    """
    scan = selective_cpu.selective_scan if choose(x_BLD) == "cpu" else selective_torch.selective_scan
    return scan(x_BLD, r_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, moments)
