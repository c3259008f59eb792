"""Text as a source: the standard library, files of any folder, and data sets of the Hugging Face Hub."""

from __future__ import annotations

import json
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from orchestrator.data import arrow, tokenizer
from orchestrator.data.source import Source, SourcePath, cannot_be_read, digest, file_facts, read
from orchestrator.errors import UserError

# Every n-th block of text is held out: both splits then come from all over the corpus.
VAL_EVERY = 20
BLOCK = 16_384
# Files of records, of which one field is text; all others are text as a whole.
RECORDS = (".jsonl", ".parquet")
# Characters of a file that a tokenizer gets at once, up to the end of the line.
PIECE = 1 << 20


class StdlibText(Source):
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
        text = b"".join(read(path) for path in files)
        _write(folder, np.frombuffer(text, np.uint8), f"standard library of Python {platform.python_version()}")


class TextFiles(Source):
    """Text of files or of a Hugging Face data set, as bytes or as the tokens of a tokenizer.

    A folder's files are read in order of their names, whole, but of those called *.jsonl and *.parquet one text field
    per record; a newline follows each record. Every twentieth block of 16,384 tokens is held out. A tokenizer's special
    tokens are left out.
    """

    source: Literal["text"]
    path: SourcePath | None = Field(None, description="A file or a folder.")
    seq_len: int = Field(256, ge=1, description="Tokens per sequence.")
    field: str = Field("text", description="What the text is called in *.jsonl, *.parquet and the hub's data sets.")
    hub: str | None = Field(None, description="Instead of path, a data set's name on the Hugging Face Hub.")
    subset: str | None = Field(None, description="Which of the hub's data sets of that name, where there are several.")
    split: str = Field("train", description="Split of the hub's data set.")
    tokenizer: str | None = Field(
        None, description="A tokenizer.json or a name on the Hugging Face Hub; left out, tokens are bytes."
    )

    @field_validator("tokenizer")
    @classmethod
    def _absolute(cls, name: str | None) -> str | None:
        return None if name is None else tokenizer.rooted(name)

    @model_validator(mode="after")
    def _one_origin(self) -> TextFiles:
        if (self.path is None) == (self.hub is None):
            raise ValueError("source text takes one of path and hub")
        if self.hub is None and (self.subset, self.split) != (None, "train"):
            raise ValueError("subset and split belong to hub; with path they must be left out")
        return self

    @property
    def dataset_name(self) -> str:
        """Changes with the files' names, sizes and times, so that new text is not mistaken for the old.

        A data set of the hub is what it was when it was first asked for.
        """
        files = self._files() if self.path else []
        facts: list[object] = list(file_facts(files))
        if self.hub is not None:
            facts.append((self.hub, self.subset, self.split))
        if self.hub is not None or any(path.suffix in RECORDS for path in files):
            facts.append(self.field)
        if self.tokenizer is not None:
            facts.append(("tokenizer", tokenizer.facts(self.tokenizer)))
        return f"text-{digest(facts)}"

    def prepare(self, folder: Path) -> None:
        origin = str(self.path) if self.path else f"Hugging Face data set {self.hub}, {self.subset}, {self.split}"
        if self.tokenizer is None:
            text = b"".join(content for _, content in self._texts())
            self._check(len(text))
            _write(folder, np.frombuffer(text, np.uint8), origin)
            return
        loaded = tokenizer.load(self.tokenizer)
        tokens = tokenizer.encode(loaded, self._pieces())
        self._check(len(tokens))
        _write(folder, tokens, f"{origin}, tokenizer {self.tokenizer}", tokenizer.vocab_size(loaded))

    def _check(self, length: int) -> None:
        if not length:
            raise UserError(f"data at {self.path or self.hub} is empty: there is no text to train on")

    def _files(self) -> list[Path]:
        assert self.path is not None
        if not self.path.exists():
            raise UserError(f"data.path {self.path} does not exist")
        return [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())

    def _texts(self) -> Iterator[tuple[str, bytes]]:
        """Whole files and single records, each with what to call it in a message."""
        if self.hub is not None:
            yield from ((self.hub, text) for text in _records_of_hub(self.hub, self.subset, self.split, self.field))
            return
        for path in self._files():
            match path.suffix:
                case ".jsonl":
                    records = _records_of_jsonl(path, self.field)
                case ".parquet":
                    records = _records_of_parquet(path, self.field)
                case _:
                    records = iter([read(path)])
            yield from ((str(path), text) for text in records)

    def _pieces(self) -> Iterator[str]:
        """What the tokenizer gets: no more at once than it can hold, and no word in two parts."""
        for name, content in self._texts():
            try:
                text = content.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name} is not UTF-8, which data.tokenizer {self.tokenizer} needs: {error.reason} at byte "
                    f"{error.start}"
                ) from error
            first = 0
            while first < len(text):
                newline = text.find("\n", first + PIECE)
                last = len(text) if newline < 0 else newline + 1
                yield text[first:last]
                first = last


def _records_of_jsonl(path: Path, field: str) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"line {number} of {path} is not JSON: {error}") from error
                value = record.get(field) if isinstance(record, dict) else None
                yield _record(value, field, f"line {number} of {path}")
    except OSError as error:
        raise cannot_be_read(error) from error


def _records_of_parquet(path: Path, field: str) -> Iterator[bytes]:
    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column {field}, which data.field names; there are {columns}")
            number = 0
            for batch in file.iter_batches(columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _record(value, field, f"row {number} of {path}")
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a whole Parquet file: {' '.join(str(error).split())}") from error


def _records_of_hub(hub: str, subset: str | None, split: str, field: str) -> Iterator[bytes]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(f"data.hub {hub} needs the library datasets: pip install 'rayduce[text]'") from error
    try:
        records = load_dataset(hub, subset, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.hub {hub} (subset {subset}, split {split}) cannot be had: {reason}") from error
    if field not in records.column_names:
        columns = ", ".join(records.column_names)
        raise UserError(f"data.hub {hub} has no column {field}, which data.field names; there are {columns}")
    for number, value in enumerate(records[field], 1):
        yield _record(value, field, f"row {number} of {hub}")


def _record(value: object, field: str, where: str) -> bytes:
    if not isinstance(value, str):
        raise UserError(f"{where} has no text as {field}, which data.field names")
    try:
        return value.encode() + b"\n"
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        raise UserError(f"{where} has a {field} that is no Unicode text: {error.reason}") from error


def _write(folder: Path, tokens: NDArray[np.unsignedinteger], origin: str, vocab_size: int = 256) -> None:
    if len(tokens) < VAL_EVERY * BLOCK:
        train, val = _split_tail(tokens)
    else:
        blocks = np.arange(-(-len(tokens) // BLOCK)) % VAL_EVERY == VAL_EVERY - 1
        held_out = np.repeat(blocks, BLOCK)[: len(tokens)]
        train, val = tokens[~held_out], tokens[held_out]
    arrow.write_tokens(folder, {"train": train, "val": val}, origin, vocab_size)


def _split_tail(
    tokens: NDArray[np.unsignedinteger],
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]:
    at = max(1, len(tokens) - max(1, len(tokens) // VAL_EVERY))
    return tokens[:at], tokens[at:]
