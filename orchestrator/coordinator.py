"""The coordinator: an actor that gathers spectra, ranks states over all layers, and gives everyone one plan.

Statistics never reach it: each layer's owner among the workers solves that layer, so that the work falls with the
number of workers, and sends a spectrum. Once ranks are decided the owners send their layers' reductions. Rank 0 gets
them as one plan and passes it on among the workers: projections are tens of MiB, too much to give to each from here.

The driver owns the actor, so it outlives worker restarts and dies with the driver. It is also where rank 0
leaves what the driver shows and records, and hears whether the driver wants an end. Should the actor's process die, Ray
starts it again; it knows of no attempt then, so it refuses everyone until a new group of workers begins one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from compression.gramians import SelectiveMoments, Statistics
from compression.plan import LayerPlan, TruncationPlan
from compression.planning import (
    Decision,
    Occasion,
    Rule,
    Submission,
    assemble,
    decide,
    keep_everything,
    layer_plan,
    solve_layer,
)
from compression.truncation import Solution
from orchestrator.events import Event, Lost, Probed, Reserved, Stopped
from orchestrator.group import Group

logger = logging.getLogger(__name__)

Stage = Literal["spectra", "reductions"]


class UnrankableError(ValueError):
    """The layers of some owner cannot be ranked: their statistics are not finite, or they are not stable."""


class StaleAttemptError(RuntimeError):
    """A worker of a dead attempt asked for something."""


@dataclass(frozen=True)
class Failure:
    """What an owner submits when its layers cannot be ranked."""

    reason: str


@dataclass(frozen=True)
class Sender:
    """Who submits, and for which probe."""

    occasion: Occasion
    rank: int
    dims: tuple[int, ...]


@dataclass
class _Meeting:
    """One stage of one probe: what has come in, and the answer that all wait for."""

    answer: asyncio.Future[Any]
    present: set[int] = field(default_factory=set)
    layers: dict[int, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Coordinator:
    """Fenced by (attempt, step, rank): duplicates change nothing, stragglers of a dead attempt are refused."""

    def __init__(self, rule: Rule | None, timeout_s: float, max_failures: float = 0) -> None:
        self._events: list[Event] = []
        self._awaited = asyncio.Event()  # somebody needs the driver to take the events now
        self._begin_run(rule, timeout_s, max_failures)

    def _begin_run(self, rule: Rule | None, timeout_s: float, max_failures: float) -> None:
        """Know nothing but what probes go by, how often workers may be lost, and what is reserved for them."""
        self._rule = rule
        self._timeout_s = timeout_s
        self._failures_left = max_failures
        self._attempt = 0
        self._workers = 0
        self._meetings: dict[tuple[int, Stage], _Meeting] = {}
        self._previous: TruncationPlan | None = None
        self._events = [event for event in self._events if isinstance(event, Reserved)]
        self._published = len(self._events)  # how many so far; the driver records what it took
        self._taken = self._recorded = 0
        self._stop = False

    async def begin_attempt(self, attempt: int, workers: int, previous: TruncationPlan | None = None) -> None:
        """A new group of workers takes over. Groups with lower numbers are refused from now on.

        `previous` is the plan of the last probe that its state has been through, if any.

        Raises:
            StaleAttemptError: a later group has already begun.
        """
        if attempt < self._attempt:
            raise StaleAttemptError(f"attempt {attempt} begins, but attempt {self._attempt} is on")
        self._attempt = attempt
        self._workers = workers
        self._previous = previous
        self._meetings.clear()

    async def decide(
        self, sender: Sender, layers: Mapping[int, Submission] | Failure
    ) -> list[Decision] | TruncationPlan:
        """Submit the spectra of the layers that a rank owns; what is decided for each layer, once all have.

        Every rank must call this. When one has not after the deadline, everyone present gets a plan that keeps
        all states and names who was missing.

        Raises:
            StaleAttemptError: the attempt has been superseded.
            UnrankableError: some owner has submitted a failure.
        """

        def settle(layers: dict[int, Submission]) -> list[Decision]:
            assert self._rule is not None
            ordered = [layers[layer] for layer in range(len(layers))]
            return decide(ordered, self._rule, sender.occasion, self._previous)

        return await self._meet("spectra", sender, layers, settle)  # type: ignore[no-any-return]

    async def assemble(self, sender: Sender, layers: Mapping[int, LayerPlan]) -> TruncationPlan | None:
        """Submit the reductions of the layers that a rank owns; once all have, the plan of this probe for rank 0.

        Deadline and errors are those of `decide`.
        """

        def settle(layers: dict[int, LayerPlan]) -> TruncationPlan:
            return assemble(layers, sender.occasion)

        plan: TruncationPlan = await self._meet("reductions", sender, layers, settle)
        return plan if sender.rank == 0 else None

    async def _meet(
        self, stage: Stage, sender: Sender, layers: Mapping[int, Any] | Failure, settle: Callable[[dict[int, Any]], Any]
    ) -> Any:
        self._refuse_stale(sender.occasion.attempt)
        step = sender.occasion.step
        meeting = self._meeting(step, stage)
        if sender.rank not in meeting.present and not meeting.answer.done():
            meeting.present.add(sender.rank)
            if isinstance(layers, Failure):
                meeting.failures.append(layers.reason)
            else:
                meeting.layers.update(layers)
            if len(meeting.present) == self._workers:
                try:
                    if meeting.failures:
                        raise UnrankableError("; ".join(sorted(meeting.failures)))
                    meeting.answer.set_result(settle(meeting.layers))
                except Exception as error:  # noqa: BLE001 -- whoever came last, everyone has to hear of it
                    meeting.answer.set_exception(error)
        await asyncio.wait([meeting.answer], timeout=self._timeout_s)
        if not meeting.answer.done():
            missing = ", ".join(map(str, sorted(set(range(self._workers)) - meeting.present)))
            reason = f"kept: rank {missing} did not submit within {self._timeout_s:g} s"
            logger.warning("probe at step %d: %s", step, reason)
            meeting.answer.set_result(keep_everything(sender.dims, sender.occasion, reason))
        # The answer stays for late readers; what it was made of would pile up.
        meeting.layers = {}
        return meeting.answer.result()

    def _meeting(self, step: int, stage: Stage) -> _Meeting:
        """The present one; of earlier probes only the last is kept, for late readers."""
        if (step, stage) not in self._meetings:
            steps = sorted({step} | {other for other, _ in self._meetings})[-2:]
            self._meetings = {key: meeting for key, meeting in self._meetings.items() if key[0] in steps}
            self._meetings[step, stage] = _Meeting(asyncio.get_running_loop().create_future())
        return self._meetings[step, stage]

    async def publish(self, attempt: int, events: Sequence[Event]) -> bool:
        """Leave rank 0's events for the driver; whether the driver wants the run to stop.

        A sender that waits for this keeps the events in order. The plan of a probe is what the next one is compared
        with.

        Raises:
            StaleAttemptError: the attempt has been superseded.
        """
        self._refuse_stale(attempt)
        self._previous = next((event.plan for event in events if isinstance(event, Probed)), self._previous)
        self._events.extend(events)
        self._published += len(events)
        if any(isinstance(event, Stopped) for event in events):
            self._awaited.set()
        return self._stop

    async def reserved(self, group: Any) -> None:
        """What Ray keeps for workers that are about to start: nobody else could give it back for a dead controller."""
        self._events.append(Reserved(group))
        self._published += 1

    async def lost(self, reason: str) -> bool:
        """Ray Train's controller says why the workers have ended; whether it may start them again."""
        self._failures_left -= 1
        if self._failures_left < 0:
            return False
        self._events.append(Lost(reason))
        self._published += 1
        return True

    async def drain(self, stop: bool, patience: float) -> list[Event]:
        """All events since the last call, whose events are recorded by now; with `stop`, the workers are told to end.

        Many at a time, so it waits for `patience` seconds, or until a checkpoint or the run's end depends on it.
        """
        self._stop = stop
        self._recorded = self._taken
        with suppress(TimeoutError):
            await asyncio.wait_for(self._awaited.wait(), patience)
        self._awaited.clear()
        self._taken = self._published
        events, self._events = self._events, []
        return events

    async def recorded(self, attempt: int) -> None:
        """Wait until the driver has recorded all that has been published by now.

        Raises:
            StaleAttemptError: the attempt has been superseded.
        """
        self._refuse_stale(attempt)
        published = self._published
        while self._recorded < published:
            if self._taken < published:
                self._awaited.set()
            await asyncio.sleep(0.02)
            self._refuse_stale(attempt)

    def _refuse_stale(self, attempt: int) -> None:
        if attempt != self._attempt:
            raise StaleAttemptError(f"a worker is of attempt {attempt}, but attempt {self._attempt} is on")


def coordinate(
    coordinator: Any, rule: Rule, occasion: Occasion, statistics: Sequence[Statistics], group: Group
) -> TruncationPlan:
    """One probe as a worker sees it: reduce, solve and submit the layers it owns, get the plan that everyone gets.

    Moments are summed over the workers towards one owner per layer.

    Raises:
        DisagreementError: another worker got another plan.
        UnrankableError: some layer cannot be ranked; on every worker.
    """
    sender = Sender(occasion, group.rank, tuple(part.d_state for part in statistics))
    solutions: dict[int, Solution] = {}
    submission: dict[int, Submission] | Failure = {}
    own: dict[int, Statistics] = {}
    for layer, part in enumerate(statistics):
        owner = layer % group.size
        if isinstance(part, SelectiveMoments):
            part = part.from_vector(group.sum_at(owner, part.to_vector()).cpu())
        if owner == group.rank:
            own[layer] = part
    try:
        solutions = {layer: solve_layer(layer, part, rule, occasion.step) for layer, part in own.items()}
        submission = {layer: Submission.of(solution) for layer, solution in solutions.items()}
    except ValueError as error:
        submission = Failure(str(error))
    plan = ray.get(coordinator.decide.remote(sender, submission))
    if not isinstance(plan, TruncationPlan):
        layers = {layer: layer_plan(layer, solution, plan[layer]) for layer, solution in solutions.items()}
        plan = group.from_first(ray.get(coordinator.assemble.remote(sender, layers)))
    group.prove_equal(f"the plan of step {occasion.step}", plan.digest)
    return plan  # type: ignore[no-any-return]
