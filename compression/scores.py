"""Which states of a selective layer to keep first, and what the kept ones can take over from the others.

All channels share B and C, so a state index is kept or cut in all of them.

Shapes: N state, D channels, R states kept, J states cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compression.gramians import SelectiveMoments, selective_gramians

Score = Literal["hankel", "greedy", "averaged", "ghost", "magnitude", "smallest", "random"]

# Of a state's variance. The sums behind the cross moments are right to about this much, being of float32 products;
# below it, two states are one.
RIDGE = 1e-6


@dataclass(frozen=True)
class Ranking:
    """States in the order in which to keep them, and a descending spectrum whose sums say how many to keep."""

    order_N: Tensor  # int64
    sigma_N: Tensor  # float64, descending
    own_N: Tensor  # float64, the spectrum's entry of each state in the order of `order_N`


def rank_states(moments: SelectiveMoments, score: Score, seed: int) -> Ranking:
    """Rank by one score.

    hankel     root of the product of both Gramians' diagonals, summed over channels: the HSV of each index
    greedy     backward elimination of whatever the remaining states replace best, see `_eliminate`
    averaged   modal HSVs of the system with averaged A, B and C (after CompreSSM, arXiv 2510.02823, appendix)
    ghost      root mean squared contribution to the output (GHOST, arXiv 2602.11408)
    magnitude  product of the norms of a state's weights for B and for C
    smallest   the smallest HSVs first: an ablation
    random     any states, drawn from `seed`: an ablation

    Raises:
        ValueError: the moments are not finite or cover no token.
    """
    moments.check()
    if score == "greedy":
        return _eliminate(moments)
    if score in ("smallest", "random"):
        sigma_N, order_N = _hankel(moments).sort(descending=True, stable=True)
        draw_N = ablation_order(len(order_N), score, seed)
        return Ranking(order_N[draw_N], sigma_N, sigma_N[draw_N])
    sigma_N, order_N = SCORES[score](moments).sort(descending=True, stable=True)
    return Ranking(order_N, sigma_N, sigma_N)


def ablation_order(count: int, score: Score, seed: int) -> Tensor:
    """Places in a descending spectrum in the order in which an ablation keeps them, int64."""
    if score == "smallest":
        return torch.arange(count).flip(0)
    assert score == "random"
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _hankel(moments: SelectiveMoments) -> Tensor:
    controllability_DN, observability_DN = selective_gramians(moments)
    return (controllability_DN * observability_DN).sum(0).sqrt()


def _averaged(moments: SelectiveMoments) -> Tensor:
    decay2_DN = (2 * moments.log_a_DN / moments.tokens).exp()
    leak_DN = (1 - decay2_DN).clamp_min(1 / float(moments.tokens))
    gain_DN = (moments.b_DN / moments.tokens) * (moments.c_N / moments.tokens)
    return (gain_DN / leak_DN).square().sum(0).sqrt()


def _ghost(moments: SelectiveMoments) -> Tensor:
    return (moments.hc2_N / moments.tokens).sqrt()


def _magnitude(moments: SelectiveMoments) -> Tensor:
    return moments.weight_N / moments.tokens


SCORES: dict[Score, Callable[[SelectiveMoments], Tensor]] = {
    "hankel": _hankel,
    "averaged": _averaged,
    "ghost": _ghost,
    "magnitude": _magnitude,
}


def _correlations(moments: SelectiveMoments) -> tuple[Tensor, Tensor]:
    """E[h h^T] in units of each state's root mean square, (N, N), regularised; and these units, (N,)."""
    unit_N = moments.hh_NN.diagonal().sqrt()
    unit_N = torch.where(unit_N > 0, unit_N, 1.0)
    eye_NN = torch.eye(len(unit_N), dtype=unit_N.dtype)
    return moments.hh_NN / (unit_N[:, None] * unit_N) + RIDGE * eye_NN, unit_N


def compensation(moments: SelectiveMoments, kept: Sequence[int]) -> Tensor:
    """The map F (R, N) with which C' = F C of the kept states stands for all of C: y = C h ~ C' h_kept.

    What the cut states would hold is regressed onto the kept ones over all channels and tokens. If C did not depend
    on the state, no other F would leave a smaller mean squared error of the output.
    """
    corr_NN, unit_N = _correlations(moments)
    kept_R = torch.tensor(kept)
    cut_J = torch.tensor([n for n in range(moments.d_state) if n not in set(kept)], dtype=torch.int64)
    fold_RN = torch.zeros(len(kept), moments.d_state, dtype=torch.float64)
    fold_RN[torch.arange(len(kept)), kept_R] = 1
    weights_RJ = torch.linalg.solve(corr_NN[kept_R][:, kept_R], corr_NN[kept_R][:, cut_J])
    fold_RN[:, cut_J] = weights_RJ * unit_N[cut_J] / unit_N[kept_R, None]
    return fold_RN


def _eliminate(moments: SelectiveMoments) -> Ranking:
    """Cut, again and again, the state whose loss costs least once the others have taken over what they can.

    Without state j the error is E[C_j^2] times what is left of E[h_j^2] given the other states, a Schur complement;
    C is the projection that earlier cuts have been folded into. As in optimal brain surgery (Hassibi and Stork, NIPS
    1992), the inverse of E[h h^T] gives both, and is downdated from cut to cut.
    """
    corr_NN, _ = _correlations(moments)
    # Not the units, which are 1 where nothing arrives: what C reads of such a state is nothing.
    root_N = moments.hh_NN.diagonal().sqrt()
    cc_NN = moments.cc_NN / moments.tokens * (root_N[:, None] * root_N) / moments.samples
    inverse_NN = torch.linalg.inv(corr_NN)
    N = len(root_N)
    alive_N = torch.ones(N, dtype=torch.bool)
    cuts, costs = [], []
    for _ in range(N):
        cost_N = torch.where(alive_N, cc_NN.diagonal() / inverse_NN.diagonal(), torch.inf)
        # Among equal states the last goes first.
        j = N - 1 - int(cost_N.flip(0).argmin())
        cuts.append(j)
        costs.append(float(cost_N[j].clamp_min(0)))
        alive_N[j] = False
        pivot = inverse_NN[j, j]
        others_N = torch.where(alive_N, -inverse_NN[:, j] / pivot, 0.0)
        cc_NN = cc_NN + others_N[:, None] * cc_NN[j] + cc_NN[:, j, None] * others_N
        cc_NN = cc_NN + others_N[:, None] * others_N * cc_NN[j, j]
        inverse_NN = inverse_NN - inverse_NN[:, j, None] * inverse_NN[j] / pivot
        inverse_NN[j, j] = 1
    # What an early cut costs, a later one costs at least: the spectrum has to descend.
    sigma_N = torch.tensor(costs, dtype=torch.float64).cummax(0).values.sqrt()
    return Ranking(torch.tensor(cuts).flip(0), sigma_N.flip(0), sigma_N.flip(0))
