"""How many states each layer keeps, and when it is asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compression.ranking import SMALLEST_GAIN, Spectrum, Target, choose_ranks, rank_within_tolerance
from compression.schedule import Window


def choose_rank(sigma: Sequence[float], target: Target, initial: int, event: int, events: int) -> tuple[int, str]:
    """Of one layer alone."""
    return choose_ranks([Spectrum(tuple(sigma), initial, channels=1)], target, event, events)[0]


@pytest.mark.parametrize("decay", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(10))
def test_tolerance_is_the_smallest_rank_with_the_mass(seed: int, decay: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    d_state = int(torch.randint(1, 40, (), generator=generator))
    order_N = torch.arange(d_state, dtype=torch.float64)
    sigma_N = torch.rand(d_state, dtype=torch.float64, generator=generator) * torch.exp(-decay * order_N)
    sigma_N = sigma_N.sort(descending=True).values
    total = math.fsum(sigma_N.tolist())
    for tolerance in (1e-6, 0.01, 0.1, 0.5, 0.99):
        rank = rank_within_tolerance(sigma_N.tolist(), tolerance)
        assert 1 <= rank <= d_state
        assert math.fsum(sigma_N[:rank].tolist()) >= (1 - tolerance) * total * (1 - 1e-14)
        assert math.fsum(sigma_N[: rank - 1].tolist()) < (1 - tolerance) * total


def test_mass_that_is_exactly_enough_is_enough() -> None:
    sigma_N = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert [rank_within_tolerance(sigma_N.tolist(), tolerance) for tolerance in (0.5, 0.25, 0.125)] == [1, 2, 3]


def dims_over_events(initial: int, target: Target, events: int) -> list[int]:
    """Dimensions before the first and after each event, for a flat spectrum."""
    dims = [initial]
    for event in range(1, events + 1):
        dims.append(choose_rank([1.0] * dims[-1], target, initial, event, events)[0])
    return dims


@pytest.mark.parametrize(
    ("initial", "dim", "events"),
    [
        (16, 4, 1),
        (16, 4, 4),
        (16, 12, 4),
        (64, 4, 3),
        (128, 1, 4),
        (256, 28, 16),
        (384, 57, 4),
        (2, 1, 5),
        # The 5 % gate must not swallow the last cut of these.
        (64, 50, 16),
        (128, 93, 16),
        (64, 32, 16),
    ],
)
def test_dim_is_reached_in_equal_ratios(initial: int, dim: int, events: int) -> None:
    dims = dims_over_events(initial, Target(dim=dim), events)
    assert dims[-1] == dim
    for event, (before, after) in enumerate(pairwise(dims), start=1):
        exact = initial * (dim / initial) ** (event / events)
        assert abs(after - exact) <= 0.5 or (after == before and exact > 0.94 * before)


@pytest.mark.parametrize("target", [Target(dim=1), Target(tolerance=0.999), Target(dim=1, tolerance=0.999)])
@pytest.mark.parametrize("initial", [1, 2, 3, 16])
def test_never_below_one(initial: int, target: Target) -> None:
    assert dims_over_events(initial, target, 6)[-1] == 1


@pytest.mark.parametrize(
    ("dim", "rank", "kept"), [(100, 96, 100), (100, 95, 95), (20, 19, 19), (19, 18, 18), (18, 18, 18)]
)
def test_a_layer_is_cut_only_if_it_shrinks_by_five_percent(dim: int, rank: int, kept: int) -> None:
    assert SMALLEST_GAIN == 0.05
    chosen, reason = choose_rank([1.0] * dim, Target(tolerance=1 - (rank - 0.5) / dim), dim, 1, 1)
    assert chosen == kept
    assert reason.startswith("kept") == (chosen == dim)


def test_the_gate_measures_the_present_dimension_and_the_ratio_the_initial_one() -> None:
    flat = [1.0] * 40
    assert choose_rank(flat, Target(dim=25), 100, 1, 2)[0] == 40  # half of the way from 100 to 25 is 50
    assert choose_rank(flat, Target(dim=25), 100, 2, 2)[0] == 25


def test_of_tolerance_and_dim_the_smaller_rank_wins_and_is_named() -> None:
    sigma = [0.5**i for i in range(20)]
    by_tolerance, by_dim = Target(tolerance=0.1, dim=10), Target(tolerance=1e-4, dim=10)
    assert choose_rank(sigma, by_tolerance, 20, 1, 1) == (4, "tolerance 0.1")
    rank, reason = choose_rank(sigma, by_dim, 20, 1, 1)
    assert rank == 10
    assert "dim 10" in reason


@pytest.mark.parametrize(
    "arguments",
    [{}, {"tolerance": 0}, {"tolerance": 1}, {"dim": 0}, {"dim": 4, "rank": 4}, {"dim": 4, "fraction": 0.5}],
)
def test_targets_without_a_meaning_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Target(**arguments)


def test_each_layer_can_have_a_dim_of_its_own() -> None:
    spectra, target = random_spectra(0, layers=3), Target(dim=(1, 2, 3))
    assert [rank for rank, _ in choose_ranks(spectra, target, 1, 1)] == [1, 2, 3]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.77])
def test_a_fraction_is_of_each_layers_own_states(fraction: float) -> None:
    spectra = [Spectrum(tuple([1.0] * dim), dim, 1) for dim in (10, 64, 3)]
    ranks = [rank for rank, _ in choose_ranks(spectra, Target(fraction=fraction), 1, 1)]
    assert ranks == [max(1, round(fraction * dim)) for dim in (10, 64, 3)]


def random_spectra(seed: int, layers: int = 5) -> list[Spectrum]:
    """Of unequal scales, lengths and widths."""
    generator = torch.Generator().manual_seed(seed)
    spectra = []
    for _ in range(layers):
        dim = int(torch.randint(4, 40, (), generator=generator))
        decay = float(torch.rand((), generator=generator))
        scale = float(10 ** (4 * torch.rand((), generator=generator)))
        channels = int(torch.randint(1, 30, (), generator=generator))
        spectra.append(Spectrum(tuple(scale * math.exp(-decay * i) for i in range(dim)), dim, channels))
    return spectra


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_of_states_is_met_exactly_and_spent_where_it_counts(seed: int) -> None:
    spectra = random_spectra(seed)
    for states in (5, 17, sum(s.dim for s in spectra) // 2):
        target = Target(budget={"states": states}, allocation="global")
        ranks = [rank for rank, _ in choose_ranks(spectra, target, 1, 1)]
        assert sum(ranks) == states
        assert min(ranks) >= 1
        # No state that was cut has a larger share of its layer's mass than one that was kept for that share.
        kept = [s.sigma[rank - 1] / sum(s.sigma) for s, rank in zip(spectra, ranks, strict=True) if rank > 1]
        cut = [s.sigma[rank] / sum(s.sigma) for s, rank in zip(spectra, ranks, strict=True) if rank < s.dim]
        assert min(kept, default=math.inf) >= max(cut)


@pytest.mark.parametrize("seed", range(6))
def test_with_a_budget_of_its_layers_all_keep_the_same_share(seed: int) -> None:
    """The oracle is the smallest tolerance that fits, for each layer on its own."""
    spectra = random_spectra(seed)
    for states in (5, 17, sum(s.dim for s in spectra) // 2):
        ranks = [rank for rank, _ in choose_ranks(spectra, Target(budget={"states": states}), 1, 1)]
        assert sum(ranks) == states
        fitting = [1] * len(spectra)
        for tolerance in sorted(1 - sum(s.sigma[:rank]) / sum(s.sigma) for s in spectra for rank in range(1, s.dim)):
            found = [rank_within_tolerance(s.sigma, tolerance) for s in spectra]
            if sum(found) <= states:
                fitting = found
                break
        # What is left of the budget is not enough for all layers' next state.
        assert all(more >= rank for more, rank in zip(ranks, fitting, strict=True))
        assert sum(ranks) - sum(fitting) < len(spectra)


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_of_cost_is_kept_to_within_one_state(seed: int) -> None:
    spectra = random_spectra(seed)
    whole = sum(s.dim * s.channels for s in spectra)
    for share, allocation in itertools.product((0.5, 0.8), ("layer", "global")):
        target = Target(budget={"cost": share}, allocation=allocation)
        ranks = [rank for rank, _ in choose_ranks(spectra, target, 1, 1)]
        cost = sum(rank * s.channels for rank, s in zip(ranks, spectra, strict=True))
        assert share * whole - max(s.channels for s in spectra) < cost <= share * whole


def test_a_budget_is_approached_in_equal_ratios() -> None:
    target, dims = Target(budget={"states": 32}, allocation="global"), [64, 64]
    totals = []
    for event in range(1, 5):
        spectra = [Spectrum(tuple(0.9**i for i in range(dim)), 64, 1) for dim in dims]
        dims = [rank for rank, _ in choose_ranks(spectra, target, event, 4)]
        totals.append(sum(dims))
    assert totals == [round(128 * (32 / 128) ** (event / 4)) for event in range(1, 5)]


@pytest.mark.parametrize("seed", range(6))
def test_a_global_tolerance_is_the_mean_share_at_the_fewest_states(seed: int) -> None:
    spectra = random_spectra(seed)
    ranks = [rank for rank, _ in choose_ranks(spectra, Target(tolerance=0.2, allocation="global"), 1, 1)]
    lost = [1 - sum(s.sigma[:rank]) / sum(s.sigma) for s, rank in zip(spectra, ranks, strict=True)]
    assert sum(lost) <= 0.2 * len(spectra) + 1e-12
    alone = [rank for rank, _ in choose_ranks(spectra, Target(tolerance=0.2), 1, 1)]
    gated = [rank == s.dim for rank, s in zip(ranks, spectra, strict=True)]
    assert any(gated) or sum(ranks) <= sum(alone)
    # Fewest: no state that was cut has a larger share of its layer's mass than one that was kept for that share.
    cuts = [(s, rank) for s, rank, whole in zip(spectra, ranks, gated, strict=True) if not whole]
    kept = [s.sigma[rank - 1] / sum(s.sigma) for s, rank in cuts if rank > 1]
    assert min(kept, default=math.inf) >= max(s.sigma[rank] / sum(s.sigma) for s, rank in cuts)


def test_shares_count_not_scales() -> None:
    spectra = random_spectra(1)
    louder = [Spectrum(tuple(100 * sigma for sigma in spectra[0].sigma), spectra[0].dim, 1), *spectra[1:]]
    target = Target(budget={"states": 30}, allocation="global")
    assert [r for r, _ in choose_ranks(louder, target, 1, 1)] == [r for r, _ in choose_ranks(spectra, target, 1, 1)]


def test_ladders_round_up_and_budgets_down() -> None:
    flat = [Spectrum(tuple([1.0] * 64), 64, 1)] * 2
    ladder = (8, 16, 32)
    for tolerance, rank in ((0.8, 16), (0.76, 16), (0.74, 32), (0.4, 64), (0.99, 8)):
        assert choose_ranks(flat, Target(tolerance=tolerance, ladder=ladder), 1, 1)[0][0] == rank
    target = Target(budget={"states": 50}, allocation="global", ladder=ladder)
    assert [rank for rank, _ in choose_ranks(flat, target, 1, 1)] == [16, 16]
    # On the way to a dimension too, and never to more states than there are.
    assert [rank for rank, _ in choose_ranks(flat, Target(dim=8, ladder=ladder), 1, 3)] == [32, 32]
    # What a budget leaves whole, it cuts to no rung.
    twice = Target(budget={"states": 96}, ladder=ladder)
    assert [rank for rank, _ in choose_ranks([Spectrum((1.0,) * 48, 64, 1)] * 2, twice, 1, 1)] == [48, 48]
    uneven = [Spectrum((1.0,) * dim, 64, 1) for dim in (64, 48)]
    alike = Target(budget={"states": 100}, ladder=(16, 32, 64), uniform=True)
    assert [rank for rank, _ in choose_ranks(uneven, alike, 1, 1)] == [32, 32]
    few = [Spectrum(tuple([1.0] * 12), 64, 1)]
    assert choose_ranks(few, Target(tolerance=0.1, ladder=ladder), 1, 1)[0][0] == 12


@pytest.mark.parametrize("tolerance", [0.03, 0.055, 0.5])
@pytest.mark.parametrize("size", [{"dim": 61}, {"budget": {"states": 122}, "allocation": "global"}])
def test_a_size_is_reached_whatever_the_tolerance_says(tolerance: float, size: dict[str, Any]) -> None:
    """The last step may be less than 5 %, and a tolerance that comes to the same rank makes no difference."""
    flat = [Spectrum((1.0,) * 64, 64, 1)] * 2
    ranks = [rank for rank, _ in choose_ranks(flat, Target(tolerance=tolerance, **size), 1, 1)]
    assert sum(ranks) <= 122
    assert max(ranks) <= 61


def test_uniform_is_uniform_where_layers_differ() -> None:
    steep, flat = Spectrum(tuple(0.5**n for n in range(64)), 64, 1), Spectrum((1.0,) * 64, 64, 1)
    for target in (Target(tolerance=0.01, dim=62, uniform=True), Target(dim=62, uniform=True)):
        assert [rank for rank, _ in choose_ranks([steep, flat], target, 1, 1)] == [62, 62]
    narrow = Spectrum((1.0,) * 8, 8, 1)
    assert [rank for rank, _ in choose_ranks([flat, narrow], Target(dim=12, uniform=True), 1, 1)] == [8, 8]


def test_a_share_of_the_cost_is_not_rounded_away() -> None:
    spectra = [Spectrum((1.0,) * 25, 25, 1)] * 4
    target = Target(budget={"cost": 0.57}, allocation="global")
    assert sum(rank for rank, _ in choose_ranks(spectra, target, 1, 1)) == 57


@pytest.mark.parametrize("size", [{"dim": 8}, {"budget": {"states": 64}, "allocation": "global"}])
def test_uniform_waits_for_a_layer_that_carries_nothing(size: dict[str, Any]) -> None:
    silent, flat = (Spectrum((value,) * 64, initial_dim=64, channels=1) for value in (0.0, 1.0))
    chosen = choose_ranks([silent, flat], Target(uniform=True, **size), 1, 1)
    assert [rank for rank, _ in chosen] == [64, 64]
    assert all("carries" in reason for _, reason in chosen)


def test_uniform_gives_all_layers_the_largest_rank_but_keeps_to_a_budget() -> None:
    spectra = [Spectrum(tuple(decay**i for i in range(32)), 32, 1) for decay in (0.5, 0.8, 0.9)]
    alone = [rank for rank, _ in choose_ranks(spectra, Target(tolerance=0.05), 1, 1)]
    assert len(set(alone)) == 3
    same = [rank for rank, _ in choose_ranks(spectra, Target(tolerance=0.05, uniform=True), 1, 1)]
    assert same == [max(alone)] * 3
    target = Target(budget={"states": 31}, allocation="global", uniform=True)
    assert [rank for rank, _ in choose_ranks(spectra, target, 1, 1)] == [10] * 3


@pytest.mark.parametrize(
    ("size", "rank"),
    [
        ({"dim": 16}, 16),
        ({"fraction": 0.25}, 16),
        ({"budget": {"states": 48}}, 16),
        ({"budget": {"cost": 0.25}}, 16),
        ({"budget": {"states": 96}, "ladder": (8, 32)}, 32),
        ({"dim": 16, "ladder": (16, 32)}, 16),
    ],
)
@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_uniform_reaches_a_size_whatever_layers_would_get_by_themselves(
    size: dict[str, Any], rank: int, allocation: str
) -> None:
    spectra = [Spectrum(tuple(decay**i for i in range(64)), 64, 1) for decay in (0.5, 1.0, 0.8)]
    target = Target(allocation=allocation, uniform=True, **size)
    assert [rank for rank, _ in choose_ranks(spectra, target, 1, 1)] == [rank] * 3


@pytest.mark.parametrize(
    "target",
    [
        Target(tolerance=0.5),
        Target(dim=2),
        Target(fraction=0.1),
        Target(budget={"states": 12}, allocation="global"),
        Target(tolerance=0.5, allocation="global"),
    ],
)
def test_a_layer_that_carries_nothing_is_left_alone(target: Target) -> None:
    silent, loud = Spectrum((0.0,) * 8, 8, 1), Spectrum(tuple(0.5**i for i in range(8)), 8, 1)
    (kept, reason), (rank, _) = choose_ranks([silent, loud], target, 1, 1)
    assert (kept, reason) == (8, "kept: no state carries anything yet")
    assert rank < 8


@pytest.mark.parametrize("total", [100, 997, 20_000])
@pytest.mark.parametrize("events", [1, 3, 4, 7])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.1), (0.0, 1.0), (0.25, 0.75), (0.9, 1.0)])
def test_probes_are_equidistant_and_end_with_the_window(total: int, events: int, start: float, end: float) -> None:
    steps = Window(events=events, start=start, end=end).probe_steps(total)
    width = (end - start) * total / events
    assert len(steps) == events
    assert steps[0] >= 1
    assert steps[-1] == round(end * total) <= total
    for before, after in pairwise((start * total, *steps)):
        assert abs(after - before - width) <= 1
        assert after > before


def test_default_window_is_four_probes_in_the_first_tenth() -> None:
    assert Window().probe_steps(1000) == (25, 50, 75, 100)


@pytest.mark.parametrize(
    "arguments", [{"events": 0}, {"start": 0.5, "end": 0.5}, {"start": 0.5}, {"end": 1.1}, {"start": -0.1}]
)
def test_windows_that_do_not_open_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Window(**arguments)
