"""The coordinator as a real actor: everyone gets one plan, whatever the order, repetition or absence of messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from compression.gramians import SelectiveMoments
from compression.ranking import Target
from compression.truncation import StateSelection, TruncationPlan
from orchestrator.coordinator import Coordinator

pytestmark = pytest.mark.cluster
STEP, WORKERS, DIMS = 5, 2, [8, 8]


def moments(seed: int) -> SelectiveMoments:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return SelectiveMoments(torch.tensor(1.0, dtype=torch.float64), draw(3, 8), draw(3, 8), draw(8), draw(8))


@pytest.fixture
def submit(local_ray: None) -> Callable[..., Any]:
    return submitter(timeout_s=60)


def submitter(timeout_s: float) -> Callable[..., Any]:
    actor = ray.remote(Coordinator).options(num_cpus=0).remote(Target(dim=3), [8, 8], [STEP], timeout_s)
    assert ray.get(actor.begin_attempt.remote(WORKERS)) == 1

    def ask(rank: int, attempt: int = 1, part: SelectiveMoments | None = None) -> Any:
        return actor.decide.remote(attempt, STEP, rank, DIMS, {rank: part or moments(rank)})

    ask.actor = actor  # type: ignore[attr-defined]
    return ask


def test_everyone_gets_the_same_plan_in_any_order(submit: Callable[..., Any]) -> None:
    plans: list[TruncationPlan] = ray.get([submit(1), submit(0)])
    assert plans[0].digest == plans[1].digest
    assert plans[0].dims_after == (3, 3)
    assert all(isinstance(layer.reduction, StateSelection) for layer in plans[0].layers)


def test_a_duplicate_changes_nothing(submit: Callable[..., Any]) -> None:
    first, again = submit(0), submit(0, part=moments(99))
    plans = ray.get([first, again, submit(1), submit(1)])
    expected = ray.get([submit(0), submit(1)])[0]
    assert {plan.digest for plan in plans} == {expected.digest}


def test_a_straggler_of_a_dead_attempt_is_refused(submit: Callable[..., Any]) -> None:
    assert ray.get(submit.actor.begin_attempt.remote(WORKERS)) == 2  # type: ignore[attr-defined]
    with pytest.raises(RayTaskError, match="asks for attempt 1, but attempt 2 is on"):
        ray.get(submit(0))
    plan = ray.get([submit(0, attempt=2), submit(1, attempt=2)])[0]
    assert plan.attempt == 2


def test_a_missing_worker_turns_the_probe_into_keep(local_ray: None) -> None:
    submit = submitter(timeout_s=2)
    plan = ray.get(submit(0), timeout=60)
    assert not plan.truncates
    assert "rank 1 did not submit within 2 s" in plan.layers[0].reason
    late = ray.get(submit(1))  # comes after the decision, and hears the same
    assert late.digest == plan.digest


def test_nan_statistics_name_the_layer(submit: Callable[..., Any]) -> None:
    broken = moments(0)
    broken.h2_DN[0, 0] = float("nan")
    both = [submit(0), submit(1, part=broken)]
    for answer in both:
        with pytest.raises(RayTaskError, match=r"layer 1 at step 5: .*NaN"):
            ray.get(answer)
