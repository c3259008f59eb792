"""Whole runs as the tests start them, and what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load

from compression.plan import TruncationPlan
from orchestrator import checkpoint, launch
from orchestrator.config import ClusterConfig, RunConfig
from orchestrator.crew import Crew
from orchestrator.launch import Lent
from orchestrator.run_folder import read_metrics
from orchestrator.storage import checkpoints_of

if TYPE_CHECKING:  # MLflow takes seconds, and processes that tests start import this file too
    import pytest
    from mlflow.entities import Run

# Guards against hangs and says nothing of speed: what has not ended by then, on however slow a machine, never will.
HANGS_S = 900.0

_crews: dict[tuple[object, ...], Crew] = {}
_drivers: list[subprocess.Popen[str]] = []


def train(config: RunConfig) -> dict[str, Any]:
    """`launch.train` with workers that wait for the next run, because starting them takes most of a small one's time.

    Only where a test has Ray running, `local_ray`, which ends them.
    """
    return launch.train(config, Lent(crew_of(config.cluster)))


def crew_of(cluster: ClusterConfig) -> Crew:
    """The workers that `train` keeps for runs with these settings."""
    key = (cluster.workers, cluster.cpus_per_worker, cluster.timeout_s, cluster.max_failures)
    crew = _crews.pop(key, None)
    if crew is None:
        while len(_crews) > 1:
            _crews.pop(next(iter(_crews))).close()
        folder = Path(tempfile.mkdtemp(prefix="crew"))
        crew = Crew(cluster, folder)
    _crews[key] = crew  # last: it is the one that was used last
    return crew


def lend_crews(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """For a test, have these modules work with the crews of `train` instead of starting and ending their own."""
    for module in modules:
        monkeypatch.setattr(f"{module}.Crew", lambda cluster, folder: nullcontext(crew_of(cluster)))


def end_crews() -> None:
    while _crews:
        _crews.popitem()[1].close()


def start(raw: dict[str, Any], *options: str, command: str = "train", **environment: str) -> subprocess.Popen[str]:
    """`rayduce train`, or another command, as a process of its own session, as a person at a terminal starts it."""
    config = Path(raw["storage"]).parent / f"{raw['name']}.yaml"
    config.write_text(yaml.safe_dump(raw))
    words = [str(Path(sys.executable).with_name("rayduce")), command, str(config), *options]
    pipe = subprocess.PIPE
    env = os.environ | environment
    driver = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=env)
    _drivers.append(driver)
    return driver


def track(raw: dict[str, Any], empty_store: Path) -> dict[str, Any]:
    """A run's config with MLflow, in a copy of this database beside the run's folder."""
    storage = Path(raw["storage"])
    storage.mkdir(parents=True)
    shutil.copy(empty_store, storage)
    return raw | {"tracking": {"mlflow": True, "mlflow_uri": f"sqlite:///{storage / empty_store.name}"}}


def end_drivers() -> None:
    """Those that a test which failed has left behind; whoever is held in them would be for ever."""
    while _drivers:
        driver = _drivers.pop()
        if driver.poll() is None:
            driver.kill()


def alive_in(session: int) -> list[tuple[int, str]]:
    """Process id and title of everything that lives in a session, such as a driver's."""
    # Whole lines: pytest loads readline, which tells our children that these have 80 columns.
    command = ["ps", "-ww", "-o", "pid=,stat=,args=", "-s", str(session)]
    listing = subprocess.run(command, capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    return [(int(pid), title) for pid, state, title in rows if not state.startswith("Z")]


def line_with(driver: subprocess.Popen[str], words: str) -> str:
    """Wait for a line of a driver's output; nobody else must be reading it."""
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(islice((s for s in driver.stdout or () if words in s), 1)))
    reader.daemon = True
    reader.start()
    reader.join(HANGS_S)
    assert found, f"no line with {words!r}"
    return found[0]


def wait_until(condition: Callable[[], object], what: str, within: float = HANGS_S) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within:g} s"
        time.sleep(0.02)


def wait_while_running(driver: subprocess.Popen[str], condition: Callable[[], object], what: str) -> None:
    """Wait for something that a driver does. One that ends meanwhile fails the test with its own words."""
    wait_until(lambda: driver.poll() is not None or condition(), what)
    assert driver.poll() is None, driver.communicate()


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["train_loss"] for row in read_metrics(folder) if "train_loss" in row}


def plans(folder: Path) -> list[TruncationPlan]:
    return [TruncationPlan.from_json(path.read_text()) for path in sorted((folder / "plans").glob("*.json"))]


def runs_of(raw: dict[str, Any]) -> list[Run]:
    """All MLflow runs in a config's database."""
    from mlflow import MlflowClient

    client = MlflowClient(raw["tracking"]["mlflow_uri"])
    experiment = client.get_experiment_by_name("rayduce")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def family(raw: dict[str, Any]) -> tuple[Run, list[Run]]:
    """The one MLflow run without a parent, and all others, whose parent it is."""
    runs = runs_of(raw)
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    return parent, children


# What must not be loaded to use a model; importing any of it fails there.
_LOADED_ALONE = """
import sys
sys.modules |= dict.fromkeys(["ray", "deepspeed", "mlflow"])
from orchestrator.inference import load_model
print(*[load_model(run).state_dims for run in sys.argv[1:]])
"""


def dims_loaded_alone(*runs: str) -> str:
    """The state dimensions of runs' models, loaded where there is neither Ray nor DeepSpeed nor MLflow."""
    command = [sys.executable, "-c", _LOADED_ALONE, *runs]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def saved(folder: Path, step: int, storage: str | None = None) -> dict[str, torch.Tensor]:
    """Every parameter and moment of a run's checkpoint; `storage` is checkpoints.storage."""
    place = checkpoint.at(checkpoints_of(folder, storage), step)
    shards = [place.read(name) for name in place.names() if name.endswith(".safetensors")]
    return {key: tensor for shard in shards if shard is not None for key, tensor in load(shard).items()}


def assert_ended_like(raw: dict[str, Any], undisturbed: Path) -> None:
    """Losses, weights and moments to the last bit, dims, cuts and plans as those of `small_run`, and one MLflow run."""
    folder = Path(raw["storage"]) / raw["name"]
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (folder, undisturbed))
    assert summary["final_dims"] == expected["final_dims"] == [4, 4]
    assert summary["val_loss_final"] == expected["val_loss_final"]
    assert [cut["step"] for cut in summary["truncations"]] == [3, 7]
    assert [plan.dims_after for plan in plans(folder)] == [(8, 8), (4, 4)]
    (run,) = runs_of(raw)
    assert (run.info.status, run.info.run_id) == ("FINISHED", summary["mlflow_run_id"])
    assert losses(folder) == losses(undisturbed)
    storage = raw["checkpoints"].get("storage")
    assert_same_state(saved(folder, raw["train"]["steps"], storage), saved(undisturbed, raw["train"]["steps"]))


def assert_same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """To the last bit."""
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
