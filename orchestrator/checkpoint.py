"""Checkpoints as they lie in storage: a safetensors shard per rank, and a JSON manifest that names them.

A checkpoint is complete or absent: it is complete once its manifest exists, which is written last and deleted first.
Files that no manifest names do not count. Whole parameters lie in the shards, so any number of workers can read them.
There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from compression.moments import ParameterState
from orchestrator.errors import UserError
from orchestrator.filesystem import Folder, reason
from orchestrator.group import Group
from orchestrator.guard import Watch
from orchestrator.sharded_state import ShardedState, assign_owners

MANIFEST = "manifest.json"
_UNCUT = "uncut-"
_PARTS = ("value", "exp_avg", "exp_avg_sq")
_READERS = 4


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or deleted, or their folder not be looked through; the others are intact."""


class Shard(BaseModel):
    """One rank's file. The pattern keeps a manifest from pointing outside its folder.

    The last part of the name is drawn anew for every save: what an earlier one of this step left behind, complete or
    not, is never written over and never taken for a part of this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, Field(pattern=r"^shard-\d{5}-of-\d{5}-[0-9a-f]{16}\.safetensors$")]
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint holds. `digest` is the SHA-256 of all other fields."""

    # A loss that is not finite must come back as it was, or the digest would not match.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format: Literal[4] = 4
    step: int
    optimizer_step: int
    train_seconds: float
    """Of all steps, probes and cuts so far, but for what a guard took back and what a restart lost."""
    state_dims: list[int]
    shapes: dict[str, tuple[int, ...]]
    shard_of: dict[str, int]
    shards: list[Shard]
    truncations: list[dict[str, Any]]
    watch: Watch | None = None
    probe: str | None
    """The plan of the last probe, as JSON, as far as the next one is compared with it."""
    val_loss: float | None
    """On held-out data, as last measured."""
    after_cut: bool
    """Whether it was written right after a truncation."""
    config: dict[str, Any]
    data_sha256: str
    digest: str = ""

    def content_digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def completed(self, shards: Sequence[Shard]) -> Manifest:
        """With these shards and the digest of it all."""
        manifest = self.model_copy(update={"shards": list(shards)})
        return manifest.model_copy(update={"digest": manifest.content_digest()})


def shard_file(rank: int, workers: int, token: str) -> str:
    return f"shard-{rank:05d}-of-{workers:05d}-{token}.safetensors"


def serialized(states: Mapping[str, ParameterState]) -> bytes:
    """The content of a shard."""
    return save(
        {
            f"{part}:{name}": tensor.contiguous()
            for name, parameter in states.items()
            for part, tensor in zip(_PARTS, parameter.tensors(), strict=True)
        }
    )


def at(folder: Folder, step: int) -> Folder:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def uncut_at(folder: Folder, step: int) -> Folder:
    """Where the state right before the cut after `step` lies, as long as a guard watches that cut."""
    return folder / f"{_UNCUT}{step:08d}"


def uncuts(folder: Folder) -> list[Folder]:
    """What there is of `uncut_at`, complete or not."""
    return [folder / name for name in folder.names() if name.startswith(_UNCUT)]


def _step_of(name: str) -> int | None:
    """The step that a folder's name says; None for another name."""
    match = re.fullmatch(r"step-(\d{8,})", name)
    return int(match[1]) if match else None


def steps(folder: Folder) -> list[int]:
    """Steps of all checkpoints in `folder`, complete or not, ascending."""
    return sorted(step for name in folder.names() if (step := _step_of(name)) is not None)


def complete_steps(folder: Folder) -> list[int]:
    """Steps of the complete ones among them, ascending."""
    return [step for step in steps(folder) if at(folder, step).has(MANIFEST)]


def newest(folder: Folder, up_to: float = math.inf) -> Folder | None:
    """The complete checkpoint of the highest step in `folder`, or of the highest up to a step.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        found = (at(folder, step) for step in reversed(steps(folder)) if step <= up_to)
        return next((path for path in found if path.has(MANIFEST)), None)
    except OSError as error:
        raise UserError(f"checkpoints {folder} cannot be read: {reason(error)}") from error


def delete(path: Folder) -> None:
    """Delete a checkpoint; not for a moment is there one that looks complete and is not.

    Raises:
        CheckpointError: it is still there.
    """
    try:
        path.delete(MANIFEST)
        path.delete_all()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be deleted: {reason(error)}") from error


def _remedy(damaged: Folder) -> str:
    """What a person can do about a checkpoint that cannot be read."""
    folder, step = damaged.parent, _step_of(damaged.name)
    earlier = [s for s in complete_steps(folder) if step is not None and s < step]
    if earlier:
        return f"delete {damaged} to continue from the one before, of step {earlier[-1]}"
    return "bring its files back from a copy; without them this run cannot continue, and another name= starts a new one"


def verify(path: Folder) -> Manifest:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        UserError: names the file that is missing, unreadable or damaged.
    """
    _refuse_link(path.parent, path.name, "checkpoint", "folder")
    _refuse_link(path, MANIFEST, "checkpoint manifest", "file")
    manifest = read_manifest(path)

    def check(shard: Shard) -> None:
        file = path / shard.file
        _refuse_link(path, shard.file, "checkpoint shard", "file")
        try:
            digest = path.sha256(shard.file)
        except OSError as error:
            raise UserError(f"checkpoint shard {file} is unreadable: {reason(error)}") from error
        if digest is None:
            raise UserError(f"checkpoint shard {file} is missing")
        if digest != shard.sha256:
            raise UserError(f"checkpoint shard {file} is damaged; {_remedy(path)}")

    with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as pool:
        list(pool.map(check, manifest.shards))
    return manifest


def _refuse_link(folder: Folder, name: str, what: str, proper: str) -> None:
    if folder.is_link(name):
        raise UserError(f"{what} {folder / name} is a link, which may lead outside its folder; it must be a {proper}")


def load(path: Folder, manifest: Manifest, group: Group) -> ShardedState:
    """This rank's share of a verified checkpoint, at any number of workers."""
    sizes = {name: math.prod(shape) for name, shape in manifest.shapes.items()}
    owners = assign_owners(sizes, group.size)
    wanted = [name for name, owner in owners.items() if owner == group.rank]
    own = {name: ParameterState(*parts) for name, parts in _read(path, manifest, wanted, _PARTS)}
    return ShardedState(owners, dict(manifest.shapes), own, manifest.optimizer_step)


def load_values(path: Folder, manifest: Manifest) -> dict[str, Tensor]:
    """All parameters of a verified checkpoint by name, float32 on the CPU, without Adam's moments."""
    return {name: value for name, (value,) in _read(path, manifest, manifest.shapes, _PARTS[:1])}


def _read(
    path: Folder, manifest: Manifest, names: Iterable[str], parts: Sequence[str]
) -> Iterator[tuple[str, list[Tensor]]]:
    """These parts of these parameters; nothing else is read, and no file twice."""
    by_shard: dict[int, list[str]] = {}
    for name in names:
        by_shard.setdefault(manifest.shard_of[name], []).append(name)
    for index, wanted in by_shard.items():
        shard = manifest.shards[index]
        try:
            with path.on_disk(shard.file, shard.sha256) as copy, safe_open(copy, framework="pt") as file:
                for name in wanted:
                    yield name, [file.get_tensor(f"{part}:{name}") for part in parts]
        except SafetensorError as error:
            raise UserError(f"checkpoint shard {path / shard.file} is damaged: {error}") from error


def read_manifest(path: Folder) -> Manifest:
    """The manifest of the checkpoint in a folder.

    Raises:
        UserError: it is missing or damaged, or of another step than its folder.
    """
    file = path / MANIFEST
    try:
        content = path.read(MANIFEST)
    except OSError as error:
        raise UserError(f"checkpoint manifest {file} is unreadable: {reason(error)}") from error
    if content is None:
        raise UserError(f"checkpoint manifest {file} is missing")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise UserError(f"checkpoint manifest {file} is damaged, or of another version of Rayduce") from error
    if manifest.content_digest() != manifest.digest:
        raise UserError(f"checkpoint manifest {file} is damaged: its content does not match its digest")
    named = [index in range(len(manifest.shards)) for index in manifest.shard_of.values()]
    if manifest.shard_of.keys() != manifest.shapes.keys() or not all(named):
        raise UserError(f"checkpoint manifest {file} is damaged: it names no shard for some of its parameters")
    if _step_of(path.name) not in (None, manifest.step):
        raise UserError(f"checkpoint manifest {file} is of step {manifest.step}, not of its folder's; {_remedy(path)}")
    return manifest
