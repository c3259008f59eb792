"""Mamba-2's scan: the one function that a layer calls, whatever computes it.

Shapes: B batch, L time, H heads, P head width, G groups, N state, D all channels (H x P).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.gramians import SAMPLE_EVERY, SelectiveMoments
from models.scan import reference
from models.scan.backends import choose
from models.scan.ssd_torch import CHUNK, chunked_scan, state_dtype


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    moments: SelectiveMoments | None = None,
) -> Tensor:
    """The recurrence of Mamba-2 (arXiv 2405.21060, section 7), (B, L, H, P).

        h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t    y_t = C_t h_t + D x_t

    Every head has a state (P, N), a decay A < 0 and time steps dt >= 0 of its own; H / G heads at a time share B and C.
    Any floating dtypes: states and decays are float32 at least, and y has the dtype of x. With `moments`, which need
    G = 1, the sums of this batch are added to it; that changes neither result nor gradients.
    """
    groups = B_BLGN.shape[2]
    arguments = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H)
    with torch.autocast(x_BLHP.device.type, enabled=False):
        if moments is not None:
            assert groups == 1, "statistics are those of one group"
            _add_moments(x_BLHP, dt_BLH, A_H, B_BLGN.squeeze(2), C_BLGN.squeeze(2), moments)
        if choose(x_BLHP) == "reference":
            exact = (part.to(state_dtype(x_BLHP, dt_BLH)) for part in arguments)
            return reference.ssd_scan(*exact).to(x_BLHP.dtype)
        if groups == 1:
            return chunked_scan(x_BLHP, dt_BLH, A_H, B_BLGN.squeeze(2), C_BLGN.squeeze(2), D_H)
        heads = (x_BLHP.chunk(groups, 2), dt_BLH.chunk(groups, 2), A_H.chunk(groups))
        by_group = zip(*heads, B_BLGN.unbind(2), C_BLGN.unbind(2), D_H.chunk(groups), strict=True)
        return torch.cat([chunked_scan(*group) for group in by_group], dim=2)


@torch.no_grad()
def _add_moments(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLN: Tensor, C_BLN: Tensor, moments: SelectiveMoments
) -> None:
    """The recurrence step by step, in float32 at least, for the squares of all its states."""
    dtype = state_dtype(x_BLHP, dt_BLH)
    B_BLN, C_BLN, width = B_BLN.to(dtype), C_BLN.to(dtype), x_BLHP.shape[3]
    decay_BLH = (dt_BLH.to(dtype) * A_H).exp()
    decay_BLD1 = decay_BLH.repeat_interleave(width, 2).unsqueeze(-1)
    input_BLD1 = (x_BLHP * dt_BLH.unsqueeze(-1).to(dtype)).flatten(2).unsqueeze(-1)
    h_BDN = B_BLN.new_zeros(B_BLN.shape[0], decay_BLD1.shape[2], B_BLN.shape[2])
    h2_DN = torch.zeros_like(moments.h2_DN)
    h2_BLN = torch.empty_like(B_BLN)  # sums over channels
    for start in range(0, B_BLN.shape[1], CHUNK):
        h2_BDN = torch.zeros_like(h_BDN)
        for t in range(start, min(start + CHUNK, B_BLN.shape[1])):
            h_BDN.mul_(decay_BLD1[:, t]).baddbmm_(input_BLD1[:, t], B_BLN[:, t].unsqueeze(1))
            squares_BDN = h_BDN.square()
            h2_BDN += squares_BDN
            h2_BLN[:, t] = squares_BDN.sum(1)
            if (t + 1) % SAMPLE_EVERY == 0 or t + 1 == B_BLN.shape[1]:
                moments.add_samples(h_BDN.flatten(0, 1), len(h_BDN))
        h2_DN += h2_BDN.sum(0)
    a2_DN = decay_BLH.double().square().sum((0, 1)).repeat_interleave(width).unsqueeze(-1)
    hc2_1N = (h2_BLN.double() * C_BLN.square()).sum((0, 1)).unsqueeze(0)
    moments.add(h2_DN, a2_DN, hc2_1N)
