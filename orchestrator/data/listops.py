"""ListOps: nested operations on digits, whose value a model tells from the sequence of their tokens.

Nangia and Bowman 2018 (arXiv 1804.06028), as Long Range Arena generates it (Tay et al. 2020, arXiv 2011.04006;
`listops.py` of its code): from depth 1 on, a node is an operation with probability 1/4, of one of four kinds and with 2
to `max_args` arguments, else a digit; at `max_depth` it is a digit. Expressions whose length lies outside the bounds,
and those that came before, are dropped. Its files have parentheses too, which its readers drop as these do.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.heads import PADDING
from orchestrator.data import arrow
from orchestrator.data.source import Source, SourcePath, cannot_be_read, digest, file_facts, require_folder
from orchestrator.errors import UserError

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
WORDS = (*(str(digit) for digit in range(10)), *OPERATORS, "]")
TOKEN_OF = {word: token for token, word in enumerate(WORDS, PADDING + 1)}
VOCAB_SIZE = PADDING + 1 + len(WORDS)
OPERATION_SHARE = 0.25
# Expressions that are drawn at once, and how many such draws may bring nothing new.
TREES = 20_000
PATIENCE = 100
# A level that would have more nodes is not drawn before trees that are too long already are gone.
MOST_NODES = 5_000_000
EXAMPLES: dict[str, int] = {"train": 96_000, "val": 2_000, "test": 2_000}

Example = tuple[bytes, int]


class ListOps(Source):
    """ListOps: nested MIN, MAX, median and sum modulo 10 of digits; the value, one of ten, is asked.

    Generated as Long Range Arena does, whose parameters are the defaults, or read from its files. Its test examples are
    held out, or those meant for validation.
    """

    source: Literal["listops"]
    path: SourcePath | None = Field(None, description="Folder of basic_{train,val,test}.tsv, instead of generating.")
    held_out: Literal["test", "val"] = Field("test", description="Which examples are held out.")
    min_length: int = Field(500, ge=1, description="Sequences have more tokens.")
    max_length: int = Field(2000, ge=5, description="Sequences have fewer tokens.")
    max_depth: int = Field(10, ge=2, le=20, description="Depth of the deepest digits.")
    max_args: int = Field(10, ge=2, le=1000, description="Most arguments of an operation.")
    train_examples: int = Field(EXAMPLES["train"], ge=1, description="Sequences to train on.")
    held_out_examples: int = Field(EXAMPLES["test"], ge=1, description="Sequences each for test and val.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of the sequences.")

    @model_validator(mode="after")
    def _something_to_draw(self) -> ListOps:
        if self.path is not None:
            fields = type(self).model_fields.items()
            changed = [n for n, f in fields if not f.is_required() and getattr(self, n) != f.default]
            for name in set(changed) - {"path", "held_out"}:
                raise ValueError(f"{name} {getattr(self, name)} is for generating; with path it must be left out")
        if self.max_length < self.min_length + 2:
            raise ValueError(
                f"max_length {self.max_length} must be at least {self.min_length + 2}, two more than min_length"
            )
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = 2 + self.max_args * longest
        if longest <= self.min_length:
            raise ValueError(
                f"min_length {self.min_length} must be less than {longest}, the longest that max_depth "
                f"{self.max_depth} and max_args {self.max_args} allow"
            )
        return self

    @property
    def dataset_name(self) -> str:
        """Changes with every setting and with the files."""
        facts = [] if self.path is None else file_facts(self._files())
        return f"listops-{digest((self.model_dump_json(), facts))}"

    def _files(self) -> list[Path]:
        assert self.path is not None
        require_folder(self.path, self)
        files = [self.path / f"basic_{split}.tsv" for split in ("train", self.held_out)]
        for file in files:
            if not file.is_file():
                raise UserError(f"data.path {self.path} has no file {file.name}, as Long Range Arena calls it")
        return files

    def prepare(self, folder: Path) -> None:
        if self.path is None:
            examples = self.generate()
            train = list(islice(examples, self.train_examples))
            val = list(islice(examples, self.held_out_examples))
            held_out = val if self.held_out == "val" else list(islice(examples, self.held_out_examples))
            origin = f"generated, {self.model_dump_json()}"
        else:
            train, held_out = (list(_read(file)) for file in self._files())
            origin = str(self.path)
        splits: dict[arrow.Split, tuple[list[arrow.Documents], NDArray[np.int64]]] = {
            "train": _columns(train),
            "val": _columns(held_out),
        }
        arrow.write_documents(folder, splits, VOCAB_SIZE, n_classes=10, origin=origin)

    def generate(self) -> Iterator[Example]:
        """Different expressions without end, as tokens with their values; a function of the settings alone.

        Raises:
            UserError: the bounds leave so few expressions that none is new for long.
        """
        generator = np.random.Generator(np.random.Philox(key=[self.seed, 0]))
        seen: set[bytes] = set()
        idle = 0
        while idle < PATIENCE:
            before = len(seen)
            trees = _Trees.draw(generator, self.max_depth, self.max_args, self.max_length)
            for tokens, value in trees.between(self.min_length, self.max_length).examples():
                if tokens not in seen:
                    seen.add(tokens)
                    yield tokens, value
            idle = 0 if len(seen) > before else idle + 1
        raise UserError(
            f"data.min_length {self.min_length}, data.max_length {self.max_length}, data.max_depth {self.max_depth} "
            f"and data.max_args {self.max_args} gave {len(seen)} expressions and then none in {PATIENCE * TREES} "
            "draws; wider bounds give more"
        )


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth, from left to right through all trees; the next level has their arguments in order."""

    kinds: NDArray[np.int64]
    """A digit, or 10 and more for an operation."""
    arguments: NDArray[np.int64]
    """How many; 0 for a digit."""
    tree: NDArray[np.int64]


@dataclass(frozen=True)
class _Trees:
    """Many expressions at once, level by level: a tree's nodes are independent of each other, so the order of the draws
    makes no difference to what is drawn."""

    levels: list[_Level]
    count: int

    @classmethod
    def draw(cls, generator: np.random.Generator, max_depth: int, max_args: int, longer: int) -> _Trees:
        """Those with `longer` tokens or more may be missing."""
        levels: list[_Level] = []
        tree, count = np.arange(TREES), TREES
        for depth in range(1, max_depth + 1):
            n = len(tree)
            is_operation = (generator.random(n) < OPERATION_SHARE) & (depth < max_depth)
            digits, operators = generator.integers(10, size=n), 10 + generator.integers(len(OPERATORS), size=n)
            arguments = np.where(is_operation, generator.integers(2, max_args + 1, size=n), 0)
            levels.append(_Level(np.where(is_operation, operators, digits), arguments, tree))
            if arguments.sum() > MOST_NODES:
                grown = cls(levels, count)
                least = grown._lengths() + np.bincount(tree, arguments, count)
                grown = grown._only(least < longer)
                levels, count, (*_, last) = grown.levels, grown.count, grown.levels
                tree, arguments = last.tree, last.arguments
            tree = np.repeat(tree, arguments)
        return cls(levels, count)

    def between(self, shorter: int, longer: int) -> _Trees:
        """Only those with more than `shorter` and fewer than `longer` tokens."""
        lengths = self._lengths()
        return self._only((lengths > shorter) & (lengths < longer))

    def _lengths(self) -> NDArray[np.int64]:
        """Tokens of each tree."""
        lengths = np.zeros(self.count, np.int64)
        for level in self.levels:
            lengths += np.bincount(level.tree, 1 + (level.arguments > 0), self.count).astype(np.int64)
        return lengths

    def _only(self, kept: NDArray[np.bool_]) -> _Trees:
        number = np.cumsum(kept) - 1
        levels = []
        for level in self.levels:
            own = kept[level.tree]
            levels.append(_Level(level.kinds[own], level.arguments[own], number[level.tree[own]]))
        return _Trees(levels, int(kept.sum()))

    def examples(self) -> Iterator[Example]:
        """Tokens and value of each."""
        if not self.count:
            return
        values: NDArray[np.int64] = np.empty(0, np.int64)
        lengths: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for level in reversed(self.levels):
            inside = np.flatnonzero(level.arguments)
            own = np.where(level.arguments > 0, 2, 1)
            level_values = level.kinds.copy()
            if len(inside):
                firsts = np.cumsum(level.arguments[inside]) - level.arguments[inside]
                own[inside] += np.add.reduceat(lengths[0], firsts)
                level_values[inside] = _apply(level.kinds[inside] - 10, values, firsts)
            values, lengths = level_values, [own, *lengths]

        ends = np.cumsum(lengths[0])
        tokens = np.empty(int(ends[-1]), np.uint8)
        places = ends - lengths[0]
        for level, own, below in zip(self.levels, lengths, lengths[1:], strict=False):
            tokens[places] = PADDING + 1 + level.kinds
            inside = np.flatnonzero(level.arguments)
            tokens[places[inside] + own[inside] - 1] = TOKEN_OF["]"]
            if not len(inside):
                break
            # An argument begins where those before it end, and the first behind its operator.
            firsts = np.cumsum(level.arguments[inside]) - level.arguments[inside]
            before = np.cumsum(below) - below
            offsets = places[inside] + 1 - before[firsts]
            places = before + np.repeat(offsets, level.arguments[inside])
        for first, last, value in zip(ends - lengths[0], ends, values, strict=True):
            yield tokens[first:last].tobytes(), int(value)


def _apply(operators: NDArray[np.int64], arguments: NDArray[np.int64], firsts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The value of each operation, whose arguments begin at `firsts`; the median is rounded down."""
    counts = np.diff(firsts, append=len(arguments))
    group = np.repeat(np.arange(len(firsts)), counts)
    ordered = arguments[np.lexsort((arguments, group))]
    medians = (ordered[firsts + (counts - 1) // 2] + ordered[firsts + counts // 2]) // 2
    sums = np.add.reduceat(arguments, firsts) % 10
    choices = [ordered[firsts], ordered[firsts + counts - 1], medians, sums]
    return np.choose(operators, choices)


def _columns(examples: list[Example]) -> tuple[list[arrow.Documents], NDArray[np.int64]]:
    documents = arrow.Documents(tokens for tokens, _ in examples)
    return [documents], np.array([value for _, value in examples], np.int64)


def _read(path: Path) -> Iterator[Example]:
    """The examples of a file of Long Range Arena: a line with the names Source and Target, then those, tab between."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file, delimiter="\t")
            if next(rows, None) != ["Source", "Target"]:
                raise UserError(f"the first line of {path} must be Source and Target with a tab between")
            empty = True
            for row in rows:
                empty = False
                where = f"line {rows.line_num} of {path}"
                if len(row) != 2 or row[1] not in WORDS[:10]:
                    raise UserError(f"{where} must be an expression and a digit with a tab between")
                words = row[0].replace("(", " ").replace(")", " ").split()
                if unknown := [word for word in words if word not in TOKEN_OF]:
                    raise UserError(f"{where} has the word {unknown[0]!r}; valid are {' '.join(WORDS)}")
                if not words:
                    raise UserError(f"{where} has no expression")
                yield bytes(TOKEN_OF[word] for word in words), int(row[1])
            if empty:
                raise UserError(f"{path} has no examples")
    except OSError as error:
        raise cannot_be_read(error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of Long Range Arena: {error}") from error
