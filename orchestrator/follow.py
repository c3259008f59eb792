"""The driver's view of a run: rank 0's events become metrics, artifacts, and lines on the terminal."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from dataclasses import replace
from typing import Any

import ray

from compression.plan import TruncationPlan
from orchestrator.errors import TrainingError
from orchestrator.events import (
    CutRecord,
    Event,
    Job,
    Lost,
    Measured,
    Probed,
    Reserved,
    RolledBack,
    Saved,
    Started,
    Stopped,
)
from orchestrator.run_folder import plan_path
from orchestrator.terminal import Terminal, count, dims, duration
from orchestrator.tracking import Tracker

PATIENCE_S = 0.5  # for events to gather, where nobody waits for them


class Follower:
    """Drains the coordinator while the main thread waits for the training to end."""

    def __init__(self, job: Job, tracker: Tracker, terminal: Terminal) -> None:
        self.cuts: list[CutRecord] = []
        """Of the whole run, those before it was continued included."""
        self.checkpoint: str | None = None
        self.step = 0
        self.stopped: int | None = None
        """The step after which the workers have ended."""
        self.ended = threading.Event()
        """Set once nothing more is followed: the workers have ended, or the recording has failed."""
        self.running = False
        """Whether there is a group of workers that trains."""
        self.lost = 0
        """How many have failed."""
        self.reservation: Any = None
        """Ray's placement group of the workers."""
        self.failure: Exception | None = None
        """What ended the recording, if anything did; nobody would read the rest of the training."""
        self._folder = job.folder
        self._coordinator = job.coordinator
        self._until = job.until
        self._tracker = tracker
        self._terminal = terminal
        self._dims: list[float] = [*job.config.model.state_dims]
        self._recent: deque[dict[str, float]] = deque(maxlen=10)
        self._val_loss: float | None = None
        self._stop = threading.Event()
        self._end_workers = False
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self._thread.start()

    def end_workers(self) -> bool:
        """Have the workers save and end after the next step that they report; False where they know already."""
        known, self._end_workers = self._end_workers, True
        return not known

    def stop(self) -> None:
        """Take what is left and end."""
        self._stop.set()
        self._thread.join()
        self._terminal.finish()

    def _follow(self) -> None:
        try:
            while self.stopped is None and not self._stop.is_set():
                self._take(PATIENCE_S)
            if self.stopped is None:
                self._take(0)
        except OSError as error:
            self.failure = TrainingError(f"the run cannot be recorded in {self._folder}: {error.strerror or error}")
        except Exception as error:  # noqa: BLE001 -- handed to the main thread, which raises it
            self.failure = error
        finally:
            self.ended.set()

    def _take(self, patience: float) -> None:
        events: list[Event] = ray.get(self._coordinator.drain.remote(self._end_workers, patience))
        for event in events:
            self._handle(event)
        if self._recent:
            self._terminal.progress(self._progress())

    def _handle(self, event: Event) -> None:
        match event:
            case Reserved(group):
                self.reservation = group
            case Started(step, checkpoint, cuts, sizes, parameters, scans):
                self.running = True
                self.step, self.checkpoint, self.cuts, self._dims = step, checkpoint, list(cuts), [*sizes]
                self._recent.clear()
                how = f"continued after step {step}" if step else "started"
                self._terminal.line(f"{how}: {count(parameters)} parameters, {self._until} steps, {scans}")
            case Lost(reason):
                self.running = False
                self.lost += 1
                self._terminal.line(f"workers lost after step {self.step} ({reason}); starting them again")
            case Measured(step, metrics):
                self._tracker.log(step, metrics)
                if "train_loss" in metrics:
                    self.step = step
                    self._recent.append(metrics)
                self._val_loss = metrics.get("val_loss", self._val_loss)
                if "d_state_00" in metrics:
                    self._dims = [value for key, value in sorted(metrics.items()) if key.startswith("d_state_")]
            case Probed(plan, cut):
                self._tracker.artifact(plan_path(self._folder, plan), "plans")
                self._tracker.log(plan.step, movement(plan))
                if cut is None:
                    reasons = "; ".join(sorted({layer.reason for layer in plan.layers}))
                    moved = describe_movement(plan)
                    self._terminal.line(f"probe at step {plan.step}: nothing cut ({reasons}){moved}")
                else:
                    self.cuts.append(cut)
                    self._terminal.line(describe_cut(cut) + describe_movement(plan))
            case RolledBack(step, reason):
                self.step = step
                self.cuts = [replace(cut, rolled_back=cut.rolled_back or cut.step >= step) for cut in self.cuts]
                self._tracker.log(step, {"rolled_back": 1.0})
                self._terminal.line(f"rolled back to step {step}, before the cut: {reason}; nothing more will be cut")
            case Saved(_, path):
                self.checkpoint = path
            case Stopped(step):
                self.stopped = step

    def _progress(self) -> str:
        """Speeds are medians of the last steps: one slow step should not make the ETA jump."""
        step_ms = statistics.median(row["step_ms"] for row in self._recent)
        loss = statistics.mean(row["train_loss"] for row in self._recent)
        held_out = f"  held-out {self._val_loss:.3f}" if self._val_loss is not None else ""
        speed = statistics.median(row["tokens_per_s"] for row in self._recent)
        return (
            f"step {self.step}/{self._until}  loss {loss:.3f}{held_out}  {count(speed)} tokens/s  "
            f"states {dims(self._dims)}  ETA {duration((self._until - self.step) * step_ms / 1000)}"
        )


def movement(plan: TruncationPlan) -> dict[str, float]:
    """Drift and overlap of each layer since the last probe, as metrics."""
    metrics = {}
    for layer in plan.layers:
        for name, value in (("hsv_drift", layer.drift), ("kept_overlap", layer.overlap)):
            if value is not None:
                metrics[f"{name}_{layer.layer:02d}"] = value
    return metrics


def describe_movement(plan: TruncationPlan) -> str:
    """The largest drift and the least overlap of any layer, which say why a cut comes now."""
    drifts = [layer.drift for layer in plan.layers if layer.drift is not None]
    overlaps = [layer.overlap for layer in plan.layers if layer.overlap is not None]
    words = f"; since the last probe {max(drifts):.1%} of the spectrum moved" if drifts else ""
    return words + (f", {min(overlaps):.0%} of the kept states stayed" if drifts and overlaps else "")


def describe_cut(cut: CutRecord) -> str:
    """A truncation in one line."""
    mass = sorted({f"{share:.1%}" for share in cut.mass_kept})
    kept = mass[0] if len(mass) == 1 else f"{min(cut.mass_kept):.1%} to {max(cut.mass_kept):.1%}"
    return (
        f"cut at step {cut.step}: states {dims(cut.dims_before)} -> {dims(cut.dims_after)}, "
        f"{kept} of the spectrum kept, layers' outputs changed by at most {max(cut.output_errors):.1%}, "
        f"held-out loss {cut.val_loss_before:.3f} -> {cut.val_loss_after:.3f}, {cut.seconds:.1f} s"
    )
