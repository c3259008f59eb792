"""Mamba-2's norm behind the scan: gate, then RMS norm.

Shapes: D channels, G groups, S channels of a group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.scan.backends import choose
from models.scan.extension import kernels

EPS = 1e-5


class GatedRMSNorm(nn.Module):
    """weight v / rms(v) with v = y silu(z); the mean square is over each of `groups` groups of channels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Both (..., D) in one dtype, which the result has too; computed in float32 at least."""
        with torch.autocast(y.device.type, enabled=False):
            if choose(y) == "cpu":
                out: Tensor = _GatedRMSNorm.apply(  # type: ignore[no-untyped-call]
                    y.contiguous(), z.contiguous(), self.weight.float(), self.groups
                )
                return out
            dtype = torch.promote_types(y.dtype, torch.float32)
            v_GS = torch.unflatten(y.to(dtype) * F.silu(z.to(dtype)), -1, (self.groups, -1))
            unit_GS = F.rms_norm(v_GS, v_GS.shape[-1:], eps=EPS)
            return (unit_GS.flatten(-2) * self.weight).to(y.dtype)


class _GatedRMSNorm(torch.autograd.Function):
    """Keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight_D: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(y, z, weight_D)
        ctx.groups = groups
        return kernels().norm_forward(y, z, weight_D, groups)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*kernels().norm_backward(dout.contiguous(), *ctx.saved_tensors, ctx.groups), None)
