"""Which failures end a run at once, how many others it gets over, and what a cluster may be called."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from models.scan.backends import UnavailableError
from orchestrator.checkpoint import CheckpointError
from orchestrator.config_reading import parse_config
from orchestrator.coordinator import Coordinator, StaleAttemptError
from orchestrator.crew import Foreman, release_dead
from orchestrator.errors import UserError
from orchestrator.events import Job, Measured, Reserved, Stopped
from orchestrator.failures import comes_again
from orchestrator.group import DisagreementError
from orchestrator.ray_cluster import cluster_address


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ActorDiedError(), False),
        (RuntimeError("Connection closed by peer"), False),
        (ConnectionResetError(errno.ECONNRESET, "reset"), False),
        (OSError(errno.ENOSPC, "no space"), True),
        (PermissionError(errno.EACCES, "denied"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (NotImplementedError("no such kernel"), True),
        (UnavailableError("mamba_ssm cannot be imported"), True),
        (DisagreementError("workers disagree"), True),
        (CheckpointError("damaged"), True),
        (FloatingPointError("NaN"), True),
        (KeyError("a bug"), True),
    ],
)
def test_only_what_another_machine_may_cure_is_tried_again(error: BaseException, again: bool) -> None:
    assert comes_again(error) is again


def test_failures_are_counted_for_each_run_alone(small_run: dict[str, Any]) -> None:
    config = parse_config(small_run)

    async def story() -> None:
        foreman = Foreman()
        assert await foreman.lost("before it has heard of a run")
        for number in (1, 2):
            await foreman.assign(number, Job(config, config.storage / "small", None, 12), 2)
            assert [await foreman.lost("gone") for _ in range(3)] == [True, True, False]
            await foreman.assign(number, Job(config, config.storage / "small", None, 12), 2)
            assert not await foreman.lost("gone"), "to hear of a job again changes nothing"
        restarted = Foreman()
        await restarted.assign(2, Job(config, config.storage / "small", None, 12), 0)
        assert not await restarted.lost("gone"), "the driver remembers what a process that died has counted"

    asyncio.run(story())


def test_what_is_reserved_between_two_runs_is_told_with_the_next(small_run: dict[str, Any]) -> None:
    config = parse_config(small_run)

    async def story() -> None:
        foreman = Foreman()
        for number in (1, 2):
            await foreman.assign(number, Job(config, config.storage / "small", None, 12), 2)
            await foreman.begin_attempt(number, 1)
            await foreman.publish(number, [Stopped(12)])
            await foreman.reserved(f"after {number}")
        assert await foreman.drain(False, patience=0) == [Reserved("after 1"), Stopped(12), Reserved("after 2")]
        await foreman.drain(False, patience=0)
        await foreman.recorded(2)

    asyncio.run(story())


def test_the_driver_takes_events_at_once_where_somebody_waits_for_that_and_else_many_together() -> None:
    async def story() -> None:
        coordinator = Coordinator(None, 60)
        await coordinator.begin_attempt(1, 1)
        taking = asyncio.create_task(coordinator.drain(False, patience=600))
        first, second = Measured(1, {}), Measured(2, {})
        for event in (first, second):
            await coordinator.publish(1, [event])
            await asyncio.sleep(0.1)
        assert not taking.done()
        saving = asyncio.create_task(coordinator.recorded(1))
        assert await asyncio.wait_for(taking, 60) == [first, second]
        await asyncio.sleep(0.1)
        assert not saving.done(), "the driver has taken them, but may not have recorded them yet"
        taking = asyncio.create_task(coordinator.drain(False, patience=600))
        await asyncio.wait_for(saving, 60)
        await coordinator.publish(1, [Stopped(12)])
        assert Stopped(12) in await asyncio.wait_for(taking, 60)

    asyncio.run(story())


def test_a_reservation_that_is_being_noted_is_left_alone(tmp_path: Path) -> None:
    note = tmp_path / "reserved-by-0123.partial"
    note.write_text("01")
    release_dead(tmp_path, all_are=True)
    assert note.exists()


def test_a_new_process_does_not_let_workers_wait_for_what_it_cannot_know(small_run: dict[str, Any]) -> None:
    """What they told the old one of their job's end may be lost, so they have to tell it again."""
    config = parse_config(small_run)
    job = Job(config, config.storage / "small", None, config.train.steps)

    async def story() -> None:
        foreman = Foreman()
        await foreman.assign(1, job, 3)
        assert await foreman.next_job(0, 0) == (1, job)
        await foreman.begin_attempt(3, 2)
        waiting = asyncio.create_task(foreman.next_job(1, 3))
        await asyncio.sleep(0)
        assert not waiting.done()
        await foreman.assign(2, job, 3)
        assert await waiting == (2, job)
        restarted = Foreman()
        await restarted.assign(1, job, 3)
        with pytest.raises(StaleAttemptError):
            await restarted.next_job(1, 3)
        await restarted.dismiss()
        assert await restarted.next_job(1, 3) == (1, None)

    asyncio.run(story())


def test_a_coordinator_alone_allows_as_many_failures_as_it_is_told() -> None:
    assert [asyncio.run(Coordinator(None, 1, failures).lost("gone")) for failures in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "must be HOST:PORT"),
        ("ray://127.0.0.1:10001", "must be HOST:PORT"),
        ("127.0.0.1", "must be HOST:PORT"),
        ("127.0.0.1:port", "must be HOST:PORT"),
        ("127.0.0.1:1", "cannot be reached"),
    ],
)
def test_an_address_of_something_else_is_refused(address: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS {address} {words}"):
        cluster_address()


@pytest.mark.parametrize(("address", "found"), [("", "local"), ("local", "local"), ("auto", "auto")])
def test_where_ray_looks_by_itself_nothing_is_tried(address: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_address() == found
