"""Where metrics go. JSONL in the run's folder is the ground truth; MLflow gets the same and may fail."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from orchestrator.config import RunConfig
from orchestrator.mlflow_tracker import MlflowTracker, Nesting, mlflow_tracker


class Tracker(Protocol):
    """Anything that takes metrics by optimizer step and files."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def artifact(self, path: Path, folder: str = "") -> None: ...

    def close(self, status: str) -> None:
        """`status` as MLflow spells it: FINISHED, FAILED or KILLED."""


class JsonlTracker:
    """One JSON object a line: `step`, `seconds` since the start, and what was measured at that step."""

    def __init__(self, path: Path) -> None:
        self._started = time.time()
        _drop_half_line(path)
        self._file = path.open("a", buffering=1)
        self._failed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        seconds = round(time.time() - self._started, 3)
        try:
            self._file.write(json.dumps({"step": step, "seconds": seconds} | dict(metrics)) + "\n")
        except OSError:
            self._failed = True
            raise

    def artifact(self, path: Path, folder: str = "") -> None:
        """The run's folder holds it already."""

    def close(self, status: str) -> None:
        try:
            self._file.close()
        except OSError:
            # What could not be written before is tried again here, and would hide what came of it then.
            if not self._failed:
                raise


def _drop_half_line(path: Path) -> None:
    """A run that was killed while it wrote leaves a line without an end; what follows must not join it."""
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)


class CompositeTracker:
    """Hands everything to several trackers in turn."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def artifact(self, path: Path, folder: str = "") -> None:
        for tracker in self._trackers:
            tracker.artifact(path, folder)

    def close(self, status: str) -> None:
        # Each of them, whatever happens to another.
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close, status)


class RunTracker(CompositeTracker):
    """What a run is tracked by: its folder, MLflow where the config wants it, and whoever listens."""

    def __init__(self, folder: Path, mlflow: MlflowTracker | None, listener: Tracker | None) -> None:
        trackers: list[Tracker] = [JsonlTracker(folder / "metrics.jsonl")]
        super().__init__([*trackers, *(tracker for tracker in (mlflow, listener) if tracker is not None)])
        self._mlflow = mlflow

    @property
    def mlflow_run_id(self) -> str | None:
        return self._mlflow.run_id if self._mlflow else None


@contextmanager
def tracking(
    config: RunConfig,
    folder: Path,
    warn: Callable[[str], None],
    nesting: Nesting | None = None,
    listener: Tracker | None = None,
) -> Iterator[RunTracker]:
    """Track a run for the duration of the block; how the block ends is the run's status."""
    tracker = RunTracker(folder, mlflow_tracker(config, folder, warn, nesting), listener)
    with closing(tracker):
        yield tracker


def hand_over(folder: Path, tracker: Tracker) -> None:
    """Give a tracker the files of a run that has ended.

    Its plans once more: of those of a driver that was killed MLflow may not have been told.
    """
    for part in ("plans", "figures"):
        for path in sorted((folder / part).glob("*")):
            tracker.artifact(path, part)
    for name in ("config.yaml", "summary.json", "report.html"):
        if (folder / name).exists():
            tracker.artifact(folder / name)


@contextmanager
def closing(tracker: Tracker) -> Iterator[None]:
    """Close a tracker with how the block ends."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
