"""A linear recurrence as the convolution that it is: no state exists for any time step.

The impulse response K_k = Re(C a^k B) is a matrix product over states; the sequence goes through it by FFT.

Shapes: B batch, L time, H width (I as the input's, O as the output's), N state, M = 2 N, F frequencies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.scan.backends import choose
from models.scan.extension import kernels


def impulse_response(
    length: int,
    a_re_N: Tensor,
    a_im_N: Tensor,
    B_re_NH: Tensor,
    B_im_NH: Tensor,
    C_re_HN: Tensor,
    C_im_HN: Tensor,
) -> Tensor:
    """Re(C a^k B) for k = 0 ... length - 1, (I, O, L)."""
    powers_LM = _Powers.apply(a_re_N, a_im_N, length)  # type: ignore[no-untyped-call]
    B_re_IN, B_im_IN, C_re_H1N, C_im_H1N = B_re_NH.T, B_im_NH.T, C_re_HN.unsqueeze(1), C_im_HN.unsqueeze(1)
    gain_re_OIN = C_re_H1N * B_re_IN - C_im_H1N * B_im_IN
    gain_im_OIN = C_re_H1N * B_im_IN + C_im_H1N * B_re_IN
    response_OIL: Tensor = torch.cat([gain_re_OIN, -gain_im_OIN], dim=-1) @ powers_LM.T
    return response_OIL.transpose(0, 1)


def causal_convolution(x_BLI: Tensor, response_IOL: Tensor) -> Tensor:
    """y_t = sum_k x_(t-k) K_k, (B, L, O); one floating dtype."""
    y_BLO: Tensor = _CausalConvolution.apply(x_BLI, response_IOL)  # type: ignore[no-untyped-call]
    return y_BLO


class _Powers(torch.autograd.Function):
    """a^k as a table, (L, 2 N) real and imaginary, through float64: rounding must not add up over the steps."""

    @staticmethod
    def forward(ctx: Any, a_re_N: Tensor, a_im_N: Tensor, length: int) -> Tensor:
        a_N = torch.complex(a_re_N.double(), a_im_N.double())
        # Products of few powers: a logarithm of an eigenvalue of zero does not exist.
        K = round(length**0.5) + 1
        small_KN = torch.cat([torch.ones_like(a_N)[None], a_N.expand(K - 1, -1)]).cumprod(0)
        large_KN = torch.cat([torch.ones_like(a_N)[None], (small_KN[-1] * a_N).expand(K - 1, -1)]).cumprod(0)
        power_LN = (large_KN.unsqueeze(1) * small_KN).flatten(0, 1)[:length]
        powers_LM = torch.cat([power_LN.real.to(a_re_N.dtype), power_LN.imag.to(a_re_N.dtype)], dim=1)
        ctx.save_for_backward(powers_LM)
        return powers_LM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpowers_LM: Tensor) -> tuple[Tensor, Tensor, None]:
        """d a^k = k a^(k-1) da; the gradient takes its conjugate."""
        (powers_LM,) = ctx.saved_tensors
        k_L1 = torch.arange(1, len(powers_LM), dtype=powers_LM.dtype, device=powers_LM.device).unsqueeze(1)
        re_LN, im_LN = (powers_LM[:-1] * k_L1).chunk(2, dim=1)
        dre_LN, dim_LN = dpowers_LM[1:].chunk(2, dim=1)
        return (dre_LN * re_LN + dim_LN * im_LN).sum(0), (dim_LN * re_LN - dre_LN * im_LN).sum(0), None


class _CausalConvolution(torch.autograd.Function):
    """Own gradients: torch's of `rfft` take a complex transform of twice the length."""

    @staticmethod
    def forward(ctx: Any, x_BLI: Tensor, response_IOL: Tensor) -> Tensor:
        L = x_BLI.shape[1]
        n = _transform_length(2 * L - 1)
        x_BIF, response_IOF = torch.fft.rfft(x_BLI.mT, n), torch.fft.rfft(response_IOL, n)
        ctx.save_for_backward(x_BIF, response_IOF)
        ctx.n = n
        return _signal(_mix(x_BIF, response_IOF), n, L)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLO: Tensor) -> tuple[Tensor, Tensor]:
        x_BIF, response_IOF = ctx.saved_tensors
        L = dy_BLO.shape[1]
        dy_BOF = torch.fft.rfft(dy_BLO.mT, ctx.n)
        dx_BLI = _signal(_mix(dy_BOF, response_IOF.transpose(0, 1).conj()), ctx.n, L)
        dresponse_IOL = torch.fft.irfft(_correlate(x_BIF, dy_BOF), ctx.n)[..., :L]
        return dx_BLI, dresponse_IOL


def _mix(x_BIF: Tensor, response_IOF: Tensor) -> Tensor:
    """What each channel out has of those in, (B, O, F)."""
    if choose(x_BIF.real) == "cpu":
        return kernels().spectral_mix(_pairs(x_BIF), _pairs(response_IOF))  # type: ignore[no-any-return]
    return torch.einsum("bif,iof->bof", x_BIF, response_IOF)


def _correlate(x_BIF: Tensor, y_BOF: Tensor) -> Tensor:
    """Of each channel in with each out, over the batch, (I, O, F)."""
    if choose(x_BIF.real) == "cpu":
        return kernels().spectral_correlate(_pairs(x_BIF), _pairs(y_BOF))  # type: ignore[no-any-return]
    return torch.einsum("bif,bof->iof", x_BIF.conj(), y_BOF)


def _pairs(spectrum: Tensor) -> Tensor:
    """As the kernels read it."""
    return spectrum.resolve_conj().contiguous()


def _signal(spectrum_BHF: Tensor, n: int, length: int) -> Tensor:
    x_BHL: Tensor = torch.fft.irfft(spectrum_BHF, n)[..., :length]
    return x_BHL.mT.contiguous()


def _transform_length(shortest: int) -> int:
    """The next length that has no prime factor above 7, for which FFTs are fast."""
    n = shortest
    while True:
        rest = n
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
