"""How fast an LRU layer is balanced and cut: `python -m benchmarks.hankel`.

Beside the published code too, where there is a clone of it (`benchmarks/published.py`).

Shapes: N state, H width, F frequencies, K probes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import SEED, Duel, Step, duel
from benchmarks.published import CLONE, PublishedCut
from benchmarks.report import AT_MOST, RESULTS, Row, report, setting
from compression.gramians import LTISystem
from compression.plan import StateTransform
from compression.truncation import BalancedLTI

WIDTH = 512
# The rate of float32 products, on two threads, of the machine that the limits in milliseconds were set for.
LIMIT_FLOPS = 294e9
PRODUCT_SIZE = 2048
# Of the largest HSV, and of the reduced response: the published code begins in complex64.
HSV_TOLERANCE, RESPONSE_TOLERANCE = 1e-4, 1e-3

Reduction = tuple[Tensor, LTISystem]


def lru_system(d_state: int, width: int = WIDTH, seed: int = SEED) -> LTISystem:
    """An LRU layer as it starts: poles uniform on the ring from 0.9 to 0.999 at any phase, states at unit power."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(d_state, dtype=torch.float64, generator=generator)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.complex128, generator=generator)

    magnitude2_N = uniform() * (0.999**2 - 0.9**2) + 0.9**2
    B_NH = gaussian(d_state, width) * ((1 - magnitude2_N) / width).sqrt()[:, None]
    eigenvalues_N = torch.polar(magnitude2_N.sqrt(), 2 * math.pi * uniform())
    return LTISystem(eigenvalues_N, B_NH, gaussian(width, d_state) / math.sqrt(d_state))


def ours(system: LTISystem, rank: int) -> Reduction:
    """HSVs (N,), descending, and the system of `rank` states."""
    solution = BalancedLTI(system, "hankel", seed=0)
    cut = solution.reduce(rank).reduction
    assert isinstance(cut, StateTransform)
    return solution.sigma_N, LTISystem(cut.eigenvalues_R, cut.left_RN @ system.B_NH, system.C_HN @ cut.right_NR)


def cut_beside_published(d_state: int, seconds: float) -> Duel:
    system, rank = lru_system(d_state), d_state // 4
    published = PublishedCut(system, rank)
    assert_same_work(ours(system, rank), published.result())
    times = duel(partial(ours, system, rank), {"published code": published}, seconds)
    published.close()
    return times


def cut_beside_products(d_state: int, limit_ms: float, seconds: float) -> Duel:
    """The limit as work, so that it means the same on any machine: the products that take it at LIMIT_FLOPS."""
    system, rank = lru_system(d_state), d_state // 4
    products = products_worth(limit_ms)
    ours(system, rank)
    products()
    return duel(partial(ours, system, rank), {f"products of {limit_ms:g} ms": products}, seconds)


def products_worth(limit_ms: float) -> Step:
    """float32 matrix products of as many operations as LIMIT_FLOPS does in this time."""
    rows = round(limit_ms / 1e3 * LIMIT_FLOPS / (2 * PRODUCT_SIZE**2))
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    times, rest = divmod(rows, PRODUCT_SIZE)

    def step() -> None:
        for part in [left] * times + [left[:rest]]:
            part @ right

    return step


def assert_same_work(mine: Reduction, theirs: Reduction) -> None:
    """Both find the same HSVs and the same reduced system; a comparison of unequal work is worthless."""
    (sigma_N, system), (their_sigma_N, their_system) = mine, theirs
    hsv_error = float((sigma_N - their_sigma_N).abs().max() / sigma_N[0])
    response, their_response = frequency_response(system), frequency_response(their_system)
    response_error = float((response - their_response).norm() / response.norm())
    if not (hsv_error <= HSV_TOLERANCE and response_error <= RESPONSE_TOLERANCE):
        raise RuntimeError(
            f"the cuts to {system.d_state} states are not the same: HSVs differ by {hsv_error:.1e} of the largest "
            f"(at most {HSV_TOLERANCE:g}), responses by {response_error:.1e} (at most {RESPONSE_TOLERANCE:g})"
        )


def frequency_response(system: LTISystem, points: int = 64, probes: int = 4) -> Tensor:
    """C (z - A)^-1 B on the unit circle, for a few inputs, (F, H, K)."""
    generator = torch.Generator().manual_seed(SEED)
    inputs_HK = torch.randn(WIDTH, probes, dtype=torch.complex128, generator=generator)
    phase_F = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    resolvent_FN = 1 / (torch.polar(torch.ones_like(phase_F), phase_F)[:, None] - system.eigenvalues_N)
    return system.C_HN @ (resolvent_FN[:, :, None] * (system.B_NH @ inputs_HK))


def product_gflops(dtype: torch.dtype) -> float:
    """Real operations per second of a square matrix product, the best of five, in 1e9."""
    left, right = torch.randn(2, PRODUCT_SIZE // 2, PRODUCT_SIZE // 2, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return (8 if dtype.is_complex else 2) * (PRODUCT_SIZE // 2) ** 3 / best / 1e9


# Per state dimension: milliseconds of the limit, times faster than the published code, and seconds to measure.
SIZES = ((256, 30, 8, 15), (384, 65, 7, 20), (1024, 800, 5, 90))
BESIDE_PRODUCTS = tuple(
    Row(
        f"LRU layer cut from N={d_state} to {d_state // 4}, times products of {limit_ms} ms at 294 GFLOP/s",
        partial(cut_beside_products, d_state, limit_ms),
        at_least=1,
        aim=0.8,
        seconds=seconds / 2,
        at_most=AT_MOST,
    )
    for d_state, limit_ms, _, seconds in SIZES
)
BESIDE_PUBLISHED = tuple(
    Row(
        f"LRU layer cut from N={d_state} to {d_state // 4}, times faster than the published code",
        partial(cut_beside_published, d_state),
        at_least=at_least,
        aim=1.5 * at_least,
        seconds=seconds,
    )
    for d_state, _, at_least, seconds in SIZES
)


def head() -> str:
    rates = ", ".join(f"{str(dtype)[6:]} {product_gflops(dtype):.0f}" for dtype in (torch.float32, torch.complex128))
    said = f"H {WIDTH}; ours in complex128, the published code in complex64; GFLOP/s of matrix products: {rates}\n"
    return setting("torch", said=said)


def main(arguments: Sequence[str] | None = None) -> int:
    rows, output = BESIDE_PRODUCTS, RESULTS / "hankel.json"
    if CLONE.exists():
        rows += BESIDE_PUBLISHED
    else:
        print(f"no clone of the published code in {CLONE}: its rows are left out", file=sys.stderr)
    return report("python -m benchmarks.hankel", "Benchmarks of an LTI layer's cut.", rows, head, output, arguments)


if __name__ == "__main__":
    sys.exit(main())
