"""Small checkpoints as the tests write them, also in processes of their own, which import no more than this."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path
from typing import Any

import torch

from compression.moments import ParameterState
from orchestrator import checkpoint
from orchestrator.checkpoint import CheckpointError, Manifest
from orchestrator.checkpoint_writer import Writer
from orchestrator.config import CheckpointsConfig
from orchestrator.filesystem import Folder
from orchestrator.group import Group
from orchestrator.retention import prune
from orchestrator.sharded_state import ShardedState, assign_owners

SHAPES = {"embedding": (7, 3), "mixer.A": (4,), "mixer.B": (4, 5), "norm": (1,), "scalar": ()}
TOKEN, OTHER = "0" * 15 + "1", "f" * 16
CPU = torch.device("cpu")


def states(seed: int) -> dict[str, ParameterState]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: ParameterState(*(torch.randn(shape, generator=generator) for _ in range(3)))
        for name, shape in SHAPES.items()
    }


def share(whole: dict[str, ParameterState], rank: int, workers: int) -> ShardedState:
    owners = assign_owners({name: math.prod(shape) for name, shape in SHAPES.items()}, workers)
    own = {name: state for name, state in whole.items() if owners[name] == rank}
    return ShardedState(owners, dict(SHAPES), own, optimizer_step=3)


def manifest(step: int, workers: int = 1, **content: Any) -> Manifest:
    plain = Manifest(
        step=step,
        optimizer_step=3,
        train_seconds=0.0,
        state_dims=[4],
        shapes=SHAPES,
        shard_of=share(states(0), 0, workers).owners,
        shards=[],
        truncations=[{"val_loss_after": math.inf}],
        probe=None,
        val_loss=None,
        after_cut=False,
        config={},
        data_sha256="",
    )
    return plain.model_copy(update=content)


def write(folder: Folder, step: int, workers: int = 1, token: str = TOKEN, seed: int = 0, **content: Any) -> Folder:
    """Write a checkpoint with all its workers, and wait for it."""
    path, whole = checkpoint.at(folder, step), states(seed)
    writers = [Writer(rank, workers, timeout_s=30) for rank in range(workers)]
    for rank, writer in enumerate(writers):
        writer.save(path, token, manifest(step, workers, **content), share(whole, rank, workers))
    for writer in writers:
        writer.wait()
    return path


def equal(left: dict[str, ParameterState], right: dict[str, ParameterState]) -> bool:
    pairs = [zip(left[name].tensors(), right[name].tensors(), strict=True) for name in right]
    return left.keys() == right.keys() and all(torch.equal(a, b) for pair in pairs for a, b in pair)


def restored(path: Folder, workers: int = 1) -> dict[str, ParameterState]:
    verified = checkpoint.verify(path)
    loaded = [checkpoint.load(path, verified, Group(rank, workers, CPU)).own for rank in range(workers)]
    assert sum(map(len, loaded)) == len(SHAPES)
    return {name: state for own in loaded for name, state in own.items()}


def save_for_ever(folder: Path) -> None:
    for step in range(1, 10**6):
        write(Folder.of(folder, "place"), step, workers=2, token=f"{step:016x}", seed=step)
        prune(Folder.of(folder, "place"), step, CheckpointsConfig())


def save_much(uri: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    large = {name: torch.full((2**25,), 1.0) for name in ("value", "exp_avg", "exp_avg_sq")}
    state = ShardedState({"large": 0}, {"large": (2**25,)}, {"large": ParameterState(**large)}, optimizer_step=3)
    writer = Writer(0, 1, timeout_s=30)
    writer.save(checkpoint.at(Folder.of(uri, "place"), 5), TOKEN, manifest(5), state)
    writer.wait()


def write_with_room_for(limit: int, folder: Path) -> str:
    """What a checkpoint ends with that outgrows a limit for files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(Folder.of(folder, "place", retry_s=60), 2)
    except CheckpointError as error:
        return str(error)
    return "written"
