"""What several runs share: the full-size training up to their first cuts, trained once.

A run that differs from the others only from its first probe on begins with the trunk's last checkpoint before it.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO

from orchestrator import checkpoint, launch
from orchestrator.checkpoint import MANIFEST, CheckpointError, Manifest
from orchestrator.config import CheckpointsConfig, RunConfig
from orchestrator.config_changes import refuse_other_run
from orchestrator.errors import Interrupted, TrainingError
from orchestrator.filesystem import Folder
from orchestrator.launch import Lent
from orchestrator.retention import prune
from orchestrator.run_folder import metrics_so_far, write_whole
from orchestrator.signals import StopRequest
from orchestrator.space import Point, Space
from orchestrator.storage import checkpoints_of

TRUNK = "trunk"
# Where first cuts are many or not known beforehand, a trial begins at most this share of the training before its own.
SPACING = 0.01
# Of the training, what a trunk that dies loses at most.
LOSS = 0.05
POLL_S = 0.1


def untruncated(config: RunConfig, name: str) -> RunConfig:
    """The same run without truncation, under another name."""
    return config.model_copy(update={"name": name, "truncation": None})


def trunk_config(trial: RunConfig) -> RunConfig:
    """The full-size run of a trial, which keeps all its checkpoints: any of them may be another trial's beginning."""
    trunk, steps = untruncated(trial, TRUNK), trial.train.steps
    every = min(trial.train.checkpoint_every, max(1, int(LOSS * steps)))
    train = trunk.train.model_copy(update={"checkpoint_every": every})
    checkpoints = trunk.checkpoints.model_copy(update={"keep_last": steps, "keep_best": 0})
    return trunk.model_copy(update={"train": train, "checkpoints": checkpoints})


def saved_after(starts: frozenset[int], steps: int) -> frozenset[int]:
    """After which steps of a training a trunk is saved: the known `starts`, or so many that any is near one."""
    if 0 < len(starts) <= 1 / SPACING:
        return starts
    every = max(1, int(SPACING * steps))
    return frozenset(range(every, steps, every))


@dataclass(frozen=True)
class Trunk:
    """What several trials begin with."""

    run: RunConfig
    saved: frozenset[int]
    """Steps after which it is saved, for trials to begin there."""
    ahead: int
    """The last step that one begins after, as far as that is known."""

    def begins(self, trial: RunConfig) -> bool:
        """Whether the trial differs only from its first cut on."""
        return trunk_config(trial).model_copy(update={"name": self.run.name}) == self.run


def shared_trunks(
    space: Space, base: RunConfig, points: Sequence[Point], further: Sequence[Point] = ()
) -> tuple[Trunk, ...]:
    """One for all trials at these points that begin alike; none for a trial that begins like no other.

    Where points are not known beforehand, one for all, if the space's edges begin alike. One for all goes as far as
    trials at `further` points need, too.
    """
    groups: dict[str, list[RunConfig]] = {}
    for point in points or space.edges():
        trial = space.config(base, point)
        groups.setdefault(trunk_config(trial).model_dump_json(), []).append(trial)
    one_for_all = len(groups) == 1
    if not one_for_all and not points:
        return ()
    later = {space.config(base, point).uncut_steps for point in further if one_for_all}
    trunks = []
    for number, trials in enumerate(groups.values()):
        if one_for_all or len(trials) > 1:
            run = trunk_config(trials[0])
            run = run if one_for_all else run.model_copy(update={"name": f"{TRUNK}-{number}"})
            starts = frozenset(trial.uncut_steps for trial in trials if points)
            trunks.append(Trunk(run, saved_after(starts, run.train.steps), max(starts | later, default=0)))
    return tuple(trunks)


def branch(
    trial: RunConfig, trunk: RunConfig, before: int, lent: Lent, saved: Collection[int] = (), ahead: int = 0
) -> int:
    """Give a trial its beginning: the trunk's last checkpoint up to step `before`; the step that it begins after.

    Where that needs more of the trunk, it is trained up to there, or to step `ahead`, which others are known to need,
    and saved after `before` and the steps of `saved` on the way. A trial that has a checkpoint of its own goes on from
    there, and one that has ended needs none. Waits while another trial extends the trunk.

    Raises:
        UserError: the trunk that is there was trained with another config.
        TrainingError: the trunk did not come as far as step `before`.
        Interrupted: a signal came while it was trained or waited for.
    """
    folder = trial.storage / trial.name
    own = checkpoints_of(folder, trial.checkpoints.storage, trial.checkpoints.retry_s)
    note = folder / "branch.json"
    if checkpoint.newest(own) is not None or (folder / "summary.json").exists():
        return int(json.loads(note.read_text())["step"]) if note.exists() else 0
    if before < 1:
        return 0
    with _alone(trunk, lent.stop):
        shared = _checkpoints(trunk)
        if _reached(shared) < before:
            try:
                launch.train(trunk, replace(lent, until=max(before, ahead), save_after=frozenset({before, *saved})))
            except TrainingError:
                if _reached(shared) < before:
                    raise
        source = checkpoint.newest(shared, before)
        if source is None:
            return 0  # so early a trial has nothing to gain
        manifest = checkpoint.verify(source)
        refuse_other_run(trunk, manifest.config)
        step = manifest.step
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in metrics_so_far(trunk.storage / trunk.name) if row["step"] <= step]
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_whole(note, json.dumps({"step": step, "trunk": trunk.name}) + "\n")
        own.create()
        _graft(source, manifest, checkpoint.at(own, step), trial)
    return step


def forget(trunk: RunConfig, policy: CheckpointsConfig) -> None:
    """Leave of a trunk's checkpoints what stays of any run's: no trial begins with one any more.

    Raises:
        TrainingError: the storage is away.
    """
    shared = _checkpoints(trunk)
    try:
        if step := _reached(shared):
            prune(shared, step, policy)
    except CheckpointError as error:
        raise TrainingError(f"{error}; the same command tries again") from error


def _checkpoints(trunk: RunConfig) -> Folder:
    return checkpoints_of(trunk.storage / trunk.name, trunk.checkpoints.storage, trunk.checkpoints.retry_s)


def _reached(shared: Folder) -> int:
    """The last step after which the trunk is saved; 0 where there is none."""
    path = checkpoint.newest(shared)
    return checkpoint.read_manifest(path).step if path is not None else 0


def _graft(source: Folder, manifest: Manifest, target: Folder, config: RunConfig) -> None:
    """Copy a checkpoint that becomes one of another run, which continues from there with its own config."""
    for shard in manifest.shards:
        content = source.read(shard.file)
        assert content is not None, "it has just been verified"
        target.write(shard.file, content)
    manifest = manifest.model_copy(update={"config": config.model_dump(mode="json")}).completed(manifest.shards)
    target.write(MANIFEST, manifest.model_dump_json(indent=1).encode())


@contextmanager
def _alone(trunk: RunConfig, stop: StopRequest) -> Iterator[None]:
    """For the duration of the block nobody else extends the trunk.

    Raises:
        Interrupted: a signal came while another one did.
    """
    sweep = trunk.storage
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / f"{trunk.name}.lock").open("a") as lock:
        while not _taken(lock):
            if stop.signal is not None:
                raise Interrupted(f"stopped before the beginning that runs of {sweep.name} share", stop.signal)
            time.sleep(POLL_S)
        yield


def _taken(lock: IO[str]) -> bool:
    """Whether this open file is locked now, for as long as it is open."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
