"""Whatever process is killed at whatever point, the run ends as if nothing had happened."""

from __future__ import annotations

import functools
import itertools
import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chaos.conftest import AddRow
from tests.chaos.harness import POINTS, Strike, actors_alive, disturbed, shared_cluster
from tests.conftest import small_run as small_run_fixture
from tests.runs import HANGS_S, losses, plans, runs_of, saved, start, wait_until

pytestmark = pytest.mark.cluster
STEPS = 12
VICTIMS = ("worker", "other", "coordinator", "controller", "driver")
MIXED = ("driver", "worker", "controller", "coordinator", "worker", "other", "worker", "other")  # one at each point


def runs() -> Iterator[Any]:
    """Each run goes through a kill at every point, one after the other."""
    yield pytest.param(2, MIXED, id="ZeRO-2, one at each point")
    for stage, victim in itertools.product((0, 1, 2, 3), VICTIMS):
        yield pytest.param(stage, (victim,) * len(POINTS), marks=pytest.mark.long, id=f"ZeRO-{stage}, {victim}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Callable[[int], Path]:
    """The folder of a run with a ZeRO stage to which nothing happens."""

    @functools.cache
    def run(stage: int) -> Path:
        raw = small_run_fixture.__wrapped__(tmp_path_factory.mktemp("undisturbed"), corpus)
        raw["cluster"]["zero_stage"] = stage
        driver = start(raw)
        output, said = driver.communicate(timeout=HANGS_S)
        assert driver.returncode == 0, output + said
        return Path(raw["storage"]) / raw["name"]

    return run


@pytest.fixture
def tracked(tracked_run: dict[str, Any]) -> dict[str, Any]:
    tracked_run["cluster"]["timeout_s"] = 30
    return tracked_run


@pytest.mark.parametrize(("stage", "victims"), runs())
def test_a_run_survives(
    stage: int,
    victims: Sequence[str],
    tracked: dict[str, Any],
    undisturbed: Callable[[int], Path],
    add_row: AddRow,
) -> None:
    reference = undisturbed(stage)
    tracked["cluster"] |= {"zero_stage": stage, "max_failures": len(POINTS)}
    strikes = [Strike(victim, *point) for victim, point in zip(victims, POINTS.values(), strict=True)]
    outcome, end = None, "NO"
    try:
        outcome = disturbed(tracked, *strikes)
        assert outcome.code == 0, outcome.output + outcome.errors
        assert ends_like(tracked, reference)
        end = "to the last bit"
    finally:
        seconds = outcome.seconds if outcome is not None else []
        for victim, when, took in itertools.zip_longest(victims, POINTS, seconds):
            case = f"ZeRO-{stage}, {victim}, {when}"
            add_row(case, "not recovered" if took is None else f"{took:.0f}", end)
    # A kill is noticed within `cluster.timeout_s`; then a group has to start, for a driver with a cluster around it.
    assert max(outcome.seconds) < tracked["cluster"]["timeout_s"] + outcome.first
    # From the beginning only before there is a checkpoint, and after that from the last: the one of the second cut was
    # complete before that of step 10 was begun.
    assert len(re.findall("started: ", outcome.output)) <= 2
    assert int(re.findall(r"continued after step (\d+)", outcome.output)[-1]) >= 7


def ends_like(raw: dict[str, Any], undisturbed: Path) -> bool:
    """Losses, weights and moments, to the last bit; the rest of what the run leaves is asserted."""
    folder = Path(raw["storage"]) / raw["name"]
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (folder, undisturbed))
    ended, reference = saved(folder, STEPS), saved(undisturbed, STEPS)
    assert ended.keys() == reference.keys()
    assert summary["final_dims"] == expected["final_dims"] == [4, 4]
    assert summary["val_loss_final"] == expected["val_loss_final"]
    assert [cut["step"] for cut in summary["truncations"]] == [3, 7]
    assert [plan.dims_after for plan in plans(folder)] == [(8, 8), (4, 4)]
    (run,) = runs_of(raw)
    assert (run.info.status, run.info.run_id) == ("FINISHED", summary["mlflow_run_id"])
    return losses(folder) == losses(undisturbed) and all(torch.equal(ended[key], reference[key]) for key in reference)


@pytest.mark.long
def test_a_worker_that_hangs_is_lost(
    tracked: dict[str, Any], undisturbed: Callable[[int], Path], add_row: AddRow
) -> None:
    """It answers nobody, but its connections stay open: only `cluster.timeout_s` tells, here 30 s."""
    point = "once the plan is agreed"
    killed = disturbed(tracked | {"name": "killed", "tracking": {"mlflow": False}}, Strike("other", *POINTS[point]))
    outcome = disturbed(tracked, Strike("other", *POINTS[point], signal.SIGSTOP))
    assert outcome.code == 0, outcome.output + outcome.errors
    assert ends_like(tracked, undisturbed(2))
    # A kill is noticed at once; both then start a group.
    add_row(f"ZeRO-2, other hangs, {point}", f"{outcome.seconds[0]:.0f}", "to the last bit")
    assert outcome.seconds[0] < 30 + 2 * killed.seconds[0]


@pytest.mark.long
def test_after_too_many_failures_the_same_command_continues(
    tracked: dict[str, Any], undisturbed: Callable[[int], Path]
) -> None:
    tracked["cluster"]["max_failures"] = 0
    outcome = disturbed(tracked, Strike("worker", *POINTS["once the plan is agreed"]))
    assert outcome.code == 1
    (sentence,) = outcome.errors.splitlines()
    assert sentence.startswith("rayduce: training failed after step 7: ")
    again = start(tracked)
    output, errors = again.communicate(timeout=HANGS_S)
    assert again.returncode == 0, output + errors
    assert ends_like(tracked, undisturbed(2))


@pytest.mark.long
def test_a_killed_driver_leaves_nothing_on_a_shared_cluster(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the head would make a token that its drivers have to be told
    small_run["train"]["steps"] = 100_000
    with shared_cluster() as address:
        driver = start(small_run, RAY_ADDRESS=address)
        folder = Path(small_run["storage"]) / "small"
        wait_until(lambda: driver.poll() is not None or len(list(folder.glob("plans/*.json"))) == 2, "two plans")
        assert driver.poll() is None, driver.communicate()
        driver.kill()
        driver.communicate()
        wait_until(lambda: actors_alive(address) == [], "all actors end", within=60)
        again = start(small_run, RAY_ADDRESS=address)
        assert again.stdout is not None
        while "continued after step" not in (line := again.stdout.readline()):
            assert line, again.communicate()
        again.send_signal(signal.SIGTERM)
        again.communicate(timeout=120)
        assert again.returncode == 128 + signal.SIGTERM
        wait_until(lambda: actors_alive(address) == [], "all actors end", within=60)
