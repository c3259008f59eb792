"""A run's folder: who may write there, and what an earlier start has left in it."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import Manifest, newest, read_manifest, verify
from orchestrator.config import RunConfig
from orchestrator.config_changes import differences, refuse_other_run
from orchestrator.config_reading import load_config
from orchestrator.errors import UserError
from orchestrator.filesystem import Folder, reason
from orchestrator.mlflow_tracker import MLFLOW_RUN
from orchestrator.run_folder import read_json

# Locked by the driver for as long as it lives; holds who that is.
LOCK = "driver.lock"
# The effective config of the last start.
CONFIG = "config.yaml"


def checkpoints_of(run: Path, storage: str | None, retry_s: float = 0) -> Folder:
    """Where the checkpoints of the run in folder `run` lie; `storage` is checkpoints.storage.

    Raises:
        UserError: it cannot be understood.
    """
    if storage is None:
        return Folder.of(run / "checkpoints", "storage", retry_s)
    return Folder.of(storage, "checkpoints.storage", retry_s) / run.name


@contextmanager
def run_folder(config: RunConfig, retry_s: float = 0) -> Iterator[Path]:
    """The folder of the run, made where it is missing, and closed to other drivers for the duration of the block.

    `retry_s`: how long its checkpoints' storage may be away.

    A `UserError` in the block takes a folder away again that was made for it, as long as nothing was started there:
    a run starts by writing config.yaml.

    Raises:
        UserError: another driver is at work there, or the storage, or that of the checkpoints, cannot be written.
    """
    folder = config.storage / config.name
    new = not folder.exists()
    with hold_folder(folder):
        try:
            (folder / "plans").mkdir(exist_ok=True)
            checkpoints = _create(folder, config, retry_s)
            # Runs of one name below two `storage`s may share it; stores know no locks.
            apart = checkpoints.is_local and config.checkpoints.storage is not None
            with _locked(Path(checkpoints.path), "checkpoints.storage") if apart else nullcontext():
                yield folder
        except UserError:
            if new and not (folder / "config.yaml").exists():
                shutil.rmtree(folder)
            raise


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """A folder with one for logs in it, closed to other drivers for the duration of the block.

    Raises:
        UserError: another driver is at work there, or it cannot be written.
    """
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"storage {folder.parent} cannot be written: {error.filename} is in the way") from error
    except OSError as error:
        raise UserError(f"storage {folder.parent} cannot be written: {error.strerror}") from error
    with _locked(folder, "storage"):
        yield


@contextmanager
def _locked(folder: Path, setting: str) -> Iterator[None]:
    try:
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{setting} {folder.parent} cannot be written: {error.strerror}") from error
    with lock:
        try:
            # The kernel's lock, on NFS too: it is gone with the process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"run {folder} is being trained by {lock.read()}; wait for its end, or give this run another name="
            ) from None
        except OSError as error:
            raise UserError(f"{setting} {folder.parent} cannot be locked: {error.strerror}") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _create(folder: Path, config: RunConfig, retry_s: float) -> Folder:
    storage = config.checkpoints.storage
    checkpoints = checkpoints_of(folder, storage, retry_s)
    if storage is not None and earlier_storage(folder) == storage:
        try:
            checkpoints.expect()
        except OSError as error:
            raise UserError(
                f"checkpoints.storage {storage} has no folder {folder.name} any more ({reason(error)}), where run "
                f"{folder} keeps its checkpoints; bring it back, or give the run another name="
            ) from error
    try:
        checkpoints.create()
    except OSError as error:
        raise UserError(
            f"checkpoints.storage: {checkpoints} cannot be written ({reason(error)}); it must be a folder or a bucket "
            "that exists and that you may write"
        ) from error
    return checkpoints


def earlier_start(config: RunConfig, folder: Path, retry_s: float = 0) -> Manifest | None:
    """The verified manifest of the run's newest complete checkpoint; None where the run has to start over.

    `retry_s`: how long the checkpoints' storage may be away.

    Raises:
        UserError: the checkpoint is damaged, or of a run with another config.
    """
    path = newest(checkpoints_of(folder, config.checkpoints.storage, retry_s))
    if path is None:
        _refuse_other_place(config, folder)
        return None
    refuse_other_run(config, read_manifest(path).config)
    return verify(path)


def _refuse_other_place(config: RunConfig, folder: Path) -> None:
    """To start over for want of checkpoints would take away the metrics and plans of those that are elsewhere."""
    storage = config.checkpoints.storage
    earlier = earlier_storage(folder) if (folder / CONFIG).exists() else storage
    if earlier != storage and newest(checkpoints_of(folder, earlier)) is not None:
        here, there = (place or "the run's own folder" for place in (storage, earlier))
        raise UserError(
            f"checkpoints.storage: {here} has no checkpoint of run {folder}, whose own are in {there}; "
            "move them, or give the run another name="
        )


def earlier_storage(folder: Path) -> str | None:
    """The checkpoints.storage that the run in this folder was last started with, if it was.

    Raises:
        UserError: the config that it has left cannot be read, or is none.
    """
    return _left_in(folder).checkpoints.storage if (folder / CONFIG).exists() else None


def _left_in(folder: Path) -> RunConfig:
    """The config of the last start in this folder."""
    try:
        return load_config(folder / CONFIG)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}, which an earlier start has left: {error}") from error


def finished(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has come to its end; None where it has not.

    Raises:
        UserError: the run that has ended is of another config, or what it has left cannot be read.
    """
    path = folder / "summary.json"
    if not path.exists():
        return None
    refuse_other_run(config, _left_in(folder).model_dump(mode="json"))
    return read_json(path, "truncations")


def start_over(config: RunConfig, folder: Path) -> None:
    """Take away what a start without a complete checkpoint has left, so that nothing of it shows up later.

    The MLflow run stays where the config is the same, so that a training has one.
    """
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    if (folder / CONFIG).exists() and differences(config, _left_in(folder).model_dump(mode="json")):
        (folder / MLFLOW_RUN).unlink(missing_ok=True)
