"""What several runs share: the full-size training up to their first cuts, trained once.

A run that differs from the others only from its first probe on begins with the trunk's last checkpoint before it.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from orchestrator import checkpoint, launch
from orchestrator.checkpoint import MANIFEST
from orchestrator.config import RunConfig
from orchestrator.errors import Interrupted
from orchestrator.filesystem import Folder
from orchestrator.launch import Lent
from orchestrator.run_folder import metrics_so_far, write_whole
from orchestrator.signals import StopRequest
from orchestrator.space import Point, Space
from orchestrator.storage import checkpoints_of

NAME = "trunk"
# A trial begins at most this share of the training before its first cut.
SPACING = 0.01
POLL_S = 0.1


def untruncated(config: RunConfig, name: str) -> RunConfig:
    """The same run without truncation, under another name."""
    return config.model_copy(update={"name": name, "truncation": None})


def trunk_of(trial: RunConfig) -> RunConfig:
    """The full-size run of a trial, which keeps so many checkpoints that a first cut anywhere is near one."""
    trunk = untruncated(trial, NAME)
    every = max(1, int(SPACING * trial.train.steps))
    train = trunk.train.model_copy(update={"checkpoint_every": every})
    checkpoints = trunk.checkpoints.model_copy(update={"keep_last": trial.train.steps, "keep_best": 0})
    return trunk.model_copy(update={"train": train, "checkpoints": checkpoints})


def share_a_trunk(space: Space, base: RunConfig, points: Sequence[Point]) -> bool:
    """Whether trials differ only from their first cut on, as far as these points and the space's edges tell."""
    trunks = [trunk_of(space.config(base, point)) for point in (*points, *space.edges())]
    return all(trunk == trunks[0] for trunk in trunks)


def branch(trial: RunConfig, trunk: RunConfig, before: int, lent: Lent, ahead: int = 0) -> int:
    """Give a trial its beginning: the trunk's last checkpoint up to step `before`; the step that it begins after.

    The trunk is trained as far as that needs, or to step `ahead`, which others are known to need. A trial that has a
    checkpoint of its own goes on from there, and one that has ended needs none. Waits while another trial extends the
    trunk.
    """
    folder = trial.storage / trial.name
    own = checkpoints_of(folder, trial.checkpoints.storage, trial.checkpoints.retry_s)
    note = folder / "branch.json"
    if checkpoint.newest(own) is not None or (folder / "summary.json").exists():
        return int(json.loads(note.read_text())["step"]) if note.exists() else 0
    if before < 1:
        return 0
    with _alone(trunk.storage, lent.stop):
        launch.train(trunk, replace(lent, until=max(before, ahead)))
        shared = checkpoints_of(trunk.storage / trunk.name, trunk.checkpoints.storage, trunk.checkpoints.retry_s)
        step = max((step for step in checkpoint.complete_steps(shared) if step <= before), default=0)
        if step == 0:
            return 0  # so early a trial has nothing to gain
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in metrics_so_far(trunk.storage / trunk.name) if row["step"] <= step]
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_whole(note, json.dumps({"step": step}) + "\n")
        own.create()
        _graft(checkpoint.at(shared, step), checkpoint.at(own, step), trial)
    return step


def _graft(source: Folder, target: Folder, config: RunConfig) -> None:
    """Copy a checkpoint that becomes one of another run, which continues from there with its own config."""
    manifest = checkpoint.verify(source)
    for shard in manifest.shards:
        content = source.read(shard.file)
        assert content is not None, "it has just been verified"
        target.write(shard.file, content)
    manifest = manifest.model_copy(update={"config": config.model_dump(mode="json")}).completed(manifest.shards)
    target.write(MANIFEST, manifest.model_dump_json(indent=1).encode())


@contextmanager
def _alone(sweep: Path, stop: StopRequest) -> Iterator[None]:
    """For the duration of the block nobody else of this sweep extends the trunk.

    Raises:
        Interrupted: a signal came while another one did.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / "trunk.lock").open("a") as lock:
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
