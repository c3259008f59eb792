"""The coordinator as a real actor: everyone gets one plan, whatever the order, repetition or absence of messages."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from benchmarks.coordination import axis, lru, mamba, measure, messages, rotated
from compression.gramians import SelectiveMoments, Statistics
from compression.plan import StateSelection, TruncationPlan
from compression.planning import Decision, Occasion, Rule, Submission, layer_plan, plan_truncation, solve_layer
from compression.ranking import Target
from models.heads import SequenceModel
from models.mamba import MambaConfig
from models.mamba2 import Mamba2Config
from models.registry import AnyConfig, ClassificationTask, build_model
from orchestrator.config import ClusterConfig
from orchestrator.coordinator import Coordinator, Failure, Sender, coordinate
from orchestrator.crew import Crew
from orchestrator.group import DisagreementError, Group
from tests.plans import rule, selective_moments
from tests.systems import random_system

pytestmark = pytest.mark.cluster
STEP, WORKERS, DIMS = 5, 2, (8, 8)
RULE = rule(DIMS, Target(dim=3))


class Owner:
    """Rank r owns layer r and asks as a worker does, one stage at a time."""

    def __init__(self, actor: Any, rank: int, attempt: int = 1, seed: int | None = None) -> None:
        self.actor, self.rank = actor, rank
        self.sender = Sender(Occasion(STEP, attempt, 1, 1), rank, DIMS)
        self.solution = solve_layer(rank, selective_moments(seed=rank if seed is None else seed), RULE, STEP)

    def decide(self) -> Any:
        return self.actor.decide.remote(self.sender, {self.rank: Submission.of(self.solution)})

    def assemble(self, decisions: Sequence[Decision]) -> Any:
        own = {self.rank: layer_plan(self.rank, self.solution, decisions[self.rank])}
        return self.actor.assemble.remote(self.sender, own)


class AnyRuns(Coordinator):
    """A coordinator of one run after another, as a crew's is: an actor takes seconds to start."""

    async def begin(self, rule: Rule, timeout_s: float, workers: int) -> None:
        self._begin_run(rule, timeout_s, max_failures=0)
        await self.begin_attempt(1, workers)


Begin = Callable[..., Any]


@pytest.fixture(scope="module")
def coordinator(local_ray: None) -> Begin:
    """Begins a run; its coordinator."""
    actor = ray.remote(AnyRuns).options(num_cpus=0).remote(None, 0)

    def begin(timeout_s: float = 60, rule: Rule = RULE, workers: int = WORKERS) -> Any:
        ray.get(actor.begin.remote(rule, timeout_s, workers))
        return actor

    return begin


def test_the_first_rank_gets_the_plan_of_a_single_process_in_any_order(coordinator: Begin) -> None:
    actor = coordinator()
    owners = [Owner(actor, 1), Owner(actor, 0)]
    decided = ray.get([owner.decide() for owner in owners])
    assert decided[0] == decided[1]
    nothing, plan = ray.get([owner.assemble(decided[0]) for owner in owners])
    alone = plan_truncation([selective_moments(seed=seed) for seed in (0, 1)], RULE, Occasion(STEP, 1, 1, 1))
    assert nothing is None
    assert plan.digest == alone.digest
    assert alone.dims_after == (3, 3)
    assert all(isinstance(layer.reduction, StateSelection) for layer in alone.layers)


def test_a_duplicate_changes_nothing() -> None:
    """Without Ray, which may hand an actor its calls in another order: here it is known who came first."""

    async def probe() -> None:
        actor = Coordinator(RULE, 60)
        await actor.begin_attempt(1, WORKERS)
        sent = [(0, selective_moments(seed=0)), (0, selective_moments(seed=99)), (1, selective_moments(seed=1))]
        solutions = [solve_layer(rank, moments, RULE, STEP) for rank, moments in sent]
        senders = [Sender(Occasion(STEP, 1, 1, 1), rank, DIMS) for rank, _ in sent]
        decided = await asyncio.gather(
            *(
                actor.decide(sender, {sender.rank: Submission.of(solution)})
                for sender, solution in zip(senders, solutions, strict=True)
            )
        )
        assert decided[0] == decided[1] == decided[2]
        plans = await asyncio.gather(
            *(
                actor.assemble(sender, {sender.rank: layer_plan(sender.rank, solution, decided[0][sender.rank])})
                for sender, solution in zip(senders, solutions, strict=True)
            )
        )
        first, again, nothing = plans
        assert nothing is None
        assert first is again
        alone = plan_truncation([moments for _, moments in (sent[0], sent[2])], RULE, Occasion(STEP, 1, 1, 1))
        assert first.digest == alone.digest

    asyncio.run(probe())


def test_a_straggler_of_a_dead_attempt_is_refused(coordinator: Begin) -> None:
    actor = coordinator()
    ray.get(actor.begin_attempt.remote(2, WORKERS))
    for straggler in (Owner(actor, 0).decide(), actor.publish.remote(1, []), actor.begin_attempt.remote(1, WORKERS)):
        with pytest.raises(RayTaskError, match=r"attempt 1.*, but attempt 2 is on"):
            ray.get(straggler)
    owners = [Owner(actor, rank, attempt=2) for rank in range(WORKERS)]
    decided = ray.get([owner.decide() for owner in owners])
    plan = ray.get([owner.assemble(decided[0]) for owner in owners])[0]
    assert plan.attempt == 2


@pytest.mark.parametrize("stage", ["decide", "assemble"])
def test_a_missing_worker_turns_the_probe_into_keep(coordinator: Begin, stage: str) -> None:
    actor = coordinator(timeout_s=2)
    punctual, late = Owner(actor, 1), Owner(actor, 0)
    if stage == "decide":
        ask, ask_late = punctual.decide, late.decide
    else:
        decisions = ray.get([punctual.decide(), late.decide()])[0]
        ask, ask_late = (lambda: punctual.assemble(decisions)), (lambda: late.assemble(decisions))
    told = ray.get(ask(), timeout=60)
    plan = ray.get(ask_late())  # comes after the decision
    assert not plan.truncates
    assert "rank 0 did not submit within 2 s" in plan.layers[0].reason
    assert told == (plan if stage == "decide" else None)


def test_what_one_owner_cannot_rank_everyone_hears_of(coordinator: Begin) -> None:
    actor = coordinator()
    broken = Owner(actor, 1)
    answers = [
        Owner(actor, 0).decide(),
        actor.decide.remote(broken.sender, Failure("layer 1 at step 5: the state statistics hold NaN")),
    ]
    for answer in answers:
        with pytest.raises(RayTaskError, match=r"layer 1 at step 5: .*NaN"):
            ray.get(answer)


def test_what_cannot_be_decided_everyone_hears_of(coordinator: Begin) -> None:
    actor = coordinator()
    submission = Submission.of(Owner(actor, 0).solution)
    answers = [
        actor.decide.remote(Sender(Occasion(STEP, 1, 1, 1), rank, DIMS), {layer: submission})
        for rank, layer in ((0, 0), (1, 7))
    ]
    for answer in answers:
        with pytest.raises(RayTaskError, match="KeyError: 1"):
            ray.get(answer, timeout=30)


def test_answers_do_not_pile_up_and_the_last_one_stays_for_late_readers() -> None:
    """Without Ray: the actor's own class, whose objects can be counted here."""
    answers: list[weakref.ref[TruncationPlan]] = []

    async def probe(actor: Coordinator, step: int) -> None:
        occasion = Occasion(step, 1, step, 20)
        senders = [Sender(occasion, rank, DIMS) for rank in range(WORKERS)]
        decided = await asyncio.gather(
            *(actor.decide(sender, {sender.rank: Submission.of(solutions[sender.rank])}) for sender in senders)
        )
        layers = [{rank: layer_plan(rank, solutions[rank], decided[0][rank])} for rank in range(WORKERS)]
        plan, _ = await asyncio.gather(*(actor.assemble(*pair) for pair in zip(senders, layers, strict=True)))
        assert plan is await actor.assemble(senders[0], layers[0])
        assert plan is not None
        answers.append(weakref.ref(plan))

    async def probes() -> None:
        actor = Coordinator(RULE, 60)
        await actor.begin_attempt(1, WORKERS)
        for step in range(1, 21):
            await probe(actor, step)
        gc.collect()
        assert [answer() is None for answer in answers] == [True] * 18 + [False] * 2

    solutions = [solve_layer(rank, selective_moments(seed=rank), RULE, STEP) for rank in range(WORKERS)]
    asyncio.run(probes())


def test_a_thousand_workers_may_wait_at_once(local_ray: None, tmp_path: Path) -> None:
    crew = Crew(ClusterConfig(workers=1100), tmp_path)  # type: ignore[arg-type]
    waiting = [crew.foreman.next_job.remote(0, 0) for _ in range(1100)]
    ray.get(crew.foreman.dismiss.remote(), timeout=60)
    assert ray.get(waiting, timeout=60) == [(0, None)] * 1100
    crew.close()


@ray.remote(num_cpus=0)
class Worker:
    """A rank of a real gloo group."""

    def join(self, rank: int, size: int, store: str) -> None:
        """A new group, instead of the one before."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        self.group = Group(rank, size, torch.device("cpu"))

    def coordinate(self, actor: Any, statistics: Sequence[Statistics], rule: Any) -> TruncationPlan:
        return coordinate(actor, rule, Occasion(STEP, 1, 1, 1), statistics, self.group)

    def disagreement(self, held: str) -> str | None:
        """What this worker is told of the others, which may hold another plan than `held`."""
        try:
            self.group.prove_equal("the plan", hashlib.sha256(held.encode()).hexdigest())
        except DisagreementError as error:
            return str(error)
        return None


def parts_of(moments: SelectiveMoments, workers: int) -> list[SelectiveMoments]:
    """Statistics that sum to `moments`, of as many workers, with unequal shares of the tokens."""
    shares = torch.arange(1, workers + 1, dtype=torch.float64)
    shares /= shares.sum()
    return [moments.from_vector(moments.to_vector() * share) for share in shares]


MODELS: list[AnyConfig] = [
    MambaConfig(kind="mamba", n_layers=2, d_model=8, d_state=12),
    Mamba2Config(kind="mamba2", n_layers=2, d_model=8, d_state=12, headdim=4),
    Mamba2Config(kind="mamba2", n_layers=2, d_model=8, d_state=12, headdim=4, basis="rotated"),
]


@torch.no_grad()
def seen_by(model: SequenceModel, features_BLI: torch.Tensor) -> list[Statistics]:
    """What a probe gathers of every layer from these sequences."""
    mixers = model.mixers()
    for mixer in mixers:
        mixer.start_statistics()
    model(features_BLI)
    return [mixer.finish_statistics() for mixer in mixers]


Groups = Callable[[int], list[Any]]
SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def group_of(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Groups:
    """All workers of a new group of this size."""
    everyone = [Worker.remote() for _ in range(max(SIZES))]

    def start(size: int) -> list[Any]:
        store = str(tmp_path_factory.mktemp("group") / "store")
        group = everyone[:size]
        ray.get([worker.join.remote(rank, size, store) for rank, worker in enumerate(group)])
        return group

    return start


def nan_at_one_worker() -> list[Statistics]:
    """What each of two workers has seen of a layer."""
    parts = parts_of(selective_moments(seed=1), WORKERS)
    parts[0].hh_NN[2, 3] = math.nan
    return [*parts]


def unstable() -> list[Statistics]:
    system = random_system(8, 2)
    system.eigenvalues_N[3] = 1j
    return [system] * WORKERS


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(nan_at_one_worker(), "the state statistics hold NaN"), (unstable(), "an eigenvalue lies on or outside the unit")],
    ids=["NaN", "unstable"],
)
def test_what_one_worker_sees_break_ends_the_probe_of_all(
    coordinator: Begin, group_of: Groups, broken: list[Statistics], reason: str
) -> None:
    actor = coordinator()
    sound = parts_of(selective_moments(), WORKERS)
    calls = [
        worker.coordinate.remote(actor, [sound[rank], broken[rank]], RULE)
        for rank, worker in enumerate(group_of(WORKERS))
    ]
    for call in calls:
        with pytest.raises(RayTaskError, match=rf"UnrankableError: layer 1 at step {STEP}: {reason}"):
            ray.get(call, timeout=60)


def test_every_worker_hears_of_a_disagreement(group_of: Groups) -> None:
    workers = group_of(WORKERS)
    for held in (("one", "one"), ("one", "another")):
        told = ray.get([worker.disagreement.remote(each) for worker, each in zip(workers, held, strict=True)])
        digests = [hashlib.sha256(each.encode()).hexdigest()[:12] for each in held]
        sentence = f"workers disagree on the plan: rank 0: {digests[0]}, rank 1: {digests[1]}"
        assert told == [None if len(set(held)) == 1 else sentence] * WORKERS


@pytest.mark.parametrize("score", ["hankel", "greedy"])
@pytest.mark.parametrize("workers", SIZES)
def test_any_number_of_workers_makes_the_same_plan(
    coordinator: Begin, group_of: Groups, workers: int, score: str
) -> None:
    """However the sequences are shared out; a linear system is known to every worker."""
    torch.manual_seed(0)
    task, compensate = ClassificationTask(n_features=3, n_classes=4), score == "greedy"
    # What a run with these has: only Mamba-1's states can be eliminated with compensation.
    models = [build_model(config, task, config.state_dims).double() for config in MODELS[: 1 if compensate else None]]
    systems: list[Statistics] = [] if compensate else [random_system(12, 3, seed=1), random_system(10, 2, seed=2)]
    features_BLI = torch.randn(6, 70, 3, dtype=torch.float64)
    shares = {1: (6,), 2: (1, 5), 3: (1, 2, 3)}[workers]
    whole, *parts = (
        [part for model in models for part in seen_by(model, rows)] + systems
        for rows in (features_BLI, *features_BLI.split(shares))
    )
    target = Target(tolerance=0.2, dim=6, allocation="global")
    everything = rule([part.d_state for part in whole], target, score=score, compensate=compensate)
    actor = coordinator(60, everything, workers)
    plans = ray.get(
        [worker.coordinate.remote(actor, parts[rank], everything) for rank, worker in enumerate(group_of(workers))]
    )
    alone = plan_truncation(whole, everything, Occasion(STEP, 1, 1, 1))
    assert len({plan.digest for plan in plans}) == 1
    assert plans[0].dims_after == alone.dims_after
    assert alone.truncates
    for layer, expected in zip(plans[0].layers, alone.layers, strict=True):
        if isinstance(expected.reduction, StateSelection):
            assert isinstance(layer.reduction, StateSelection)
            assert layer.reduction.kept == expected.reduction.kept
            torch.testing.assert_close(layer.reduction.fold_RN, expected.reduction.fold_RN, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.tensor(layer.spectrum), torch.tensor(expected.spectrum), rtol=1e-9, atol=1e-12)


@pytest.mark.long
def test_the_benchmark_of_coordination_runs(local_ray: None) -> None:
    timing = measure(mamba(2, 4, 6), workers=2)
    assert timing.ms > timing.solving_ms > 0


def test_the_benchmark_of_coordination_counts() -> None:
    kinds = (mamba, axis, rotated, lru)
    single, sent = ({kind(n, 4, 6).name: messages(kind(n, 4, 6)) for kind in kinds} for n in (1, 3))
    for name, part in sent.items():
        # Sums of each selective layer, whatever is made of them; an LRU's weights are known.
        assert part.statistics == 3 * single[name].statistics
        assert (part.statistics == 0) == (name == "LRU")
    assert sent["Mamba-2, axis"].reductions < sent["Mamba-2, rotated"].reductions < sent["LRU"].reductions
