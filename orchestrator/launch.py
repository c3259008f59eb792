"""The driver: check, start Ray and the coordinator, train, and leave a complete folder behind."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.checkpoint import Manifest
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.data.arrow import describe
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.sources import prepare
from orchestrator.errors import Interrupted, TrainingError, UserError
from orchestrator.events import Job
from orchestrator.failures import RetryPolicy, in_a_line, root_cause
from orchestrator.follow import Follower
from orchestrator.mlflow_tracker import mlflow_command
from orchestrator.ray_cluster import ray_cluster
from orchestrator.report import write_report
from orchestrator.run_folder import write_whole
from orchestrator.signals import StopRequest, stop_request
from orchestrator.storage import earlier_start, finished, run_folder, start_over
from orchestrator.summary import describe_summary, write_summary
from orchestrator.terminal import Terminal, chatter_to, duration
from orchestrator.tracking import Tracker, tracking
from orchestrator.versions import deepspeed_version
from orchestrator.worker import run_worker


def train(config: RunConfig) -> dict[str, Any]:
    """Run a training to its end; returns what `summary.json` holds.

    A run of this name that was interrupted continues from its last complete checkpoint; one that is finished is left
    as it is.

    Raises:
        UserError: something in the config, the data, the storage or the checkpoint is not usable, DeepSpeed is of
            another version, or another driver is at work in the folder; nothing has been started.
        TrainingError: the workers failed; the folder holds the log and the last complete checkpoint.
        Interrupted: SIGINT or SIGTERM ended the run before its last step.
    """
    started = time.perf_counter()
    deepspeed_version()
    with run_folder(config) as folder, ExitStack() as stack:
        if (summary := finished(config, folder)) is not None:
            print(f"run {config.name} is finished: {folder / 'summary.json'}; another name= starts a new run")
            return summary
        earlier = earlier_start(config, folder)
        data = prepare(config.data, config.data_root)
        _check_data(config, data, earlier)
        terminal = stack.enter_context(chatter_to(folder / "logs" / "ray.log"))
        stack.enter_context(ray_cluster(config))
        stop = stack.enter_context(stop_request())
        if earlier is None:
            start_over(config, folder)
        write_whole(folder / "config.yaml", config.to_yaml())
        size = f"{config.cluster.workers} workers, ZeRO-{config.cluster.zero_stage}"
        terminal.line(f"run {folder.name}: {config.model.kind}, {size}")
        terminal.line("starting (the first run on a machine compiles its kernels, about a minute)")
        summary = _run(config, folder, terminal, stop)

    print(f"done in {duration(time.perf_counter() - started)}")
    print("\n".join(describe_summary(summary)))
    print(f"  files       {folder} (report.html, summary.json, metrics.jsonl, plans, figures, logs)")
    print(f"  checkpoint  {summary['checkpoint']}")
    if summary["mlflow_run_id"]:
        print(f"  MLflow      {mlflow_command(config)}")
    return summary


def _run(config: RunConfig, folder: Path, terminal: Terminal, stop: StopRequest) -> dict[str, Any]:
    """Train, then write the summary and the report, with everything tracked."""
    with tracking(config, folder, terminal.line) as tracker:
        follower = _train(config, folder, tracker, terminal, stop)
        truncations = [cut.as_dict() for cut in follower.cuts]
        summary = write_summary(config, folder, truncations, tracker.mlflow_run_id, follower.checkpoint)
        report = write_report(folder)
        for path in sorted((folder / "figures").iterdir()):
            tracker.artifact(path, "figures")
        for path in (folder / "config.yaml", folder / "summary.json", report):
            tracker.artifact(path)
    return summary


def _train(config: RunConfig, folder: Path, tracker: Tracker, terminal: Terminal, stop: StopRequest) -> Follower:
    # Its process may die like a worker's: whoever calls meanwhile waits until Ray has started it again.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    coordinator = ray.remote(Coordinator).options(**options).remote(config.truncation_rule, config.cluster.timeout_s)
    follower = Follower(config, folder, coordinator, tracker, terminal)
    try:
        _fit(Job(config, folder, coordinator), follower, terminal, stop)
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"training failed after step {follower.step}: {_cause(error)}; details in {folder / 'logs' / 'ray.log'}"
        ) from error
    finally:
        follower.stop()
        ray.kill(coordinator)
    if follower.failure is not None:
        raise follower.failure
    if follower.stopped is not None:
        assert stop.signal is not None, "workers end early only when they are asked to"
        how = f"stopped after step {follower.stopped} of {config.train.steps}"
        raise Interrupted(f"{how}; the same command continues from there", stop.signal)
    return follower


def _fit(job: Job, follower: Follower, terminal: Terminal, stop: StopRequest) -> None:
    """Train, and start again when Ray Train's controller dies, which nobody else looks after."""
    for _ in range(job.config.cluster.max_failures):
        try:
            return _wait_for(_trainer(job), follower, terminal, stop)
        except RayActorError:
            terminal.line(f"Ray Train's controller died after step {follower.step}; starting the workers again")
            follower.release()
    try:
        return _wait_for(_trainer(job), follower, terminal, stop)
    except RayActorError as error:
        raise TrainingError(
            f"Ray Train's controller died after step {follower.step}, as often as cluster.max_failures "
            f"{job.config.cluster.max_failures} allows; the same command continues from the last checkpoint"
        ) from error


def _trainer(job: Job) -> TorchTrainer:
    cluster, workers = job.config.cluster, job.config.cluster.workers
    # How long Ray Train waits for a worker that does not answer, and for nodes; it has no other way to be told.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.timeout_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.timeout_s)
    # An actor more per group of workers, to announce the loss of a node to workers that do not ask for it.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    return TorchTrainer(
        run_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers.min if workers.min == workers.max else (workers.min, workers.max),
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": int(cluster.use_gpu)},
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo", timeout_s=cluster.timeout_s),
        # Ray Train would continue a run whose name and path it knows; that is for our checkpoints to decide.
        run_config=ray.train.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(job.folder / "ray_train"),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
            ),
            callbacks=[RetryPolicy(job.coordinator)],
        ),
    )


def _wait_for(trainer: TorchTrainer, follower: Follower, terminal: Terminal, stop: StopRequest) -> None:
    """Run the trainer to its end, or until what it reports cannot be recorded any more.

    A signal has the workers end, which this still waits for.

    In a thread, because in the main one Ray Train takes SIGINT for itself, and ends the process without a word. In a
    daemon, because a call that Ray's shutdown overtakes may never return.
    """
    fit: Future[None] = Future()

    def run() -> None:
        try:
            trainer.fit()
            fit.set_result(None)
        except Exception as error:  # noqa: BLE001 -- raised in the main thread
            fit.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    while follower.failure is None:
        if wait([fit], timeout=1).done:
            fit.result()
            return
        if stop.signal is not None and follower.end_workers():
            terminal.line("stopping: a checkpoint follows (a second signal ends at once, without)")


def _check_data(config: RunConfig, data: Path, earlier: Manifest | None) -> None:
    """Open both splits once, so that a dataset that is damaged, too small or changed is found before Ray starts."""
    TrainBatches(data, config.seq_len, config.train.batch_size, config.seed, 0, 1).at(1)
    next(validation_batches(data, config.seq_len, 1, 1, 0, 1))
    if earlier and earlier.data_sha256 != describe(data).sha256["train"]:
        raise UserError(
            f"run {config.storage / config.name} cannot continue: the data at {data} is not what it was trained on"
        )


def _cause(error: BaseException) -> str:
    """The first worker's own words, without the layers that Ray wraps around them."""
    if isinstance(error, ray.train.WorkerGroupError):
        error = error.worker_failures[min(error.worker_failures)]
    elif isinstance(error, ray.train.ControllerError):
        error = error.controller_failure
    return in_a_line(root_cause(error))
