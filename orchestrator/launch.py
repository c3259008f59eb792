"""The driver: check, start Ray and the coordinator, train, and leave a complete folder behind."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator import checkpoint
from orchestrator.config import RunConfig, flatten, refuse_other_run
from orchestrator.coordinator import Coordinator
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.sources import prepare
from orchestrator.errors import TrainingError, UserError
from orchestrator.events import Job
from orchestrator.follow import Follower
from orchestrator.report import write_report
from orchestrator.summary import describe_summary, write_summary
from orchestrator.terminal import Terminal, chatter_to, duration
from orchestrator.tracking import CompositeTracker, JsonlTracker, MlflowTracker, Tracker

MLFLOW_RUN = "mlflow.json"


def train(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Run a training to its end; returns what `summary.json` holds.

    With `resume`, the newest run of this name continues from its last complete checkpoint.

    Raises:
        UserError: something in the config, the data, the storage or the checkpoint is not usable; nothing
            has been started.
        TrainingError: the workers failed; the folder holds the log and the last complete checkpoint.
    """
    started = time.perf_counter()
    folder, resume_from, manifest = _continue_run(config) if resume else (None, None, None)
    data = prepare(config.data, config.data_root)
    _check_data(config, data)
    if folder is None:
        folder = _new_run(config)
    (folder / "config.yaml").write_text(config.to_yaml())
    print(f"run {folder.name}: {config.model.kind}, {config.cluster.workers} workers, ZeRO-{config.cluster.zero_stage}")
    log = folder / "logs" / "ray.log"

    with chatter_to(log) as terminal:
        terminal.line("starting the workers (a machine's first run compiles DeepSpeed's collectives, about a minute)")
        with _ray(config):
            summary = _fit(config, folder, resume_from, manifest, terminal)

    print(f"done in {duration(time.perf_counter() - started)}")
    print("\n".join(describe_summary(summary)))
    print(f"  files       {folder} (report.html, summary.json, metrics.jsonl, plans, figures, logs)")
    print(f"  checkpoint  {summary['checkpoint']}")
    if summary["mlflow_run_id"]:
        print(f"  MLflow      {_mlflow_command(config)}")
    return summary


def _fit(
    config: RunConfig,
    folder: Path,
    resume_from: Path | None,
    manifest: checkpoint.Manifest | None,
    terminal: Terminal,
) -> dict[str, Any]:
    coordinator = (
        ray.remote(Coordinator)
        .options(num_cpus=0)
        .remote(
            config.truncation.target if config.truncation else None,
            config.model.d_state,
            config.model.n_layers,
            config.probe_steps,
            config.cluster.timeout_s,
        )
    )
    mlflow = _mlflow(config, folder, terminal)
    tracker: Tracker = CompositeTracker([JsonlTracker(folder / "metrics.jsonl"), *([mlflow] if mlflow else [])])
    follower = Follower(config, folder, coordinator, tracker, terminal)
    status = "FAILED"
    try:
        _trainer(config, Job(config, folder, resume_from, coordinator)).fit()
        follower.stop()
        earlier = manifest.truncations if manifest else []
        truncations = [*earlier, *(cut.as_dict() for cut in follower.cuts)]
        run_id = mlflow.run_id if mlflow else None
        summary = write_summary(config, folder, truncations, run_id, follower.checkpoint)
        write_report(folder)
        for path in sorted((folder / "figures").iterdir()):
            tracker.artifact(path, "figures")
        for name in ("config.yaml", "summary.json", "report.html"):
            tracker.artifact(folder / name)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"training failed after step {follower.step}: {_cause(error)}; details in {folder / 'logs' / 'ray.log'}"
        ) from error
    finally:
        follower.stop()
        tracker.close(status)
        ray.kill(coordinator)
    return summary


def _worker(job: Job) -> None:
    # Imported where it runs: the driver needs no DeepSpeed, whose import takes seconds and prints.
    from orchestrator.loop import train_worker

    train_worker(job)


def _trainer(config: RunConfig, job: Job) -> TorchTrainer:
    cluster = config.cluster
    return TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": int(cluster.use_gpu)},
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo", timeout_s=int(cluster.timeout_s)),
        # Ray Train resumes a run whose name and path it knows; resuming is ours to decide.
        run_config=ray.train.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(job.folder / "ray_train"),
            failure_config=FailureConfig(max_failures=0),
        ),
    )


@contextmanager
def _ray(config: RunConfig) -> Iterator[None]:
    """Ray for the duration of the block: the cluster that RAY_ADDRESS names, or one on this machine.

    Raises:
        UserError: the cluster cannot hold the workers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run needs no network
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # the log should hold whole tracebacks
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(include_dashboard=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise UserError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']} cannot be reached") from error
    try:
        _check_resources(config)
        yield
    finally:
        if ours:
            ray.shutdown()


def _check_resources(config: RunConfig) -> None:
    has = ray.cluster_resources()
    # An autoscaler may add nodes that are not there yet; Ray Train asks it the same way.
    may_have = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    wanted = {"CPU": config.cluster.cpus_per_worker, "GPU": int(config.cluster.use_gpu)}
    for resource, per_worker in wanted.items():
        need, most = per_worker * config.cluster.workers, max(has.get(resource, 0), may_have.get(resource, 0))
        if need > most:
            raise UserError(
                f"cluster.workers {config.cluster.workers} need {need} {resource}s ({per_worker} each), "
                f"but the cluster has {most:g}"
            )


def _check_data(config: RunConfig, data: Path) -> None:
    """Open both splits once, so that a dataset that is damaged or too small is found before Ray starts."""
    TrainBatches(data, config.seq_len, config.train.batch_size, config.seed, 0, 1).at(1)
    next(validation_batches(data, config.seq_len, 1, 1, 0, 1))


def _new_run(config: RunConfig) -> Path:
    """A folder of its own for every run: NAME, NAME-2, NAME-3, …"""
    number = 1
    while True:
        folder = config.storage / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            folder.mkdir(parents=True)
            for part in ("plans", "logs", "checkpoints"):
                (folder / part).mkdir()
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"storage {config.storage} cannot be written: {folder} is a file") from None
            number += 1
        except OSError as error:
            raise UserError(f"storage {config.storage} cannot be written: {error.strerror}") from error


def _continue_run(config: RunConfig) -> tuple[Path, Path, checkpoint.Manifest]:
    """The newest run of this name, its newest complete checkpoint, and that checkpoint's verified manifest."""
    pattern = re.compile(rf"{re.escape(config.name)}(?:-(\d+))?")
    found = [
        (int(match[1] or 1), path)
        for path in (config.storage.iterdir() if config.storage.is_dir() else ())
        if (match := pattern.fullmatch(path.name)) and (path / "config.yaml").is_file()
    ]
    if not found:
        raise UserError(f"there is no run {config.name} in storage {config.storage} to resume")
    folder = max(found)[1]
    path = checkpoint.newest(folder / "checkpoints")
    if path is None:
        raise UserError(f"run {folder} has no complete checkpoint to resume from; start it again without --resume")
    manifest = checkpoint.verify(path)
    refuse_other_run(config, manifest.config)
    if manifest.step >= config.train.steps:
        raise UserError(f"run {folder} is finished: its last checkpoint is of step {manifest.step}")
    return folder, path, manifest


def _mlflow_uri(config: RunConfig) -> str:
    """The configured server, else MLflow's own environment variable, else SQLite beside the runs."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    return config.tracking.mlflow_uri or from_environment or f"sqlite:///{config.storage / 'mlflow.db'}"


def _mlflow_command(config: RunConfig) -> str:
    uri = _mlflow_uri(config)
    return f"mlflow ui --backend-store-uri {uri}" if uri.startswith("sqlite:") else uri


def _mlflow(config: RunConfig, folder: Path, terminal: Terminal) -> MlflowTracker | None:
    if not config.tracking.mlflow:
        return None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a run needs no network
    return MlflowTracker(
        _mlflow_uri(config),
        config.tracking.experiment,
        config.storage / "mlartifacts",
        folder.name,
        dict(flatten(config.model_dump(mode="json"))),
        folder / MLFLOW_RUN,
        terminal.line,
    )


def _cause(error: BaseException) -> str:
    """The first worker's own words, without the layers that Ray wraps around them."""
    failures = getattr(error, "worker_failures", None)
    inner: BaseException | None = failures[min(failures)] if failures else error.__cause__
    while isinstance(inner, RayTaskError):
        inner = inner.cause
    text = str(inner if inner is not None else error).strip().splitlines()
    return f"{type(inner or error).__name__}: {text[-1] if text else 'no message'}"
