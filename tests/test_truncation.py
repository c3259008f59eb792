"""Balanced truncation of LTI layers: its error bound, and what it does to systems that are hard to reduce."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compression.gramians import LTISystem
from compression.hankel import lti_balancing
from compression.plan import StateTransform
from compression.scores import Score
from compression.truncation import BalancedLTI, diagonal_reduction
from tests.plans import plan_of
from tests.systems import (
    frequency_response,
    impulse_response,
    largest_gain,
    nearly_defective_system,
    padded_system,
    random_system,
)


def reduced(system: LTISystem, cut: StateTransform) -> LTISystem:
    return LTISystem(cut.eigenvalues_R, cut.left_RN @ system.B_NH, system.C_HN @ cut.right_NR)


def truncated(system: LTISystem, rank: int) -> tuple[LTISystem, StateTransform, float]:
    """The reduced system, its transform, and 2 x the sum of the discarded HSVs."""
    balancing = lti_balancing(system)
    cut = diagonal_reduction(system, balancing, range(rank))
    assert cut is not None
    assert cut.eigenvalues_R.numel() == rank
    return reduced(system, cut), cut, 2 * float(balancing.sigma_N[rank:].sum())


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


@pytest.mark.parametrize("score", ["smallest", "random"])
def test_ablations_keep_other_balanced_coordinates(score: Score) -> None:
    system, rank = SYSTEMS["moderate"], 5
    balancing = lti_balancing(system)
    drawn = [BalancedLTI(system, score, seed) for seed in (0, 0, 1)]
    kept = [solution.own_N[:rank] for solution in drawn]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2]) == (score == "smallest")
    if score == "smallest":
        assert torch.equal(kept[0], balancing.sigma_N.flip(0)[:rank])
    assert torch.equal(drawn[0].own_N.sort(descending=True).values, balancing.sigma_N)
    assert drawn[0].error_bound(rank) is None

    outcome = drawn[0].reduce(rank)
    assert isinstance(outcome.reduction, StateTransform)
    assert float(outcome.reduction.eigenvalues_R.abs().max()) < 1
    # What is kept are these coordinates and no others, in a basis in which they are diagonal.
    places = [int((balancing.sigma_N == sigma).nonzero()) for sigma in drawn[0].own_N[: outcome.rank]]
    left_RN, _ = balancing.projections(places)
    both = torch.cat([left_RN, outcome.reduction.left_RN])
    assert int(torch.linalg.matrix_rank(both, rtol=1e-8)) == outcome.rank


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
    assert error >= 0.999 * float(lti_balancing(system).sigma_N[rank])


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


@pytest.mark.parametrize("name", SYSTEMS)
def test_all_states_kept_is_the_same_system(name: str) -> None:
    system = SYSTEMS[name]
    same, _, bound = truncated(system, system.d_state)
    assert bound == 0
    torch.testing.assert_close(impulse_response(same, 200), impulse_response(system, 200), rtol=0, atol=1e-11)
    if name != "real":  # its last HSV is 1e-19 of the first: no output tells where that pole is
        distance_NN = (same.eigenvalues_N[:, None] - system.eigenvalues_N).abs()
        for nearest_N in (distance_NN.min(0).values, distance_NN.min(1).values):
            assert float(nearest_N.max()) <= 1e-12


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
@pytest.mark.parametrize("name", SYSTEMS)
def test_reduced_hsvs_are_the_leading_ones(name: str, rank: int) -> None:
    """HSVs differ by at most the Hankel norm of the error, and in discrete time a cut only lowers them."""
    sigma_N = lti_balancing(SYSTEMS[name]).sigma_N
    smaller, _, bound = truncated(SYSTEMS[name], rank)
    slack = 1e-9 * float(sigma_N[0])
    lost_R = sigma_N[:rank] - lti_balancing(smaller).sigma_N
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


def test_no_rank_is_tried_that_would_hardly_be_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    defective = "compression.truncation.diagonal_reduction"
    monkeypatch.setattr(defective, lambda system, balancing, coordinates: tried.append(len(coordinates)))
    system = random_system(40, 40, seed=0)
    outcome = BalancedLTI(system, "hankel", seed=0).reduce(30)
    assert (outcome.rank, outcome.reduction) == (40, None)
    assert tried == list(range(30, 39))  # 38 of 40 is 5 % less


def test_a_reduction_that_rounding_makes_unstable_keeps_more_states() -> None:
    """In exact arithmetic none is; with a pole 3e-16 within the unit circle one in seven would be."""
    fallen_back = 0
    for seed in range(30):
        system = random_system(8, 1, seed, radius=(0.5, 0.999))
        system.eigenvalues_N[0] *= (1 - 3e-16) / system.eigenvalues_N[0].abs()
        if float(system.eigenvalues_N.abs().max()) >= 1:
            continue  # rounded to it
        solution = BalancedLTI(system, "hankel", seed=0)
        for rank in range(1, lti_balancing(system).numerical_rank):
            outcome = solution.reduce(rank)
            if outcome.rank > rank:
                fallen_back += 1
                assert outcome.remark == f"rank {rank} is not safe to diagonalise, {outcome.rank} is"
            if isinstance(outcome.reduction, StateTransform):
                assert float(outcome.reduction.eigenvalues_R.abs().max()) < 1
            else:
                assert outcome.rank == 8
    assert fallen_back > 0


@pytest.mark.parametrize("part", ["B_NH", "C_HN"])
def test_a_layer_that_carries_nothing_yet_is_left_alone(part: str) -> None:
    system = random_system(8, 2)
    silent = replace(system, **{part: torch.zeros_like(getattr(system, part))})
    (layer,) = plan_of(silent, dim=4).layers
    assert (layer.dim_after, layer.reason) == (8, "kept: no state carries anything yet")
