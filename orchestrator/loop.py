"""What a worker runs."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import ray
import ray.train
import ray.train.torch
import torch

from compression.plan import TruncationPlan
from compression.planning import Occasion, keep_everything
from models.registry import Task
from models.scan import backends
from orchestrator import checkpoint
from orchestrator.checkpoint import Manifest
from orchestrator.checkpoint_writer import Writer
from orchestrator.config import GuardConfig, Pace
from orchestrator.coordinator import UnrankableError, coordinate
from orchestrator.data import arrow
from orchestrator.data.batches import Batch, TrainBatches, validation_batches
from orchestrator.data.sources import prepare
from orchestrator.engine import Engine
from orchestrator.events import CutRecord, Event, Job, Measured, Probed, RolledBack, Saved, Started, Stopped
from orchestrator.failpoints import reach
from orchestrator.failures import root_cause
from orchestrator.filesystem import Folder
from orchestrator.group import Group, limit_waiting
from orchestrator.guard import Watch
from orchestrator.retention import prune
from orchestrator.run_folder import drop_plans_after, next_attempt, write_plan
from orchestrator.sharded_state import ShardedState
from orchestrator.storage import checkpoints_of


def train_worker(job: Job) -> int:
    """Train from the beginning or from a checkpoint to the last step, truncating on the way; the attempt's number."""
    worker = Worker(job)
    worker.run()
    return int(worker.attempt)


class Worker:
    """One worker's place in a run: its data, its engine, and what the run has been through so far."""

    def __init__(self, job: Job) -> None:
        self.config = config = job.config
        self.folder = job.folder
        self.until = job.until
        self.save_after = job.save_after
        self.coordinator = job.coordinator
        context = ray.train.get_context()
        torch.set_num_threads(config.cluster.cpus_per_worker)
        backends.force(config.cluster.scan)
        device = ray.train.torch.get_device() if config.cluster.use_gpu else torch.device("cpu")
        self.group = Group(context.get_world_rank(), context.get_world_size(), device)

        self.data = prepare(config.data, config.data_root)
        description = arrow.describe(self.data)
        self.data_sha256 = description.sha256["train"]
        self.group.prove_equal("the training data", self.data_sha256)
        self.batches = TrainBatches(
            self.data, config.seq_len, config.train.batch_size, config.seed, self.group.rank, self.group.size
        )
        self.step = 0
        self.train_seconds = 0.0
        self.truncations: list[CutRecord] = []
        self.watch: Watch | None = None
        self.val_loss: float | None = None
        self.last_plan: TruncationPlan | None = None
        self.checkpoints = checkpoints_of(job.folder, config.checkpoints.storage, config.checkpoints.retry_s)
        self.writer = Writer(self.group.rank, self.group.size, config.cluster.timeout_s)
        self.stopping = False
        taken_over = self.group.together(lambda: self._take_over() if self.group.rank == 0 else None)
        self.attempt, step = self.group.from_first(taken_over)
        self.resumed_from = checkpoint.at(self.checkpoints, step) if step else None
        self.engine = self._start(description.task)
        limit_waiting(config.cluster.timeout_s)
        self.pending: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []  # step, loss, gradient norm, seconds

    def run(self) -> None:
        config = self.config
        engine = self.engine
        path = str(self.resumed_from) if self.resumed_from else None
        cuts, dims = self.truncations, list(engine.state_dims)
        self._publish([Started(self.step, path, cuts, dims, engine.parameter_count, engine.scans)])
        train, probes = config.train, set(config.probe_steps)
        if self.step == train.steps:
            # The machine that had its metrics may be gone, and the summary needs the last ones.
            self._publish([Measured(self.step, self._evaluate() | self._standing())])
        stop = self.step < self.until and self._stop_wanted()
        while self.step < self.until and not stop:
            self.step += 1
            self._train_step()
            self.writer.check()
            reach("step", self.step)
            last = self.step == self.until
            probe = self.step in probes and self._may_cut()
            evaluate = self.step == train.steps or self.step % train.eval_every == 0
            due = last or self.step % train.checkpoint_every == 0 or self.step in self.save_after
            report = due or probe or evaluate or self.step % train.log_every == 0
            if report and not self._report_losses():
                continue
            before = self.step
            cut = probe and self._probe()
            if evaluate and not cut and self.step == before:
                self._measure(self._evaluate())
            if self.step != before:
                continue  # a cut was taken back
            stop = report and not last and self._stop_wanted()
            if due or cut or stop:
                self._save(after_cut=cut)
        self.writer.wait()
        self.engine.close()
        self._publish([Stopped(self.step)])

    def _take_over(self) -> tuple[int, int]:
        """Rank 0 begins a new attempt, which older groups of workers are refused from then on.

        Returns its number and the step of the last complete checkpoint, which is verified; 0 where there is none.
        """
        self.checkpoints.expect()
        path = checkpoint.newest(self.checkpoints)
        manifest = checkpoint.verify(path) if path else None
        step, previous = (manifest.step, _plan_in(manifest)) if manifest else (0, None)
        drop_plans_after(self.folder, step)
        attempt = next_attempt(self.folder)
        ray.get(self.coordinator.begin_attempt.remote(attempt, self.group.size, previous))
        return attempt, step

    def _start(self, task: Task) -> Engine:
        config, path = self.config, self.resumed_from
        if path is None:
            return Engine(config, task, config.model.state_dims, self.group)
        manifest, state = self.group.together(lambda: self._read(path, checkpoint.read_manifest))
        engine = Engine(config, task, manifest.state_dims, self.group)
        engine.load(state)
        self.step, self.train_seconds = manifest.step, manifest.train_seconds
        self.watch, self.val_loss = manifest.watch, manifest.val_loss
        self.last_plan = _plan_in(manifest)
        self.truncations = [CutRecord(**record) for record in manifest.truncations]
        return engine

    def _read(self, path: Folder, read: Callable[[Folder], Manifest]) -> tuple[Manifest, ShardedState]:
        """The manifest of a checkpoint, as `read` gives it, and this rank's share of the state."""
        manifest = read(path)
        return manifest, checkpoint.load(path, manifest, self.group)

    @property
    def _pace(self) -> Pace:
        return self.config.pace(any(not cut.rolled_back for cut in self.truncations))

    def _may_cut(self) -> bool:
        """Nothing more is cut after a cut that was taken back."""
        rule = self.config.truncation_rule
        assert rule is not None
        return rule.may_cut(self.engine.state_dims) and not any(cut.rolled_back for cut in self.truncations)

    @property
    def _guard(self) -> GuardConfig | None:
        return self.config.truncation.guard if self.config.truncation else None

    def _train_step(self) -> None:
        started = time.perf_counter()
        pace = self._pace
        loss = self.engine.step(self.batches.at(self.step, pace.batch), self.step, pace)
        self.pending.append((self.step, loss, self.engine.gradient_norm, time.perf_counter() - started))

    def _report_losses(self) -> bool:
        """One reduction for all losses and gradients since the last report, because each costs a round trip.

        False where one is no number and the last cut was taken back for it.

        Raises:
            FloatingPointError: as `_give_up`.
        """
        started = time.perf_counter()
        pending, self.pending = self.pending, []
        numbers = self.group.mean([number for _, loss, norm, _ in pending for number in (loss, norm)])
        times = [seconds for _, _, _, seconds in pending]
        if self.group.device.type == "cuda":
            # A step there only launches work, which the reduction has waited for: share the time out evenly.
            total = sum(times) + time.perf_counter() - started
            times = [total / len(times)] * len(times)
        self.train_seconds += sum(times)
        events: list[Event] = []
        lost = []
        for (step, *_), loss, norm, seconds in zip(pending, numbers[::2], numbers[1::2], times, strict=True):
            metrics = {
                "train_loss": loss,
                "gradient_norm": norm,
                "learning_rate": self.config.train.learning_rate(step) * self._pace.lr,
                "step_ms": 1000 * seconds,
                "tokens_per_s": self.batches.tokens_per_step * self._pace.batch / seconds,
            }
            events.append(Measured(step, metrics))
            named = (("training loss", loss), ("gradient", norm))
            lost += [f"the {what} of step {step}" for what, number in named if not math.isfinite(number)]
        self._publish(events)
        if lost:
            self._give_up(lost[0])
        return not lost

    def _give_up(self, what: str) -> None:
        """Take the last cut back because `what` is no number, which no patience mends.

        Raises:
            FloatingPointError: no guard watches the last cut; on every worker.
        """
        if self.watch is None:
            raise FloatingPointError(f"{what} is no number; train.lr may be too high")
        self._roll_back(f"{what} is no number")

    def _probe(self) -> bool:
        """Gather, decide, and cut if the plan says so."""
        started = time.perf_counter()
        rule, probes = self.config.truncation_rule, self.config.probe_steps
        assert rule is not None
        steps = range(self.step, self.step - self.probe_batches, -1)
        statistics = self.engine.statistics(self.batches.at(step, self._pace.batch) for step in steps)
        reach("statistics", self.step)
        occasion = Occasion(self.step, self.attempt, probes.index(self.step) + 1, len(probes))
        try:
            plan = coordinate(self.coordinator, rule, occasion, statistics, self.group)
        except UnrankableError as error:
            if self.watch is None:
                raise
            self._roll_back(str(root_cause(error)))
            return False
        probe_seconds = time.perf_counter() - started
        self.train_seconds += probe_seconds
        self._publish([Measured(self.step, {"probe_ms": 1000 * probe_seconds})])
        before: dict[str, float] = {}
        if plan.truncates:
            plan, before = self.engine.certify(plan, self._held_out())
            # An earlier cut first: what this one is measured by must not be what that one has cost.
            if not self._judge(before):
                return False
            if not all(math.isfinite(layer.output_error or 0.0) for layer in plan.layers):
                plan = keep_everything(plan.dims_before, occasion, "kept: cut, a layer's output would not be finite")
        self._keep_plan(plan)
        if not plan.truncates:
            self._publish([Probed(plan.remembered(), None)])
            return False

        guard = self._guard
        if guard is not None and self.watch is None:
            saving = time.perf_counter()
            self._write_checkpoint(checkpoint.uncut_at(self.checkpoints, self.step), after_cut=False)
            self.watch = Watch(step=self.step, before=before[guard.metric], evaluations_left=guard.patience + 1)
            started += time.perf_counter() - saving  # no checkpoint's time is the training's
        reach("plan", self.step)
        self.engine.reshape(plan)
        reach("reshape", self.step)
        self.group.prove_equal(f"the parameters after the cut at step {self.step}", self.engine.checksum())
        seconds = time.perf_counter() - started
        self.train_seconds += seconds - probe_seconds
        after = self._evaluate()
        record = CutRecord(
            step=self.step,
            dims_before=list(plan.dims_before),
            dims_after=list(plan.dims_after),
            mass_kept=[layer.mass_kept for layer in plan.layers],
            error_bounds=[layer.error_bound for layer in plan.layers],
            output_errors=[layer.output_error or 0.0 for layer in plan.layers],
            seconds=seconds,
            digest=plan.digest,
            val_loss_before=before["val_loss"],
            val_loss_after=after["val_loss"],
        )
        self.truncations.append(record)
        self._publish([Probed(plan.remembered(), record)])
        around = {"val_loss_before": before["val_loss"], "val_loss_after": after["val_loss"]}
        return self._measure(after | around)

    def _keep_plan(self, plan: TruncationPlan) -> None:
        self.last_plan = plan.remembered()
        if self.group.rank == 0:
            write_plan(self.folder, plan)

    @property
    def probe_batches(self) -> int:
        """Batches up to this step that a probe looks at; there are fewer at the very beginning."""
        assert self.config.truncation is not None
        return min(self.config.truncation.probe_batches, self.step)

    def _held_out(self) -> Iterator[Batch]:
        train, group = self.config.train, self.group
        rows, size = train.eval_batches * train.batch_size, train.batch_size // train.accumulation
        return validation_batches(self.data, self.config.seq_len, rows, size, group.rank, group.size)

    def _evaluate(self) -> dict[str, float]:
        return self.engine.evaluate(self._held_out())

    def _standing(self) -> dict[str, float]:
        """As metrics, the time spent so far, and the state dimensions of each layer and together."""
        dims = self.engine.state_dims
        by_layer = {f"d_state_{layer:02d}": float(dim) for layer, dim in enumerate(dims)}
        return {"train_seconds": self.train_seconds, "states": float(sum(dims))} | by_layer

    def _measure(self, metrics: dict[str, float]) -> bool:
        """Publish what was measured; False where that made the guard take the last cut back.

        Raises:
            FloatingPointError: as `_give_up`, for the held-out loss.
        """
        self._publish([Measured(self.step, metrics | self._standing())])
        return self._judge(metrics)

    def _judge(self, metrics: dict[str, float]) -> bool:
        """Hold an evaluation against the guard; False where the last cut was taken back.

        Raises:
            FloatingPointError: as `_give_up`, for the held-out loss.
        """
        self.val_loss = metrics["val_loss"]
        if not math.isfinite(self.val_loss):
            self._give_up(f"the held-out loss after step {self.step}")
            return False
        guard = self._guard
        if self.watch is None or guard is None:
            return True
        self.watch = self.watch.after_another()
        value = metrics[guard.metric]
        verdict = self.watch.verdict(guard, value, last=self.step == self.config.train.steps)
        if verdict == "hurt":
            before = f"{guard.metric} was {self.watch.before:.4f} there"
            self._roll_back(f"{before} and is {value:.4f} after step {self.step}")
        elif verdict == "recovered":
            self.watch = None
        return verdict != "hurt"

    def _roll_back(self, reason: str) -> None:
        """Back to right before the cut: weights, moments, dimensions and data position, which is the step."""
        assert self.watch is not None
        step = self.watch.step
        self._publish([RolledBack(step, reason)])
        self.group.together(self.writer.wait)  # rank 0 for the whole checkpoint
        uncut = checkpoint.uncut_at(self.checkpoints, step)
        read = checkpoint.verify if self.group.rank == 0 else checkpoint.read_manifest
        manifest, state = self.group.together(lambda: self._read(uncut, read))
        assert manifest.step == step, f"the checkpoint before the cut is of step {manifest.step}, not {step}"
        self.engine.restore(manifest.state_dims, state)
        self.step, self.train_seconds = step, manifest.train_seconds
        self.watch, self.val_loss = None, manifest.val_loss
        self.truncations = [replace(cut, rolled_back=cut.step >= step) for cut in self.truncations]
        # The cut has been measured at this step, too.
        self._publish([Measured(step, self._evaluate() | self._standing())])
        self._save(after_cut=False)

    def _save(self, after_cut: bool) -> None:
        path = checkpoint.at(self.checkpoints, self.step)
        saved = Saved(self.step, str(path))

        def after() -> None:
            ray.get(self.coordinator.publish.remote(self.attempt, [saved]))
            prune(self.checkpoints, saved.step, self.config.checkpoints)

        self._write_checkpoint(path, after_cut, after)

    def _write_checkpoint(self, path: Folder, after_cut: bool, *after: Callable[[], None]) -> None:
        """Begin to write; training waits for the checkpoint before this one, and for the copy of its state.

        Nothing is written of a state that is NaN or infinite anywhere. `after`: what rank 0 does once the checkpoint is
        complete, if anything.

        Raises:
            FloatingPointError: as `_give_up`, for a parameter or moment.
        """
        self.group.together(self.writer.wait)
        state = self.engine.state()
        if float(self.group.sum(torch.tensor([float(not state.is_finite())]))) > 0:
            self._give_up(f"a parameter or moment after step {self.step}")
            return
        manifest = Manifest(
            step=self.step,
            optimizer_step=state.optimizer_step,
            train_seconds=self.train_seconds,
            state_dims=self.engine.state_dims,
            shapes=state.shapes,
            shard_of=state.owners,
            shards=[],
            truncations=[record.as_dict() for record in self.truncations],
            watch=self.watch,
            probe=self.last_plan.to_json() if self.last_plan else None,
            val_loss=self.val_loss,
            after_cut=after_cut,
            config=self.config.model_dump(mode="json"),
            data_sha256=self.data_sha256,
        )
        token = self.group.broadcast(torch.tensor([secrets.randbits(63)]), 0)
        self.writer.save(path, f"{int(token):016x}", manifest, state, self._recorded, *after)

    def _recorded(self) -> None:
        """A checkpoint must not be ahead of the run's metrics: nobody would measure those steps again.

        Nor may workers complete one when others have taken over.

        Raises:
            StaleAttemptError: they have.
        """
        ray.get(self.coordinator.recorded.remote(self.attempt))

    def _publish(self, events: list[Event]) -> None:
        if self.group.rank == 0:
            # Waiting keeps the events in order, and a coordinator that died does not go unnoticed.
            self.stopping = ray.get(self.coordinator.publish.remote(self.attempt, events))

    def _stop_wanted(self) -> bool:
        """Whether the driver wants an end, as rank 0 has just heard: all ranks stop after the same step."""
        return bool(self.group.broadcast(torch.tensor([float(self.stopping)]), 0))


def _plan_in(manifest: Manifest) -> TruncationPlan | None:
    return TruncationPlan.from_json(manifest.probe) if manifest.probe is not None else None
