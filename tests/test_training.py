"""Whole runs with real Ray Train workers, DeepSpeed, the coordinator, Arrow files and MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml

from compression.plan import StateSelection, TruncationPlan
from models.heads import SequenceModel
from models.registry import LanguageTask, build_model
from orchestrator import checkpoint, launch
from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.data.batches import TrainBatches
from orchestrator.data.sources import prepare
from orchestrator.errors import TrainingError, UserError
from orchestrator.mlflow_tracker import MLFLOW_RUN
from orchestrator.run_folder import read_metrics
from orchestrator.storage import checkpoints_of
from tests.conftest import CPUS
from tests.errors import relative_error
from tests.runs import HANGS_S, losses, plans, saved, train

pytestmark = pytest.mark.cluster
Finished = tuple[RunConfig, Path, str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Finished:
    """One run through the command itself, as a person starts it, with MLflow beside it."""
    from tests.conftest import small_run  # its values, with a folder that lives for the whole module

    root = tmp_path_factory.mktemp("run")
    raw = small_run.__wrapped__(root, corpus) | {"tracking": {"mlflow": True}}
    raw["truncation"] |= {"lr_factor": 0.5, "batch_factor": 2}
    path = root / "small.yaml"
    path.write_text(yaml.safe_dump(raw))
    command = [str(Path(sys.executable).with_name("rayduce")), "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, cwd=root, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return parse_config(raw), root / "runs" / "small", done.stdout


def test_a_run_leaves_everything_a_person_needs(finished: Finished) -> None:
    config, folder, output = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final_dims"] == [4, 4]
    assert [cut["step"] for cut in summary["truncations"]] == [3, 7]
    assert summary["truncations"][0]["dims_after"] == summary["truncations"][1]["dims_before"] == [8, 8]
    assert [cut["digest"] for cut in summary["truncations"]] == [plan.digest for plan in plans(folder)]
    assert summary["steps"] == config.train.steps == max(losses(folder))
    rows = read_metrics(folder)
    probing = sum(row["probe_ms"] for row in rows if row["step"] in (3, 7))
    assert summary["probe_share"] == pytest.approx(probing / sum(row["step_ms"] for row in rows))
    assert summary["val_loss_final"] < summary["truncations"][0]["val_loss_before"]
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == config
    for name in ("report.html", "figures/loss.png", "figures/state_dims.png", "figures/hsv_spectra.png"):
        assert (folder / name).stat().st_size > 1000
    assert "cut at step 3: states 16 x 2 layers -> 8 x 2 layers" in output
    [moved] = [row for row in rows if "hsv_drift_00" in row]
    assert moved["step"] == 7
    assert all(0 < moved[f"hsv_drift_0{layer}"] <= 1 for layer in (0, 1))
    [line] = [line for line in output.splitlines() if "cut at step 7" in line]
    assert re.search(r"; since the last probe \d+\.\d% of the spectrum moved$", line)
    assert "mlflow ui --backend-store-uri sqlite:////" in output
    assert "deepspeed" not in output.lower()
    assert "RayTrainWorker" in (folder / "logs" / "ray.log").read_text()


def test_mlflow_holds_the_same(finished: Finished) -> None:
    config, folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{config.storage / 'mlflow.db'}")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.d_state"] == "16"
    logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train_loss")}
    assert logged == pytest.approx(losses(folder))
    assert run.data.metrics["d_state_01"] == 4
    names = {item.path for part in ("", "plans", "figures") for item in client.list_artifacts(run.info.run_id, part)}
    assert {"summary.json", "report.html", "config.yaml", "figures/loss.png"} <= names
    assert {f"plans/{path.name}" for path in (folder / "plans").iterdir()} <= names


def test_training_equals_plain_torch_cut_by_hand(finished: Finished) -> None:
    """Losses, final parameters and both Adam moments, against one process with torch's AdamW and sliced tensors."""
    config, folder, _ = finished
    assert config.truncation is not None
    cuts = {plan.step: plan for plan in plans(folder)}
    torch.manual_seed(config.seed)
    model = build_model(config.model, LanguageTask(256), [16, 16])
    optimizer = reference_optimizer(model, config, {}, 0)
    data = prepare(config.data, config.data_root)
    batches = TrainBatches(data, config.seq_len, config.train.batch_size, config.seed, 0, 1)
    measured = losses(folder)
    lrs = {row["step"]: row["learning_rate"] for row in read_metrics(folder)}
    first_cut = min(cuts)
    # The cosine alone takes a few per cent a step.
    assert 0.85 < lrs[first_cut] / lrs[first_cut - 1] < 1
    assert 0.85 < lrs[first_cut + 1] / lrs[first_cut] / config.truncation.lr_factor < 1
    assert 0.85 < lrs[first_cut + 2] / lrs[first_cut + 1] < 1
    for step in range(1, config.train.steps + 1):
        batch = batches.at(step, 2 if step > first_cut else 1)
        for group in optimizer.param_groups:
            group["lr"] = lrs[step]
        optimizer.zero_grad()
        loss = model.loss(model(batch.inputs), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)
        optimizer.step()
        assert loss.item() == pytest.approx(measured[step], rel=1e-4)
        if step in cuts:
            model, optimizer = cut_by_hand(model, optimizer, cuts[step], config)
    ended = saved(folder, config.train.steps)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for part, tensor in (("value", parameter), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            # Of the whole tensor: single moments are sums that cancel, and differ with the order of additions.
            assert relative_error(ended[f"{part}:{name}"], tensor.detach()) < 1e-4
    manifest = checkpoint.verify(checkpoint.at(checkpoints_of(folder, None), config.train.steps))
    assert (manifest.state_dims, manifest.optimizer_step) == ([4, 4], config.train.steps)


def reference_optimizer(
    model: SequenceModel, config: RunConfig, state: dict[str, dict[str, torch.Tensor]], step: int
) -> torch.optim.AdamW:
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.ndim >= 2 and not n.endswith("A_log")]
    plain = [p for n, p in named.items() if p.ndim < 2 or n.endswith("A_log")]
    groups = [
        {"params": decayed, "weight_decay": config.train.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas)
    for name, moments in state.items():
        optimizer.state[named[name]] = moments | {"step": torch.tensor(float(step))}
    return optimizer


def cut_by_hand(
    model: SequenceModel, optimizer: torch.optim.AdamW, plan: TruncationPlan, config: RunConfig
) -> tuple[SequenceModel, torch.optim.AdamW]:
    smaller = build_model(config.model, LanguageTask(256), plan.dims_after)
    moments = {}
    for name, parameter in model.named_parameters():
        tensors = {"value": parameter.detach(), **optimizer.state[parameter]}
        del tensors["step"]
        for layer in plan.layers:
            assert isinstance(layer.reduction, StateSelection)
            kept = list(layer.reduction.kept)
            if name == f"backbone.layers.{layer.layer}.mixer.A_log":
                tensors = {key: tensor[:, kept] for key, tensor in tensors.items()}
            if name == f"backbone.layers.{layer.layer}.mixer.x_proj.weight":
                dt, B, C = 1, layer.dim_before, layer.dim_before  # dt_rank is ceil(16 / 16)
                whole_C = tensors["value"][dt + B :].double()
                tensors = {
                    key: torch.cat([p if p.shape[0] == dt else p[kept] for p in tensor.split([dt, B, C])])
                    for key, tensor in tensors.items()
                }
                assert layer.reduction.fold_RN is not None
                tensors["value"][dt + len(kept) :] = layer.reduction.fold_RN @ whole_C
        smaller.get_parameter(name).data.copy_(tensors.pop("value"))
        moments[name] = {key: tensor.clone() for key, tensor in tensors.items()}
    return smaller, reference_optimizer(smaller, config, moments, plan.step)


@pytest.mark.parametrize(
    ("kind", "zero_stage"),
    [("mamba", 1), pytest.param("lru", 2, marks=pytest.mark.long)],
)
def test_one_worker_and_two_make_the_same_run(
    small_run: dict[str, Any], local_ray: None, kind: str, zero_stage: int
) -> None:
    if kind == "lru":
        small_run["data"] = {"source": "digits"}
        small_run["model"] = {"kind": "lru", "n_layers": 2, "d_model": 8, "d_state": 16}
    folders = {}
    for workers in (1, 2):
        raw = small_run | {
            "name": f"workers{workers}",
            "cluster": {"workers": workers, "zero_stage": zero_stage, "timeout_s": 60},
        }
        train(parse_config(raw))
        folders[workers] = Path(raw["storage"]) / raw["name"]
    for alone, shared in zip(plans(folders[1]), plans(folders[2]), strict=True):
        assert (alone.step, alone.dims_before, alone.dims_after) == (shared.step, shared.dims_before, shared.dims_after)
        for one, two in zip(alone.layers, shared.layers, strict=True):
            if kind == "mamba":
                assert isinstance(one.reduction, StateSelection)
                assert isinstance(two.reduction, StateSelection)
                assert one.reduction.kept == two.reduction.kept
                torch.testing.assert_close(one.reduction.fold_RN, two.reduction.fold_RN, rtol=1e-3, atol=1e-3)
            assert one.spectrum == pytest.approx(two.spectrum, rel=1e-3, abs=1e-5 * one.spectrum[0])
    assert losses(folders[1]) == pytest.approx(losses(folders[2]), rel=1e-4)
    assert plans(folders[1])[-1].dims_after == (4, 4)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "lru"])
def test_bfloat16_follows_float32_and_keeps_float32_parameters(
    kind: str, small_run: dict[str, Any], local_ray: None
) -> None:
    """Every model, with layers of their own state dimensions, cut in both precisions alike."""
    small_run["model"] = {"kind": kind, "n_layers": 2, "d_model": 32, "d_state": [16, 9]}
    curves = []
    for precision in ("float32", "bfloat16"):
        small_run["name"], small_run["train"]["precision"] = precision, precision
        config = parse_config(small_run)
        assert train(config)["final_dims"] == [4, 4]
        folder = config.storage / precision
        curves.append(losses(folder))
        assert {part.dtype for part in saved(folder, config.train.steps).values()} == {torch.float32}
    exact, rounded = curves
    assert exact != rounded
    assert list(rounded.values()) == pytest.approx(list(exact.values()), rel=0.02)


@pytest.mark.long
def test_a_machine_without_a_compiler_trains_too(small_run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_run))
    command = [str(Path(sys.executable).with_name("rayduce")), "train", str(path)]
    nothing_built = {"CXX": "/nonexistent/c++", "TORCH_EXTENSIONS_DIR": str(tmp_path / "empty")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        cwd=tmp_path,
        check=False,
        env=os.environ | nothing_built,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scans in plain torch, because the C++ kernels cannot be built" in done.stdout
    assert "not found" in done.stdout


@pytest.fixture
def mlflow_server(tmp_path: Path, empty_store: Path) -> Iterator[tuple[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'server.db')}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--workers", "1", "--backend-store-uri", store],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it has children, which are to die with it
    )
    deadline = time.monotonic() + HANGS_S  # beside the tests of another file it takes minutes on a slow machine
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert time.monotonic() < deadline, "the MLflow server does not start"
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}", server.pid
    with contextlib.suppress(ProcessLookupError):  # the test has killed it
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_the_run_outlives_its_mlflow_server(
    small_run: dict[str, Any],
    local_ray: None,
    mlflow_server: tuple[str, int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    uri, server = mlflow_server
    small_run["tracking"] = {"mlflow_uri": uri}
    folder = Path(small_run["storage"]) / "small"

    ended = threading.Event()
    killed = threading.Event()

    def kill_when_known() -> None:
        while not (folder / MLFLOW_RUN).exists() and not ended.wait(0.05):
            pass
        os.killpg(server, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill_when_known, daemon=True).start()
    try:
        summary = train(parse_config(small_run))
        assert killed.is_set(), "the server outlived the run"
    finally:
        ended.set()
    assert summary["final_dims"] == [4, 4]
    assert set(losses(folder)) == set(range(1, 13))
    assert capfd.readouterr().out.count("MLflow at http://") == 1


def test_more_workers_than_cores_are_refused(small_run: dict[str, Any], local_ray: None) -> None:
    small_run["train"]["batch_size"] = CPUS + 1
    small_run["cluster"] = {"workers": CPUS + 1}
    with pytest.raises(UserError, match=r"cluster\.workers 7 need 7 CPUs \(1 each\), but the cluster has 6"):
        launch.train(parse_config(small_run))
    small_run["cluster"] = {"workers": 1, "use_gpu": True}
    with pytest.raises(UserError, match=r"cluster\.workers 1 need 1 GPUs \(1 each\), but the cluster has 0"):
        launch.train(parse_config(small_run))
    assert list(Path(small_run["storage"]).iterdir()) == []  # nothing was started, nothing is left


def test_another_series_of_deepspeed_is_refused(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything starts: its inner attributes may be others."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deepspeed-1.0.0.dist-info").mkdir()
    (tmp_path / "deepspeed-1.0.0.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 1.0.0\n")
    sentence = r"DeepSpeed 1\.0\.0 is installed, but Rayduce works with 0\.\d+ alone: pip install"
    with pytest.raises(UserError, match=sentence):
        launch.train(parse_config(small_run))
    assert not Path(small_run["storage"]).exists()


def test_diverged_training_fails_in_one_sentence(small_run: dict[str, Any], local_ray: None) -> None:
    small_run["train"] |= {"lr": 1e30, "warmup": 0, "grad_clip": 0}
    sentence = (
        r"training failed after step 2: .*the training loss of step 2 is no number; train\.lr may .*small/logs/ray\.log"
    )
    with pytest.raises(TrainingError, match=sentence) as failed:
        train(parse_config(small_run))
    assert "\n" not in str(failed.value)
    assert (Path(small_run["storage"]) / "small" / "attempt").read_text() == "1\n"  # not tried again


def test_statistics_that_are_no_numbers_end_the_run_in_one_sentence(small_run: dict[str, Any], local_ray: None) -> None:
    """The first step's own loss is still a number; the weights that it leaves are too large for the scans."""
    small_run["train"] |= {"lr": 1e15, "warmup": 0}
    small_run["truncation"]["steps"] = [1]
    small_run["cluster"]["workers"] = 1
    sentence = (
        r"training failed after step 1: UnrankableError: layer \d at step 1: the state statistics hold NaN or infinity"
    )
    with pytest.raises(TrainingError, match=sentence) as failed:
        train(parse_config(small_run))
    assert "\n" not in str(failed.value)
    assert (Path(small_run["storage"]) / "small" / "attempt").read_text() == "1\n"


@pytest.mark.long  # workers that fail are started again for the next test
def test_a_held_out_loss_that_is_no_number_ends_the_run_in_one_sentence(
    small_run: dict[str, Any], local_ray: None
) -> None:
    small_run["train"] |= {"steps": 1, "lr": 1e30, "warmup": 0}
    sentence = "training failed after step 1: FloatingPointError: the held-out loss after step 1 is no number"
    with pytest.raises(TrainingError, match=sentence):
        train(parse_config(small_run | {"truncation": None}))
    folder = Path(small_run["storage"]) / "small"
    assert (folder / "attempt").read_text() == "1\n"
    assert not (folder / "checkpoints" / "step-00000001").exists()
