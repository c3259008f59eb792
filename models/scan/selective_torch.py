"""Mamba-1's selective scan in plain torch, on any device: states never exist for the whole sequence at once.

Shapes: B batch, L time, D channels (d_inner), N state, K steps of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from compression.gramians import SAMPLE_EVERY, SelectiveMoments

# States of one chunk stay in cache while they are used; one state per chunk is kept for the backward pass.
CHUNK = 16
assert SAMPLE_EVERY % CHUNK == 0


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
    """As `models.scan.selective.selective_scan`, in any floating dtype; states have that of A."""
    x, r, B, C, z = (part.to(A_DN.dtype) for part in (x_BLD, r_BLD, B_BLN, C_BLN, z_BLD))
    y_BLD = streaming_scan(x, F.softplus(r), A_DN, B, C, moments)
    return ((y_BLD + D_D * x) * F.silu(z)).to(x_BLD.dtype)


def streaming_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    moments: SelectiveMoments | None = None,
) -> Tensor:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t; all tensors share one floating dtype."""
    y_BLD: Tensor = _SelectiveScan.apply(x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, moments)  # type: ignore[no-untyped-call]
    return y_BLD


def _chunk_states(x_KBD: Tensor, dt_KBD: Tensor, A_DN: Tensor, B_KBN: Tensor, h_BDN: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states of one chunk, both (K, B, D, N), from the state before it."""
    decay_KBDN = (dt_KBD.unsqueeze(-1) * A_DN).exp_()
    h_KBDN = (dt_KBD * x_KBD).unsqueeze(-1) * B_KBN.unsqueeze(2)
    for k in range(h_KBDN.shape[0]):
        h_BDN = h_KBDN[k].addcmul_(decay_KBDN[k], h_BDN)
    return decay_KBDN, h_KBDN


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        dt_BLD: Tensor,
        A_DN: Tensor,
        B_BLN: Tensor,
        C_BLN: Tensor,
        moments: SelectiveMoments | None,
    ) -> Tensor:
        x_LBD, dt_LBD, B_LBN, C_LBN = (part.transpose(0, 1).contiguous() for part in (x_BLD, dt_BLD, B_BLN, C_BLN))
        y_LBD = torch.empty_like(x_LBD)
        h_BDN = x_BLD.new_zeros(x_BLD.shape[0], *A_DN.shape)
        starts = []
        for start in range(0, x_LBD.shape[0], CHUNK):
            chunk = slice(start, start + CHUNK)
            starts.append(h_BDN)
            decay_KBDN, h_KBDN = _chunk_states(x_LBD[chunk], dt_LBD[chunk], A_DN, B_LBN[chunk], h_BDN)
            C_KBN = C_LBN[chunk]
            y_LBD[chunk] = (h_KBDN @ C_KBN.unsqueeze(-1)).squeeze(-1)
            h_BDN = h_KBDN[-1].clone()
            if moments is not None:
                h2_KBDN = h_KBDN.square()
                hc2_DN = (h2_KBDN * C_KBN.square().unsqueeze(2)).sum((0, 1))
                moments.add(h2_KBDN.sum((0, 1)), decay_KBDN.square().sum((0, 1)), hc2_DN)
                end = start + len(h_KBDN)
                if end % SAMPLE_EVERY == 0 or end == len(x_LBD):
                    moments.add_samples(h_BDN.flatten(0, 1), len(h_BDN))
        ctx.save_for_backward(x_LBD, dt_LBD, A_DN, B_LBN, C_LBN, *starts)
        return y_LBD.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_LBD, dt_LBD, A_DN, B_LBN, C_LBN, *starts = ctx.saved_tensors
        dy_LBD = dy_BLD.transpose(0, 1).contiguous()
        dx_LBD, ddt_LBD = torch.empty_like(x_LBD), torch.empty_like(dt_LBD)
        dB_LBN, dC_LBN = torch.empty_like(B_LBN), torch.empty_like(C_LBN)
        dA_DN = torch.zeros_like(A_DN)
        # What the states after this chunk add to the gradient of its last state.
        carry_BDN = torch.zeros_like(starts[0])
        for index in reversed(range(len(starts))):
            chunk = slice(index * CHUNK, (index + 1) * CHUNK)
            x_KBD, dt_KBD, B_KBN, dy_KBD = x_LBD[chunk], dt_LBD[chunk], B_LBN[chunk], dy_LBD[chunk]
            decay_KBDN, h_KBDN = _chunk_states(x_KBD, dt_KBD, A_DN, B_KBN, starts[index])
            dC_LBN[chunk] = (dy_KBD.unsqueeze(2) @ h_KBDN).squeeze(2)

            dh_KBDN = dy_KBD.unsqueeze(-1) * C_LBN[chunk].unsqueeze(2)
            dh_KBDN[-1] += carry_BDN
            for k in reversed(range(dh_KBDN.shape[0] - 1)):
                dh_KBDN[k].addcmul_(decay_KBDN[k + 1], dh_KBDN[k + 1])
            carry_BDN = decay_KBDN[0] * dh_KBDN[0]

            du_KBD = (dh_KBDN @ B_KBN.unsqueeze(-1)).squeeze(-1)
            dB_LBN[chunk] = ((dt_KBD * x_KBD).unsqueeze(2) @ dh_KBDN).squeeze(2)
            dx_LBD[chunk] = du_KBD * dt_KBD

            # d(dt A) = dh * decay * h_(t-1); dh and the decays are not needed any more.
            ddecay_KBDN = dh_KBDN.mul_(decay_KBDN)
            ddecay_KBDN[0] *= starts[index]
            ddecay_KBDN[1:] *= h_KBDN[:-1]
            ddt_LBD[chunk] = (ddecay_KBDN * A_DN).sum(-1) + du_KBD * x_KBD
            dA_DN += (ddecay_KBDN * dt_KBD.unsqueeze(-1)).sum((0, 1))
        dx_BLD, ddt_BLD, dB_BLN, dC_BLN = (g.transpose(0, 1) for g in (dx_LBD, ddt_LBD, dB_LBN, dC_LBN))
        return dx_BLD, ddt_BLD, dA_DN, dB_BLN, dC_BLN, None
