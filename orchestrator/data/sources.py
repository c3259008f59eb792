"""Where data comes from, and how each source becomes Arrow files."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from orchestrator.data import arrow
from orchestrator.data.recall import Recall
from orchestrator.errors import UserError

# Every n-th block of text is held out: both splits then come from all over the corpus.
VAL_EVERY = 20
BLOCK = 16_384


def absolute(path: Path) -> Path:
    """The path from the root: workers run in another directory than the driver.

    Raises:
        ValueError: it begins with the home of a user who does not exist.
    """
    try:
        return path.expanduser().resolve()
    except RuntimeError as error:
        raise ValueError(f"{path} names the home of an unknown user") from error


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StdlibText(_Source):
    """Bytes of the Python sources of the running interpreter's standard library; no download."""

    source: Literal["stdlib"]
    seq_len: int = Field(256, ge=1, description="Tokens per sequence.")

    @property
    def dataset_name(self) -> str:
        return f"stdlib-{platform.python_version()}"

    def prepare(self, folder: Path) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "__pycache__"}
        files = [path for path in sorted(root.rglob("*.py")) if not left_out.intersection(path.relative_to(root).parts)]
        _write_text(folder, files, root, f"standard library of Python {platform.python_version()}")


class TextFiles(_Source):
    """Bytes of a text file, or of all files below a folder in order of their names."""

    source: Literal["text"]
    path: Path = Field(description="A file or a folder.")
    seq_len: int = Field(256, ge=1, description="Tokens per sequence.")

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return absolute(path)

    @property
    def dataset_name(self) -> str:
        """Changes with the files' names, sizes and times, so that new text is not mistaken for the old."""
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files()]
        return f"text-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise UserError(f"data.path {self.path} does not exist")
        return [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())

    def prepare(self, folder: Path) -> None:
        _write_text(folder, self._files(), self.path, str(self.path))


class Digits(_Source):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, as sequences of 64 grey values in [0, 1]."""

    source: Literal["digits"]

    @property
    def dataset_name(self) -> str:
        return "digits"

    def prepare(self, folder: Path) -> None:
        from sklearn.datasets import load_digits  # takes seconds; only a first run needs it

        images, labels = load_digits(return_X_y=True)
        features = (images / 16).astype(np.float32)[:, :, None]
        order = np.random.default_rng(0).permutation(len(labels))
        held_out, kept = order[: len(labels) // 5], order[len(labels) // 5 :]
        arrow.write_examples(
            folder,
            {
                "train": (features[kept], labels[kept].astype(np.int64)),
                "val": (features[held_out], labels[held_out].astype(np.int64)),
            },
            n_classes=10,
            origin="sklearn.datasets.load_digits",
        )


AnySource = StdlibText | TextFiles | Digits | Recall
DataConfig = Annotated[AnySource, Field(discriminator="source")]
SOURCES: dict[str, type[AnySource]] = {
    "stdlib": StdlibText,
    "text": TextFiles,
    "digits": Digits,
    "recall": Recall,
}


def prepare(config: AnySource, root: Path) -> Path:
    """The dataset's folder below `root`, written if it is not there yet. Safe to call from many processes.

    Raises:
        UserError: the source is missing or empty, or the folder cannot be written.
    """
    folder = root / config.dataset_name
    if not (folder / arrow.DESCRIPTION).exists():
        config.prepare(folder)
    return folder


def _write_text(folder: Path, files: list[Path], root: Path, origin: str) -> None:
    try:
        text = b"".join(path.read_bytes() for path in files)
    except OSError as error:
        raise UserError(f"data file {error.filename} cannot be read: {error.strerror}") from error
    if not text:
        raise UserError(f"data at {root} is empty: there is no text to train on")
    tokens = np.frombuffer(text, dtype=np.uint8)
    held_out = (np.arange(len(tokens)) // BLOCK) % VAL_EVERY == VAL_EVERY - 1
    train, val = tokens[~held_out], tokens[held_out]
    if not len(val):  # a text shorter than VAL_EVERY blocks
        train, val = _split_tail(tokens)
    arrow.write_tokens(folder, {"train": train, "val": val}, origin)


def _split_tail(tokens: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    at = max(1, len(tokens) - max(1, len(tokens) // VAL_EVERY))
    return tokens[:at], tokens[at:]
