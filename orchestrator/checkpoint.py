"""Checkpoints: every rank writes the parameters it owns as safetensors, rank 0 a JSON manifest.

A checkpoint is complete or absent: it is written into `<name>.partial` and renamed at the end. Whole parameters
lie in the shards, so any number of workers can read them. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compression.moments import ParameterState
from orchestrator.errors import UserError
from orchestrator.failpoints import reach
from orchestrator.group import Group
from orchestrator.guard import Watch
from orchestrator.sharded_state import ShardedState, assign_owners

MANIFEST = "manifest.json"
_PARTS = ("value", "exp_avg", "exp_avg_sq")


class Shard(BaseModel):
    """One rank's file. The pattern keeps a manifest from pointing outside its folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, Field(pattern=r"^shard-\d{5}-of-\d{5}\.safetensors$")]
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint holds. `digest` is the SHA-256 of all other fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    step: int
    optimizer_step: int
    state_dims: list[int]
    shapes: dict[str, tuple[int, ...]]
    shard_of: dict[str, int]
    shards: list[Shard]
    truncations: list[dict[str, Any]]
    watch: Watch | None = None
    config: dict[str, Any]
    data_sha256: str
    digest: str = ""

    def content_digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save(
    folder: Path,
    step: int,
    state: ShardedState,
    state_dims: Sequence[int],
    truncations: Sequence[dict[str, Any]],
    watch: Watch | None,
    config: dict[str, Any],
    data_sha256: str,
    group: Group,
) -> Path:
    """Write the checkpoint of `step` below `folder`; collective. Returns its path, the same on every rank."""
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + ".partial")
    if group.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    group.barrier()
    files = [f"shard-{rank:05d}-of-{group.size:05d}.safetensors" for rank in range(group.size)]
    own = partial / files[group.rank]
    tensors = {
        f"{part}:{name}": tensor.contiguous()
        for name, parameter in state.own.items()
        for part, tensor in zip(_PARTS, parameter.tensors(), strict=True)
    }
    save_file(tensors, own)
    reach("checkpoint", step)
    digests = group.gather_digests(_sha256(own))
    if group.rank == 0:
        manifest = Manifest(
            step=step,
            optimizer_step=state.optimizer_step,
            state_dims=list(state_dims),
            shapes=state.shapes,
            shard_of=state.owners,
            shards=[Shard(file=file, sha256=digest) for file, digest in zip(files, digests, strict=True)],
            truncations=list(truncations),
            watch=watch,
            config=config,
            data_sha256=data_sha256,
        )
        manifest = manifest.model_copy(update={"digest": manifest.content_digest()})
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1))
        shutil.rmtree(final, ignore_errors=True)  # without a manifest, or the run would have resumed from it
        os.rename(partial, final)
    group.barrier()
    return final


def drop_after(folder: Path, step: int) -> None:
    """Delete the complete checkpoints of later steps: what they hold has been taken back."""
    while (path := newest(folder)) is not None and _step(path) > step:
        shutil.rmtree(path)


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step below `folder`."""
    return max((path.parent for path in folder.glob(f"step-*/{MANIFEST}") if path.parent.suffix == ""), default=None)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    manifest = read_manifest(path)
    for shard in manifest.shards:
        file = path / shard.file
        if not file.is_file():
            raise UserError(f"checkpoint shard {file} is missing")
        if _sha256(file) != shard.sha256:
            raise UserError(f"checkpoint shard {file} is damaged; delete {path} to resume from the one before")
    return manifest


def load(path: Path, manifest: Manifest, group: Group) -> ShardedState:
    """This rank's share of a verified checkpoint, at any number of workers."""
    sizes = {name: math.prod(shape) for name, shape in manifest.shapes.items()}
    owners = assign_owners(sizes, group.size)
    wanted = [name for name, owner in owners.items() if owner == group.rank]
    own = {name: ParameterState(*parts) for name, parts in _read(path, manifest, wanted, _PARTS)}
    return ShardedState(owners, dict(manifest.shapes), own, manifest.optimizer_step)


def load_values(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    """All parameters of a verified checkpoint by name, float32 on the CPU, without Adam's moments."""
    return {name: value for name, (value,) in _read(path, manifest, manifest.shapes, _PARTS[:1])}


def _read(
    path: Path, manifest: Manifest, names: Iterable[str], parts: Sequence[str]
) -> Iterator[tuple[str, list[Tensor]]]:
    """These parts of these parameters; nothing else is read, and no file twice."""
    by_shard: dict[int, list[str]] = {}
    for name in names:
        by_shard.setdefault(manifest.shard_of[name], []).append(name)
    for index, wanted in by_shard.items():
        shard = path / manifest.shards[index].file
        try:
            with safe_open(shard, framework="pt") as file:
                for name in wanted:
                    yield name, [file.get_tensor(f"{part}:{name}") for part in parts]
        except SafetensorError as error:
            raise UserError(f"checkpoint shard {shard} is damaged: {error}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_text())
    except OSError as error:
        raise UserError(f"checkpoint manifest {path} is missing or unreadable") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"checkpoint manifest {path} is damaged") from error
    if manifest.content_digest() != manifest.digest:
        raise UserError(f"checkpoint manifest {path} is damaged: its content does not match its digest")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
