"""The driver: check, start Ray and a crew of workers, train, and leave a complete folder behind."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.registry import build_model
from orchestrator.checkpoint import Manifest
from orchestrator.config import RunConfig
from orchestrator.crew import Crew
from orchestrator.data.arrow import describe
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.sources import prepare
from orchestrator.errors import Interrupted, UserError
from orchestrator.events import Job
from orchestrator.follow import Follower
from orchestrator.inference import load_model
from orchestrator.mlflow_tracker import Nesting, mlflow_command
from orchestrator.ray_cluster import ray_cluster
from orchestrator.report import write_report
from orchestrator.run_folder import ray_log, write_whole
from orchestrator.signals import StopRequest, stop_request
from orchestrator.storage import earlier_start, finished, run_folder, start_over
from orchestrator.summary import describe_summary, write_summary
from orchestrator.terminal import Terminal, chatter_to, duration
from orchestrator.tracking import RunTracker, Tracker, hand_over, tracking
from orchestrator.versions import deepspeed_version

# Says of a finished run that its page is drawn and its trackers have everything.
REPORTED = "reported"


@dataclass(frozen=True)
class Lent:
    """What whoever trains many runs lends to each: workers, a way to ask for the end, and where its metrics belong."""

    crew: Crew
    stop: StopRequest = field(default_factory=StopRequest)
    nesting: Nesting | None = None
    listener: Tracker | None = None
    until: int | None = None
    """The step after which training ends as if it had been interrupted."""
    save_after: frozenset[int] = frozenset()
    """Steps after which a checkpoint is wanted, besides those of the config."""
    terminal: Terminal | None = None
    """Where whoever waits is told how far the run is; what the process prints to where there is none."""


def train(config: RunConfig, lent: Lent | None = None) -> dict[str, Any]:
    """Run a training to its end; returns what `summary.json` holds, or {} where it was to end before its last step.

    A run of this name that was interrupted continues from its last complete checkpoint; one that is finished is left
    as it is.

    Raises:
        UserError: something in the config, the data, the storage or the checkpoint is not usable, DeepSpeed is of
            another version, or another driver is at work in the folder; nothing has been started.
        TrainingError: the workers failed; the folder holds the log and the last complete checkpoint.
        Interrupted: SIGINT, SIGTERM or who has lent the workers ended the run before its last step.
    """
    started = time.perf_counter()
    deepspeed_version()
    # Whoever waits at a terminal hears at once that storage is away; nobody would start a sweep's trial again.
    retry_s = config.checkpoints.retry_s if lent else 0
    belongs = (lent.nesting, lent.listener) if lent else ()
    with run_folder(config, retry_s) as folder, ExitStack() as stack:
        if (summary := finished(config, folder)) is not None:
            if not (folder / REPORTED).exists():  # the driver was killed in between
                with tracking(config, folder, print, *belongs) as tracker:
                    write_report(folder)
                    hand_over(folder, tracker)
                (folder / REPORTED).touch()
            print(f"run {config.name} is finished: {folder / 'summary.json'}; another name= starts a new run")
            return summary
        earlier = earlier_start(config, folder, retry_s)
        until = (lent.until if lent else None) or config.train.steps
        save_after = lent.save_after if lent else frozenset()
        if earlier is not None and until <= earlier.step < config.train.steps:
            return {}
        data = prepare(config.data, config.data_root)
        _check_data(config, data, earlier)
        _check_teacher(config, data)
        own = stack.enter_context(chatter_to(ray_log(folder)))
        terminal = (lent.terminal if lent else None) or own
        stop = lent.stop if lent else stack.enter_context(stop_request())
        if lent is None:
            stack.enter_context(ray_cluster(config))
        if earlier is None:
            start_over(config, folder)
        write_whole(folder / "config.yaml", config.to_yaml())
        size = f"{config.cluster.workers} workers, ZeRO-{config.cluster.zero_stage}"
        terminal.line(f"run {folder.name}: {config.model.kind}, {size}")
        if lent is None:
            terminal.line("starting (the first run on a machine compiles its kernels, about a minute)")
            crew = stack.enter_context(Crew(config.cluster, folder / "ray_train"))
        else:
            crew = lent.crew
        tracker = stack.enter_context(tracking(config, folder, terminal.line, *belongs))
        summary = _run(Job(config, folder, crew.foreman, until, save_after), crew, tracker, terminal, stop)

    if not summary:
        return {}
    (folder / REPORTED).touch()
    print(f"done in {duration(time.perf_counter() - started)}")
    print("\n".join(describe_summary(summary)))
    print(f"  files       {folder} (report.html, summary.json, metrics.jsonl, plans, figures, logs)")
    print(f"  checkpoint  {summary['checkpoint']}")
    if summary["mlflow_run_id"]:
        print(f"  MLflow      {mlflow_command(config)}")
    return summary


def _run(job: Job, crew: Crew, tracker: RunTracker, terminal: Terminal, stop: StopRequest) -> dict[str, Any]:
    """Train, then write the summary and the report."""
    config, folder = job.config, job.folder
    follower = Follower(job, tracker, terminal)
    try:
        crew.train(job, follower, terminal, stop)
    finally:
        follower.stop()
    if follower.failure is not None:
        raise follower.failure
    assert follower.stopped is not None, "else the crew would have raised"
    if follower.stopped < job.until:
        assert stop.signal is not None, "workers end early only when they are asked to"
        how = f"stopped after step {follower.stopped} of {config.train.steps}"
        raise Interrupted(f"{how}; the same command continues from there", stop.signal)
    if job.until < config.train.steps:
        return {}
    truncations = [cut.as_dict() for cut in follower.cuts]
    summary = write_summary(config, folder, truncations, tracker.mlflow_run_id, follower.checkpoint)
    write_report(folder)
    hand_over(folder, tracker)
    return summary


def _check_data(config: RunConfig, data: Path, earlier: Manifest | None) -> None:
    """Open both splits once, so that a dataset that is damaged, too small or changed is found before Ray starts."""
    TrainBatches(data, config.seq_len, config.train.batch_size, config.seed, 0, 1).at(1)
    next(validation_batches(data, config.seq_len, 1, 1, 0, 1))
    if earlier and earlier.data_sha256 != describe(data).sha256["train"]:
        raise UserError(
            f"run {config.storage / config.name} cannot continue: the data at {data} is not what it was trained on"
        )


def _check_teacher(config: RunConfig, data: Path) -> None:
    if config.train.distill is None:
        return
    teacher = load_model(config.train.distill.teacher)
    with torch.device("meta"):
        student = build_model(config.model, describe(data).task, config.model.state_dims)
    if (type(teacher), teacher.answers) != (type(student), student.answers):
        raise UserError(
            f"train.distill.teacher {config.train.distill.teacher} is a {type(teacher).__name__} of {teacher.answers} "
            f"answers; this task needs a {type(student).__name__} of {student.answers}"
        )
