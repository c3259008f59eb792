"""Whatever process is killed at whatever point, the run ends as if nothing had happened."""

from __future__ import annotations

import functools
import itertools
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config_reading import parse_config
from tests.chaos.conftest import Told
from tests.chaos.harness import POINTS, Strike, actors_alive, disturbed, finished, shared_cluster
from tests.conftest import small_run as small_run_fixture
from tests.runs import (
    assert_ended_like,
    assert_same_state,
    line_with,
    losses,
    saved,
    start,
    train,
    wait_until,
    wait_while_running,
)
from tests.s3 import Server

pytestmark = pytest.mark.cluster
VICTIMS = ("worker", "other", "coordinator", "controller", "driver")
EACH_ONCE = {
    "before the first checkpoint": "driver",
    "while statistics are gathered": "coordinator",
    "in the middle of the reshape": "worker",
    "right after the reshape": "controller",
    "before a checkpoint is complete": "other",
}


def runs() -> Iterator[Any]:
    """Who is killed at which points of a run, one after the other."""
    yield pytest.param(2, EACH_ONCE, id="ZeRO-2, each of them once")
    for stage, victim in itertools.product((0, 1, 2, 3), VICTIMS):
        everywhere = dict.fromkeys(POINTS, victim)
        yield pytest.param(stage, everywhere, marks=pytest.mark.long, id=f"ZeRO-{stage}, {victim}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, local_ray: None) -> Callable[[int], Path]:
    """The folder of a run with a ZeRO stage to which nothing happens."""

    @functools.cache
    def run(stage: int) -> Path:
        raw = small_run_fixture.__wrapped__(tmp_path_factory.mktemp("undisturbed"), corpus)
        raw["cluster"]["zero_stage"] = stage
        config = parse_config(raw)
        train(config)
        return config.storage / config.name

    return run


@pytest.fixture
def tracked(tracked_run: dict[str, Any]) -> dict[str, Any]:
    tracked_run["cluster"] |= {"timeout_s": 30, "max_failures": len(POINTS)}
    return tracked_run


@pytest.mark.parametrize(("stage", "victims"), runs())
def test_a_run_survives(
    stage: int, victims: Mapping[str, str], tracked: dict[str, Any], undisturbed: Callable[[int], Path], told: Told
) -> None:
    reference = undisturbed(stage)
    tracked["cluster"]["zero_stage"] = stage
    strikes = [Strike(victim, *POINTS[when]) for when, victim in victims.items()]
    with told(*(f"ZeRO-{stage}, {victim}, {when}" for when, victim in victims.items())) as seconds:
        outcome = disturbed(tracked, strikes, seconds)
        assert outcome.code == 0, outcome.output + outcome.errors
        assert_ended_like(tracked, reference)
        # A kill is noticed within `cluster.timeout_s`; then a group starts, for a driver with a cluster around it.
        assert len(seconds) == len(strikes)
        assert max(seconds) < 30 + outcome.first
        # From the beginning only before there is a checkpoint, and after that from the last: the one of the second cut
        # was complete before that of step 10 was begun.
        assert len(re.findall("started: ", outcome.output)) <= 2
        assert int(re.findall(r"continued after step (\d+)", outcome.output)[-1]) >= 7


@pytest.mark.long
def test_whoever_dies_while_a_checkpoint_goes_to_a_store(
    tracked: dict[str, Any], undisturbed: Callable[[int], Path], s3: Server, told: Told
) -> None:
    reference = undisturbed(2)
    tracked["train"]["checkpoint_every"] = 2
    tracked["checkpoints"]["storage"] = s3.uri.replace("bucket/checkpoints", "bucket/killed")
    # Each at a checkpoint of its own: those who live on may complete it.
    steps = dict(zip(VICTIMS, (2, 4, 6, 8, 10), strict=True))
    strikes = [Strike(victim, "write", f"step-{step:08d}") for victim, step in steps.items()]
    with told(*(f"ZeRO-2, S3, {victim}, while its checkpoint goes there" for victim in steps)) as seconds:
        outcome = disturbed(tracked, strikes, seconds)
        assert outcome.code == 0, outcome.output + outcome.errors
        assert_ended_like(tracked, reference)
        assert len(seconds) == len(strikes)
        assert max(seconds) < 30 + outcome.first


@pytest.mark.long
def test_a_worker_that_hangs_is_lost(tracked: dict[str, Any], undisturbed: Callable[[int], Path], told: Told) -> None:
    """It answers nobody, but its connections stay open: only `cluster.timeout_s` tells."""
    point = "once the plan is agreed"
    killed: list[float] = []
    untracked = tracked | {"name": "killed", "tracking": {"mlflow": False}}
    with told(f"ZeRO-2, other hangs, {point}") as seconds:
        disturbed(untracked, [Strike("other", *POINTS[point])], killed)
        outcome = disturbed(tracked, [Strike("other", *POINTS[point], signal.SIGSTOP)], seconds)
        assert outcome.code == 0, outcome.output + outcome.errors
        assert_ended_like(tracked, undisturbed(2))
        # A kill is noticed at once; both then start a group.
        assert seconds[0] < 30 + 2 * killed[0]


@pytest.mark.long
def test_a_cut_that_hurts_is_taken_back_whoever_dies_meanwhile(small_run: dict[str, Any], told: Told) -> None:
    """As `test_a_cut_that_hurts_is_taken_back`: the run goes on as if it had never been cut, to the last bit."""
    small_run |= {"data": {"source": "digits"}, "model": {"kind": "lru", "n_layers": 2, "d_model": 16, "d_state": 16}}
    small_run["train"] |= {"steps": 110, "batch_size": 40, "eval_every": 103, "checkpoint_every": 90}
    small_run["cluster"] |= {"timeout_s": 30, "max_failures": 6}
    uncut = finished(small_run | {"name": "uncut", "truncation": None})
    hurts = {"target": {"dim": 1}, "steps": [100], "score": "smallest", "guard": {"tolerance": 0, "patience": 1}}
    complete = "checkpoints/step-00000100/manifest.json"  # of the cut model, and later of the uncut one
    strikes = {
        "while the state before the cut is written": Strike("worker", "write", "uncut-00000100"),
        "between the cut and its verdict": Strike("other", "step", 102, once=complete),
        "after it was taken back": Strike("coordinator", "step", 105),
    }
    with told(*(f"ZeRO-2, guarded, {strike.victim}, {when}" for when, strike in strikes.items())) as seconds:
        outcome = disturbed(small_run | {"truncation": hurts}, strikes.values(), seconds)
        assert outcome.code == 0, outcome.output + outcome.errors
        assert len(seconds) == len(strikes)
        assert max(seconds) < 30 + outcome.first
        assert "continued after step 100" in outcome.output
        assert "rolled back to step 100" in outcome.output
        folder = uncut.with_name("small")
        (cut,) = json.loads((folder / "summary.json").read_text())["truncations"]
        assert (cut["step"], cut["rolled_back"]) == (100, True)
        assert not list((folder / "checkpoints").glob("uncut*"))
        assert losses(folder) == losses(uncut)
        assert_same_state(saved(folder, 110), saved(uncut, 110))


@pytest.mark.long
def test_after_too_many_failures_the_same_command_continues(
    tracked: dict[str, Any], undisturbed: Callable[[int], Path], told: Told
) -> None:
    tracked["cluster"]["max_failures"] = 0
    with told("ZeRO-2, worker once too often; the command is given again"):
        outcome = disturbed(tracked, [Strike("worker", *POINTS["once the plan is agreed"])], [])
        assert outcome.code == 1
        (sentence,) = outcome.errors.splitlines()
        assert sentence.startswith("rayduce: training failed after step 7: ")
        finished(tracked)
        assert_ended_like(tracked, undisturbed(2))


@pytest.mark.long
def test_a_killed_driver_leaves_nothing_on_a_shared_cluster(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the head would make a token that its drivers have to be told
    small_run["train"]["steps"] = 100_000
    with told("ZeRO-2, driver on a shared cluster"), shared_cluster() as address:
        driver = start(small_run, RAY_ADDRESS=address)
        folder = Path(small_run["storage"]) / "small"
        wait_while_running(driver, lambda: len(list(folder.glob("plans/*.json"))) == 2, "two plans")
        driver.kill()
        driver.communicate()
        wait_until(lambda: actors_alive(address) == [], "all actors end", within=60)
        again = start(small_run, RAY_ADDRESS=address)
        line_with(again, "continued after step")
        again.send_signal(signal.SIGTERM)
        again.communicate(timeout=120)
        assert again.returncode == 128 + signal.SIGTERM
        wait_until(lambda: actors_alive(address) == [], "all actors end", within=60)
