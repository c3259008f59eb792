"""Hankel singular values (HSVs): how much each state dimension carries from past inputs to future outputs.

Shapes: N state, R states kept, S and K singular values above and below ACCURATE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.gramians import LTISystem, lti_gramians

# Of the largest singular value: down to here the square root of an eigenvalue has twelve digits.
ACCURATE = 1e-2


@dataclass(frozen=True)
class Balancing:
    """Factors with P = L_P L_P^H, Q = L_Q L_Q^H and the SVD L_Q^H L_P = U diag(sigma) V^H."""

    L_P_NN: Tensor
    L_Q_NN: Tensor
    U_NN: Tensor
    sigma_N: Tensor  # float64, descending
    Vh_NN: Tensor

    @classmethod
    def of(cls, P_NN: Tensor, Q_NN: Tensor) -> Balancing:
        """HSVs of two Gramians, real or complex, by the square-root method (Antoulas 2005, section 7.3).

        The singular values of the product of Gramian factors are accurate where the eigenvalues of P Q are not.
        """
        L_P_NN, L_Q_NN = _factor(P_NN), _factor(Q_NN)
        return cls(L_P_NN, L_Q_NN, *_svd(L_Q_NN.mH @ L_P_NN))

    @property
    def numerical_rank(self) -> int:
        """States whose HSV is above rounding; those below cannot be balanced and carry nothing."""
        floor = self.sigma_N[0] * torch.finfo(torch.float64).eps * self.sigma_N.numel()
        return int((self.sigma_N > floor).sum())

    def projections(self, coordinates: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Left (R, N) and right (N, R) onto these balanced coordinates, below the numerical rank; left right = I."""
        chosen = torch.tensor(coordinates, dtype=torch.int64)
        root_R = self.sigma_N[chosen].sqrt()
        right_NR = self.L_P_NN @ self.Vh_NN.mH[:, chosen] / root_R
        left_RN = (self.L_Q_NN @ self.U_NN[:, chosen] / root_R).mH
        return left_RN, right_NR


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


def _svd(M_NN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma (descending) and V^H, from the eigenvectors of M^H M as far as these are accurate.

    LAPACK's Hermitian eigenvectors take a third of its SVD's time, but a singular value of x times the largest comes
    out of them with an error of eps / x^2. Those below ACCURATE have an SVD of their own, of what M is between the
    orthogonal complements of the others.
    """
    squares_N, V_NN = torch.linalg.eigh(M_NN.mH @ M_NN)
    squares_N, V_NN = squares_N.flip(0), V_NN.flip(1)
    accurate = int((squares_N > ACCURATE**2 * squares_N[0]).sum())
    sigma_S, V_NS, V_NK = squares_N[:accurate].sqrt(), V_NN[:, :accurate], V_NN[:, accurate:]
    U_NS = M_NN @ V_NS / sigma_S
    if accurate == len(squares_N):
        return U_NS, sigma_S, V_NS.mH
    complement_NK = torch.linalg.qr(U_NS, mode="complete").Q[:, accurate:]
    U_KK, sigma_K, Wh_KK = torch.linalg.svd(complement_NK.mH @ M_NN @ V_NK)
    U_NN, V_NN = torch.cat([U_NS, complement_NK @ U_KK], 1), torch.cat([V_NS, V_NK @ Wh_KK.mH], 1)
    # Where the two meet, rounding may have swapped neighbours.
    sigma_N, order_N = torch.cat([sigma_S, sigma_K]).sort(descending=True)
    return U_NN[:, order_N], sigma_N, V_NN[:, order_N].mH


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
