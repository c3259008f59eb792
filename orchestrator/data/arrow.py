"""A dataset on disk: one memory-mapped Arrow file per split and a small description beside them.

A dataset is one of five kinds. "tokens": a flat column of tokens, cut into windows when it is read; uint8 for bytes,
else what the vocabulary needs. "examples": a column of float32 feature vectors (a fixed-size list per example) and a
column of labels. "sequences": a column of uint16 tokens and one of int32 targets, both fixed-size lists as long as a
sequence. "documents": a column of uint8 tokens, lists of different lengths, and a column of labels. "pairs": the same
with a second column of tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from models.registry import (
    ClassificationTask,
    LanguageTask,
    PairClassificationTask,
    RecallTask,
    Task,
    TokenClassificationTask,
)
from orchestrator.errors import UserError

DESCRIPTION = "dataset.json"
Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
DOCUMENT_COLUMNS = ("tokens", "tokens_2")


class Description(BaseModel):
    """What `dataset.json` says: the kind, the sizes, and a SHA-256 of each split's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: Literal["tokens", "examples", "sequences", "documents", "pairs"]
    origin: str
    vocab_size: int = 0
    n_features: int = 0
    n_classes: int = 0
    sha256: dict[Split, str]

    @property
    def task(self) -> Task:
        match self.kind:
            case "tokens":
                return LanguageTask(self.vocab_size)
            case "examples":
                return ClassificationTask(self.n_features, self.n_classes)
            case "sequences":
                return RecallTask(self.vocab_size)
            case "documents":
                return TokenClassificationTask(self.vocab_size, self.n_classes)
            case "pairs":
                return PairClassificationTask(self.vocab_size, self.n_classes)


class Documents:
    """Byte strings of different lengths, one behind the other in memory."""

    def __init__(self, documents: Iterable[bytes] = ()) -> None:
        self._flat, self._offsets = bytearray(), [0]
        for document in documents:
            self.add(document)

    def add(self, document: bytes) -> None:
        self._flat += document
        self._offsets.append(len(self._flat))

    def column(self) -> pa.LargeListArray:
        flat = np.frombuffer(self._flat, np.uint8)
        return pa.LargeListArray.from_arrays(pa.array(self._offsets, pa.int64()), pa.array(flat))


def write_tokens(
    folder: Path, splits: Mapping[Split, NDArray[np.unsignedinteger]], origin: str, vocab_size: int = 256
) -> None:
    """Write text, one array of tokens per split, bytes or a tokenizer's. An existing folder is left as it is."""
    tables = {split: pa.table({"tokens": pa.array(tokens)}) for split, tokens in splits.items()}
    _write(folder, tables, kind="tokens", origin=origin, vocab_size=vocab_size)


def write_examples(
    folder: Path,
    splits: Mapping[Split, tuple[NDArray[np.float32], NDArray[np.int64]]],
    n_classes: int,
    origin: str,
) -> None:
    """Write labelled sequences: features (examples, L, I) and labels (examples,) per split."""
    tables = {}
    for split, (features, labels) in splits.items():
        tables[split] = pa.table({"features": _lists(features), "label": pa.array(labels)})
    n_features = splits["train"][0].shape[2]
    _write(folder, tables, kind="examples", origin=origin, n_features=n_features, n_classes=n_classes)


def write_sequences(
    folder: Path,
    splits: Mapping[Split, tuple[NDArray[np.uint16], NDArray[np.int32]]],
    vocab_size: int,
    origin: str,
) -> None:
    """Write sequences with their targets, tokens (examples, L) and targets (examples, L) per split."""
    tables = {
        split: pa.table({"tokens": _lists(tokens), "targets": _lists(targets)})
        for split, (tokens, targets) in splits.items()
    }
    _write(folder, tables, kind="sequences", origin=origin, vocab_size=vocab_size)


def write_documents(
    folder: Path,
    splits: Mapping[Split, tuple[Sequence[Documents], NDArray[np.int64]]],
    vocab_size: int,
    n_classes: int,
    origin: str,
) -> None:
    """Write labelled documents, or pairs of them: one or two columns of documents and labels (examples,) per split.

    Token 0 is padding, which no document holds.
    """
    tables = {}
    for split, (columns, labels) in splits.items():
        named = {name: documents.column() for name, documents in zip(DOCUMENT_COLUMNS, columns, strict=False)}
        tables[split] = pa.table(named | {"label": pa.array(labels)})
    kind = "pairs" if len(splits["train"][0]) == 2 else "documents"
    _write(folder, tables, kind=kind, origin=origin, vocab_size=vocab_size, n_classes=n_classes)


def _lists(values: NDArray[Any]) -> pa.FixedSizeListArray:
    """One fixed-size list per row, whatever its shape."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values[0].size)


def _write(folder: Path, tables: Mapping[Split, pa.Table], **description: object) -> None:
    """Write beside the folder and rename, so that the dataset is complete or absent."""
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        digests = {}
        for split, table in tables.items():
            path = partial / f"{split}.arrow"
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)  # one record batch, so that a split is one contiguous column
            with path.open("rb") as file:
                digests[split] = hashlib.file_digest(file, "sha256").hexdigest()
        text = Description.model_validate(description | {"sha256": digests}).model_dump_json(indent=2)
        (partial / DESCRIPTION).write_text(text + "\n")
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / DESCRIPTION).exists():  # not merely another worker that was faster
                raise
    except OSError as error:
        raise UserError(f"data cannot be written to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def describe(folder: Path) -> Description:
    """The description of a dataset.

    Raises:
        UserError: it is missing, unreadable, or of another format.
    """
    path = folder / DESCRIPTION
    try:
        return Description.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(f"no dataset at {folder}: {path.name} is missing or unreadable") from error
    except ValueError as error:  # as pydantic's errors, JSON's and those of bytes that are no text are
        raise UserError(f"{path} is damaged; delete {folder} to have it prepared again") from error


def read(folder: Path, split: Split) -> pa.RecordBatch:
    """A split's single record batch, memory-mapped: nothing is read before it is used.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / f"{split}.arrow"
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is missing or damaged; delete {folder} to have it prepared again") from error
