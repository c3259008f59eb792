"""The recurrences as the papers write them, one time step after the other: what every backend must equal.

For tests: any floating dtype, float64 above all, slow, and gradients through plain autograd.

Shapes: B batch, L time, D channels (d_inner), N state, H heads or LRU width, P head width, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compression.gramians import SAMPLE_EVERY, SelectiveMoments


def selective_scan(
    x_BLD: Tensor,
    r_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    z_BLD: Tensor,
    moments: SelectiveMoments | None = None,
) -> Tensor:
    """As `models.scan.selective.selective_scan` (Mamba, arXiv 2312.00752, eq. 2 and 4)."""
    dt_BLD = F.softplus(r_BLD)
    h_BDN = x_BLD.new_zeros(x_BLD.shape[0], *A_DN.shape)
    y = []
    for t in range(x_BLD.shape[1]):
        decay_BDN = torch.exp(dt_BLD[:, t, :, None] * A_DN)
        h_BDN = decay_BDN * h_BDN + (dt_BLD[:, t] * x_BLD[:, t]).unsqueeze(-1) * B_BLN[:, t, None]
        y.append((h_BDN @ C_BLN[:, t, :, None]).squeeze(-1))
        if moments is not None:
            h2_BDN, C_BN = h_BDN.detach().square(), C_BLN[:, t].detach()
            hc2_DN = (h2_BDN * C_BN.square().unsqueeze(1)).sum(0)
            moments.add(h2_BDN.sum(0), decay_BDN.detach().square().sum(0), hc2_DN)
            if (t + 1) % SAMPLE_EVERY == 0 or t + 1 == x_BLD.shape[1]:
                moments.add_samples(h_BDN.detach().flatten(0, 1), len(h_BDN))
    return (torch.stack(y, dim=1) + D_D * x_BLD) * F.silu(z_BLD)


def ssd_scan(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
) -> Tensor:
    """As `models.scan.ssd.ssd_scan` (Mamba-2, arXiv 2405.21060, eq. 3 and section 7): heads share B and C by group."""
    B, L, H, P = x_BLHP.shape
    G, N = B_BLGN.shape[2:]
    B_BLHN, C_BLHN = (part.repeat_interleave(H // G, dim=2) for part in (B_BLGN, C_BLGN))
    h_BHPN = x_BLHP.new_zeros(B, H, P, N)
    y = []
    for t in range(L):
        decay_BH = torch.exp(dt_BLH[:, t] * A_H)
        u_BHP = dt_BLH[:, t].unsqueeze(-1) * x_BLHP[:, t]
        h_BHPN = decay_BH[..., None, None] * h_BHPN + u_BHP.unsqueeze(-1) * B_BLHN[:, t].unsqueeze(2)
        y.append((h_BHPN @ C_BLHN[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(y, dim=1) + D_H.unsqueeze(-1) * x_BLHP


def linear_recurrence(
    x_BLH: Tensor,
    a_re_N: Tensor,
    a_im_N: Tensor,
    B_re_NH: Tensor,
    B_im_NH: Tensor,
    C_re_HN: Tensor,
    C_im_HN: Tensor,
) -> Tensor:
    """As `models.scan.linear.linear_recurrence` (LRU, arXiv 2303.06349, eq. 1), with real arithmetic."""
    re_BN = im_BN = x_BLH.new_zeros(x_BLH.shape[0], a_re_N.shape[0])
    y = []
    for x_BH in x_BLH.unbind(1):
        re_BN, im_BN = (
            a_re_N * re_BN - a_im_N * im_BN + x_BH @ B_re_NH.T,
            a_re_N * im_BN + a_im_N * re_BN + x_BH @ B_im_NH.T,
        )
        y.append(re_BN @ C_re_HN.T - im_BN @ C_im_HN.T)
    return torch.stack(y, dim=1)
