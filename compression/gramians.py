"""What a layer contributes at a probe, and the Gramians that follow from it.

Shapes: N state, H width of an LTI layer, D channels of a selective layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass
class SelectiveMoments:
    """Sums over tokens of what a selective scan saw, in float64.

    Sums are additive, so the moments of a global batch are the sum of the workers' moments, whatever the
    split. `tokens` counts them.
    """

    tokens: Tensor  # ()
    h2_DN: Tensor  # sum of the squared state
    a2_DN: Tensor  # sum of the squared decay exp(dt A)
    c2_N: Tensor  # sum of the squared output projection
    hc2_N: Tensor  # sum of the squared contribution to the output, over channels too

    @classmethod
    def zeros(cls, d_inner: int, d_state: int, device: torch.device | str = "cpu") -> SelectiveMoments:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(zero(), zero(d_inner, d_state), zero(d_inner, d_state), zero(d_state), zero(d_state))

    @property
    def d_state(self) -> int:
        return self.c2_N.numel()

    def add(self, h2_DN: Tensor, a2_DN: Tensor, hc2_DN: Tensor, C: Tensor) -> None:
        """Add sums over some tokens, of any floating dtype; `C` (..., N) holds those tokens' output projections."""
        self.tokens += C.numel() // C.shape[-1]
        self.h2_DN += h2_DN
        self.a2_DN += a2_DN
        self.c2_N += C.double().square().flatten(0, -2).sum(0)
        self.hc2_N += hc2_DN.double().sum(0)

    def to_vector(self) -> Tensor:
        """All sums in one float64 vector, for one reduction over the workers."""
        return torch.cat([part.reshape(-1) for part in self._parts()])

    def from_vector(self, vector: Tensor) -> SelectiveMoments:
        """The inverse of `to_vector`, with the shapes of this object."""
        parts = self._parts()
        pieces = torch.split(vector, [part.numel() for part in parts])
        return SelectiveMoments(*(piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.tokens, self.h2_DN, self.a2_DN, self.c2_N, self.hc2_N


Statistics = LTISystem | SelectiveMoments


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

    Raises:
        ValueError: a moment is not finite, or there are no tokens.
    """
    if float(moments.tokens) == 0:
        raise ValueError("the state statistics cover no token")
    if not bool(torch.isfinite(moments.to_vector()).all()):
        raise ValueError("the state statistics hold NaN or infinity; the training has diverged")
    controllability_DN = moments.h2_DN / moments.tokens
    decay_DN = moments.a2_DN / moments.tokens
    # A state that never decays would be infinitely observable: bound its memory by the tokens that were seen.
    leak_DN = (1 - decay_DN).clamp_min(1 / float(moments.tokens))
    observability_DN = (moments.c2_N / moments.tokens) / leak_DN
    return controllability_DN, observability_DN
