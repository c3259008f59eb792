"""The driver: check, start Ray and the coordinator, train, and leave a complete folder behind."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.data.arrow import describe
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.sources import prepare
from orchestrator.errors import TrainingError, UserError
from orchestrator.events import CutRecord, Job
from orchestrator.follow import Follower
from orchestrator.mlflow_tracker import mlflow_command
from orchestrator.ray_cluster import ray_cluster
from orchestrator.report import write_report
from orchestrator.storage import Earlier, earlier_run, new_run
from orchestrator.summary import describe_summary, write_summary
from orchestrator.terminal import Terminal, chatter_to, duration
from orchestrator.tracking import Tracker, tracking


def train(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Run a training to its end; returns what `summary.json` holds.

    With `resume`, the newest run of this name continues from its last complete checkpoint.

    Raises:
        UserError: something in the config, the data, the storage or the checkpoint is not usable; nothing
            has been started.
        TrainingError: the workers failed; the folder holds the log and the last complete checkpoint.
    """
    started = time.perf_counter()
    earlier = earlier_run(config) if resume else None
    data = prepare(config.data, config.data_root)
    _check_data(config, data, earlier)
    folder = earlier.folder if earlier else new_run(config)
    with ExitStack() as stack:
        terminal = stack.enter_context(chatter_to(folder / "logs" / "ray.log"))
        try:
            stack.enter_context(ray_cluster(config))
        except UserError:
            if earlier is None:
                shutil.rmtree(folder)  # nothing was started, so nothing is left behind
            raise
        (folder / "config.yaml").write_text(config.to_yaml())
        size = f"{config.cluster.workers} workers, ZeRO-{config.cluster.zero_stage}"
        terminal.line(f"run {folder.name}: {config.model.kind}, {size}")
        terminal.line("starting (the first run on a machine compiles its kernels, about a minute)")
        summary = _run(config, folder, earlier, terminal)

    print(f"done in {duration(time.perf_counter() - started)}")
    print("\n".join(describe_summary(summary)))
    print(f"  files       {folder} (report.html, summary.json, metrics.jsonl, plans, figures, logs)")
    print(f"  checkpoint  {summary['checkpoint']}")
    if summary["mlflow_run_id"]:
        print(f"  MLflow      {mlflow_command(config)}")
    return summary


def _run(config: RunConfig, folder: Path, earlier: Earlier | None, terminal: Terminal) -> dict[str, Any]:
    """Train, then write the summary and the report, with everything tracked."""
    with tracking(config, folder, terminal.line) as tracker:
        follower = _train(config, folder, earlier, tracker, terminal)
        truncations = [cut.as_dict() for cut in follower.cuts]
        last = follower.checkpoint or (str(earlier.checkpoint) if earlier else None)
        summary = write_summary(config, folder, truncations, tracker.mlflow_run_id, last)
        report = write_report(folder)
        for path in sorted((folder / "figures").iterdir()):
            tracker.artifact(path, "figures")
        for path in (folder / "config.yaml", folder / "summary.json", report):
            tracker.artifact(path)
    return summary


def _train(config: RunConfig, folder: Path, earlier: Earlier | None, tracker: Tracker, terminal: Terminal) -> Follower:
    coordinator = ray.remote(Coordinator).options(num_cpus=0).remote(config.truncation_rule, config.cluster.timeout_s)
    cuts = [CutRecord(**record) for record in earlier.manifest.truncations] if earlier else []
    follower = Follower(config, folder, coordinator, tracker, terminal, cuts)
    try:
        _wait_for(_trainer(config, Job(config, folder, earlier.checkpoint if earlier else None, coordinator)), follower)
    except ray.train.TrainingFailedError as error:
        raise TrainingError(
            f"training failed after step {follower.step}: {_cause(error)}; details in {folder / 'logs' / 'ray.log'}"
        ) from error
    finally:
        follower.stop()
        ray.kill(coordinator)
    if follower.failure is not None:
        raise follower.failure
    return follower


def _worker(job: Job) -> None:
    if not job.config.cluster.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that it sees, whose is not ours
    # Imported where it runs: the driver needs no DeepSpeed, whose import takes seconds and prints.
    from orchestrator.loop import train_worker

    train_worker(job)


def _trainer(config: RunConfig, job: Job) -> TorchTrainer:
    cluster, workers = config.cluster, config.cluster.workers
    return TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers.min if workers.min == workers.max else (workers.min, workers.max),
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": int(cluster.use_gpu)},
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo", timeout_s=cluster.timeout_s),
        # Ray Train resumes a run whose name and path it knows; resuming is ours to decide.
        run_config=ray.train.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(job.folder / "ray_train"),
            failure_config=FailureConfig(max_failures=0),
        ),
    )


def _wait_for(trainer: TorchTrainer, follower: Follower) -> None:
    """Run the trainer to its end, or until what it reports cannot be recorded any more.

    In a thread, because in the main one Ray Train takes SIGINT for itself, and ends the process without a word.
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fit")
    fit = pool.submit(trainer.fit)
    pool.shutdown(wait=False)
    while follower.failure is None:
        if wait([fit], timeout=1).done:
            fit.result()
            return


def _check_data(config: RunConfig, data: Path, earlier: Earlier | None) -> None:
    """Open both splits once, so that a dataset that is damaged, too small or changed is found before Ray starts."""
    TrainBatches(data, config.seq_len, config.train.batch_size, config.seed, 0, 1).at(1)
    next(validation_batches(data, config.seq_len, 1, 1, 0, 1))
    if earlier and earlier.manifest.data_sha256 != describe(data).sha256["train"]:
        raise UserError(f"run {earlier.folder} cannot be resumed: the data at {data} is not what it was trained on")


def _cause(error: BaseException) -> str:
    """The first worker's own words, without the layers that Ray wraps around them."""
    failures = getattr(error, "worker_failures", None)
    inner: BaseException | None = failures[min(failures)] if failures else error.__cause__
    while isinstance(inner, RayTaskError):
        inner = inner.cause
    text = str(inner if inner is not None else error).strip().splitlines()
    return f"{type(inner or error).__name__}: {text[-1] if text else 'no message'}"
