"""Each layer's own problem: its spectrum, and the reduction to any rank.

Shapes: N states before, R states after.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.gramians import LTISystem, SelectiveMoments, Statistics, pooled_gramians
from compression.hankel import Balancing, lti_balancing
from compression.plan import Reduction, StateRotation, StateSelection, StateTransform
from compression.ranking import SMALLEST_GAIN
from compression.scores import Score, ablation_order, compensation, rank_states

# Beyond this condition number of the eigenvectors the diagonal form of the reduced system, whose weights are
# float32, is wrong by more than its certificate: the reduction is nearly defective.
LARGEST_CONDITION = 1e4


@dataclass(frozen=True)
class Outcome:
    """A reduction to `rank` states, which may be others than were asked for, and then why."""

    rank: int
    reduction: Reduction | None
    remark: str = ""


class Solution(ABC):
    """What an owner knows of a layer once its Gramians are solved."""

    hsv_N: Tensor
    """The layer's HSVs, float64, descending, whatever it is that ranks states."""
    sigma_N: Tensor
    """The spectrum that decides how many states are kept, float64, descending; the HSVs unless a score has its own."""
    own_N: Tensor
    """The same in the order in which states are kept: ablations do not begin with the largest."""
    order: tuple[int, ...] = ()
    """States in the order in which they are kept; empty where all that is known of them is their spectrum."""
    channels: int
    """Of the layer, each with as many states as the spectrum has entries."""

    @abstractmethod
    def reduce(self, rank: int) -> Outcome:
        """Cut to `rank` states, fewer than there are."""

    def error_bound(self, rank: int) -> float | None:
        """An upper bound on the error of a reduction to `rank`, where there is one."""
        return None


def solve(statistics: Statistics, score: Score, compensate: bool, seed: int) -> Solution:
    """Rank the states of one layer.

    Raises:
        ValueError: the statistics are not finite, or an LTI layer is not stable.
    """
    if isinstance(statistics, LTISystem):
        return ChosenModes(statistics) if score == "magnitude" else BalancedLTI(statistics, score, seed)
    if statistics.rotates:
        return BalancedMoments(statistics, score, seed)
    return ChosenStates(statistics, score, compensate, seed)


class ChosenStates(Solution):
    """A selective layer that keeps some of its states in all channels."""

    def __init__(self, moments: SelectiveMoments, score: Score, compensate: bool, seed: int) -> None:
        ranking = rank_states(moments, score, seed)
        self.hsv_N = rank_states(moments, "hankel", seed).sigma_N
        self.sigma_N, self.own_N, self.order = ranking.sigma_N, ranking.own_N, tuple(ranking.order_N.tolist())
        self.channels = moments.d_inner
        self._moments, self._compensate = moments, compensate

    def reduce(self, rank: int) -> Outcome:
        kept = tuple(sorted(self.order[:rank]))
        fold_RN = compensation(self._moments, kept) if self._compensate else None
        return Outcome(rank, StateSelection(kept, fold_RN))


class _Balanced(Solution):
    """Balanced coordinates, of which the largest are kept; the ablations keep others."""

    def __init__(self, balancing: Balancing, score: Score, seed: int) -> None:
        self.hsv_N = self.sigma_N = balancing.sigma_N
        self._balancing = balancing
        # Coordinates below rounding cannot be computed. A layer that carries nothing is not cut.
        count = max(1, balancing.numerical_rank)
        coordinates = torch.arange(count) if score == "hankel" else ablation_order(count, score, seed)
        self._coordinates: list[int] = coordinates.tolist()
        self.own_N = balancing.sigma_N[coordinates]

    def _limited(self, rank: int) -> tuple[int, str]:
        if len(self._coordinates) < rank:
            rank = len(self._coordinates)
            return rank, f"no more than {rank} states carry anything"
        return rank, ""


class BalancedMoments(_Balanced):
    """A selective layer whose decay belongs to all states: balanced truncation of its pooled second moments."""

    def __init__(self, moments: SelectiveMoments, score: Score, seed: int) -> None:
        moments.check()
        super().__init__(Balancing.of(*pooled_gramians(moments)), score, seed)
        self.channels = moments.d_inner

    def reduce(self, rank: int) -> Outcome:
        rank, remark = self._limited(rank)
        return Outcome(rank, StateRotation(*self._balancing.projections(self._coordinates[:rank])), remark)


class BalancedLTI(_Balanced):
    """Square-root balanced truncation of an LTI layer, diagonalised, in complex128."""

    def __init__(self, system: LTISystem, score: Score, seed: int) -> None:
        super().__init__(lti_balancing(system), score, seed)
        self.channels = system.B_NH.shape[1]
        self._system, self._score = system, score

    def reduce(self, rank: int) -> Outcome:
        """A reduced system that is nearly defective falls back to the next larger rank that is safe.

        Where that would hardly be a cut any more, to all states; a last cut that is smaller tries no other rank.
        """
        rank, remark = self._limited(rank)
        worth_a_cut = max(rank, int((1 - SMALLEST_GAIN) * self._system.d_state))
        for r in range(rank, min(len(self._coordinates), worth_a_cut, self._system.d_state - 1) + 1):
            cut = diagonal_reduction(self._system, self._balancing, self._coordinates[:r])
            if cut is not None:
                return Outcome(r, cut, remark if r == rank else f"rank {rank} is not safe to diagonalise, {r} is")
        dim = self._system.d_state
        return Outcome(dim, None, f"rank {rank} is not safe to diagonalise, {dim} is")

    def error_bound(self, rank: int) -> float | None:
        return 2 * float(self.sigma_N[rank:].sum()) if self._score == "hankel" else None


class ChosenModes(Solution):
    """An LTI layer that keeps some of its modes as they are, by the norms of their weights: magnitude pruning."""

    def __init__(self, system: LTISystem) -> None:
        self.hsv_N = lti_balancing(system).sigma_N
        norms_N = system.B_NH.norm(dim=1) * system.C_HN.norm(dim=0)
        self.sigma_N, self._ranked_N = norms_N.sort(descending=True, stable=True)
        self.own_N = self.sigma_N
        self.channels = system.B_NH.shape[1]
        self._system = system

    def reduce(self, rank: int) -> Outcome:
        kept_R = self._ranked_N[:rank].sort().values
        eye_NN = torch.eye(self._system.d_state, dtype=torch.complex128)
        return Outcome(rank, StateTransform(eye_NN[kept_R], eye_NN[:, kept_R], self._system.eigenvalues_N[kept_R]))


def diagonal_reduction(system: LTISystem, balancing: Balancing, coordinates: Sequence[int]) -> StateTransform | None:
    """Keep these balanced coordinates and diagonalise; None where that is nearly defective, or not stable."""
    left_RN, right_NR = balancing.projections(coordinates)
    eigenvalues_R, vectors_RR = torch.linalg.eig(left_RN @ (system.eigenvalues_N[:, None] * right_NR))
    if float(torch.linalg.cond(vectors_RR)) >= LARGEST_CONDITION or float(eigenvalues_R.abs().max()) >= 1:
        return None
    left_RN, right_NR = torch.linalg.solve(vectors_RR, left_RN), right_NR @ vectors_RR
    # Eigenvectors have no scale of their own, but Adam's steps have: a new state takes that of its ancestor.
    ancestors_R = StateTransform(left_RN, right_NR, eigenvalues_R).ancestors_R
    scale_R1 = left_RN.gather(1, ancestors_R[:, None])
    return StateTransform(left_RN / scale_R1, right_NR * scale_R1.T, eigenvalues_R)
