"""What a worker runs."""

from __future__ import annotations

import time
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch

from models.registry import Task
from models.scan import backends
from orchestrator import checkpoint
from orchestrator.coordinator import coordinate
from orchestrator.data import arrow
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.sources import prepare
from orchestrator.engine import Engine, learning_rate
from orchestrator.events import CutRecord, Event, Job, Measured, Probed, Saved, Started
from orchestrator.group import Group
from orchestrator.run_folder import write_plan


def train_worker(job: Job) -> None:
    """Train from the beginning or from a checkpoint to the last step, truncating on the way."""
    Worker(job).run()


class Worker:
    """One worker's place in a run: its data, its engine, and what the run has been through so far."""

    def __init__(self, job: Job) -> None:
        self.config = config = job.config
        self.folder = job.folder
        self.coordinator = job.coordinator
        context = ray.train.get_context()
        torch.set_num_threads(config.cluster.cpus_per_worker)
        backends.force(config.cluster.scan)
        device = ray.train.torch.get_device() if config.cluster.use_gpu else torch.device("cpu")
        self.group = Group(context.get_world_rank(), context.get_world_size(), device)
        self.attempt = self._begin_attempt()

        self.data = prepare(config.data, config.data_root)
        description = arrow.describe(self.data)
        self.data_sha256 = description.sha256["train"]
        self.group.prove_equal("the training data", self.data_sha256)
        self.batches = TrainBatches(
            self.data, config.seq_len, config.train.batch_size, config.seed, self.group.rank, self.group.size
        )
        self.step = 0
        self.truncations: list[CutRecord] = []
        self.engine = self._restore(job.resume_from, description.task)
        self.pending: list[tuple[int, torch.Tensor, float]] = []  # step, loss, seconds

    def run(self) -> None:
        config = self.config
        self._publish([Started(self.step, self.engine.parameter_count, self.engine.scans)])
        train, probes = config.train, set(config.probe_steps)
        for step in range(self.step + 1, train.steps + 1):
            self.step = step
            self._train_step()
            last = step == train.steps
            probe, evaluate = step in probes, last or step % train.eval_every == 0
            if probe or evaluate or step % train.log_every == 0:
                self._report_losses()
            cut = probe and self._probe()
            if evaluate and not cut:
                self._measure(self._evaluate())
            if last or cut or step % train.checkpoint_every == 0:
                self._save()
        self.engine.close()

    def _begin_attempt(self) -> int:
        """Rank 0 announces this group of workers to the coordinator and tells the others its number."""
        number = torch.zeros(1, dtype=torch.int64)
        if self.group.rank == 0:
            number += ray.get(self.coordinator.begin_attempt.remote(self.group.size))
        return int(self.group.broadcast(number, 0))

    def _restore(self, path: Path | None, task: Task) -> Engine:
        config = self.config
        if path is None:
            return Engine(config, task, config.model.state_dims, self.group)
        manifest = checkpoint.read_manifest(path)  # the driver has verified the checkpoint
        engine = Engine(config, task, manifest.state_dims, self.group)
        engine.load(checkpoint.load(path, manifest, self.group))
        self.step = manifest.step
        self.truncations = [CutRecord(**record) for record in manifest.truncations]
        return engine

    def _train_step(self) -> None:
        started = time.perf_counter()
        loss = self.engine.step(self.batches.at(self.step), self.step)
        self.pending.append((self.step, loss, time.perf_counter() - started))

    def _report_losses(self) -> None:
        """One reduction for all losses since the last report, because each costs a round trip."""
        started = time.perf_counter()
        losses = self.group.mean([loss for _, loss, _ in self.pending])
        times = [seconds for _, _, seconds in self.pending]
        if self.group.device.type == "cuda":
            # A step there only launches work, which the reduction has waited for: share the time out evenly.
            total = sum(times) + time.perf_counter() - started
            times = [total / len(times)] * len(times)
        events: list[Event] = []
        for loss, seconds, (step, _, _) in zip(losses, times, self.pending, strict=True):
            metrics = {
                "train_loss": loss,
                "learning_rate": learning_rate(step, self.config.train),
                "step_ms": 1000 * seconds,
                "tokens_per_s": self.batches.tokens_per_step / seconds,
            }
            events.append(Measured(step, metrics))
        self._publish(events)
        self.pending.clear()

    def _probe(self) -> bool:
        """Gather, decide, and cut if the plan says so."""
        started = time.perf_counter()
        steps = range(self.step, self.step - self.probe_batches, -1)
        statistics = self.engine.statistics(self.batches.at(step) for step in steps)
        plan = coordinate(self.coordinator, self.attempt, self.step, statistics, self.group)
        seconds = time.perf_counter() - started
        if self.group.rank == 0:
            write_plan(self.folder, plan)
        if not plan.truncates:
            self._publish([Probed(plan, None)])
            return False

        before = self._evaluate()
        started = time.perf_counter()
        self.engine.reshape(plan)
        self.group.prove_equal(f"the parameters after the cut at step {self.step}", self.engine.checksum())
        seconds += time.perf_counter() - started
        after = self._evaluate()
        around = {"val_loss_before": before["val_loss"], "val_loss_after": after["val_loss"]}
        self._measure(after | around)

        mass_kept = [layer.mass_kept for layer in plan.layers]
        record = CutRecord(
            step=self.step,
            dims_before=list(plan.dims_before),
            dims_after=list(plan.dims_after),
            mass_kept=mass_kept,
            seconds=seconds,
            digest=plan.digest,
            **around,
        )
        self.truncations.append(record)
        self._publish([Probed(plan, record)])
        return True

    @property
    def probe_batches(self) -> int:
        """Batches up to this step that a probe looks at; there are fewer at the very beginning."""
        assert self.config.truncation is not None
        return min(self.config.truncation.probe_batches, self.step)

    def _evaluate(self) -> dict[str, float]:
        train = self.config.train
        return self.engine.evaluate(
            validation_batches(
                self.data,
                self.config.seq_len,
                train.batch_size,
                train.eval_batches,
                self.group.rank,
                self.group.size,
            )
        )

    def _measure(self, metrics: dict[str, float]) -> None:
        dims = {f"d_state_{layer:02d}": float(dim) for layer, dim in enumerate(self.engine.state_dims)}
        self._publish([Measured(self.step, metrics | dims)])

    def _save(self) -> None:
        path = checkpoint.save(
            self.folder / "checkpoints",
            self.step,
            self.engine.state(),
            self.engine.state_dims,
            [record.as_dict() for record in self.truncations],
            self.config.model_dump(mode="json"),
            self.data_sha256,
            self.group,
        )
        self._publish([Saved(self.step, str(path))])

    def _publish(self, events: list[Event]) -> None:
        if self.group.rank == 0:
            # Waiting keeps the events in order, and a coordinator that died does not go unnoticed.
            ray.get(self.coordinator.publish.remote(events))
