"""Hankel singular values (HSVs): how much each state dimension carries from past inputs to future outputs.

Shapes: N state, D channels of a selective layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.gramians import LTISystem, SelectiveMoments, lti_gramians, selective_gramians


@dataclass(frozen=True)
class BalancingFactors:
    """Factors with P = L_P L_P^H, Q = L_Q L_Q^H and the SVD L_Q^H L_P = U diag(sigma) V^H."""

    L_P_NN: Tensor
    L_Q_NN: Tensor
    U_NN: Tensor
    sigma_N: Tensor  # float64, descending
    Vh_NN: Tensor

    @property
    def numerical_rank(self) -> int:
        """States whose HSV is above rounding; those below cannot be balanced and carry nothing."""
        floor = self.sigma_N[0] * torch.finfo(torch.float64).eps * self.sigma_N.numel()
        return max(1, int((self.sigma_N > floor).sum()))


def balancing_factors(system: LTISystem) -> BalancingFactors:
    """HSVs of an LTI system by the square-root method (Antoulas 2005, section 7.3), in complex128.

    The singular values of the product of Gramian factors are accurate where the eigenvalues of P Q are not.

    Raises:
        ValueError: the system is not finite or not stable.
    """
    if not all(bool(torch.isfinite(part).all()) for part in (system.eigenvalues_N, system.B_NH, system.C_HN)):
        raise ValueError("a state matrix holds NaN or infinity; the training has diverged")
    if float(system.eigenvalues_N.abs().max()) >= 1:
        raise ValueError("an eigenvalue lies on or outside the unit circle; Hankel singular values do not exist")
    P_NN, Q_NN = lti_gramians(system)
    L_P_NN, L_Q_NN = _factor(P_NN), _factor(Q_NN)
    U_NN, sigma_N, Vh_NN = torch.linalg.svd(L_Q_NN.mH @ L_P_NN)
    return BalancingFactors(L_P_NN, L_Q_NN, U_NN, sigma_N, Vh_NN)


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


def selective_hankel(moments: SelectiveMoments) -> Tensor:
    """HSV of each state index of a selective layer, (N,) float64, in state order.

    The channels share B and C, so an index is kept or cut in all of them: its HSV is the root of the product of
    both Gramians' diagonals, summed over channels.
    """
    controllability_DN, observability_DN = selective_gramians(moments)
    return (controllability_DN * observability_DN).sum(0).sqrt()
