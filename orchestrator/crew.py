"""A crew: Ray Train workers and their coordinator, who train one job after another.

Starting workers takes far longer than giving them something else to train, so whoever has several jobs keeps the crew.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._raylet import PlacementGroupID
from ray.exceptions import RayActorError
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup

from orchestrator.config import ClusterConfig
from orchestrator.coordinator import Coordinator
from orchestrator.errors import Interrupted, TrainingError
from orchestrator.events import Job
from orchestrator.failures import RetryPolicy, in_a_line, root_cause
from orchestrator.follow import Follower
from orchestrator.run_folder import PARTIAL, ray_log, write_whole
from orchestrator.signals import StopRequest
from orchestrator.terminal import Terminal
from orchestrator.worker import run_worker

_POLL_S = 0.25
_LEAVE_S = 60.0
# In a crew's folder: the id of a reservation, by the actor that made it.
_RESERVED = "reserved-by-"


class Foreman(Coordinator):
    """The coordinator of one run after another, which also says what the workers train next."""

    def __init__(self) -> None:
        # A process that was started again is told of the run in a moment; until then nothing is once too often.
        super().__init__(None, 0, max_failures=math.inf)
        self._number = 0
        self._job: Job | None = None
        self._closed = False
        self._news = asyncio.Event()

    async def assign(self, number: int, job: Job, failures_left: int) -> None:
        """Job `number`, from 1, is what everyone works on from now on. To hear of it again changes nothing."""
        if number != self._number:
            self._number, self._job = number, job
            self._begin_run(job.config.truncation_rule, job.config.cluster.timeout_s, failures_left)
            self._news.set()

    async def next_job(self, after: int, attempt: int) -> tuple[int, Job | None]:
        """Number and content of the job that follows, as soon as there is one; None where none will follow.

        `attempt` is the one in which the caller has ended job `after`, both 0 before the first.

        Raises:
            StaleAttemptError: this process was started since, so what it was told of that job's end may be lost.
        """
        if after and self._number <= after and not self._closed:
            self._refuse_stale(attempt)
        while self._number <= after and not self._closed:
            self._news.clear()
            await self._news.wait()
        return self._number, None if self._closed else self._job

    async def dismiss(self) -> None:
        """Whoever asks for a job hears that there is none."""
        self._closed = True
        self._news.set()


class Crew:
    """Workers of one cluster config, who start with the first job."""

    def __init__(self, cluster: ClusterConfig, folder: Path, log: Path | None = None) -> None:
        """`folder` is Ray Train's, and `log` is where the workers' output goes: by default to that of each run."""
        self.cluster = cluster
        self.log = log
        self._folder = folder
        # Its process may die like a worker's: whoever calls meanwhile waits until Ray has started it again.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        # All workers wait here at once, perhaps beside those of a group that is dying: Ray would let 1,000 calls wait.
        options["max_concurrency"] = 1000 + 2 * cluster.workers.max
        self.foreman = ray.remote(Foreman).options(**options).remote()
        self._number = 0
        self._fit: Future[Any] | None = None
        self._at_work = False
        self._reservation: PlacementGroup | None = None
        actor = ray.get_runtime_context().get_actor_id()
        self._note = folder / f"{_RESERVED}{actor}" if actor is not None else None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; those who wait for a job end by themselves.

        What runs them has to have ended too before Ray is shut down: it would end this process with exit code 1.
        """
        if self._fit is not None and not self._at_work:
            ray.get(self.foreman.dismiss.remote())
            wait([self._fit], timeout=_LEAVE_S)
        ray.kill(self.foreman)
        self._release()

    def train(self, job: Job, follower: Follower, terminal: Terminal, stop: StopRequest) -> None:
        """Have the workers train a job to its end, or until what they report cannot be recorded any more.

        When Ray Train's controller dies, which nobody else looks after, the workers are started again.

        Raises:
            TrainingError: they failed, with the first one's own words.
            Interrupted: a signal came, and there were no workers to save anything.
        """
        self._number += 1
        self._at_work = True
        left, patience = self.cluster.max_failures, math.inf
        idle_since = time.monotonic()
        while follower.failure is None and follower.stopped is None:
            # Again and again, because a process that Ray had to start again knows of no job.
            ray.get(self.foreman.assign.remote(self._number, job, self.cluster.max_failures - follower.lost))
            if self._fit is None:
                self._fit = in_a_thread(self._trainer().fit, "fit")
            follower.ended.wait(_POLL_S)
            ended = self._fit.done() and follower.stopped is None
            self._reserve(follower.reservation)
            if follower.running:
                idle_since = time.monotonic()
            elif time.monotonic() > idle_since + self.cluster.timeout_s:
                terminal.line(self._what_is_missing())
                idle_since = math.inf
            if stop.signal is not None:
                if follower.end_workers():
                    terminal.line("stopping: a checkpoint follows (a second signal ends at once, without)")
                    patience = time.monotonic() + self.cluster.timeout_s
                if not follower.running and (ended or time.monotonic() > patience):
                    where = f"stopped after step {follower.step}, when there were no workers"
                    raise Interrupted(f"{where}; the same command continues from the last checkpoint", stop.signal)
            if ended:
                self._explain(follower, terminal, left, self.log or ray_log(job.folder))
                left -= 1
        self._reserve(follower.reservation)
        self._at_work = follower.stopped is None

    def _what_is_missing(self) -> str:
        """For a person who waits: Ray Train waits in silence, and where the number of workers may vary, for ever."""
        cluster, there = self.cluster, ray.cluster_resources()
        needs, has = f"{cluster.cpus_per_worker} CPUs", f"{there.get('CPU', 0):g} CPUs"
        if cluster.use_gpu:
            needs, has = f"{needs} and a GPU", f"{has} and {there.get('GPU', 0):g} GPUs"
        return (
            f"no workers for {cluster.timeout_s} s: cluster.workers needs {cluster.workers.min} at once, each with "
            f"{needs}, and the cluster has {has}; waiting"
        )

    def _explain(self, follower: Follower, terminal: Terminal, left: int, log: Path) -> None:
        """The workers have ended before the job: say why, or raise it."""
        fit, self._fit = self._fit, None
        assert fit is not None
        try:
            fit.result()
        except ray.train.TrainingFailedError as error:
            follower.stop()  # what the workers told before they failed belongs to the message
            raise TrainingError(
                f"training failed after step {follower.step}: {_cause(error)}; details in {log}"
            ) from error
        except RayActorError as error:
            if left == 0:
                raise TrainingError(
                    f"Ray Train's controller died after step {follower.step}, as often as cluster.max_failures "
                    f"{self.cluster.max_failures} allows; the same command continues from the last checkpoint"
                ) from error
            terminal.line(f"Ray Train's controller died after step {follower.step}; starting the workers again")
            follower.running = False
            self._reserve(follower.reservation)
            self._release()

    def _reserve(self, group: PlacementGroup | None) -> None:
        """Remember what the workers occupy; in an actor, which may be killed, for `release_dead` too."""
        if group is None or group == self._reservation:
            return
        self._reservation = group
        if self._note is not None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._note, group.id.hex())

    def _release(self) -> None:
        """Give back what the workers occupied, and end those that are left.

        Ray keeps a dead controller's reservation for as long as the driver lives, and what Ray Train has to clean up
        needs the dashboard.
        """
        if self._reservation is not None:
            ray.util.remove_placement_group(self._reservation)
            self._reservation = None
        if self._note is not None:
            self._note.unlink(missing_ok=True)

    def _trainer(self) -> _Trainer:
        cluster, workers = self.cluster, self.cluster.workers
        # How long Ray Train waits for a worker that does not answer, and for nodes; it has no other way to be told.
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.timeout_s)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.timeout_s)
        # An actor more per group of workers, to announce the loss of a node to workers that do not ask for it.
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        return _Trainer(
            run_worker,
            train_loop_config={"foreman": self.foreman, "use_gpu": cluster.use_gpu},
            scaling_config=ScalingConfig(
                num_workers=workers.min if workers.min == workers.max else (workers.min, workers.max),
                use_gpu=cluster.use_gpu,
                resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": int(cluster.use_gpu)},
            ),
            torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo", timeout_s=cluster.timeout_s),
            # Ray Train would continue a run whose name and path it knows; that is for our checkpoints to decide.
            run_config=ray.train.RunConfig(
                name=f"{time.time_ns()}",
                storage_path=str(self._folder),
                # The workers' failures are counted by the coordinator, see RetryPolicy.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=cluster.max_failures),
                callbacks=[RetryPolicy(self.foreman)],
            ),
        )


def release_dead(folder: Path, all_are: bool = False) -> None:
    """Give back what crews with this folder occupy whose process was killed; `all_are`: whatever Ray says of them.

    In the driver that started them, whose reservations Ray takes these for.
    """
    for note in folder.glob(f"{_RESERVED}*"):
        if note.suffix == PARTIAL:
            continue  # its crew writes it now, or was killed before it had workers
        actor = ray._private.state.actors(note.name.removeprefix(_RESERVED))
        if all_are or actor["State"] == "DEAD":
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(note.read_text())))
            note.unlink(missing_ok=True)


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Without two actors that Ray Train starts and that do nothing here.

    One gives back what a dead controller has reserved, as `Crew` does. It is detached and asks the dashboard every
    second, so where there is none it helps nobody and, on a cluster that lives on, never ends (2.60,
    placement_group_cleaner.py, `_monitor_loop`). The other shares out Ray Data's datasets, of which there are none.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        idle = {"PlacementGroupCleanerCallback", "DatasetsCallback"}
        return [callback for callback in callbacks if type(callback).__name__ not in idle]


def in_a_thread(fit: Callable[[], Any], name: str) -> Future[Any]:
    """Run Ray Train or Ray Tune to its end.

    In a thread, because in the main one they take SIGINT for themselves, and Ray Train ends the process without a word.
    In a daemon, because a call that Ray's shutdown overtakes may never return.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(fit())
        except Exception as error:  # noqa: BLE001 -- raised in the main thread
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _cause(error: BaseException) -> str:
    """The first worker's own words, without the layers that Ray wraps around them."""
    if isinstance(error, ray.train.WorkerGroupError):
        error = error.worker_failures[min(error.worker_failures)]
    elif isinstance(error, ray.train.ControllerError):
        error = error.controller_failure
    return in_a_line(root_cause(error))
