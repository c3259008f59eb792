"""State-space systems that several tests share.

Shapes: N state, H width, F frequencies, K time steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compression.gramians import LTISystem


def random_system(d_state: int, width: int, seed: int = 0, radius: tuple[float, float] = (0.5, 0.95)) -> LTISystem:
    """Complex eigenvalues between two magnitudes, at any phase; Gaussian B (each state at unit power) and C."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.complex128, generator=generator)

    low, high = radius
    magnitude_N = low + (high - low) * torch.rand(d_state, dtype=torch.float64, generator=generator)
    phase_N = 2 * math.pi * torch.rand(d_state, dtype=torch.float64, generator=generator)
    B_NH = gaussian(d_state, width) * (1 - magnitude_N.square()).sqrt()[:, None]
    return LTISystem(torch.polar(magnitude_N, phase_N), B_NH, gaussian(width, d_state))


def padded_system(minimal: LTISystem, kind: str, seed: int = 0) -> LTISystem:
    """`minimal` with four more states that no input reaches, or no output sees, in shuffled order."""
    extra = random_system(4, minimal.B_NH.shape[1], seed + 1000)
    reached_N = torch.tensor({"unreachable": [0, 0, 0, 0], "unobservable": [1] * 4, "both": [0, 0, 1, 1]}[kind])
    seen_N = torch.tensor({"unreachable": [1, 1, 1, 1], "unobservable": [0] * 4, "both": [1, 0, 0, 0]}[kind])
    order_N = torch.randperm(minimal.d_state + 4, generator=torch.Generator().manual_seed(seed))
    return LTISystem(
        torch.cat([minimal.eigenvalues_N, extra.eigenvalues_N])[order_N],
        torch.cat([minimal.B_NH, extra.B_NH * reached_N[:, None]])[order_N],
        torch.cat([minimal.C_HN, extra.C_HN * seen_N], dim=1)[:, order_N],
    )


def nearly_defective_system() -> LTISystem:
    """Its reduction to two states lies where two real poles turn into a complex pair."""
    c = 3.970900924
    parts = ([0.8, 0.7, 0.3, -0.4], [[1], [1], [1], [1]], [[c, 1 - c, 0.05, 0.02]])
    return LTISystem(*(torch.tensor(part, dtype=torch.complex128) for part in parts))


def impulse_response(system: LTISystem, steps: int) -> Tensor:
    """C A^k B for k = 0 ... steps - 1, (K, H, H)."""
    powers_KN = system.eigenvalues_N[None, :] ** torch.arange(steps)[:, None]
    return torch.einsum("hn,kn,ni->khi", system.C_HN, powers_KN, system.B_NH)


def frequency_response(system: LTISystem, points: int = 2000) -> Tensor:
    """C (z - A)^-1 B on the unit circle, (F, H, H)."""
    phase_F = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    z_F = torch.polar(torch.ones_like(phase_F), phase_F)
    resolvent_FN = 1 / (z_F[:, None] - system.eigenvalues_N)
    return torch.einsum("hn,fn,ni->fhi", system.C_HN, resolvent_FN, system.B_NH)


def largest_gain(response_FHH: Tensor) -> float:
    """The H-infinity norm as far as the grid shows it."""
    return float(torch.linalg.svdvals(response_FHH)[:, 0].max())
