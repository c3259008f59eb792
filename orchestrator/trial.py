"""One trial of a sweep, as Ray Tune runs it: a driver that keeps its crew of workers for the next one."""

from __future__ import annotations

import fcntl
import json
import queue
import secrets
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune

from orchestrator import launch
from orchestrator.config import RunConfig
from orchestrator.crew import Crew
from orchestrator.errors import Interrupted, TrainingError
from orchestrator.failures import in_a_line
from orchestrator.launch import Lent
from orchestrator.mlflow_tracker import Nesting
from orchestrator.run_folder import metrics_so_far, ray_log, write_whole
from orchestrator.signals import StopRequest
from orchestrator.space import Space
from orchestrator.trial_folder import AGAIN, OUTCOME, POINT, PROMOTED, PRUNED, conclude, final, measured, status_of
from orchestrator.trunk import Trunk, branch

# In the sweep's: that a signal wants its trials to save and end.
STOPPING = "stopping"
# In what Ray Tune is told: the name of the trial's folder.
FOLDER = "folder"
POLL_S = 1.0


@dataclass(frozen=True)
class Sweep:
    """What all trials of one start of a sweep have in common. `base.storage` is the sweep's folder."""

    base: RunConfig
    space: Space
    trunks: tuple[Trunk, ...]
    parent_run_id: str | None
    rung: int | None = None
    """The step after which trials end, under ASHA, but for those that are promoted."""
    start: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells apart the starts of a sweep that was interrupted."""

    def trunk_of(self, trial: RunConfig) -> Trunk | None:
        """What a trial shares with others, if it does."""
        return next((trunk for trunk in self.trunks if trunk.begins(trial)), None)


class Progress:
    """The tracker that tells Ray Tune of every evaluation: folder, step, and what can be an objective."""

    def __init__(self, folder: str, results: queue.Queue[Any]) -> None:
        self._folder = folder
        self._results = results

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "val_loss" in metrics:
            self._results.put({FOLDER: self._folder, "step": step} | measured(metrics))

    def artifact(self, path: Path, folder: str = "") -> None: ...

    def close(self, status: str) -> None: ...


class Trial(tune.Trainable):  # type: ignore[misc]
    """Trains in a thread; `step` waits for the next evaluation. A trial that is stopped ends with a checkpoint.

    Ray Tune stops one when `step` has returned, and gives it ten seconds: too late where a signal ends the sweep, which
    trials find out for themselves.
    """

    def setup(self, config: dict[str, Any], sweep: Sweep) -> None:
        self._sweep = sweep
        base = sweep.base
        self._crew = Crew(base.cluster, workers_of(base.storage), ray_log(base.storage))
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        result: Any = None
        while result is None:
            if (self._sweep.base.storage / STOPPING).exists():
                self._stop.signal = signal.SIGTERM
            with suppress(queue.Empty):
                result = self._results.get(timeout=POLL_S)
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[no-any-return]

    def cleanup(self) -> None:
        self._end()
        self._crew.close()

    def _begin(self, point: dict[str, Any]) -> None:
        self._results: queue.Queue[Any] = queue.Queue()
        self._stop = StopRequest()
        folder = _trial_folder(self._sweep, self.trial_id, point)
        self._thread = threading.Thread(target=self._run, args=(folder, dict(point)), name="trial", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._stop.signal = signal.SIGTERM
        self._thread.join()

    def _run(self, folder: Path, point: dict[str, Any]) -> None:
        sweep = self._sweep
        base = sweep.base.model_copy(update={"name": folder.name})
        result: Any
        words: str | None
        try:
            for name in (OUTCOME, "report.html"):  # of one that has failed, and is tried again
                (folder / name).unlink(missing_ok=True)
            config = sweep.space.config(base, point)
            progress = Progress(base.name, self._results)
            tags = {"trial": base.name}
            if (trunk := sweep.trunk_of(config)) is not None:
                lent = Lent(self._crew, self._stop, Nesting(sweep.parent_run_id, {"trial": trunk.run.name}))
                step = branch(config, trunk.run, config.uncut_steps, lent, trunk.saved, trunk.ahead)
                tags |= {"trunk": trunk.run.name, "trunk_step": str(step)}
            rung = None if (folder / PROMOTED).exists() else sweep.rung
            nesting = Nesting(sweep.parent_run_id, tags, folder / PRUNED, to_its_end=rung is None)
            summary = launch.train(config, Lent(self._crew, self._stop, nesting, progress, rung))
            if rung is None:
                status, end = "finished", final(summary) | {"step": summary["steps"]}
            else:
                [there] = [row for row in metrics_so_far(folder) if row["step"] == rung]
                status, end = "stopped", measured(there) | {"step": rung}
            words, result = None, {FOLDER: base.name, "done": True} | end
        except Interrupted as error:
            # As such it would end Ray's process.
            status, words, result = "stopped", None, TrainingError(str(error))
        except Exception as error:  # noqa: BLE001 -- raised where Ray Tune waits for the next result
            status, words, result = "failed", in_a_line(error), error
        try:
            conclude(folder, status, words)
        except OSError as error:  # a full disk must not leave Ray Tune waiting
            result = error
        self._results.put(result)


def _trial_folder(sweep: Sweep, trial_id: str, point: Mapping[str, Any]) -> Path:
    """The folder of a trial, numbered in the order of their beginnings; of one that an earlier start left, its own."""
    note = {"trial_id": trial_id, "start": sweep.start, "point": dict(point)}
    place = sweep.base.storage
    with (place / "trials.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another trial may begin at the same time
        taken = [int(path.name.removeprefix("trial-")) for path in place.glob("trial-*")]
        folder = place / f"trial-{1 + max(taken, default=-1):05d}"
        for path in sorted(place.glob(f"trial-*/{POINT}")):
            other = json.loads(path.read_text())
            if other["point"] == note["point"] and other["start"] != sweep.start and status_of(path.parent)[0] in AGAIN:
                folder = path.parent
                break
        folder.mkdir(exist_ok=True)
        write_whole(folder / POINT, json.dumps(note) + "\n")
    return folder


def workers_of(sweep: Path) -> Path:
    """Where a sweep's crews leave what Ray Train writes."""
    return sweep / "ray_train"
