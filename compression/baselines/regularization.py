"""Penalties on the Hankel singular values (HSVs), which make a layer easy to reduce when its training has ended.

Shapes: N state, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.gramians import LTISystem, lti_gramians
from compression.hankel import Balancing

# Squarings of A in the Lyapunov solve: eigenvalues up to 1 - 1e-4 are then gone from its powers, to rounding.
DOUBLINGS = 19


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
        balancing = Balancing.of(P_NN, Q_NN)
        left_RN, right_NR = balancing.projections(range(balancing.numerical_rank))
    reached = ((left_RN @ P_NN) * left_RN.conj()).sum()
    observed = ((right_NR.mH @ Q_NN) * right_NR.T).sum()
    return (reached + observed).real / 2


def dense_nuclear_norm(system: LTISystem) -> Tensor:
    """The sum of the HSVs as the roots of the eigenvalues of P Q, float64, with gradients through dense matrices.

    Neither the diagonal form of A nor that of the Gramians is used: both Lyapunov equations are solved densely and
    differentiated, as is the eigenvalue decomposition. It is what regularising the Hankel nuclear norm was before the
    structure was put to use, and the cost that is quoted against it (CompreSSM, arXiv 2510.02823, section 4).
    """
    A_NN = torch.diag(system.eigenvalues_N)
    P_NN = dense_lyapunov(A_NN, system.B_NH @ system.B_NH.mH)
    Q_NN = dense_lyapunov(A_NN.mH, system.C_HN.mH @ system.C_HN)
    squares_N = torch.linalg.eigvals(P_NN @ Q_NN).real
    # The root's slope is infinite at 0, where rounding leaves what carries nothing.
    floor = squares_N.detach().max() * torch.finfo(torch.float64).eps * len(squares_N)
    total: Tensor = squares_N[squares_N > floor].sqrt().sum()
    return total


def dense_lyapunov(A_NN: Tensor, W_NN: Tensor) -> Tensor:
    """X with X = A X A^H + W by doubling (Smith, SIAM J. Appl. Math. 16, 1968), complex128; |eigenvalues of A| < 1."""
    X_NN = W_NN
    for _ in range(DOUBLINGS):
        X_NN = X_NN + A_NN @ X_NN @ A_NN.mH
        A_NN = A_NN @ A_NN
    return X_NN
