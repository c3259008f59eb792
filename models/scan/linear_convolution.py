"""A linear recurrence as the convolution that it is: no state exists for any time step.

The impulse response K_k = Re(C a^k B) is a matrix product over states; the sequence goes through it by FFT.

Shapes: B batch, L time, H width (I as the input's, O as the output's), N state, F frequencies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def impulse_response(
    length: int,
    a_re_N: Tensor,
    a_im_N: Tensor,
    B_re_NH: Tensor,
    B_im_NH: Tensor,
    C_re_HN: Tensor,
    C_im_HN: Tensor,
) -> Tensor:
    """Re(C a^k B) for k = 0 ... length - 1, (L, I, O)."""
    power_re_LN, power_im_LN = _Powers.apply(a_re_N, a_im_N, length)  # type: ignore[no-untyped-call]
    B_re_NI1, B_im_NI1 = B_re_NH.unsqueeze(2), B_im_NH.unsqueeze(2)
    C_re_N1O, C_im_N1O = C_re_HN.T.unsqueeze(1), C_im_HN.T.unsqueeze(1)
    gain_re_NIO = B_re_NI1 * C_re_N1O - B_im_NI1 * C_im_N1O
    gain_im_NIO = B_re_NI1 * C_im_N1O + B_im_NI1 * C_re_N1O
    response: Tensor = power_re_LN @ gain_re_NIO.flatten(1) - power_im_LN @ gain_im_NIO.flatten(1)
    return response.view(length, B_re_NH.shape[1], C_re_HN.shape[0])


def causal_convolution(x_BLI: Tensor, response_LIO: Tensor) -> Tensor:
    """y_t = sum_k x_(t-k) K_k, (B, L, O); one floating dtype."""
    y_BLO: Tensor = _CausalConvolution.apply(x_BLI, response_LIO)  # type: ignore[no-untyped-call]
    return y_BLO


class _Powers(torch.autograd.Function):
    """a^k as a table, in double precision: rounding must not accumulate over thousands of steps."""

    @staticmethod
    def forward(ctx: Any, a_re_N: Tensor, a_im_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
        a_N = torch.complex(a_re_N.double(), a_im_N.double())
        # Products of few powers: a logarithm of an eigenvalue of zero does not exist.
        K = round(length**0.5) + 1
        small_KN = torch.cat([torch.ones_like(a_N)[None], a_N.expand(K - 1, -1)]).cumprod(0)
        large_KN = torch.cat([torch.ones_like(a_N)[None], (small_KN[-1] * a_N).expand(K - 1, -1)]).cumprod(0)
        power_LN = (large_KN.unsqueeze(1) * small_KN).flatten(0, 1)[:length]
        re_LN, im_LN = power_LN.real.to(a_re_N.dtype), power_LN.imag.to(a_re_N.dtype)
        ctx.save_for_backward(re_LN, im_LN)
        return re_LN, im_LN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dre_LN: Tensor, dim_LN: Tensor) -> tuple[Tensor, Tensor, None]:
        """d a^k = k a^(k-1) da; the gradient takes its conjugate."""
        re_LN, im_LN = (part[:-1] for part in ctx.saved_tensors)
        k_L1 = torch.arange(1, dre_LN.shape[0], dtype=dre_LN.dtype, device=dre_LN.device).unsqueeze(1)
        dre_LN, dim_LN = dre_LN[1:] * k_L1, dim_LN[1:] * k_L1
        return (dre_LN * re_LN + dim_LN * im_LN).sum(0), (dim_LN * re_LN - dre_LN * im_LN).sum(0), None


class _CausalConvolution(torch.autograd.Function):
    """Own gradients: torch's of `rfft` take a complex transform of twice the length."""

    @staticmethod
    def forward(ctx: Any, x_BLI: Tensor, response_LIO: Tensor) -> Tensor:
        L = x_BLI.shape[1]
        n = _transform_length(2 * L - 1)
        x_FBI = _spectrum(x_BLI, n)
        response_FIO = torch.fft.rfft(response_LIO, n, dim=0).contiguous()
        ctx.save_for_backward(x_FBI, response_FIO)
        ctx.n = n
        return _signal(x_FBI @ response_FIO, n, L)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLO: Tensor) -> tuple[Tensor, Tensor]:
        x_FBI, response_FIO = ctx.saved_tensors
        L = dy_BLO.shape[1]
        dy_FBO = _spectrum(dy_BLO, ctx.n)
        dx_BLI = _signal(dy_FBO @ _adjoint(response_FIO), ctx.n, L)
        dresponse_LIO = torch.fft.irfft(_adjoint(x_FBI) @ dy_FBO, ctx.n, dim=0)[:L]
        return dx_BLI, dresponse_LIO


def _spectrum(x_BLH: Tensor, n: int) -> Tensor:
    x_BHF: Tensor = torch.fft.rfft(x_BLH.transpose(1, 2), n)
    return x_BHF.permute(2, 0, 1).contiguous()


def _signal(x_FBH: Tensor, n: int, length: int) -> Tensor:
    x_BHL: Tensor = torch.fft.irfft(x_FBH.permute(1, 2, 0), n)
    return x_BHL[..., :length].transpose(1, 2)


def _adjoint(matrices: Tensor) -> Tensor:
    """Written out: torch multiplies lazily conjugated batches one matrix after the other."""
    return matrices.mH.resolve_conj().contiguous()


def _transform_length(shortest: int) -> int:
    """The next length that has no prime factor above 5, for which FFTs are fast."""
    n = shortest
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
