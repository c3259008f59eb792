"""Mamba-1's selective scan: the one function that a layer calls, whatever computes it.

Shapes: B batch, L time, D channels (d_inner), N state.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from compression.gramians import SelectiveMoments
from models.scan.backends import Choice, choose

# Loaded when first used: Triton and mamba_ssm are not installed everywhere.
MODULES: dict[Choice, str] = {
    "torch": "models.scan.selective_torch",
    "cpu": "models.scan.selective_cpu",
    "triton": "models.scan.selective_triton",
    "mamba_ssm": "models.scan.selective_mamba_ssm",
    "reference": "models.scan.reference",
}


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

    x, B, C and z share one floating dtype, which the result (B, L, D) has too; next to bfloat16, A and D are float32,
    as are states and decays, and r may be. With `moments`, the sums of this batch are added to it; that changes neither
    result nor gradients.
    """
    scan = import_module(MODULES[choose(x_BLD, mamba_ssm=moments is None)]).selective_scan
    with torch.autocast(x_BLD.device.type, enabled=False):
        out_BLD: Tensor = scan(x_BLD, r_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, moments)
    return out_BLD
