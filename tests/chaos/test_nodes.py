"""A machine is lost, or more come: the run goes on with those that there are."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster

from tests.chaos.conftest import AddRow
from tests.chaos.harness import POINTS, Points, began
from tests.runs import HANGS_S, losses, plans, runs_of, saved, start, wait_until

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
    stage: int, tracked_run: dict[str, Any], cluster: Cluster, points: Points, add_row: AddRow
) -> None:
    tracked_run["cluster"] |= {"zero_stage": stage, "max_failures": len(POINTS)}
    driver = start(tracked_run, RAY_ADDRESS=cluster.address)
    attempts, seconds = Path(tracked_run["storage"]) / tracked_run["name"] / "attempt", {}
    for when, (point, step) in POINTS.items():
        points.arm(point, step)
        held, attempt = points.held(driver, point, step), attempts.read_text()
        cluster.add_node(num_cpus=1)
        struck = time.monotonic()
        lose_node_of(cluster, held)  # which takes the worker along, though not at once: it stays held
        wait_until(functools.partial(began, attempts, attempt, driver), f"another group after {point}")
        seconds[when] = time.monotonic() - struck
    output, errors = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 0, output + errors
    folder, reference = attempts.parent, undisturbed(tracked_run, cluster)
    assert losses(folder) == losses(reference)
    state, expected = saved(folder, 12), saved(reference, 12)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    [run] = runs_of(tracked_run)
    assert run.info.status == "FINISHED"
    for when, took in seconds.items():
        add_row(f"ZeRO-{stage}, node, {when}", f"{took:.0f}", "to the last bit")


def test_an_elastic_run_goes_on_with_fewer_workers(small_run: dict[str, Any], cluster: Cluster, points: Points) -> None:
    """The global batch is the same, so the losses are too, but for the order in which floats are added."""
    small_run["cluster"]["workers"] = {"min": 1, "max": 2}
    middle = POINTS["in the middle of the reshape"]
    points.arm(*middle)
    driver = start(small_run, RAY_ADDRESS=cluster.address)
    lose_node_of(cluster, points.held(driver, *middle))
    output, errors = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 0, output + errors
    folder = Path(small_run["storage"]) / small_run["name"]
    cluster.add_node(num_cpus=1)
    reference = undisturbed(small_run, cluster)
    assert [len(list((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))) for step in (5, 12)] == [
        2,
        1,
    ]
    assert [plan.dims_after for plan in plans(folder)] == [plan.dims_after for plan in plans(reference)]
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-3)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, reference)]
    assert summaries[0]["final_dims"] == summaries[1]["final_dims"] == [4, 4]
    assert summaries[0]["val_loss_final"] == pytest.approx(summaries[1]["val_loss_final"], rel=1e-3)


def test_an_elastic_run_takes_a_node_that_comes_later(small_run: dict[str, Any], cluster: Cluster) -> None:
    small_run["cluster"]["workers"] = {"min": 1, "max": 3}
    small_run["train"] |= {"steps": 100_000, "checkpoint_every": 50}
    driver = start(small_run, RAY_ADDRESS=cluster.address)
    folder = Path(small_run["storage"]) / small_run["name"] / "checkpoints"

    def saved_by(workers: int) -> bool:
        return driver.poll() is not None or any(folder.glob(f"*/shard-*-of-{workers:05d}-*"))

    wait_until(lambda: saved_by(2), "two workers have saved")
    cluster.add_node(num_cpus=1)
    wait_until(lambda: saved_by(3), "three workers have saved")
    assert driver.poll() is None, driver.communicate()
    driver.kill()
    driver.wait()
