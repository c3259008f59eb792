"""Mamba-1's selective scan through Triton kernels, float32 or bfloat16 on a GPU; states and sums are float32.

One state per chunk of time steps is kept for the backward pass, which computes the others again, chunk by chunk.

Shapes: B batch, L time, D channels (d_inner), N state; G blocks of channels, T chunks, K steps of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compression.gramians import SAMPLE_EVERY, SelectiveMoments
from models.scan import selective_triton_kernels as kernels
from models.scan.extension import rows

# Longer chunks keep fewer states from the forward pass, but those of the chunk in work should stay in the cache.
CHUNK = 32


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
    """As `models.scan.selective.selective_scan`: A and D in float32, the others in float32 or bfloat16, as is out."""
    x_BLD, r_BLD, B_BLN, C_BLN, z_BLD = (rows(part) for part in (x_BLD, r_BLD, B_BLN, C_BLN, z_BLD))
    out_BLD: Tensor = _SelectiveScan.apply(  # type: ignore[no-untyped-call]
        x_BLD, r_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD, moments
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
        (B, L, D), N = x_BLD.shape, A_DN.shape[1]
        grid, block = _launch(B, D, N)
        # The kernels' tiles take the layout of what they load: that of A_DN would spread a channel over threads.
        tensors = (x_BLD, r_BLD, A_DN.T.contiguous(), B_BLN, C_BLN, D_D.contiguous(), z_BLD)
        out_BLD = x_BLD.new_empty(B, L, D)
        starts_BTND = A_DN.new_empty(B, -(-L // CHUNK), N, D)
        *sums_BND, last_BND = (A_DN.new_empty(B if moments is not None else 0, N, D) for _ in range(4))
        strides = _strides(x_BLD, r_BLD, B_BLN, C_BLN, z_BLD)
        with torch.cuda.device_of(x_BLD):  # type: ignore[no-untyped-call]
            kernels.forward[grid](
                *tensors,
                out_BLD,
                starts_BTND,
                *sums_BND,
                last_BND,
                *strides,
                L,
                D,
                N,
                CHUNK,
                moments is not None,
                **block,
            )
        if moments is not None:
            # Each sequence is summed in float32, the sequences in float64.
            h2_DN, a2_DN, hc2_DN = (part.sum(0, dtype=torch.float64).T for part in sums_BND)
            moments.add(h2_DN, a2_DN, hc2_DN)
            apart = SAMPLE_EVERY // CHUNK
            for h_BND in [*starts_BTND.unbind(1)[apart::apart], last_BND]:
                moments.add_samples(h_BND.mT.flatten(0, 1), B)
        ctx.save_for_backward(*tensors, starts_BTND)
        return out_BLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLD: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, starts_BTND = ctx.saved_tensors
        x_BLD, r_BLD, A_ND, B_BLN, C_BLN, _, z_BLD = tensors
        (B, L, D), N = x_BLD.shape, A_ND.shape[0]
        grid, block = _launch(B, D, N)
        G = grid[0]
        dout_BLD = rows(dout_BLD)
        dx_BLD, dr_BLD, dz_BLD = (part.new_empty(B, L, D) for part in (x_BLD, r_BLD, z_BLD))
        dA_BND, dD_BD = A_ND.new_empty(B, N, D), A_ND.new_empty(B, D)
        # B and C belong to all channels. Partial sums of the blocks make a step repeatable to the last bit, which
        # atomic additions would not. Until they are added up, they take N / 16 times the memory of x in float32.
        dB_GBLN, dC_GBLN = (A_ND.new_empty(G, B, L, N) for _ in range(2))
        states_BGKND = A_ND.new_empty(B, G, CHUNK, block["BLOCK_N"], block["BLOCK_D"])
        gradients = (dx_BLD, dr_BLD, dA_BND, dB_GBLN, dC_GBLN, dD_BD, dz_BLD)
        strides = _strides(x_BLD, r_BLD, B_BLN, C_BLN, z_BLD, dout_BLD)
        with torch.cuda.device_of(x_BLD):  # type: ignore[no-untyped-call]
            kernels.backward[grid](
                *tensors, dout_BLD, starts_BTND, *gradients, states_BGKND, *strides, L, D, N, CHUNK, **block
            )
        dB_BLN, dC_BLN = dB_GBLN.sum(0).to(B_BLN.dtype), dC_GBLN.sum(0).to(C_BLN.dtype)
        return dx_BLD, dr_BLD, dA_BND.sum(0).T, dB_BLN, dC_BLN, dD_BD.sum(0), dz_BLD, None


def _launch(B: int, D: int, N: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and a program's tile of channels and states with its warps: 16 states to a thread up to N = 128."""
    block_d, block_n = min(32, _power_of_2(D)), _power_of_2(N)
    warps = min(max(block_d * block_n // 512, 1), 8)
    return (-(-D // block_d), B), {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": warps}


def _power_of_2(size: int) -> int:
    """The smallest that is not less than `size`."""
    return 1 << (size - 1).bit_length()


def _strides(*tensors: Tensor) -> list[int]:
    """Over batch and time."""
    return [stride for part in tensors for stride in part.stride()[:2]]
