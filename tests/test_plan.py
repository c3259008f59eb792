"""The plan: what it says of every layer, and that it arrives at every worker as it was made."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compression.hankel import lti_balancing
from compression.plan import StateSelection, StateTransform, TruncationPlan
from compression.planning import Occasion, keep_everything, plan_truncation
from compression.ranking import Target
from tests.plans import hankel_of, plan_of, rule, selective_moments
from tests.systems import padded_system, random_system

REPOSITORY = Path(__file__).parent.parent


def test_an_lti_plan_states_what_it_costs() -> None:
    system = random_system(12, 2)
    sigma = lti_balancing(system).sigma_N.tolist()
    (layer,) = plan_of(system, dim=5).layers
    assert (layer.layer, layer.dim_before, layer.dim_after) == (0, 12, 5)
    assert list(layer.spectrum) == sigma
    assert layer.mass_kept == pytest.approx(sum(sigma[:5]) / sum(sigma))
    assert layer.error_bound == pytest.approx(2 * sum(sigma[5:]))
    assert "dim 5" in layer.reason


def test_a_selective_plan_keeps_the_largest_in_state_order() -> None:
    moments = selective_moments()
    sigma_N = hankel_of(moments)
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
    for part in (moments.h2_DN, moments.a2_DN, moments.cc_NN):
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
    plan = keep_everything([16, 3], Occasion(5, 2, 1, 4), "rank 3 did not answer")
    assert not plan.truncates
    assert plan.dims_before == plan.dims_after == (16, 3)
    assert all(layer.reduction is None and layer.mass_kept == 1 for layer in plan.layers)
    assert TruncationPlan.from_json(plan.to_json()) == plan


def example_plan() -> TruncationPlan:
    statistics = (random_system(6, 2), selective_moments(), random_system(1, 1))
    return plan_truncation(statistics, rule([6, 8, 1], Target(dim=3)), Occasion(step=7, attempt=2, event=1, events=1))


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
        "import sys; from compression.plan import TruncationPlan; "
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
