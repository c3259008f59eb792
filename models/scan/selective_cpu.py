"""Mamba-1's selective scan through the C++ kernels on a CPU.

Shapes: B batch, L time, D channels (d_inner), N state, G blocks of V channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compression.gramians import SAMPLE_EVERY, SelectiveMoments
from models.scan.extension import kernels, rows

# Of selective.cpp.
CHUNK = 16


def selective_scan(
    x_BLD: Tensor,
    r_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    z_BLD: Tensor,
    moments: SelectiveMoments | None,
) -> Tensor:
    """As `models.scan.selective.selective_scan`, in float32 or bfloat16."""
    # The wide sequences x and z are read as they are; r, B and C, smaller or more delicate, in float32.
    out_BLD: Tensor = _SelectiveScan.apply(  # type: ignore[no-untyped-call]
        rows(x_BLD), *(rows(part.float()) for part in (r_BLD, A_DN, B_BLN, C_BLN, D_D)), rows(z_BLD), moments
    )
    return out_BLD


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        r_BLD: Tensor,
        A_DN: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        D_D: Tensor,
        z_BLD: Tensor,
        moments: SelectiveMoments | None,
    ) -> Tensor:
        tensors = (x_BLD, r_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD)
        out_BLD, starts, *sums = kernels().selective_forward(*tensors, moments is not None)
        assert starts.shape[2] == -(-x_BLD.shape[1] // CHUNK), "the kernel's chunks are of another length"
        if moments is not None:
            h2_DN, a2_DN, hc2_DN, last_BGNV = sums
            moments.add(h2_DN, a2_DN, hc2_DN)
            # Channels beyond the last block's end have no input, so their states are zero.
            apart = SAMPLE_EVERY // CHUNK
            for h_BGNV in [*starts.unbind(2)[apart::apart], last_BGNV]:
                moments.add_samples(h_BGNV.mT.flatten(0, 2), len(h_BGNV))
        ctx.save_for_backward(*tensors, starts)
        return out_BLD  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLD: Tensor) -> tuple[Tensor | None, ...]:
        return (*kernels().selective_backward(rows(dout_BLD), *ctx.saved_tensors), None)
