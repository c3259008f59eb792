"""One command for a run: it starts it, continues it after an interruption, and leaves a finished one alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from compression.plan import StateSelection
from orchestrator import checkpoint
from orchestrator.checkpoint import MANIFEST
from orchestrator.cli import main
from orchestrator.config import RunConfig, Workers
from orchestrator.config_reading import parse_config
from orchestrator.data.sources import TextFiles
from orchestrator.errors import TrainingError, UserError
from orchestrator.mlflow_tracker import MLFLOW_RUN
from orchestrator.storage import checkpoints_of, run_folder
from tests.chaos.harness import Points
from tests.conftest import small_run as small_run_fixture
from tests.runs import (
    HANGS_S,
    line_with,
    losses,
    plans,
    saved,
    start,
    track,
    train,
    wait_while_running,
)

pytestmark = pytest.mark.cluster
Finished = tuple[RunConfig, Path]


def _losses_of_a_step_and_of_its_repetition(raw: dict[str, Any], text: bytes) -> tuple[list[float], bool, bool]:
    from models.registry import LanguageTask
    from orchestrator.data.batches import Batch
    from orchestrator.engine import Engine
    from orchestrator.group import Group

    engine = Engine(parse_config(raw), LanguageTask(256), [16, 16], Group(0, 1, torch.device("cpu")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().reshape(4, -1)
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    engine.step(batch, 1)
    state = engine.state()
    found = [float(engine.step(batch, 2))]
    for step in (2, 3):
        engine.restore([16, 16], state)
        found.append(float(engine.step(batch, step)))
    evaluated = engine.evaluate([batch]) == engine.evaluate([batch])
    first, second = ([part.to_vector() for part in engine.statistics([batch])] for _ in range(2))
    engine.close()
    return found, evaluated, all(map(torch.equal, first, second))


def test_what_is_dropped_follows_from_the_step(small_run: dict[str, Any], alone: ProcessPoolExecutor) -> None:
    small_run["model"]["dropout"] = 0.5
    small_run |= {"cluster": {"zero_stage": 2}, "truncation": None}
    found, evaluated, counted = alone.submit(
        _losses_of_a_step_and_of_its_repetition, small_run, os.urandom(132)
    ).result()
    assert found[0] == found[1] != found[2]
    assert evaluated, "an evaluation drops something"
    assert counted, "a probe drops something"


def varied(raw: dict[str, Any]) -> dict[str, Any]:
    """With what a run that continues could get wrong: it drops something, and has another pace after its first cut."""
    raw["model"]["dropout"] = 0.1
    raw["truncation"] |= {"lr_factor": 0.5, "batch_factor": 2}
    return raw


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, empty_store: Path, local_ray: None) -> Finished:
    raw = small_run_fixture.__wrapped__(tmp_path_factory.mktemp("run"), corpus)
    config = parse_config(track(varied(raw), empty_store))  # copies of the run have the same database
    train(config)
    return config, config.storage / config.name


def interrupted(finished: Finished, storage: Path, after: int) -> tuple[RunConfig, Path]:
    """A copy of the finished run as if its driver had been killed after `after` steps."""
    config, folder = finished
    copy = storage / folder.name
    shutil.copytree(folder, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > after:
            shutil.rmtree(path)
    rows = [line for line in (copy / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= after + 1]
    (copy / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 6, "train_l')
    (copy / "summary.json").unlink()
    return config.model_copy(update={"storage": storage}), copy


def same_end(folder: Path, reference: Path, step: int) -> bool:
    ended, expected = saved(folder, step), saved(reference, step)
    return ended.keys() == expected.keys() and all(torch.equal(ended[key], expected[key]) for key in expected)


def test_continuing_equals_never_having_stopped(finished: Finished, tmp_path: Path) -> None:
    _, reference = finished
    config, folder = interrupted(finished, tmp_path, after=5)
    summary = train(config)
    assert losses(folder) == losses(reference)  # bit by bit, the cut at step 7 included
    assert [plan.dims_after for plan in plans(folder)] == [(8, 8), (4, 4)]
    assert [plan.attempt for plan in plans(folder)] == [1, 2]
    assert same_end(folder, reference, 12)
    original = json.loads((reference / "summary.json").read_text())
    assert [cut["step"] for cut in summary["truncations"]] == [3, 7]
    assert summary["mlflow_run_id"] == original["mlflow_run_id"]


@pytest.mark.parametrize(
    ("workers", "stage"),
    [(1, 3), *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, 2), (2, 0), (2, 3)))],
)
def test_a_run_continues_with_other_workers_and_at_another_stage(
    finished: Finished, tmp_path: Path, workers: int, stage: int
) -> None:
    """Sums in another order differ in their last bits; the states that are kept do not."""
    _, reference = finished
    config, folder = interrupted(finished, tmp_path, after=5)
    change = {"workers": Workers(min=workers, max=workers), "zero_stage": stage}
    train(config.model_copy(update={"cluster": config.cluster.model_copy(update=change)}))
    cut, expected = plans(folder)[-1], plans(reference)[-1]
    assert (cut.step, cut.attempt, cut.dims_after) == (7, 2, expected.dims_after)
    for ours, theirs in zip(cut.layers, expected.layers, strict=True):
        assert isinstance(ours.reduction, StateSelection)
        assert isinstance(theirs.reduction, StateSelection)
        assert ours.reduction.kept == theirs.reduction.kept
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-4)


def test_a_state_that_is_no_number_is_never_saved(finished: Finished, tmp_path: Path) -> None:
    """Though losses and gradients are: a second moment that is infinite holds its parameter where it is."""
    config, folder = interrupted(finished, tmp_path, after=5)
    # A worker that the others of this file do not need: those of a run that fails are started again.
    one = config.cluster.model_copy(update={"workers": Workers(min=1, max=1)})
    path = checkpoint.at(checkpoints_of(folder, None), 5)
    manifest = checkpoint.verify(path)
    shards = []
    for shard in manifest.shards:
        file = Path(path.path, shard.file)
        tensors = load_file(file)
        moment = next(tensor for key, tensor in tensors.items() if key.startswith("exp_avg_sq:"))
        moment.view(-1)[0] = math.inf
        save_file(tensors, file)
        shards.append(shard.model_copy(update={"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))
    Path(path.path, MANIFEST).write_text(manifest.completed(shards).model_dump_json())
    with pytest.raises(
        TrainingError, match=r"a parameter or moment after step 7 is no number; train\.lr may be too high"
    ):
        train(config.model_copy(update={"cluster": one}))
    assert checkpoint.complete_steps(checkpoints_of(folder, None)) == [3, 5]


def test_a_run_without_a_complete_checkpoint_starts_over(finished: Finished, tmp_path: Path) -> None:
    """In the same folder, and whatever of the first start is not trained again is gone."""
    _, reference = finished
    config, folder = interrupted(finished, tmp_path, after=12)
    for path in list((folder / "checkpoints").iterdir()):
        path.rename(path.with_name(path.name + ".partial"))
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('\n{"step": 99, "val_loss": 0.0}\n')
    summary = train(config)
    assert losses(folder) == losses(reference)
    assert {plan.attempt for plan in plans(folder)} == {2}
    assert same_end(folder, reference, 12)
    assert summary["val_loss_final"] == json.loads((reference / "summary.json").read_text())["val_loss_final"]
    assert (folder / MLFLOW_RUN).read_text() == (reference / MLFLOW_RUN).read_text()


def test_a_finished_run_whose_machine_is_gone_gets_its_summary_again(finished: Finished, tmp_path: Path) -> None:
    """From storage that holds the checkpoint of the last step, and nothing else of the run; nothing is trained."""
    config, reference = finished
    shutil.copytree(reference / "checkpoints", tmp_path / "storage" / "small")
    checkpoints = config.checkpoints.model_copy(update={"storage": str(tmp_path / "storage")})
    summary = train(config.model_copy(update={"storage": tmp_path / "runs", "checkpoints": checkpoints}))
    original = json.loads((reference / "summary.json").read_text())
    for key in ("final_dims", "truncations", "val_loss_final"):
        assert summary[key] == original[key]
    folder = tmp_path / "runs" / "small"
    assert losses(folder) == {}
    assert (folder / "report.html").exists()


def test_a_folder_is_taken_away_only_where_nothing_was_started(small_run: dict[str, Any]) -> None:
    config = parse_config(small_run)
    with pytest.raises(UserError, match="too early"), run_folder(config) as folder:
        raise UserError("too early")
    assert not folder.exists()

    def train() -> None:
        with run_folder(config) as folder:
            (folder / "config.yaml").write_text(config.to_yaml())
            raise UserError("after the training")

    with pytest.raises(UserError, match="after the training"):
        train()
    assert (folder / "config.yaml").exists()


def test_a_finished_run_is_not_trained_again(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    config, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "driver.lock"}
    assert train(config) == json.loads((folder / "summary.json").read_text())
    (line,) = capfd.readouterr().out.splitlines()
    assert str(folder / "summary.json") in line
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match=r"seed \(was 0, is 5\); another name= starts a new run"):
        train(config.model_copy(update={"seed": 5}))
    # As where the driver was killed right after the summary.
    for name in ("report.html", "reported"):
        (folder / name).unlink()
    client = MlflowClient(config.tracking.mlflow_uri)
    run_id = json.loads((folder / "summary.json").read_text())["mlflow_run_id"]
    client.update_run(run_id, status="RUNNING")
    shutil.rmtree(client.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    train(config)
    assert (folder / "report.html").exists()
    assert {item.path for item in client.list_artifacts(run_id)} >= {"plans", "figures", "report.html"}
    assert client.get_run(run_id).info.status == "FINISHED"


def test_what_cannot_continue_is_refused_by_name(finished: Finished, tmp_path: Path) -> None:
    config, folder = interrupted(finished, tmp_path, after=5)
    other = config.model_copy(update={"seed": 5, "train": config.train.model_copy(update={"lr": 1.0})})
    with pytest.raises(UserError, match=r"seed \(was 0, is 5\), train\.lr \(was 0\.01, is 1\.0\); another name="):
        train(other)
    checkpoint = folder / "checkpoints" / "step-00000005"
    [shard] = checkpoint.glob("shard-00001-of-00002-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged"):
        train(config)
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 5', '"step": 6', 1))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        train(config)


def test_another_place_without_the_checkpoints_starts_nothing_over(finished: Finished, tmp_path: Path) -> None:
    config, folder = interrupted(finished, tmp_path, after=5)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "driver.lock"}
    elsewhere = config.checkpoints.model_copy(update={"storage": str(tmp_path / "elsewhere")})
    with pytest.raises(
        UserError, match=r"elsewhere has no checkpoint of run .*, whose own are in the run's own folder"
    ):
        train(config.model_copy(update={"checkpoints": elsewhere}))
    assert {path: path.read_bytes() for path in before} == before


def test_continuing_refuses_other_data(finished: Finished, tmp_path: Path) -> None:
    config, _ = interrupted(finished, tmp_path, after=5)
    assert isinstance(config.data, TextFiles)
    text = config.data.path.read_bytes()
    config.data.path.write_bytes(b"another page" + text)  # at the end it might all be held out
    try:
        with pytest.raises(UserError, match="is not what it was trained on"):
            train(config)
    finally:
        config.data.path.write_bytes(text)


def test_a_folder_has_one_driver_at_a_time_until_that_is_killed(small_run: dict[str, Any]) -> None:
    config = parse_config(small_run)
    hold = "import sys, time; from orchestrator.config_reading import *; from orchestrator.storage import *\n"
    hold += "with run_folder(load_config(Path(sys.argv[1]))): print('held', flush=True); time.sleep(600)"
    path = config.storage.parent / "small.yaml"
    path.write_text(yaml.safe_dump(small_run))
    first = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    second = CliRunner().invoke(main, ["train", str(path)])
    assert second.exit_code == 2
    assert f"process {first.pid} on {socket.gethostname()}" in second.stderr
    assert str(config.storage / "small") in second.stderr
    assert second.stderr.count("\n") == 1
    first.kill()
    first.wait()
    with run_folder(config):
        pass


def test_runs_of_one_name_do_not_share_storage_of_checkpoints(small_run: dict[str, Any], tmp_path: Path) -> None:
    """Each would delete what the other saves, though their folders are two."""
    config = parse_config(small_run | {"checkpoints": {"storage": str(tmp_path / "saved")}})
    other = config.model_copy(update={"storage": tmp_path / "elsewhere"})
    with (
        run_folder(config),
        pytest.raises(UserError, match=f"run .*saved/small is being trained by process {os.getpid()}"),
        run_folder(other),
    ):
        pass
    assert not (tmp_path / "elsewhere" / "small").exists()
    with run_folder(other):
        pass


def test_a_signal_ends_the_run_with_a_checkpoint(small_run: dict[str, Any], finished: Finished, tmp_path: Path) -> None:
    """SIGINT to the whole session, as a terminal does, and later SIGTERM; the same command continues each time."""
    _, reference = finished
    varied(small_run)
    folder = Path(small_run["storage"]) / "small"
    points = Points(tmp_path / "points")
    points.arm("step", 4)
    driver = start(small_run, RAYDUCE_HOLD=str(points.folder))
    points.held(driver, "step", 4)
    os.killpg(driver.pid, signal.SIGINT)
    line_with(driver, "stopping: a checkpoint follows")
    time.sleep(1)  # until it has been passed on
    points.let_go("step", 4)
    _, said = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 128 + signal.SIGINT, said
    stopped = max(losses(folder))
    assert f"stopped after step {stopped} of 12; the same command continues" in said
    assert stopped < 9, "the workers hear of it with their next report"
    assert not (folder / "summary.json").exists()
    assert saved(folder, stopped)

    # In a long step, say: Ray's own handler would abort the driver three seconds after SIGTERM.
    points.arm("step", 9)
    driver = start(small_run, RAYDUCE_HOLD=str(points.folder))
    points.held(driver, "step", 9)
    driver.send_signal(signal.SIGTERM)
    time.sleep(5)
    assert driver.poll() is None
    points.let_go("step", 9)
    shown, said = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 128 + signal.SIGTERM, said
    assert f"continued after step {stopped}" in shown
    assert "stopped after step 10 of 12; the same command continues" in said

    assert train(parse_config(small_run))["final_dims"] == [4, 4]
    assert losses(folder) == losses(reference)
    assert same_end(folder, reference, 12)


@pytest.mark.long
def test_training_goes_on_while_a_checkpoint_is_written(small_run: dict[str, Any], tmp_path: Path) -> None:
    """Until the next one is due, which waits for it."""
    folder, write = Path(small_run["storage"]) / "small", ("write", "step-00000005")
    points = Points(tmp_path / "points")
    points.arm(*write)
    driver = start(small_run, RAYDUCE_HOLD=str(points.folder))
    points.held(driver, *write)
    wait_while_running(driver, lambda: 6 in losses(folder), "a step after that of the checkpoint")
    assert 5 not in checkpoint.complete_steps(checkpoints_of(folder, None))
    points.let_go(*write)
    _, said = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 0, said
    assert 5 in checkpoint.complete_steps(checkpoints_of(folder, None))


@pytest.mark.long
def test_a_signal_while_ray_starts_ends_the_run(small_run: dict[str, Any]) -> None:
    driver = start(small_run)
    wait_while_running(driver, (Path(small_run["storage"]) / "small" / "logs" / "ray.log").exists, "Ray's start")
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 128 + signal.SIGTERM, said
    assert "the same command continues" in said
    assert said.count("\n") == 1


@pytest.mark.long
def test_a_second_signal_ends_at_once(small_run: dict[str, Any]) -> None:
    small_run["train"] |= {"steps": 100_000, "log_every": 100_000, "checkpoint_every": 100_000}
    folder = Path(small_run["storage"]) / "small"
    driver = start(small_run)
    wait_while_running(driver, (folder / "checkpoints" / "step-00000007").is_dir, "the second cut")
    assert driver.stdout is not None
    driver.send_signal(signal.SIGINT)
    while "stopping" not in driver.stdout.readline():
        pass
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=120)
    assert driver.returncode == 128 + signal.SIGTERM
    assert "ended at once; the same command continues from the last checkpoint" in said
