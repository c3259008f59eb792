"""Hankel singular values (HSVs): how much each state dimension carries from past inputs to future outputs.

Shapes: N state, R states kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.gramians import LTISystem, lti_gramians
from compression.svd import SVD


@dataclass(frozen=True)
class Balancing:
    """Factors with P = L_P L_P^H and Q = L_Q L_Q^H, and the SVD of L_Q^H L_P = U diag(sigma) V^H."""

    L_P_NN: Tensor
    L_Q_NN: Tensor
    svd: SVD

    @classmethod
    def of(cls, P_NN: Tensor, Q_NN: Tensor) -> Balancing:
        """HSVs of two Gramians, real or complex, by the square-root method (Antoulas 2005, section 7.3).

        The singular values of the product of Gramian factors are accurate where the eigenvalues of P Q are not.
        """
        L_P_NN, L_Q_NN = _factor(P_NN), _factor(Q_NN)
        return cls(L_P_NN, L_Q_NN, SVD(L_Q_NN.mH @ L_P_NN))

    @property
    def sigma_N(self) -> Tensor:
        """HSVs, float64, descending."""
        return self.svd.sigma_N

    @property
    def numerical_rank(self) -> int:
        """States whose HSV is above rounding; those below cannot be balanced and carry nothing."""
        floor = self.sigma_N[0] * torch.finfo(torch.float64).eps * self.sigma_N.numel()
        return int((self.sigma_N > floor).sum())

    def projections(self, coordinates: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Left (R, N) and right (N, R) onto these balanced coordinates, below the numerical rank; left right = I."""
        U_NR, V_NR = self.svd.vectors(coordinates)
        root_R = self.sigma_N[torch.tensor(coordinates, dtype=torch.int64)].sqrt()
        return (self.L_Q_NN @ U_NR / root_R).mH, self.L_P_NN @ V_NR / root_R


def lti_balancing(system: LTISystem) -> Balancing:
    """HSVs of an LTI system and what balances it, in complex128.

    Raises:
        ValueError: the system is not finite or not stable.
    """
    system.check()
    return Balancing.of(*lti_gramians(system))


def _factor(gramian_NN: Tensor) -> Tensor:
    """L with L L^H = gramian: Cholesky, or eigen-factors where the Gramian is singular to rounding."""
    L_NN: Tensor
    L_NN, failed = torch.linalg.cholesky_ex(gramian_NN)
    if int(failed) == 0:
        return L_NN
    # At a unit diagonal, or a state that is hardly reached but seen well would count as rounding beside large ones.
    diagonal_N = gramian_NN.diagonal().real
    scale_N = torch.where(diagonal_N > 0, diagonal_N, 1.0).sqrt()
    values_N, vectors_NN = torch.linalg.eigh(gramian_NN / scale_N[:, None] / scale_N)
    # The root would lift an eigenvalue of rounding size far above rounding.
    floor = values_N[-1] * values_N.numel() * torch.finfo(torch.float64).eps
    factor_NN: Tensor = scale_N[:, None] * vectors_NN * torch.where(values_N > floor, values_N, 0.0).sqrt()
    return factor_NN


def spectrum_drift(before: Sequence[float], now: Sequence[float]) -> float:
    """The share of the HSV mass, in [0, 1], that is at another place in the spectrum than before; both descending.

    By Weyl's inequality no HSV moves further than the Hankel operator does, so a spectrum at rest is what a settled
    ranking must show. Shares, because growing weights alone change no ranking. Spectra of different lengths are
    compared as far as the shorter one goes.
    """
    length = min(len(before), len(now))
    shares: list[list[float]] = []
    for spectrum in (before, now):
        total = sum(spectrum[:length])
        shares.append([sigma / total if total > 0 else 1 / length for sigma in spectrum[:length]])
    return sum((abs(a - b) for a, b in zip(*shares, strict=True)), start=0.0) / 2


def overlap(before: Sequence[int], now: Sequence[int], rank: int) -> float:
    """The share of the `rank` first states of a ranking that were among as many first ones before."""
    return len(set(before[:rank]) & set(now[:rank])) / rank
