"""Whatever process is killed at whatever point, the run ends as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from tests.chaos.harness import disturbed
from tests.conftest import small_run as small_run_fixture
from tests.runs import losses, plans, saved, start

pytestmark = pytest.mark.cluster
STEPS = 12
POINTS = {  # where a worker is held, and what that is: the cuts are at steps 3 and 7, and a checkpoint is due at 5
    "between two probes": ("step", 6),
    "while statistics are gathered": ("statistics", 7),
    "once the plan is agreed": ("plan", 7),
    "right after the reshape": ("reshape", 7),
    "while a checkpoint is written": ("checkpoint", 5),
    "before the first checkpoint": ("step", 2),
}
QUICK = {("worker", "once the plan is agreed"), ("driver", "while a checkpoint is written")}


def cases() -> Iterator[Any]:
    for victim in ("worker", "coordinator", "controller", "driver"):
        for when in POINTS:
            yield pytest.param(victim, when, marks=[] if (victim, when) in QUICK else pytest.mark.chaos)
    # The one that is not held has gone on: into the middle of the reshape.
    yield pytest.param("other", "once the plan is agreed", marks=pytest.mark.chaos)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    raw = small_run_fixture.__wrapped__(tmp_path_factory.mktemp("undisturbed"), corpus)
    driver = start(raw)
    output, said = driver.communicate(timeout=400)
    assert driver.returncode == 0, output + said
    return Path(raw["storage"]) / raw["name"]


@pytest.mark.parametrize(("victim", "when"), cases())
def test_a_run_survives(
    victim: str, when: str, small_run: dict[str, Any], undisturbed: Path, table: list[tuple[str, str, str]]
) -> None:
    storage = Path(small_run["storage"])
    small_run["tracking"] = {"mlflow": True, "mlflow_uri": f"sqlite:///{storage}/mlflow.db"}
    small_run["cluster"]["timeout_s"] = 30
    outcome = disturbed(small_run, victim, *POINTS[when])

    folder = storage / small_run["name"]
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (folder, undisturbed))
    ended, reference = saved(folder, STEPS), saved(undisturbed, STEPS)
    same = losses(folder) == losses(undisturbed) and all(torch.equal(ended[key], reference[key]) for key in reference)
    table.append((f"{victim}, {when}", f"{outcome.seconds:.0f}", "to the last bit" if same else "NO"))
    assert same
    assert ended.keys() == reference.keys()
    assert summary["final_dims"] == expected["final_dims"] == [4, 4]
    assert summary["val_loss_final"] == expected["val_loss_final"]
    assert [cut["step"] for cut in summary["truncations"]] == [3, 7]
    assert [plan.dims_after for plan in plans(folder)] == [(8, 8), (4, 4)]
    client = mlflow.MlflowClient(small_run["tracking"]["mlflow_uri"])
    experiment = client.get_experiment_by_name("rayduce")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_id) == ("FINISHED", summary["mlflow_run_id"])
