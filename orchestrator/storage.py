"""Which folder a run lives in: a new one, or the one that it continues."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from orchestrator.checkpoint import Manifest, newest, verify
from orchestrator.config import RunConfig, refuse_other_run
from orchestrator.errors import UserError
from orchestrator.filesystem import Folder, reason


@dataclass(frozen=True)
class Earlier:
    """A run to continue: its folder, its newest complete checkpoint, and that checkpoint's verified manifest."""

    folder: Path
    checkpoint: Folder
    manifest: Manifest


def checkpoints_of(run: Path, storage: str | None, retry_s: float = 0) -> Folder:
    """Where the checkpoints of the run in folder `run` lie; `storage` is checkpoints.storage.

    Raises:
        UserError: it cannot be understood.
    """
    if storage is None:
        return Folder.of(run / "checkpoints", "storage", retry_s)
    return Folder.of(storage, "checkpoints.storage", retry_s) / run.name


def new_run(config: RunConfig) -> Path:
    """A folder of its own for every run, and one for its checkpoints: NAME, NAME-2, NAME-3, …

    Raises:
        UserError: the storage, or that of the checkpoints, cannot be written.
    """
    number = 1
    while True:
        folder = config.storage / (config.name if number == 1 else f"{config.name}-{number}")
        if config.checkpoints.storage is not None and not _claim(checkpoints_of(folder, config.checkpoints.storage)):
            number += 1
            continue
        try:
            folder.mkdir(parents=True)
            for part in ("plans", "logs", "checkpoints"):
                (folder / part).mkdir()
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"storage {config.storage} cannot be written: {folder} is a file") from None
            number += 1
        except OSError as error:
            raise UserError(f"storage {config.storage} cannot be written: {error.strerror}") from error


def _claim(checkpoints: Folder) -> bool:
    """Create the folder in the checkpoints' storage; False where another run's checkpoints lie in it."""
    try:
        if checkpoints.names():
            return False
        checkpoints.create()
    except OSError as error:
        raise UserError(
            f"checkpoints.storage: {checkpoints} cannot be written ({reason(error)}); it must be a folder or a bucket "
            "that exists and that you may write"
        ) from error
    return True


def earlier_run(config: RunConfig) -> Earlier:
    """The newest run of this name that has a complete checkpoint.

    Raises:
        UserError: there is none, its checkpoint is missing or damaged, it is finished, or its config differs.
    """
    pattern = re.compile(rf"{re.escape(config.name)}(?:-(\d+))?")
    found = [
        (int(match[1] or 1), path)
        for path in (config.storage.iterdir() if config.storage.is_dir() else ())
        if (match := pattern.fullmatch(path.name)) and _name_in(path / "config.yaml") == config.name
    ]
    if not found:
        raise UserError(f"there is no run {config.name} in storage {config.storage} to resume")
    places = [(number, folder, checkpoints_of(folder, config.checkpoints.storage)) for number, folder in found]
    complete = [(number, folder, path) for number, folder, place in places if (path := newest(place))]
    if not complete:
        raise UserError(f"run {max(found)[1]} has no complete checkpoint; start it again without --resume")
    _, folder, path = max(complete, key=lambda run: run[0])
    manifest = verify(path)
    refuse_other_run(config, manifest.config)
    if manifest.step >= config.train.steps and (folder / "summary.json").exists():
        raise UserError(f"run {folder} is finished: its last checkpoint is of step {manifest.step}")
    return Earlier(folder, path, manifest)


def _name_in(config: Path) -> str | None:
    """NAME-2 may be the second run of NAME, or the first of a config that is called so."""
    if not config.is_file():
        return None
    content = yaml.safe_load(config.read_text())
    return content.get("name") if isinstance(content, dict) else None
