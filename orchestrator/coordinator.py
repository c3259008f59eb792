"""The coordinator: an actor that gathers statistics, ranks states over all layers, and gives everyone one plan.

The driver owns the actor, so it outlives worker restarts and dies with the driver. It is also where rank 0
leaves what the driver shows and records.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from compression.gramians import SelectiveMoments, Statistics
from compression.ranking import Target
from compression.truncation import TruncationPlan, keep_everything, plan_truncation
from orchestrator.events import Event
from orchestrator.group import Group

logger = logging.getLogger(__name__)


class StaleAttemptError(RuntimeError):
    """A worker of a dead attempt asked for a plan."""


@dataclass
class _Meeting:
    """One probe's submissions, and the plan that all of them wait for."""

    plan: asyncio.Future[TruncationPlan]
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    settling: asyncio.Task[None] | None = None  # held here, because the event loop alone would let it be collected
    present: set[int] = field(default_factory=set)
    statistics: dict[int, Statistics] = field(default_factory=dict)


class Coordinator:
    """Fenced by (attempt, step, rank): duplicates change nothing, stragglers of a dead attempt are refused."""

    def __init__(
        self, target: Target | None, initial_dims: Sequence[int], probes: Sequence[int], timeout_s: float
    ) -> None:
        self._target = target
        self._initial_dims = list(initial_dims)
        self._probes = list(probes)
        self._timeout_s = timeout_s
        self._attempt = 0
        self._workers = 0
        self._meetings: dict[int, _Meeting] = {}
        self._events: list[Event] = []

    async def begin_attempt(self, workers: int) -> int:
        """A new group of workers takes over; returns its number (from 1). Older groups are refused from now on."""
        self._attempt += 1
        self._workers = workers
        self._meetings.clear()
        return self._attempt

    async def decide(
        self, attempt: int, step: int, rank: int, dims: Sequence[int], statistics: Mapping[int, Statistics]
    ) -> TruncationPlan:
        """Submit the layers that `rank` owns and wait for the plan of this probe.

        Every rank must call this. When one has not after the deadline, everyone present gets a plan that keeps
        all states and names who was missing.

        Raises:
            StaleAttemptError: `attempt` has been superseded.
            ValueError: the statistics cannot be ranked (NaN, unstable).
        """
        if attempt != self._attempt:
            raise StaleAttemptError(f"rank {rank} asks for attempt {attempt}, but attempt {self._attempt} is on")
        assert self._target is not None
        if step not in self._meetings:
            self._meetings[step] = _Meeting(asyncio.get_running_loop().create_future())
        meeting = self._meetings[step]
        if rank not in meeting.present and not meeting.closed.is_set():
            meeting.present.add(rank)
            meeting.statistics.update(statistics)
            if len(meeting.present) == self._workers:
                meeting.closed.set()
                meeting.settling = asyncio.get_running_loop().create_task(self._settle(meeting, attempt, step))
        # The deadline is for those who are awaited, not for the computation.
        try:
            await asyncio.wait_for(meeting.closed.wait(), self._timeout_s)
        except TimeoutError:
            if not meeting.closed.is_set():
                meeting.closed.set()
                missing = ", ".join(map(str, sorted(set(range(self._workers)) - meeting.present)))
                reason = f"kept: rank {missing} did not submit within {self._timeout_s:g} s"
                logger.warning("probe at step %d: %s", step, reason)
                meeting.plan.set_result(keep_everything(dims, step, attempt, self._event(step), reason))
        return await asyncio.shield(meeting.plan)

    async def _settle(self, meeting: _Meeting, attempt: int, step: int) -> None:
        assert self._target is not None
        event = self._event(step)
        statistics = [meeting.statistics[layer] for layer in range(len(self._initial_dims))]
        arguments = (statistics, self._target, self._initial_dims, step, attempt, event, len(self._probes))
        try:
            meeting.plan.set_result(await asyncio.to_thread(plan_truncation, *arguments))
        except Exception as error:  # noqa: BLE001 -- every waiting worker is to hear of it
            meeting.plan.set_exception(error)

    def _event(self, step: int) -> int:
        return self._probes.index(step) + 1

    async def publish(self, events: Sequence[Event]) -> None:
        """Leave events for the driver. A sender that waits for this keeps them in order."""
        self._events.extend(events)

    async def drain(self) -> list[Event]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events


def coordinate(
    coordinator: Any, attempt: int, step: int, statistics: Sequence[Statistics], group: Group
) -> TruncationPlan:
    """One probe as a worker sees it: reduce, submit the layers it owns, get the plan that everyone gets.

    Moments are summed over the workers towards one owner per layer, so that the actor receives one set in all.

    Raises:
        DisagreementError: another worker got another plan.
    """
    own: dict[int, Statistics] = {}
    for layer, part in enumerate(statistics):
        owner = layer % group.size
        if isinstance(part, SelectiveMoments):
            part = part.from_vector(group.sum_at(owner, part.to_vector()).cpu())
        if owner == group.rank:
            own[layer] = part
    dims = [part.d_state for part in statistics]
    plan: TruncationPlan = ray.get(coordinator.decide.remote(attempt, step, group.rank, dims, own))
    group.prove_equal(f"the plan of step {step}", plan.digest)
    return plan
