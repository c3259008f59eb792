"""What one probe makes of the last: drift, overlap, and cuts that wait until a ranking has come to rest."""

from __future__ import annotations

import pytest
import torch

from compression.gramians import SelectiveMoments
from compression.hankel import lti_balancing, overlap, spectrum_drift
from compression.plan import StateSelection, TruncationPlan
from compression.planning import Occasion, Rule, plan_truncation
from compression.ranking import Target
from compression.schedule import Stable
from tests.plans import rule, selective_moments
from tests.systems import impulse_response, random_system

STABLE = Stable(probes=6, deadline=0.5, drift=0.05, overlap=0.9, patience=2)


def follow(rules: Rule, probes: list[list[SelectiveMoments]]) -> list[TruncationPlan]:
    """The plans of successive probes; what is cut stays cut."""
    plans: list[TruncationPlan] = []
    for event, statistics in enumerate(probes, start=1):
        occasion = Occasion(10 * event, 1, event, len(probes))
        shrunk = [_after(layer, part, plans) for layer, part in enumerate(statistics)]
        plans.append(plan_truncation(shrunk, rules, occasion, plans[-1] if plans else None))
    return plans


def _after(layer: int, moments: SelectiveMoments, plans: list[TruncationPlan]) -> SelectiveMoments:
    for plan in plans:
        cut = plan.layers[layer].reduction
        if isinstance(cut, StateSelection):
            kept = torch.tensor(cut.kept)
            moments = SelectiveMoments(
                *(
                    part[kept][:, kept] if name in ("hh_NN", "cc_NN") else part[..., kept] if part.ndim else part
                    for name, part in vars(moments).items()
                    if name != "rotates"
                )
            )
    return moments


def test_drift_is_a_share_and_weyl_bounds_it() -> None:
    assert spectrum_drift([3, 2, 1], [3, 2, 1]) == spectrum_drift([3, 2, 1], [30, 20, 10]) == 0
    assert spectrum_drift([1, 0, 0], [1, 1, 0]) == pytest.approx(0.5)
    assert spectrum_drift([1, 0], [0, 0]) == pytest.approx(0.5)  # nothing has no place of its own
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (torch.rand(9, generator=generator).sort(descending=True).values.tolist() for _ in range(2))
        assert 0 <= spectrum_drift(a, b) <= 1
        assert spectrum_drift(a, b) == pytest.approx(spectrum_drift(b, a))
    # A Hankel matrix that moves by E moves each singular value by at most |E|, so a small change is a small drift.
    system, moved = random_system(6, 2), random_system(6, 2)
    moved.B_NH.mul_(1 + 1e-3 * torch.randn(6, 2, generator=generator))
    sigma, sigma_moved = (lti_balancing(part).sigma_N for part in (system, moved))
    blocks = [impulse_response(part, 400) for part in (system, moved)]
    hankels = [torch.cat([torch.cat(list(b[i : i + 200]), 1) for i in range(200)], 0) for b in blocks]
    norm = float(torch.linalg.matrix_norm(hankels[0] - hankels[1], 2))
    assert float((sigma - sigma_moved).abs().max()) <= norm * (1 + 1e-6)
    assert spectrum_drift(sigma.tolist(), sigma_moved.tolist()) <= 6 * norm / float(sigma.sum())


def test_overlap_counts_the_states_in_common() -> None:
    assert overlap([3, 1, 0, 2], [1, 3, 2, 0], 2) == 1
    assert overlap([3, 1, 0, 2], [0, 2, 3, 1], 2) == 0
    assert overlap([3, 1, 0, 2], [0, 3, 2, 1], 2) == 0.5


def test_a_plan_tells_how_far_the_ranking_moved_since_the_last_probe() -> None:
    still, moved = selective_moments(seed=1), selective_moments(seed=2)
    first, same, other = follow(rule([8], Target(dim=6)), [[still], [still], [moved]])
    assert (first.layers[0].drift, first.layers[0].overlap) == (None, None)
    # The first probe cut two states, of which nothing more is known: the others have stayed what they were.
    assert (same.layers[0].drift, same.layers[0].overlap) == (pytest.approx(0, abs=1e-12), 1)
    assert other.layers[0].drift is not None
    assert other.layers[0].drift > 0.01


def test_a_layer_is_cut_when_it_has_been_quiet_for_long_enough() -> None:
    restless = [selective_moments(seed=seed) for seed in range(6)]
    settles = [*restless[:2], *[restless[2]] * 4]
    plans = follow(
        rule([8, 8], Target(dim=3), stable=STABLE), [list(pair) for pair in zip(settles, restless, strict=True)]
    )
    assert [plan.dims_after for plan in plans] == [(8, 8)] * 4 + [(3, 8), (3, 3)]
    assert [plan.layers[0].quiet for plan in plans[:5]] == [0, 0, 0, 1, 2]
    assert "quiet for 2 probes" in plans[4].layers[0].reason
    assert plans[5].layers[0].reason == "kept: cut already"
    assert "the deadline" in plans[5].layers[1].reason
    assert plans[2].layers[0].reason == "kept: 0 of 2 quiet probes"


@pytest.mark.parametrize(
    ("target", "states"),
    [
        (Target(budget={"states": 7}), 7),
        (Target(budget={"states": 7}, allocation="global"), 7),
        (Target(dim=3, uniform=True), 6),
    ],
)
def test_what_is_decided_together_waits_for_all(target: Target, states: int) -> None:
    quiet = [selective_moments(seed=9)] * 6
    settles = [selective_moments(seed=seed) for seed in range(3)] + [selective_moments(seed=3)] * 3
    plans = follow(rule([8, 8], target, stable=STABLE), [list(pair) for pair in zip(quiet, settles, strict=True)])
    assert [plan.truncates for plan in plans] == [False] * 5 + [True]
    assert sum(plans[-1].dims_after) == states


def test_an_lti_layer_is_judged_by_its_spectrum() -> None:
    system = random_system(10, 2)
    first = plan_truncation([system], rule([10], Target(dim=4), stable=STABLE), Occasion(1, 1, 1, 6))
    second = plan_truncation([system], rule([10], Target(dim=4), stable=STABLE), Occasion(2, 1, 2, 6), first)
    third = plan_truncation([system], rule([10], Target(dim=4), stable=STABLE), Occasion(3, 1, 3, 6), second)
    assert [plan.truncates for plan in (first, second, third)] == [False, False, True]
    assert third.layers[0].overlap is None
