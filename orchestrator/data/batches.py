"""Batches by step: the batch of a step is a function of (seed, step) alone.

Rank and number of workers only say which rows of it a worker takes, so any number of workers sees the same
global batches and a resumed run continues exactly.

Shapes: B rows of this worker, L time, I features, 2 documents of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.heads import NOT_ASKED, PADDING
from orchestrator.data import arrow
from orchestrator.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Inputs and what is asked.

    Tokens (B, L) and targets (B, L) int64 with NOT_ASKED; or labels (B,) int64 with features (B, L, I) float32, with
    documents (B, L) int64, or with pairs of them (B, 2, L) int64, both filled up with PADDING.
    """

    inputs: Tensor
    targets: Tensor
    first: int = 0
    """Place of the first row in the global batch, where the others follow it."""

    def to(self, device: torch.device) -> Batch:
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def split(self, parts: int) -> list[Batch]:
        """So many parts, in order, of sizes that differ by one at most."""
        found, first = [], self.first
        for part in zip(self.inputs.tensor_split(parts), self.targets.tensor_split(parts), strict=True):
            found.append(Batch(*part, first))
            first += len(part[1])
        return found

    def unasked(self) -> Batch:
        """The same inputs, of which nothing counts."""
        return Batch(self.inputs, torch.full_like(self.targets, NOT_ASKED))


# `take`: the rows of a worker, of which `part` says which of the global batch's `rows` they are.


class _TokenWindows:
    """Windows of seq_len + 1 tokens that overlap by one, so that every token but the first is predicted once."""

    def __init__(self, folder: Path, split: arrow.Split, seq_len: int) -> None:
        self.tokens: NDArray[np.unsignedinteger] = arrow.read(folder, split).column("tokens").to_numpy()
        self.seq_len = seq_len
        self.length = (len(self.tokens) - 1) // seq_len
        if self.length < 1:
            raise UserError(
                f"data.seq_len {seq_len} needs {seq_len + 1} tokens, but the {split} split of {folder} has "
                f"{len(self.tokens)}"
            )

    def take(self, rows: NDArray[np.int64], part: slice) -> Batch:
        index = rows[part, None] * self.seq_len + np.arange(self.seq_len + 1)
        window_BL = torch.from_numpy(self.tokens[index].astype(np.int64))
        return Batch(window_BL[:, :-1], window_BL[:, 1:])


class _Examples:
    def __init__(self, folder: Path, split: arrow.Split) -> None:
        batch = arrow.read(folder, split)
        self.labels: NDArray[np.int64] = batch.column("label").to_numpy()
        self.length = len(self.labels)
        flat = batch.column("features").flatten().to_numpy()
        self.features_XLI: NDArray[np.float32] = flat.reshape(self.length, -1, arrow.describe(folder).n_features)
        self.seq_len = self.features_XLI.shape[1]

    def take(self, rows: NDArray[np.int64], part: slice) -> Batch:
        own = rows[part]
        return Batch(torch.from_numpy(self.features_XLI[own]), torch.from_numpy(self.labels[own]))


class _Sequences:
    def __init__(self, folder: Path, split: arrow.Split) -> None:
        batch = arrow.read(folder, split)
        self.length = batch.num_rows
        self.tokens_XL: NDArray[np.uint16] = _rows(batch, "tokens")
        self.targets_XL: NDArray[np.int32] = _rows(batch, "targets")
        self.seq_len = self.tokens_XL.shape[1]

    def take(self, rows: NDArray[np.int64], part: slice) -> Batch:
        own = rows[part]
        tokens, targets = self.tokens_XL[own].astype(np.int64), self.targets_XL[own].astype(np.int64)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))


class _Documents:
    """Documents or pairs of them, as long as the longest of the global batch, however many workers share it."""

    def __init__(self, folder: Path, split: arrow.Split) -> None:
        batch = arrow.read(folder, split)
        self.labels: NDArray[np.int64] = batch.column("label").to_numpy()
        self.length = len(self.labels)
        names = [name for name in arrow.DOCUMENT_COLUMNS if name in batch.schema.names]
        columns = [batch.column(name) for name in names]
        self.flat: list[NDArray[np.uint8]] = [column.values.to_numpy() for column in columns]
        self.offsets: list[NDArray[np.int64]] = [column.offsets.to_numpy() for column in columns]

    @property
    def seq_len(self) -> int:
        """Tokens of an example, on average and without padding."""
        return max(1, round(sum(len(flat) for flat in self.flat) / self.length))

    def take(self, rows: NDArray[np.int64], part: slice) -> Batch:
        longest = max(int((offsets[rows + 1] - offsets[rows]).max()) for offsets in self.offsets)
        own = rows[part]
        tokens = np.full((len(own), len(self.flat), max(1, longest)), PADDING, np.int64)
        for column, (flat, offsets) in enumerate(zip(self.flat, self.offsets, strict=True)):
            for place, row in enumerate(own):
                document = flat[offsets[row] : offsets[row + 1]]
                tokens[place, column, : len(document)] = document
        inputs = torch.from_numpy(tokens)
        return Batch(inputs if len(self.flat) == 2 else inputs[:, 0], torch.from_numpy(self.labels[own]))


def _rows(batch: pa.RecordBatch, column: str) -> NDArray[Any]:
    """A column of fixed-size lists as a matrix, still in the mapped file."""
    flat: NDArray[Any] = batch.column(column).flatten().to_numpy()
    return flat.reshape(batch.num_rows, -1)


_Data = _TokenWindows | _Examples | _Sequences | _Documents


def _open(folder: Path, split: arrow.Split, seq_len: int | None) -> _Data:
    match arrow.describe(folder).kind:
        case "tokens":
            assert seq_len is not None, "sources of text have a length to cut it to"
            return _TokenWindows(folder, split, seq_len)
        case "examples":
            return _Examples(folder, split)
        case "sequences":
            return _Sequences(folder, split)
        case "documents" | "pairs":
            return _Documents(folder, split)


class TrainBatches:
    """Random access to the training batches of one worker; every epoch has an order of its own."""

    def __init__(
        self, folder: Path, seq_len: int | None, batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        assert batch_size >= world_size, "checked against the config before anything started"
        self._data = _open(folder, "train", seq_len)
        self._batch_size = batch_size
        self._seed = seed
        self._rank, self._workers = rank, world_size
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def tokens_per_step(self) -> int:
        """Time steps in one global batch."""
        return self._batch_size * self._data.seq_len

    def at(self, step: int, factor: int = 1) -> Batch:
        """This worker's rows of the batch of `step` (from 1), which has `factor` times as many sequences as usual."""
        size = factor * self._batch_size
        first, last = (size * rank // self._workers for rank in (self._rank, self._rank + 1))
        positions = (step - 1) * size + np.arange(size)
        epochs, places = np.divmod(positions, self._data.length)
        rows = np.concatenate([self._order(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        return replace(self._data.take(rows, slice(first, last)), first=first)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            # A batch may straddle epochs; older orders are not needed any more.
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            self._orders[epoch] = generator.permutation(self._data.length)
        return self._orders[epoch]


def validation_batches(
    folder: Path, seq_len: int | None, n_rows: int, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This worker's share of at most `n_rows` rows, spread evenly over the held-out split, in batches.

    Every worker gets as many batches: ZeRO-3 needs all of them for a forward pass. Where there are fewer rows than
    workers, those without get a row of which nothing counts.
    """
    data = _open(folder, "val", seq_len)
    count = min(data.length, n_rows)
    rows = np.linspace(0, data.length, count, endpoint=False).astype(np.int64)
    for first in range(0, count, batch_size):
        whole = rows[first : first + batch_size]
        none_left = rank >= len(whole)
        yield data.take(whole, slice(1)).unasked() if none_left else data.take(whole, slice(rank, None, world_size))
