"""Mamba-2's scan: the one function that a layer calls, whatever computes it.

Shapes: B batch, L time, H heads, P head width, G groups, N state, D all channels (H x P), K steps of SAMPLE_EVERY.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.gramians import SAMPLE_EVERY, SelectiveMoments
from models.scan import reference
from models.scan.backends import choose
from models.scan.extension import kernels, rows
from models.scan.ssd_torch import chunked_scan, state_dtype


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
    compiled = choose(x_BLHP) == "cpu" and dtype == torch.float32
    advance = kernels().ssd_moments if compiled else _advance
    width, (batch, _, d_state) = x_BLHP.shape[3], B_BLN.shape
    decay_BLH = (dt_BLH.to(dtype) * A_H).exp()
    decay_BLD = decay_BLH.repeat_interleave(width, 2)
    input_BLD = (x_BLHP * dt_BLH.unsqueeze(-1).to(dtype)).flatten(2)
    sequences = (decay_BLD, input_BLD, B_BLN.to(dtype), C_BLN.to(dtype))
    h_BND = input_BLD.new_zeros(batch, d_state, input_BLD.shape[2])
    h2_DN, hc2_DN = (torch.zeros_like(moments.h2_DN) for _ in range(2))
    for steps in zip(*(torch.split(part, SAMPLE_EVERY, 1) for part in sequences), strict=True):
        h2_BND, hc2_BND = advance(h_BND, *map(rows, steps))
        h2_DN += h2_BND.sum(0).T
        hc2_DN += hc2_BND.sum(0).T
        moments.add_samples(h_BND.mT.flatten(0, 1), batch)
    a2_DN = decay_BLH.double().square().sum((0, 1)).repeat_interleave(width).unsqueeze(-1)
    moments.add(h2_DN, a2_DN, hc2_DN)


def _advance(
    h_BND: Tensor, decay_BKD: Tensor, input_BKD: Tensor, B_BKN: Tensor, C_BKN: Tensor
) -> tuple[Tensor, Tensor]:
    """As ssd_moments.cpp: states before K steps become those after them; their squares, and these times C^2, summed."""
    h2_BND, hc2_BND = torch.zeros_like(h_BND), torch.zeros_like(h_BND)
    for decay_BD, input_BD, B_BN, C_BN in zip(
        *(part.unbind(1) for part in (decay_BKD, input_BKD, B_BKN, C_BKN)), strict=True
    ):
        h_BND.mul_(decay_BD.unsqueeze(1)).baddbmm_(B_BN.unsqueeze(2), input_BD.unsqueeze(1))
        square_BND = h_BND.square()
        h2_BND += square_BND
        hc2_BND.addcmul_(square_BND, C_BN.square().unsqueeze(2))
    return h2_BND, hc2_BND
