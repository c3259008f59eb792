"""Multi-query associative recall (MQAR): look up, later in a sequence, what its beginning paired with what.

Arora et al. 2023, "Zoology" (arXiv 2312.04927), which made it because recall is where models with a fixed state fall
behind attention; how many pairs a model can hold depends on its state dimension.

Shapes: X examples, L time, P pairs, S slots, V vocabulary.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.heads import NOT_ASKED
from orchestrator.data import arrow
from orchestrator.data.source import Source

FILLER = 0
Tokens = NDArray[np.uint16]
Targets = NDArray[np.int32]


class Recall(Source):
    """Multi-query associative recall: random keys with their values, then the keys again, whose values are asked."""

    source: Literal["recall"]
    seq_len: int = Field(128, ge=4, description="Tokens per sequence, at least four per pair.")
    pairs: int = Field(16, ge=1, description="Keys per sequence, each with a value and asked once.")
    vocab_size: int = Field(
        512, ge=4, le=65_536, description="Tokens: keys from the lower half without 0, values from the upper."
    )
    train_examples: int = Field(20_000, ge=1, description="Sequences to train on.")
    val_examples: int = Field(1_000, ge=1, description="Held-out sequences.")
    power: float = Field(
        0.01, ge=0, le=1, description="Slot g after the pairs gets a query with weight g^(power - 1); 1 is uniform."
    )
    # Off, as in the paper's experiments, whose figures a run can then be compared with.
    random_non_queries: bool = Field(
        False, description="Random tokens in place of 0 where nothing is asked; keys may be among them."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the sequences.")

    @model_validator(mode="after")
    def _pairs_fit(self) -> Recall:
        if 4 * self.pairs > self.seq_len:
            raise ValueError(f"seq_len {self.seq_len} must be at least {4 * self.pairs}, four tokens for each of pairs")
        if self.pairs >= self.vocab_size // 2:
            raise ValueError(
                f"vocab_size {self.vocab_size} must be at least {2 * self.pairs + 2}, "
                f"or there are no {self.pairs} different keys for pairs"
            )
        return self

    @property
    def dataset_name(self) -> str:
        """Changes with every setting."""
        return f"recall-{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:12]}"

    def prepare(self, folder: Path) -> None:
        arrow.write_sequences(
            folder,
            {"train": self.generate("train"), "val": self.generate("val")},
            self.vocab_size,
            origin=f"multi-query associative recall, {self.model_dump_json()}",
        )

    def generate(self, split: arrow.Split) -> tuple[Tokens, Targets]:
        """The sequences of a split, a function of the settings alone: tokens and targets, both (X, L).

        P keys with their values come first. What follows is divided into slots of two tokens, and each key comes back
        at the beginning of a slot of its own, with its value as target; every other target is NOT_ASKED.
        """
        examples = {"train": self.train_examples, "val": self.val_examples}[split]
        generator = np.random.Generator(np.random.Philox(key=[self.seed, arrow.SPLITS.index(split)]))
        half, pairs = self.vocab_size // 2, self.pairs
        weights_S = np.arange(1, (self.seq_len - 2 * pairs) // 2 + 1) ** (self.power - 1)
        weights_S /= weights_S.sum()

        keys_XP, values_XP, slots_XP = np.empty((3, examples, pairs), np.int64)
        for x in range(examples):
            keys_XP[x] = 1 + generator.choice(half - 1, pairs, replace=False)
            values_XP[x] = half + generator.choice(self.vocab_size - half, pairs, replace=False)
            slots_XP[x] = generator.choice(len(weights_S), pairs, replace=False, p=weights_S)
        queries_XP = 2 * pairs + 2 * slots_XP

        if self.random_non_queries:
            tokens_XL = generator.integers(self.vocab_size, size=(examples, self.seq_len), dtype=np.uint16)
        else:
            tokens_XL = np.full((examples, self.seq_len), FILLER, np.uint16)
        tokens_XL[:, 0 : 2 * pairs : 2] = keys_XP
        tokens_XL[:, 1 : 2 * pairs : 2] = values_XP
        np.put_along_axis(tokens_XL, queries_XP, keys_XP, axis=1)
        targets_XL = np.full((examples, self.seq_len), NOT_ASKED, np.int32)
        np.put_along_axis(targets_XL, queries_XP, values_XP, axis=1)
        return tokens_XL, targets_XL
