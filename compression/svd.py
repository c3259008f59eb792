"""The singular value decomposition of a square matrix: its values at once, vectors of the largest when asked for.

How many vectors are wanted is known once the values of all layers are ranked, and LAPACK has no driver that waits.

Shapes: N rows and columns, R vectors asked for, S and K singular values above and below ACCURATE.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, get_lapack_funcs
from threadpoolctl import ThreadpoolController
from torch import Tensor

# Of the largest singular value: down to here the square root of an eigenvalue has twelve digits.
ACCURATE = 1e-2
# Rows up to which SciPy's threads cost more than they save: each waits for more work on the core that torch needs next.
ONE_THREAD = 512


class SVD:
    """M = U diag(sigma) V^H, float64 or complex128, on the CPU.

    Eigenvectors of M^H M take a third of the time of LAPACK's SVD, but a singular value of x times the largest comes
    out of them with an error of eps / x^2. Those below ACCURATE have an SVD of their own, of what M is between the
    orthogonal complements of the others.
    """

    sigma_N: Tensor
    """float64, descending."""

    def __init__(self, M_NN: Tensor) -> None:
        self._M_NN = M_NN
        self._squares = HermitianEigen(M_NN.mH @ M_NN)
        squares_N = self._squares.values_N
        accurate = int((squares_N > ACCURATE**2 * squares_N[0]).sum())
        self.sigma_N = squares_N[:accurate].sqrt()
        self._whole: tuple[Tensor, Tensor] | None = None
        if accurate < len(squares_N):
            self._complete(accurate)

    def vectors(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """These columns of U and V, each (N, R)."""
        chosen = torch.tensor(indices, dtype=torch.int64)
        if self._whole is not None:
            U_NN, V_NN = self._whole
            return U_NN[:, chosen], V_NN[:, chosen]
        V_NR = self._squares.vectors(int(chosen.max()) + 1)[:, chosen]
        return self._M_NN @ V_NR / self.sigma_N[chosen], V_NR

    def _complete(self, accurate: int) -> None:
        """The values below ACCURATE, for which all vectors are needed."""
        V_NN = self._squares.vectors(len(self._M_NN))
        V_NS, V_NK = V_NN[:, :accurate], V_NN[:, accurate:]
        U_NS = self._M_NN @ V_NS / self.sigma_N
        complement_NK = torch.linalg.qr(U_NS, mode="complete").Q[:, accurate:]
        U_KK, sigma_K, Wh_KK = torch.linalg.svd(complement_NK.mH @ (self._M_NN @ V_NK))
        U_NN, V_NN = torch.cat([U_NS, complement_NK @ U_KK], 1), torch.cat([V_NS, V_NK @ Wh_KK.mH], 1)
        # Where the two meet, rounding may have swapped neighbours.
        self.sigma_N, order_N = torch.cat([self.sigma_N, sigma_K]).sort(descending=True)
        self._whole = U_NN[:, order_N], V_NN[:, order_N]


class HermitianEigen:
    """Eigenvalues of a Hermitian matrix, and eigenvectors of the largest, from one tridiagonal form of it."""

    values_N: Tensor
    """float64, descending."""

    def __init__(self, A_NN: Tensor) -> None:
        names = ("hetrd", "hetrd_lwork", "unmqr") if A_NN.is_complex() else ("sytrd", "sytrd_lwork", "ormqr")
        A = A_NN.numpy()
        to_tridiagonal, workspace, self._apply = get_lapack_funcs(names, (A,))
        with _threads(len(A)):
            self._reflectors, self._diagonal, self._beside, self._scales, _ = to_tridiagonal(
                A.copy(order="F"), lower=1, lwork=int(workspace(len(A), lower=1)[0].real), overwrite_a=1
            )
            values = eigvalsh_tridiagonal(self._diagonal, self._beside, lapack_driver="sterf")
        self.values_N = torch.from_numpy(values[::-1].copy())

    def vectors(self, count: int) -> Tensor:
        """Of the `count` largest eigenvalues, in their order, (N, count)."""
        size = len(self._diagonal)
        largest = (size - count, size - 1)
        with _threads(size):
            _, vectors = eigh_tridiagonal(
                self._diagonal, self._beside, select="i", select_range=largest, lapack_driver="stemr"
            )
            vectors = vectors[:, ::-1].astype(self._reflectors.dtype, order="F")
            if size > 1:  # the reflectors are those of a QR decomposition one row below
                reflectors = np.asfortranarray(self._reflectors[1:, :-1])
                vectors[1:] = self._apply("L", "N", reflectors, self._scales, vectors[1:], 64 * count)[0]
        return torch.from_numpy(vectors)


def _threads(rows: int) -> AbstractContextManager[object]:
    limit: AbstractContextManager[object] = _controller().limit(
        limits=1 if rows <= ONE_THREAD else None, user_api="blas"
    )
    return limit


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
