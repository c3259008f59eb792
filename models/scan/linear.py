"""The LRU's recurrence h_t = lambda h_(t-1) + u_t, chunk by chunk as matrix products.

Shapes: B batch, L time, N state, K steps of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Work per step grows with the chunk and the number of sequential products falls with it.
CHUNK = 16


def linear_scan(eigenvalues_N: Tensor, u_BLN: Tensor) -> Tensor:
    """All states of the diagonal recurrence from a zero state; complex in, complex out, shape of `u_BLN`."""
    K = min(CHUNK, u_BLN.shape[1])
    # Powers by multiplication: logarithms would fail at an eigenvalue of zero.
    powers_KN = torch.cat([torch.ones_like(eigenvalues_N)[None], eigenvalues_N.expand(K, -1).cumprod(0)])
    lag_KK = torch.arange(K, device=u_BLN.device)[:, None] - torch.arange(K, device=u_BLN.device)[None, :]
    toeplitz_NKK = powers_KN.T[:, lag_KK.clamp_min(0)] * (lag_KK >= 0)
    h_BN = torch.zeros_like(u_BLN[:, 0])
    chunks = []
    for u_BKN in torch.split(u_BLN, K, dim=1):
        k = u_BKN.shape[1]
        own_NKB = toeplitz_NKK[:, :k, :k] @ u_BKN.permute(2, 1, 0)
        h_BKN = own_NKB.permute(2, 1, 0) + powers_KN[1 : k + 1] * h_BN.unsqueeze(1)
        h_BN = h_BKN[:, -1]
        chunks.append(h_BKN)
    return torch.cat(chunks, dim=1)
