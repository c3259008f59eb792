"""What a layer contributes at a probe, and the Gramians that follow from it.

Shapes: N state, H width of an LTI layer, D channels of a selective layer, B batch, L time, X any number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Time steps from one sampled state to the next. All scans keep states at multiples of a divisor of this.
SAMPLE_EVERY = 32


@dataclass(frozen=True)
class LTISystem:
    """A diagonal, discrete, complex system h' = diag(eigenvalues) h + B u, y = C h.

    Every worker holds the same system, so it is not summed over workers.
    """

    eigenvalues_N: Tensor  # complex128, |.| < 1
    B_NH: Tensor  # complex128
    C_HN: Tensor  # complex128

    @property
    def d_state(self) -> int:
        return self.eigenvalues_N.numel()

    @torch.no_grad()
    def check(self) -> None:
        """Whether the system has Gramians.

        Raises:
            ValueError: it is not finite or not stable.
        """
        # A sum tells as well, and twenty times faster.
        if not all(bool(torch.isfinite(part.sum())) for part in (self.eigenvalues_N, self.B_NH, self.C_HN)):
            raise ValueError("a state matrix holds NaN or infinity; the training has diverged")
        if float(self.eigenvalues_N.abs().max()) >= 1:
            raise ValueError("an eigenvalue lies on or outside the unit circle; Hankel singular values do not exist")


@dataclass
class SelectiveMoments:
    """Sums over tokens of what a selective scan saw, in float64.

    Sums are additive, so the moments of a global batch are the sum of the workers' moments, whatever the
    split. States of different indices meet in `hh_NN` only, whose tokens are the last of every SAMPLE_EVERY steps
    and of each sequence: all of them would cost more than the scan.
    """

    tokens: Tensor  # (), how many
    samples: Tensor  # (), how many are in hh_NN
    h2_DN: Tensor  # squared state
    a2_DN: Tensor  # squared decay exp(dt A)
    hc2_N: Tensor  # squared contribution of a state to the output, over channels too
    hh_NN: Tensor  # products of two states, over channels too
    cc_NN: Tensor  # products of two output projections
    log_a_DN: Tensor  # dt A
    b_DN: Tensor  # dt B, what the input is multiplied with
    c_N: Tensor  # output projection
    weight_N: Tensor  # product of the norms of a state's weights for B and for C
    rotates: bool = field(default=False, kw_only=True)
    """Whether the layer can hold combinations of its states; else it has to choose among them."""

    @classmethod
    def zeros(cls, d_inner: int, d_state: int, device: torch.device | str = "cpu") -> SelectiveMoments:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        D, N = d_inner, d_state
        shapes: list[tuple[int, ...]] = [(), (), (D, N), (D, N), (N,), (N, N), (N, N), (D, N), (D, N), (N,), (N,)]
        return cls(*(zero(*shape) for shape in shapes))

    @property
    def d_state(self) -> int:
        return self.c_N.numel()

    @property
    def d_inner(self) -> int:
        return self.h2_DN.shape[0]

    def add(self, h2_DN: Tensor, a2_DN: Tensor, hc2_DN: Tensor) -> None:
        """Add what a scan sums over some tokens, of any floating dtype."""
        self.h2_DN += h2_DN
        self.a2_DN += a2_DN
        self.hc2_N += hc2_DN.double().sum(0)

    def add_samples(self, h_XN: Tensor, tokens: int) -> None:
        """Add the states of all channels at `tokens` sampled tokens, in any order."""
        self.samples += tokens
        with _exact_products(h_XN):
            self.hh_NN += h_XN.mT @ h_XN

    @torch.no_grad()
    def add_projections(self, dt_BLD: Tensor, A_DN: Tensor, B_BLN: Tensor, C_BLN: Tensor, weight_N: Tensor) -> None:
        """Add what needs no states, and the layer's weights as often as there are tokens: means are weighted so."""
        C_XN = C_BLN.double().flatten(0, 1)
        dt_XD = dt_BLD.flatten(0, 1)
        self.tokens += len(C_XN)
        self.cc_NN += C_XN.mT @ C_XN
        self.c_N += C_XN.sum(0)
        self.log_a_DN += dt_XD.sum(0, dtype=torch.float64).unsqueeze(-1) * A_DN
        with _exact_products(dt_XD):
            self.b_DN += dt_XD.mT @ B_BLN.to(dt_XD.dtype).flatten(0, 1)
        self.weight_N += weight_N * len(C_XN)

    def to_vector(self) -> Tensor:
        """All sums in one float64 vector, for one reduction over the workers."""
        return torch.cat([part.reshape(-1) for part in self._sums().values()])

    def from_vector(self, vector: Tensor) -> SelectiveMoments:
        """The inverse of `to_vector`, with the shapes of this object."""
        parts = self._sums()
        pieces = torch.split(vector, [part.numel() for part in parts.values()])
        sums = (piece.reshape(part.shape) for part, piece in zip(parts.values(), pieces, strict=True))
        return SelectiveMoments(*sums, rotates=self.rotates)

    def _sums(self) -> dict[str, Tensor]:
        return {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}

    def check(self) -> None:
        """Whether there is anything to rank by.

        Raises:
            ValueError: a moment is not finite, or there are no tokens.
        """
        if not bool(torch.isfinite(self.to_vector()).all()):
            raise ValueError("the state statistics hold NaN or infinity; the training has diverged")
        if float(self.tokens) == 0:
            raise ValueError("the state statistics cover no token")


Statistics = LTISystem | SelectiveMoments


def _exact_products(of: Tensor) -> torch.autocast:
    """A layer under autocast gathers in the dtype of its states: rounded to bfloat16, correlated states look alike."""
    return torch.autocast(of.device.type, enabled=False)


def lti_gramians(system: LTISystem) -> tuple[Tensor, Tensor]:
    """Controllability P and observability Q, both (N, N) complex128 Hermitian.

    They solve P = A P A^H + B B^H and Q = A^H Q A + C^H C, in closed form because A is diagonal
    (CompreSSM, arXiv 2510.02823, section 3).
    """
    a_N, B_NH, C_HN = system.eigenvalues_N, system.B_NH, system.C_HN
    decay_NN = 1 - a_N[:, None] * a_N.conj()[None, :]
    P_NN = (B_NH @ B_NH.mH) / decay_NN
    Q_NN = (C_HN.mH @ C_HN) / decay_NN.conj()
    return (P_NN + P_NN.mH) / 2, (Q_NN + Q_NN.mH) / 2


def selective_gramians(moments: SelectiveMoments) -> tuple[Tensor, Tensor]:
    """Diagonals of both Gramians per channel, each (D, N) float64, from second moments.

    Controllability is E[h^2] as the scan saw it. Observability is E[C^2] / (1 - E[a^2]): the energy that a
    unit of state n releases into the output of channel d while it decays.
    """
    controllability_DN = moments.h2_DN / moments.tokens
    decay_DN = moments.a2_DN / moments.tokens
    # A state that never decays would be infinitely observable: bound its memory by the tokens that were seen.
    leak_DN = (1 - decay_DN).clamp_min(1 / float(moments.tokens))
    observability_DN = moments.cc_NN.diagonal() / moments.tokens / leak_DN
    return controllability_DN, observability_DN


def pooled_gramians(moments: SelectiveMoments) -> tuple[Tensor, Tensor]:
    """E[h h^T] summed over channels, and E[C C^T], both (N, N) float64.

    Where one decay belongs to all states, any projection of the state commutes with the dynamics, and what an
    output loses by it is exactly what it loses at the same token. If C did not depend on the state, the mean squared
    loss of rank r would be least for the balanced truncation of these two: the sum of the discarded HSVs' squares.
    """
    return moments.hh_NN / moments.samples, moments.cc_NN / moments.tokens
