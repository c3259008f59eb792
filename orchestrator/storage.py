"""Which folder a run lives in: a new one, or the one that it continues."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from orchestrator.checkpoint import Manifest, newest, verify
from orchestrator.config import RunConfig, refuse_other_run
from orchestrator.errors import UserError


@dataclass(frozen=True)
class Earlier:
    """A run to continue: its folder, its newest complete checkpoint, and that checkpoint's verified manifest."""

    folder: Path
    checkpoint: Path
    manifest: Manifest


def new_run(config: RunConfig) -> Path:
    """A folder of its own for every run: NAME, NAME-2, NAME-3, …

    Raises:
        UserError: the storage cannot be written.
    """
    number = 1
    while True:
        folder = config.storage / (config.name if number == 1 else f"{config.name}-{number}")
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
    complete = [(number, folder, path) for number, folder in found if (path := newest(folder / "checkpoints"))]
    if not complete:
        raise UserError(f"run {max(found)[1]} has no complete checkpoint; start it again without --resume")
    _, folder, path = max(complete)
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
