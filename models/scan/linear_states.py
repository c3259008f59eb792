"""The diagonal complex recurrence, all states of it, in real arithmetic.

Shapes: B batch, L time, N state, J chunks of K steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.scan.backends import choose
from models.scan.extension import kernels, rows

# All chunks of a sequence advance side by side: the loops take K + L / K turns instead of L.
CHUNK = 32


def linear_scan(a_re_N: Tensor, a_im_N: Tensor, u_re_BLN: Tensor, u_im_BLN: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of h_t = a h_(t-1) + u_t from a zero state, (B, L, N) each; one floating dtype."""
    backend = choose(u_re_BLN)
    if backend == "triton":
        from models.scan.linear_triton import linear_scan as triton_scan  # triton is not installed everywhere

        return triton_scan(a_re_N, a_im_N, u_re_BLN, u_im_BLN)
    scan = _CppScan if backend == "cpu" else _TorchScan
    h_re_BLN, h_im_BLN = scan.apply(a_re_N, a_im_N, u_re_BLN, u_im_BLN)  # type: ignore[no-untyped-call]
    return h_re_BLN, h_im_BLN


class _CppScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_re_N: Tensor, a_im_N: Tensor, u_re_BLN: Tensor, u_im_BLN: Tensor) -> tuple[Tensor, Tensor]:
        h_re_BLN, h_im_BLN = kernels().linear_forward(a_re_N, a_im_N, rows(u_re_BLN), rows(u_im_BLN))
        ctx.save_for_backward(a_re_N, a_im_N, h_re_BLN, h_im_BLN)
        return h_re_BLN, h_im_BLN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_re_BLN: Tensor, dh_im_BLN: Tensor) -> tuple[Tensor, ...]:
        du_re_BLN, du_im_BLN, da_re_N, da_im_N = kernels().linear_backward(
            rows(dh_re_BLN), rows(dh_im_BLN), *ctx.saved_tensors
        )
        return da_re_N, da_im_N, du_re_BLN, du_im_BLN


class _TorchScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_re_N: Tensor, a_im_N: Tensor, u_re_BLN: Tensor, u_im_BLN: Tensor) -> tuple[Tensor, Tensor]:
        h_re_BLN, h_im_BLN = _states(a_re_N, a_im_N, u_re_BLN, u_im_BLN)
        ctx.save_for_backward(a_re_N, a_im_N, h_re_BLN, h_im_BLN)
        return h_re_BLN, h_im_BLN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_re_BLN: Tensor, dh_im_BLN: Tensor) -> tuple[Tensor, ...]:
        a_re_N, a_im_N, h_re_BLN, h_im_BLN = ctx.saved_tensors
        # g_t = dh_t + conj(a) g_(t+1): the same recurrence, backwards in time.
        reversed_re_BLN, reversed_im_BLN = _states(a_re_N, -a_im_N, dh_re_BLN.flip(1), dh_im_BLN.flip(1))
        du_re_BLN, du_im_BLN = reversed_re_BLN.flip(1), reversed_im_BLN.flip(1)
        g_re, g_im, h_re, h_im = du_re_BLN[:, 1:], du_im_BLN[:, 1:], h_re_BLN[:, :-1], h_im_BLN[:, :-1]
        da_re_N = (g_re * h_re + g_im * h_im).sum((0, 1))
        da_im_N = (g_im * h_re - g_re * h_im).sum((0, 1))
        return da_re_N, da_im_N, du_re_BLN, du_im_BLN


def _states(a_re_N: Tensor, a_im_N: Tensor, u_re_BLN: Tensor, u_im_BLN: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks from a zero state first, then what each hands on to the next, then that through each chunk."""
    B, L, N = u_re_BLN.shape
    J = -(-L // CHUNK)
    re_BJKN, im_BJKN = (
        F.pad(part, (0, 0, 0, J * CHUNK - L)).reshape(B, J, CHUNK, N).clone(memory_format=torch.contiguous_format)
        for part in (u_re_BLN, u_im_BLN)
    )
    for k in range(1, CHUNK):
        _advance(re_BJKN[:, :, k], im_BJKN[:, :, k], a_re_N, a_im_N, re_BJKN[:, :, k - 1], im_BJKN[:, :, k - 1])
    if J > 1:
        # By multiplication: the logarithm of an eigenvalue of zero does not exist.
        powers_KN = torch.complex(a_re_N, a_im_N).expand(CHUNK, N).cumprod(0)
        last_re_BJN, last_im_BJN = re_BJKN[:, :, -1].clone(), im_BJKN[:, :, -1].clone()
        for j in range(1, J):
            before = last_re_BJN[:, j - 1], last_im_BJN[:, j - 1]
            _advance(last_re_BJN[:, j], last_im_BJN[:, j], powers_KN[-1].real, powers_KN[-1].imag, *before)
        before = last_re_BJN[:, :-1, None], last_im_BJN[:, :-1, None]
        _advance(re_BJKN[:, 1:], im_BJKN[:, 1:], powers_KN.real, powers_KN.imag, *before)
    return re_BJKN.flatten(1, 2)[:, :L], im_BJKN.flatten(1, 2)[:, :L]


def _advance(re: Tensor, im: Tensor, a_re: Tensor, a_im: Tensor, before_re: Tensor, before_im: Tensor) -> None:
    """(re, im) += a * before, in place."""
    re.addcmul_(a_re, before_re).addcmul_(a_im, before_im, value=-1)
    im.addcmul_(a_re, before_im).addcmul_(a_im, before_re)
