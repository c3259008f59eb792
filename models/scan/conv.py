"""Mamba's depthwise causal convolution with SiLU.

Shapes: B batch, L time, D channels, W width of the filter, V = W - 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.scan.backends import choose
from models.scan.extension import kernels, rows


def causal_conv_silu(x_BLD: Tensor, weight_D1W: Tensor, bias_D: Tensor) -> Tensor:
    """silu(bias + sum_w weight_w x_(t - W + 1 + w)), (B, L, D) -> (B, L, D); x is zero before the sequence.

    The result has the dtype of x; weight and bias may be float32 next to bfloat16.
    """
    if choose(x_BLD) == "cpu":
        weight_DW, bias_D = weight_D1W.squeeze(1).float(), bias_D.float()
        out_BLD: Tensor = _CausalConv.apply(rows(x_BLD), weight_DW, bias_D)  # type: ignore[no-untyped-call]
        return out_BLD
    weight_D1W, bias_D = weight_D1W.to(x_BLD.dtype), bias_D.to(x_BLD.dtype)
    padded_BDL = F.pad(x_BLD.transpose(1, 2), (weight_D1W.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded_BDL, weight_D1W, bias_D, groups=x_BLD.shape[-1])).transpose(1, 2)


def causal_conv_silu_step(x_BD: Tensor, past_BDV: Tensor, weight_D1W: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
    """One time step of `causal_conv_silu` from its V = W - 1 last inputs: the output (B, D), and those inputs next."""
    window_BDW = torch.cat([past_BDV, x_BD.unsqueeze(-1)], dim=-1)
    return F.silu((window_BDW * weight_D1W.squeeze(1)).sum(-1) + bias_D), window_BDW[..., 1:]


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_DW: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(x_BLD, weight_DW, bias_D)
        return kernels().conv_forward(x_BLD, weight_DW, bias_D)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLD: Tensor) -> tuple[Tensor, ...]:
        return tuple(kernels().conv_backward(rows(dout_BLD), *ctx.saved_tensors))
