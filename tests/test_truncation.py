"""From a spectrum to a plan: ranks, balanced truncation and its error bound, and the plan on its way to the workers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compression.gramians import LTISystem, SelectiveMoments
from compression.hankel import balancing_factors, selective_hankel
from compression.ranking import SMALLEST_GAIN, Target, choose_rank, rank_within_tolerance
from compression.schedule import Window
from compression.truncation import (
    StateSelection,
    StateTransform,
    TruncationPlan,
    balanced_truncation,
    keep_everything,
    plan_truncation,
)
from tests.systems import (
    frequency_response,
    impulse_response,
    largest_gain,
    nearly_defective_system,
    padded_system,
    random_system,
)

REPOSITORY = Path(__file__).parent.parent


def reduced(system: LTISystem, cut: StateTransform) -> LTISystem:
    return LTISystem(cut.eigenvalues_R, cut.left_RN @ system.B_NH, system.C_HN @ cut.right_NR)


def truncated(system: LTISystem, rank: int) -> tuple[LTISystem, StateTransform, float]:
    """The reduced system, its transform, and 2 x the sum of the discarded HSVs."""
    factors = balancing_factors(system)
    cut = balanced_truncation(system, factors, rank)
    assert cut is not None
    assert cut.eigenvalues_R.numel() == rank
    return reduced(system, cut), cut, 2 * float(factors.sigma_N[rank:].sum())


def plan_of(*statistics: LTISystem | SelectiveMoments, **target: Any) -> TruncationPlan:
    dims = [part.d_state for part in statistics]
    return plan_truncation(statistics, Target(**target), dims, step=1, attempt=1, event=1, events=1)


def selective_moments(d_state: int = 8, seed: int = 0) -> SelectiveMoments:
    generator = torch.Generator().manual_seed(seed)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    tokens = torch.tensor(1.0, dtype=torch.float64)
    sums = (positive(4, d_state), 0.99 * positive(4, d_state), positive(d_state), positive(d_state))
    return SelectiveMoments(tokens, *sums)


# --- balanced truncation ---

SYSTEMS = {
    "moderate": random_system(12, 2),
    "one input": random_system(20, 1, seed=1, radius=(0.9, 0.999)),
    "many inputs": random_system(40, 6, seed=2, radius=(0.9, 0.999)),
    "at the unit circle": random_system(24, 3, seed=3, radius=(0.999, 0.99999)),
    "real": LTISystem(
        torch.linspace(0.05, 0.97, 10, dtype=torch.float64).to(torch.complex128),
        torch.ones(10, 1, dtype=torch.complex128),
        torch.linspace(1, -2, 10, dtype=torch.float64)[None].to(torch.complex128),
    ),
}


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
@pytest.mark.parametrize("name", SYSTEMS)
def test_error_stays_below_twice_the_discarded_hsvs(name: str, rank: int) -> None:
    system = SYSTEMS[name]
    smaller, _, bound = truncated(system, rank)
    response_FHH = frequency_response(system)
    error = largest_gain(response_FHH - frequency_response(smaller))
    assert error > 0
    # Evaluating the responses in double precision costs some 1e-13 of the largest gain.
    assert error <= bound + 1e-12 * largest_gain(response_FHH)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_error_is_at_least_the_first_discarded_hsv(rank: int) -> None:
    """No system of that rank comes closer (Antoulas 2005, section 8.4), so a smaller error is a wrong spectrum."""
    system = random_system(8, 2, seed=5, radius=(0.3, 0.8))
    smaller, _, _ = truncated(system, rank)
    error = largest_gain(frequency_response(system) - frequency_response(smaller))
    # 2,000 points resolve poles up to 0.8 to better than 0.1 %.
    assert error >= 0.999 * float(balancing_factors(system).sigma_N[rank])


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
@pytest.mark.parametrize("name", SYSTEMS)
def test_projections_are_biorthogonal_and_diagonalise(name: str, rank: int) -> None:
    system = SYSTEMS[name]
    _, cut, _ = truncated(system, rank)
    assert cut.left_RN.shape == (rank, system.d_state)
    assert cut.right_NR.shape == (system.d_state, rank)
    A_RR = cut.left_RN @ (system.eigenvalues_N[:, None] * cut.right_NR)
    # Rounding grows with the ratio of the largest to the last kept HSV, up to 1e7 in the real system.
    eye_RR = torch.eye(rank, dtype=torch.complex128)
    torch.testing.assert_close(cut.left_RN @ cut.right_NR, eye_RR, rtol=0, atol=1e-8)
    torch.testing.assert_close(A_RR, torch.diag(cut.eigenvalues_R), rtol=0, atol=1e-8)
    assert float(cut.eigenvalues_R.abs().max()) < 1


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
@pytest.mark.parametrize("name", SYSTEMS)
def test_reduced_hsvs_are_the_leading_ones(name: str, rank: int) -> None:
    """HSVs differ by at most the Hankel norm of the error, and in discrete time a cut only lowers them."""
    sigma_N = balancing_factors(SYSTEMS[name]).sigma_N
    smaller, _, bound = truncated(SYSTEMS[name], rank)
    slack = 1e-9 * float(sigma_N[0])
    lost_R = sigma_N[:rank] - balancing_factors(smaller).sigma_N
    assert float(lost_R.min()) >= -slack
    assert float(lost_R.max()) <= bound + slack


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["unreachable", "unobservable", "both"])
def test_states_that_carry_nothing_are_cut_exactly(kind: str, seed: int) -> None:
    minimal = random_system(6, 2, seed)
    system = padded_system(minimal, kind, seed)
    for target in ({"dim": 6}, {"tolerance": 1e-6}):
        (layer,) = plan_of(system, **target).layers
        assert isinstance(layer.reduction, StateTransform)
        assert layer.dim_after == 6
        response_KHH = impulse_response(reduced(system, layer.reduction), 200)
        torch.testing.assert_close(response_KHH, impulse_response(minimal, 200), rtol=0, atol=1e-9)
        assert layer.mass_kept == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("width", [1, 3])
def test_a_state_that_repeats_another_is_cut_exactly(width: int) -> None:
    system = random_system(6, width, seed=4)
    for part in (system.eigenvalues_N, system.B_NH):
        part[1] = part[0]
    smaller, _, _ = truncated(system, 5)
    torch.testing.assert_close(impulse_response(smaller, 200), impulse_response(system, 200), rtol=0, atol=1e-9)


def test_a_nearly_defective_reduction_keeps_one_state_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compression.truncation.LARGEST_CONDITION", 1e3)
    (layer,) = plan_of(nearly_defective_system(), dim=2).layers
    assert layer.dim_after == 3
    assert "rank 2 is not safe to diagonalise, 3 is" in layer.reason
    assert layer.error_bound == pytest.approx(2 * layer.spectrum[3])
    monkeypatch.setattr("compression.truncation.LARGEST_CONDITION", 1)
    (layer,) = plan_of(nearly_defective_system(), dim=2).layers
    assert (layer.dim_after, layer.reduction, layer.error_bound) == (4, None, 0)


@pytest.mark.parametrize("part", ["B_NH", "C_HN"])
def test_a_layer_that_carries_nothing_yet_is_left_alone(part: str) -> None:
    system = random_system(8, 2)
    silent = replace(system, **{part: torch.zeros_like(getattr(system, part))})
    (layer,) = plan_of(silent, dim=4).layers
    assert (layer.dim_after, layer.reason) == (8, "kept: no state carries anything yet")


# --- plans ---


def test_an_lti_plan_states_what_it_costs() -> None:
    system = random_system(12, 2)
    sigma = balancing_factors(system).sigma_N.tolist()
    (layer,) = plan_of(system, dim=5).layers
    assert (layer.layer, layer.dim_before, layer.dim_after) == (0, 12, 5)
    assert list(layer.spectrum) == sigma
    assert layer.mass_kept == pytest.approx(sum(sigma[:5]) / sum(sigma))
    assert layer.error_bound == pytest.approx(2 * sum(sigma[5:]))
    assert "dim 5" in layer.reason


def test_a_selective_plan_keeps_the_largest_in_state_order() -> None:
    moments = selective_moments()
    sigma_N = selective_hankel(moments)
    (layer,) = plan_of(moments, dim=3).layers
    assert isinstance(layer.reduction, StateSelection)
    kept = layer.reduction.kept
    assert list(kept) == sorted(set(kept))
    dropped = sorted(set(range(8)) - set(kept))
    assert float(sigma_N[list(kept)].min()) >= float(sigma_N[dropped].max())
    assert layer.dim_after == len(kept) == 3
    assert list(layer.spectrum) == sorted(sigma_N.tolist(), reverse=True)
    assert layer.mass_kept == pytest.approx(float(sigma_N[list(kept)].sum() / sigma_N.sum()))
    assert layer.error_bound is None


def test_equal_states_are_kept_from_the_front() -> None:
    moments = selective_moments()
    for part in (moments.h2_DN, moments.a2_DN, moments.c2_N):
        part.fill_(0.5)
    (layer,) = plan_of(moments, dim=3).layers
    assert layer.reduction == StateSelection((0, 1, 2))


def test_layers_are_ranked_on_their_own() -> None:
    systems = [padded_system(random_system(6, 2, 1), "both"), random_system(10, 8, 2), random_system(1, 2, 3)]
    plan = plan_of(*systems, tolerance=1e-4)
    assert plan.truncates
    assert plan.dims_before == (10, 10, 1)
    assert plan.dims_after == tuple(plan_of(system, tolerance=1e-4).dims_after[0] for system in systems)
    assert plan.dims_after[0] <= 6
    assert plan.dims_after[2] == 1
    assert [layer.layer for layer in plan.layers] == [0, 1, 2]


def test_statistics_that_cannot_be_ranked_name_their_layer() -> None:
    diverged = selective_moments()
    diverged.h2_DN[0, 0] = math.nan
    unstable = replace(random_system(3, 2), eigenvalues_N=torch.full((3,), 1.01, dtype=torch.complex128))
    for broken, reason in ((diverged, "NaN"), (unstable, "unit circle")):
        with pytest.raises(ValueError, match=rf"layer 1 at step 1: .*{reason}"):
            plan_of(random_system(3, 2), broken, dim=2)


def test_keep_everything_does_not_truncate() -> None:
    plan = keep_everything([16, 3], step=5, attempt=2, event=1, reason="rank 3 did not answer")
    assert not plan.truncates
    assert plan.dims_before == plan.dims_after == (16, 3)
    assert all(layer.reduction is None and layer.mass_kept == 1 for layer in plan.layers)
    assert TruncationPlan.from_json(plan.to_json()) == plan


def example_plan() -> TruncationPlan:
    statistics = (random_system(6, 2), selective_moments(), random_system(1, 1))
    return plan_truncation(statistics, Target(dim=3), [6, 8, 1], step=7, attempt=2, event=1, events=1)


def test_plan_survives_json() -> None:
    plan = example_plan()
    assert [type(layer.reduction) for layer in plan.layers] == [StateTransform, StateSelection, type(None)]
    back = TruncationPlan.from_json(plan.to_json())
    assert back.digest == plan.digest
    for layer, layer_back in zip(plan.layers, back.layers, strict=True):
        assert replace(layer_back, reduction=None) == replace(layer, reduction=None)
        if isinstance(layer.reduction, StateTransform):
            for name, part in vars(layer.reduction).items():
                assert torch.equal(getattr(layer_back.reduction, name), part), name
        else:
            assert layer_back.reduction == layer.reduction


def test_digest_is_the_same_in_another_process() -> None:
    plan = example_plan()
    code = (
        "import sys; from compression.truncation import TruncationPlan; "
        "print(TruncationPlan.from_json(sys.stdin.read()).digest)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=plan.to_json(),
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert result.stdout.split() == [plan.digest]


def change_layer(index: int, **changes: Any) -> Callable[[TruncationPlan], TruncationPlan]:
    def change(plan: TruncationPlan) -> TruncationPlan:
        layers = list(plan.layers)
        layers[index] = replace(layers[index], **changes)
        return replace(plan, layers=tuple(layers))

    return change


def change_transform(part: str) -> Callable[[TruncationPlan], TruncationPlan]:
    """The smallest change that a float64 can hold."""

    def change(plan: TruncationPlan) -> TruncationPlan:
        cut = plan.layers[0].reduction
        assert isinstance(cut, StateTransform)
        tensor = getattr(cut, part).clone(memory_format=torch.contiguous_format)
        flat = torch.view_as_real(tensor).view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(math.inf, dtype=torch.float64))
        return change_layer(0, reduction=replace(cut, **{part: tensor}))(plan)

    return change


CHANGES: dict[str, Callable[[TruncationPlan], TruncationPlan]] = {
    "step": lambda plan: replace(plan, step=8),
    "attempt": lambda plan: replace(plan, attempt=1),
    "event": lambda plan: replace(plan, event=2),
    "layer missing": lambda plan: replace(plan, layers=plan.layers[:-1]),
    "kept": change_layer(1, reduction=StateSelection((0, 1, 2))),
    "nothing kept": change_layer(1, reduction=None),
    "rank": change_layer(1, dim_after=4),
    "spectrum": change_layer(0, spectrum=(1.0,)),
    "reason": change_layer(0, reason="another"),
    "error bound": change_layer(0, error_bound=0.0),
    "left": change_transform("left_RN"),
    "right": change_transform("right_NR"),
    "eigenvalues": change_transform("eigenvalues_R"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_digest_changes_with_the_content(name: str) -> None:
    plan = example_plan()
    assert example_plan().digest == plan.digest
    assert CHANGES[name](plan).digest != plan.digest


@pytest.mark.parametrize("name", CHANGES)
def test_changed_json_is_refused(name: str) -> None:
    plan = example_plan()
    forged = json.loads(CHANGES[name](plan).to_json()) | {"digest": plan.digest}
    with pytest.raises(ValueError, match="does not match its digest"):
        TruncationPlan.from_json(json.dumps(forged))


def test_a_forged_digest_and_another_format_are_refused() -> None:
    content = json.loads(example_plan().to_json())
    with pytest.raises(ValueError, match="does not match its digest"):
        TruncationPlan.from_json(json.dumps(content | {"digest": "0" * 64}))
    with pytest.raises(ValueError, match="format"):
        TruncationPlan.from_json(json.dumps(content | {"format": 99}))


# --- ranks ---


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
        rank = rank_within_tolerance(sigma_N, tolerance)
        assert 1 <= rank <= d_state
        assert math.fsum(sigma_N[:rank].tolist()) >= (1 - tolerance) * total * (1 - 1e-14)
        assert math.fsum(sigma_N[: rank - 1].tolist()) < (1 - tolerance) * total


def test_mass_that_is_exactly_enough_is_enough() -> None:
    sigma_N = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert [rank_within_tolerance(sigma_N, tolerance) for tolerance in (0.5, 0.25, 0.125)] == [1, 2, 3]


def dims_over_events(initial: int, target: Target, events: int) -> list[int]:
    """Dimensions before the first and after each event, for a flat spectrum."""
    dims = [initial]
    for event in range(1, events + 1):
        flat_N = torch.ones(dims[-1], dtype=torch.float64)
        dims.append(choose_rank(flat_N, target, initial, event, events)[0])
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
    flat_N = torch.ones(dim, dtype=torch.float64)
    chosen, reason = choose_rank(flat_N, Target(tolerance=1 - (rank - 0.5) / dim), dim, 1, 1)
    assert chosen == kept
    assert reason.startswith("kept") == (chosen == dim)


def test_the_gate_measures_the_present_dimension_and_the_ratio_the_initial_one() -> None:
    flat_N = torch.ones(40, dtype=torch.float64)
    assert choose_rank(flat_N, Target(dim=25), 100, 1, 2)[0] == 40  # half of the way from 100 to 25 is 50
    assert choose_rank(flat_N, Target(dim=25), 100, 2, 2)[0] == 25


def test_of_tolerance_and_dim_the_smaller_rank_wins_and_is_named() -> None:
    sigma_N = 0.5 ** torch.arange(20, dtype=torch.float64)
    by_tolerance, by_dim = Target(tolerance=0.1, dim=10), Target(tolerance=1e-4, dim=10)
    assert choose_rank(sigma_N, by_tolerance, 20, 1, 1) == (4, "tolerance 0.1")
    rank, reason = choose_rank(sigma_N, by_dim, 20, 1, 1)
    assert rank == 10
    assert "dim 10" in reason


@pytest.mark.parametrize("arguments", [{}, {"tolerance": 0}, {"tolerance": 1}, {"dim": 0}, {"dim": 4, "rank": 4}])
def test_targets_without_a_meaning_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Target(**arguments)


# --- timing ---


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
