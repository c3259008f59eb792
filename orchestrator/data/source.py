"""What a source of data is, and how it reads the files that a user points at."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from orchestrator.errors import UserError


def absolute(path: Path) -> Path:
    """The path from the root: workers run in another directory than the driver.

    Raises:
        ValueError: it is a URI, or begins with the home of a user who does not exist.
    """
    if re.match(r"\w+:/", str(path)):  # a path has single slashes
        raise ValueError(f"{path} must be a path that all machines see; only checkpoints.storage may be a URI")
    try:
        return path.expanduser().resolve()
    except RuntimeError as error:
        raise ValueError(f"{path} names the home of an unknown user") from error


SourcePath = Annotated[Path, AfterValidator(absolute)]


class Source(BaseModel, ABC):
    """The settings of a source, and what becomes of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    @abstractmethod
    def dataset_name(self) -> str:
        """The dataset's folder, which changes with everything that changes the data.

        Raises:
            UserError: the files that it is made of are missing.
        """

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Write the dataset.

        Raises:
            UserError: a file is missing or not what it should be, or the folder cannot be written.
        """


def digest(facts: object) -> str:
    """Twelve characters that change with the facts, for a dataset's name."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def file_facts(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times, so that new files are not mistaken for the old.

    Raises:
        UserError: one of them is missing.
    """
    try:
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise cannot_be_read(error) from error


def read(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_be_read(error) from error


def cannot_be_read(error: OSError) -> UserError:
    return UserError(f"data file {error.filename} cannot be read: {error.strerror or error}")


def require_folder(path: Path, source: Source) -> None:
    """Check that this source's data.path is a folder.

    Raises:
        UserError: it does not exist, or is a file.
    """
    valid = str(type(source).model_fields["path"].description).removesuffix(".")
    if not path.exists():
        raise UserError(f"data.path {path} does not exist; valid: {valid}")
    if not path.is_dir():
        raise UserError(f"data.path {path} is no folder; valid: {valid}")
