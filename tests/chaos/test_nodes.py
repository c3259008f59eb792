"""A machine is lost, or more come: the run goes on with those that there are."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.chaos.conftest import Told
from tests.chaos.harness import POINTS, Points, actors_alive, began
from tests.runs import (
    HANGS_S,
    assert_ended_like,
    line_with,
    losses,
    plans,
    start,
    wait_until,
    wait_while_running,
)

pytestmark = [pytest.mark.cluster, pytest.mark.long]


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Points:
    points = Points(tmp_path / "points")
    monkeypatch.setenv("RAYDUCE_HOLD", str(points.folder))
    return points


@pytest.fixture
def cluster(points: Points, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that computes nothing and two nodes of one CPU each; workers get their environment from these."""
    folder = tempfile.mkdtemp(prefix="ray")  # Ray would tell every other driver on this machine of the usual one
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def lose_node_of(cluster: Cluster, process: int) -> None:
    parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    [node] = [node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == parent]
    cluster.remove_node(node, allow_graceful=False)


def undisturbed(raw: dict[str, Any], cluster: Cluster) -> Path:
    raw = raw | {"name": "undisturbed", "tracking": {"mlflow": False}}
    driver = start(raw, RAY_ADDRESS=cluster.address)
    output, errors = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 0, output + errors
    return Path(raw["storage"]) / raw["name"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_node_takes_over_at_every_point(
    stage: int, tracked_run: dict[str, Any], cluster: Cluster, points: Points, told: Told
) -> None:
    tracked_run["cluster"] |= {"zero_stage": stage, "max_failures": len(POINTS), "timeout_s": 30}
    attempts = Path(tracked_run["storage"]) / tracked_run["name"] / "attempt"
    with told(*(f"ZeRO-{stage}, node, {when}" for when in POINTS)) as seconds:
        began_at = time.monotonic()
        driver = start(tracked_run, RAY_ADDRESS=cluster.address)
        wait_while_running(driver, attempts.exists, "the first group")
        first = time.monotonic() - began_at
        for point, place in POINTS.values():
            points.arm(point, place)
            held, attempt = points.held(driver, point, place), attempts.read_text()
            cluster.add_node(num_cpus=1)
            struck = time.monotonic()
            lose_node_of(cluster, held)  # which takes the worker along, though not at once: it stays held
            wait_until(functools.partial(began, attempts, attempt, driver), f"another group after {point}")
            seconds.append(time.monotonic() - struck)
        output, errors = driver.communicate(timeout=HANGS_S)
        assert driver.returncode == 0, output + errors
        assert_ended_like(tracked_run, undisturbed(tracked_run, cluster))
        assert max(seconds) < 30 + first
        wait_until(lambda: actors_alive(cluster.address) == [], "all actors end", within=60)


def test_an_elastic_run_goes_on_with_fewer_workers(
    small_run: dict[str, Any], cluster: Cluster, points: Points, told: Told
) -> None:
    """The global batch is the same, so the losses are too, but for the order in which floats are added."""
    small_run["cluster"]["workers"] = {"min": 1, "max": 2}
    folder = Path(small_run["storage"]) / small_run["name"]
    middle = POINTS["in the middle of the reshape"]
    points.arm(*middle)
    with told("ZeRO-2, node of an elastic run; one worker goes on"):
        driver = start(small_run, RAY_ADDRESS=cluster.address)
        held = points.held(driver, *middle)
        wait_until((folder / "checkpoints" / "step-00000005" / "manifest.json").exists, "the two's checkpoint")
        lose_node_of(cluster, held)
        output, errors = driver.communicate(timeout=HANGS_S)
        assert driver.returncode == 0, output + errors
        cluster.add_node(num_cpus=1)
        reference = undisturbed(small_run, cluster)
        assert (5 in _saved_by(2, small_run), 12 in _saved_by(1, small_run)) == (True, True)
        assert [plan.dims_after for plan in plans(folder)] == [plan.dims_after for plan in plans(reference)]
        assert losses(folder) == pytest.approx(losses(reference), rel=1e-3)
        summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, reference)]
        assert summaries[0]["final_dims"] == summaries[1]["final_dims"] == [4, 4]
        assert summaries[0]["val_loss_final"] == pytest.approx(summaries[1]["val_loss_final"], rel=1e-3)


def test_an_elastic_run_waits_for_its_least_number_of_workers(
    small_run: dict[str, Any], cluster: Cluster, points: Points, told: Told
) -> None:
    small_run["cluster"] |= {"workers": {"min": 2, "max": 3}, "timeout_s": 20}
    point = POINTS["between two probes"]
    points.arm(*point)
    with told("ZeRO-2, node of an elastic run; the least number waits for another"):
        driver = start(small_run, RAY_ADDRESS=cluster.address)
        lose_node_of(cluster, points.held(driver, *point))
        line_with(driver, "needs 2 at once, each with 1 CPUs, and the cluster has 1 CPUs; waiting")
        cluster.add_node(num_cpus=1)
        output, errors = driver.communicate(timeout=HANGS_S)
        assert driver.returncode == 0, output + errors
        assert losses(Path(small_run["storage"]) / small_run["name"]) == losses(undisturbed(small_run, cluster))


def test_an_elastic_run_takes_a_node_that_comes_later(small_run: dict[str, Any], cluster: Cluster, told: Told) -> None:
    """It goes on from a checkpoint as two workers had it, with batches that are as large as theirs."""
    small_run["cluster"]["workers"] = {"min": 1, "max": 3}
    small_run["train"] |= {"steps": 100_000, "checkpoint_every": 50}
    with told("ZeRO-2, none; an elastic run takes a third worker"):
        driver = start(small_run, RAY_ADDRESS=cluster.address)
        wait_while_running(driver, lambda: _saved_by(2, small_run), "two workers have saved")
        cluster.add_node(num_cpus=1)
        wait_while_running(driver, lambda: _saved_by(3, small_run), "three workers have saved")
        first = min(_saved_by(3, small_run))
        _stop(driver)
        reference = small_run | {"name": "two", "cluster": small_run["cluster"] | {"workers": 2}}
        driver = start(reference, RAY_ADDRESS=cluster.address)
        wait_while_running(driver, lambda: first in _saved_by(2, reference), "two workers are as far")
        _stop(driver)
        ours, theirs = (losses(Path(raw["storage"]) / raw["name"]) for raw in (small_run, reference))
        assert max(_saved_by(2, small_run)) == first - 50
        assert [ours[step] for step in range(1, first - 49)] == [theirs[step] for step in range(1, first - 49)]
        assert any(ours[step] != theirs[step] for step in range(first - 49, first + 1)), "these are not of three"
        near = [theirs[step] for step in range(first - 49, first - 39)]
        assert [ours[step] for step in range(first - 49, first - 39)] == pytest.approx(near, rel=1e-3)


def _saved_by(workers: int, raw: dict[str, Any]) -> set[int]:
    """The steps whose checkpoints so many workers have begun."""
    shards = (Path(raw["storage"]) / raw["name"] / "checkpoints").glob(f"*/shard-*-of-{workers:05d}-*")
    return {int(shard.parent.name.removeprefix("step-")) for shard in shards}


def _stop(driver: subprocess.Popen[str]) -> None:
    driver.send_signal(signal.SIGTERM)
    output, errors = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 128 + signal.SIGTERM, output + errors
