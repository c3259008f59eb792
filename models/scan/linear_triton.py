# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
"""The diagonal complex recurrence as Triton kernels, float32 on a GPU.

A program takes 32 states of one sequence, one to a thread of a warp, and walks through time.

Shapes: B batch, L time, N state.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.scan.extension import rows

BLOCK = 32


def linear_scan(a_re_N: Tensor, a_im_N: Tensor, u_re_BLN: Tensor, u_im_BLN: Tensor) -> tuple[Tensor, Tensor]:
    """As `models.scan.linear_states.linear_scan`, in float32."""
    h_re_BLN, h_im_BLN = _LinearScan.apply(  # type: ignore[no-untyped-call]
        a_re_N.contiguous(), a_im_N.contiguous(), rows(u_re_BLN), rows(u_im_BLN)
    )
    return h_re_BLN, h_im_BLN


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_re_N: Tensor, a_im_N: Tensor, u_re_BLN: Tensor, u_im_BLN: Tensor) -> tuple[Tensor, Tensor]:
        B, L, N = u_re_BLN.shape
        h_re_BLN, h_im_BLN = u_re_BLN.new_empty(B, L, N), u_re_BLN.new_empty(B, L, N)
        strides = (*u_re_BLN.stride()[:2], *u_im_BLN.stride()[:2])
        with torch.cuda.device_of(u_re_BLN):  # type: ignore[no-untyped-call]
            _forward[-(-N // BLOCK), B](
                a_re_N, a_im_N, u_re_BLN, u_im_BLN, h_re_BLN, h_im_BLN, *strides, L, N, BLOCK, num_warps=1
            )
        ctx.save_for_backward(a_re_N, a_im_N, h_re_BLN, h_im_BLN)
        return h_re_BLN, h_im_BLN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_re_BLN: Tensor, dh_im_BLN: Tensor) -> tuple[Tensor, ...]:
        a_re_N, a_im_N, h_re_BLN, h_im_BLN = ctx.saved_tensors
        B, L, N = h_re_BLN.shape
        dh_re_BLN, dh_im_BLN = rows(dh_re_BLN), rows(dh_im_BLN)
        du_re_BLN, du_im_BLN = torch.empty_like(h_re_BLN), torch.empty_like(h_re_BLN)
        da_re_BN, da_im_BN = h_re_BLN.new_empty(B, N), h_re_BLN.new_empty(B, N)
        tensors = (a_re_N, a_im_N, h_re_BLN, h_im_BLN, dh_re_BLN, dh_im_BLN, du_re_BLN, du_im_BLN, da_re_BN, da_im_BN)
        strides = (*dh_re_BLN.stride()[:2], *dh_im_BLN.stride()[:2])
        with torch.cuda.device_of(h_re_BLN):  # type: ignore[no-untyped-call]
            _backward[-(-N // BLOCK), B](*tensors, *strides, L, N, BLOCK, num_warps=1)
        return da_re_BN.sum(0), da_im_BN.sum(0), du_re_BLN, du_im_BLN


@triton.jit
def _forward(
    a_re_ptr,
    a_im_ptr,
    u_re_ptr,
    u_im_ptr,
    h_re_ptr,
    h_im_ptr,
    re_b,
    re_t,
    im_b,
    im_t,
    L,
    N,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_n = n < N
    a_re, a_im = tl.load(a_re_ptr + n, in_n, other=0.0), tl.load(a_im_ptr + n, in_n, other=0.0)
    re = tl.zeros([BLOCK], tl.float32)
    im = tl.zeros([BLOCK], tl.float32)
    # Loads run ahead of the arithmetic, whose steps take a few cycles each.
    for t in tl.range(0, tl.cast(L, tl.int64), num_stages=8):
        u_re = tl.load(u_re_ptr + b * re_b + t * re_t + n, in_n, other=0.0)
        u_im = tl.load(u_im_ptr + b * im_b + t * im_t + n, in_n, other=0.0)
        re, im = a_re * re - a_im * im + u_re, a_re * im + a_im * re + u_im
        tl.store(h_re_ptr + (b * L + t) * N + n, re, in_n)
        tl.store(h_im_ptr + (b * L + t) * N + n, im, in_n)


@triton.jit
def _backward(
    a_re_ptr,
    a_im_ptr,
    h_re_ptr,
    h_im_ptr,
    dh_re_ptr,
    dh_im_ptr,
    du_re_ptr,
    du_im_ptr,
    da_re_ptr,
    da_im_ptr,
    re_b,
    re_t,
    im_b,
    im_t,
    L,
    N,
    BLOCK: tl.constexpr,
):
    """g_t = dh_t + conj(a) g_(t+1), which is du, and da = sum of conj(h_(t-1)) g_t."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_n = n < N
    a_re, a_im = tl.load(a_re_ptr + n, in_n, other=0.0), tl.load(a_im_ptr + n, in_n, other=0.0)
    g_re = tl.zeros([BLOCK], tl.float32)
    g_im = tl.zeros([BLOCK], tl.float32)
    da_re = tl.zeros([BLOCK], tl.float32)
    da_im = tl.zeros([BLOCK], tl.float32)
    for back in tl.range(0, tl.cast(L, tl.int64), num_stages=8):
        t = L - 1 - back
        row = (b * L + t) * N + n
        dh_re = tl.load(dh_re_ptr + b * re_b + t * re_t + n, in_n, other=0.0)
        dh_im = tl.load(dh_im_ptr + b * im_b + t * im_t + n, in_n, other=0.0)
        h_re = tl.load(h_re_ptr + row - N, in_n & (t > 0), other=0.0)
        h_im = tl.load(h_im_ptr + row - N, in_n & (t > 0), other=0.0)
        g_re, g_im = dh_re + a_re * g_re + a_im * g_im, dh_im + a_re * g_im - a_im * g_re
        tl.store(du_re_ptr + row, g_re, in_n)
        tl.store(du_im_ptr + row, g_im, in_n)
        da_re += h_re * g_re + h_im * g_im
        da_im += h_re * g_im - h_im * g_re
    tl.store(da_re_ptr + b * N + n, da_re, in_n)
    tl.store(da_im_ptr + b * N + n, da_im, in_n)
