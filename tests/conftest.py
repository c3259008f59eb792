from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# As the command does: torch and DeepSpeed look for ninja, which pip put beside the interpreter.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers would give way to whatever else computes here, and starve beside the tests of another file.
os.environ.setdefault("RAY_worker_niceness", "0")
# Any will do for the tests' own S3 server, and Ray's workers know what was there when Ray started.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "any")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "any")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes with as many threads as there are cores wait for each other in every small product.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import ray
import torch
import torch.distributed as dist

from models.scan import backends, extension
from tests.runs import end_crews, end_drivers, track
from tests.s3 import Server

# The files that take longest, first: two processes, which get a file each as they come to it, then end together. Of
# those that start a Ray cluster of their own, no two begin at once: each is more processes than there are cores. Tests
# whose runs fail take their workers along, so the file that has most of them is the last that needs any.
LONGEST = [
    "test_kills.py",
    "test_zero.py",
    "test_continuing.py",  # of the first process too, because a file of one test is not enough to wait for
    "test_triton.py",
    "test_lti_oracles.py",
    "test_sweep.py",
    "test_checkpoints.py",
    "test_comparison.py",
    "test_cuts_in_runs.py",
    "test_generation.py",
    "test_recall.py",
    "test_training.py",
    "test_coordinator.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text: this project's own sources, in one file of several blocks."""
    sources = sorted(Path(__file__).resolve().parents[1].glob("*/*.py"))
    path = tmp_path_factory.mktemp("corpus") / "sources.txt"
    path.write_bytes(b"".join(source.read_bytes() for source in sources) * 2)
    return path


@pytest.fixture
def small_run(tmp_path: Path, corpus: Path) -> dict[str, Any]:
    """A config of seconds: two Mamba layers on real text, cut from 16 states to 4 at steps 3 and 7."""
    return {
        "name": "small",
        "storage": str(tmp_path / "runs"),
        "data_root": str(tmp_path / "data"),
        "data": {"source": "text", "path": str(corpus), "seq_len": 48},
        "model": {"kind": "mamba", "n_layers": 2, "d_model": 16, "d_state": 16},
        "train": {
            "steps": 12,
            "batch_size": 4,
            "lr": 0.01,
            "eval_every": 6,
            "eval_batches": 2,
            "log_every": 2,
            "checkpoint_every": 5,
        },
        "checkpoints": {"keep_last": 100},
        "truncation": {"target": {"dim": 4}, "steps": [3, 7]},
        "cluster": {"workers": 2, "zero_stage": 2, "timeout_s": 60},
        "tracking": {"mlflow": False},
    }


@pytest.fixture(autouse=True)
def _no_driver_outlives_its_test() -> Iterator[None]:
    yield
    end_drivers()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow without a run: making its tables takes seconds, copying them nothing."""
    import mlflow  # takes seconds itself

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracked_run(small_run: dict[str, Any], empty_store: Path) -> dict[str, Any]:
    """`small_run` with MLflow, in a database beside its folder."""
    return track(small_run, empty_store)


CPUS = 6  # of Ray: for two crews of `train` that wait, of two workers and of one, and two workers beside them


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for the tests that start several trainings in this process, with room for `train`'s waiting workers."""
    ray.init("local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    yield
    end_crews()
    ray.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def _join_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.fixture(scope="session")
def alone() -> Iterator[ProcessPoolExecutor]:
    """A process for real engines of one worker, because DeepSpeed keeps to the first process group that it meets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("DS_ACCELERATOR", "cpu")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _join_alone)
        pool.submit(int).result()  # starts the process, which keeps these settings for itself
    with pool:
        yield pool


Pair = Callable[..., list[Any]]


def _join(rank: int, store: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes for real engines of two workers: runs a function of the rank on both, and gives both results."""
    store = tmp_path_factory.mktemp("pair") / "store"
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("DS_ACCELERATOR", "cpu")
        pools = [ProcessPoolExecutor(1, spawn, _join, (rank, str(store))) for rank in range(2)]
        for pool in pools:
            stack.enter_context(pool)

        def both(function: Callable[..., Any], *arguments: Any) -> list[Any]:
            futures = [pool.submit(function, rank, *arguments) for rank, pool in enumerate(pools)]
            return [future.result() for future in futures]

        both(_rank)  # both have joined, and keep these settings
        yield both


def _rank(rank: int) -> int:
    return rank


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of the scans in turn."""
    if request.param == "cpu" and extension.load() is None:
        pytest.skip(f"no C++ kernels here: {extension.why_not()}")
    backends.force(request.param)
    yield request.param
    backends.force("auto")
