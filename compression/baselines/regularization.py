"""Penalties on the Hankel singular values (HSVs), which make a layer easy to reduce when its training has ended.

Shapes: N state, H width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compression.gramians import LTISystem, lti_gramians
from compression.hankel import Balancing


def hankel_sum(system: LTISystem) -> Tensor:
    """The sum of the HSVs, float64, with gradients to the system (Schwerdtner, Berman, Peherstorfer, arXiv 2510.22951).

    In the balanced coordinates with rows w_i and columns v_i an HSV moves by (w_i dP w_i^H + v_i^H dQ v_i) / 2. So with
    both held fixed, the half sum of these forms of P and Q has the sum's value and its gradient, and nothing is
    differentiated but the closed forms of the Gramians. HSVs below rounding, which have no coordinates, are left out.

    Raises:
        ValueError: the system is not finite or not stable.
    """
    system.check()
    P_NN, Q_NN = lti_gramians(system)
    with torch.no_grad():
        balancing = Balancing.of(P_NN.cpu(), Q_NN.cpu())
        coordinates = balancing.projections(range(balancing.numerical_rank))
        left_RN, right_NR = (part.to(P_NN.device) for part in coordinates)
    reached = ((left_RN @ P_NN) * left_RN.conj()).sum()
    observed = ((right_NR.mH @ Q_NN) * right_NR.T).sum()
    return (reached + observed).real / 2


def dense_nuclear_norm(system: LTISystem) -> Tensor:
    """The sum of the HSVs as the roots of the eigenvalues of P Q, float64, with gradients through dense matrices.

    Neither the diagonal form of A nor that of the Gramians is used: both Lyapunov equations are solved densely and
    differentiated, as is the eigenvalue decomposition. That is the cost which is quoted against regularising the Hankel
    nuclear norm (CompreSSM, arXiv 2510.02823, section 4); code published for LRUs (Forgione, Mejari, Piga, arXiv
    2403.14833) has the closed forms of the Gramians and penalises the mean.

    Raises:
        ValueError: the system is not finite or not stable.
    """
    system.check()
    powers = squarings(torch.diag(system.eigenvalues_N), float(system.eigenvalues_N.detach().abs().max()))
    P_NN = dense_lyapunov(powers, system.B_NH @ system.B_NH.mH)
    Q_NN = dense_lyapunov([power_NN.mH for power_NN in powers], system.C_HN.mH @ system.C_HN)
    squares_N = torch.linalg.eigvals(P_NN @ Q_NN).real
    # The root's slope is infinite at 0, where rounding leaves what carries nothing.
    floor = squares_N.detach().max() * torch.finfo(torch.float64).eps * len(squares_N)
    total: Tensor = squares_N[squares_N > floor].sqrt().sum()
    return total


def squarings(A_NN: Tensor, radius: float) -> list[Tensor]:
    """A, A^2, A^4 ... to the last one above rounding, complex128; `radius` is A's largest |eigenvalue|, below 1."""
    steps = math.log(torch.finfo(torch.float64).eps) / math.log(max(radius, 0.5))
    powers = [A_NN]
    while 2 ** len(powers) < steps:
        powers.append(powers[-1] @ powers[-1])
    return powers


def dense_lyapunov(powers: Sequence[Tensor], W_NN: Tensor) -> Tensor:
    """X with X = A X A^H + W by doubling (Smith, SIAM J. Appl. Math. 16, 1968), from the `squarings` of A."""
    X_NN = W_NN
    for power_NN in powers:
        X_NN = X_NN + power_NN @ X_NN @ power_NN.mH
    return X_NN
