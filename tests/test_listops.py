"""ListOps: generated expressions are worth what an evaluator of their text says, and files are read as they are."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from models.registry import TokenClassificationTask
from orchestrator.data import arrow
from orchestrator.data import listops as listops_source
from orchestrator.data.batches import TrainBatches
from orchestrator.data.listops import OPERATORS, TOKEN_OF, VOCAB_SIZE, ListOps
from orchestrator.data.sources import prepare
from orchestrator.errors import UserError

WORD_OF = {token: word for word, token in TOKEN_OF.items()}
SHORT = {"min_length": 20, "max_length": 60, "train_examples": 50, "held_out_examples": 20}


def listops(**settings: Any) -> ListOps:
    return ListOps.model_validate({"source": "listops"} | SHORT | settings)


def test_unless_told_otherwise_it_is_long_range_arenas() -> None:
    """Tay et al. 2020, appendix: 500 to 2,000 tokens, ten levels, ten arguments; 96,000, 2,000 and 2,000 examples."""
    plain = ListOps.model_validate({"source": "listops"})
    assert (plain.min_length, plain.max_length, plain.max_depth, plain.max_args) == (500, 2000, 10, 10)
    assert (plain.train_examples, plain.held_out_examples) == (96_000, 2_000)


def words(tokens: bytes) -> list[str]:
    return [WORD_OF[token] for token in tokens]


def evaluate(expression: list[str]) -> tuple[int, int]:
    """Value and depth of an expression, by a stack of open operations."""
    opened: list[tuple[str, list[int]]] = [("", [])]
    deepest = 1
    for word in expression:
        if word in OPERATORS:
            opened.append((word, []))
        elif word == "]":
            operator, arguments = opened.pop()
            assert len(arguments) >= 2
            match operator:
                case "[MIN":
                    value = min(arguments)
                case "[MAX":
                    value = max(arguments)
                case "[MED":
                    value = int(statistics.median(arguments))
                case _:
                    value = sum(arguments) % 10
            opened[-1][1].append(value)
        else:
            opened[-1][1].append(int(word))
        deepest = max(deepest, len(opened))
    assert len(opened) == 1
    (value,) = opened[0][1]
    return value, deepest


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_length": 500, "max_length": 2000},  # as published
        {"min_length": 2, "max_length": 6, "max_depth": 2, "max_args": 3},
        {"max_depth": 4, "max_args": 30},
        {"max_args": 2, "min_length": 10, "max_length": 30},
    ],
    ids=str,
)
def test_values_and_lengths_are_right(settings: dict[str, Any]) -> None:
    config = listops(**settings)
    examples = list(islice(config.generate(), 300))
    assert len({tokens for tokens, _ in examples}) == 300
    for tokens, value in examples:
        assert config.min_length < len(tokens) < config.max_length
        found, depth = evaluate(words(tokens))
        assert found == value
        assert depth <= config.max_depth


def test_trees_that_are_too_long_already_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With up to 20 arguments a tree would have 2.75 times as many nodes at each of its 20 levels."""
    monkeypatch.setattr(listops_source, "MOST_NODES", 100_000)
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    trees = listops_source._Trees.draw(generator, 20, 20, 60)
    assert 0 < trees.count < listops_source.TREES
    assert max(len(level.kinds) for level in trees.levels) <= 100_000
    config = listops(max_depth=20, max_args=20)
    for tokens, value in islice(config.generate(), 300):
        assert evaluate(words(tokens))[0] == value
        assert config.min_length < len(tokens) < config.max_length


def test_operations_arguments_and_digits_are_drawn_evenly() -> None:
    """Where the bounds choose nothing: every expression of depth two with up to four arguments."""
    config = listops(min_length=1, max_length=100, max_depth=3, max_args=4)
    counts: Counter[str] = Counter()
    arguments: Counter[int] = Counter()
    for tokens, _ in islice(config.generate(), 4000):
        expression = words(tokens)
        counts.update(expression)
        depth, number = 0, 0
        for word in expression:  # of the outermost operation
            number += depth == 1 and word != "]"
            depth += (word in OPERATORS) - (word == "]")
        arguments[number] += 1
    operations = [counts[operator] for operator in OPERATORS]
    assert max(operations) < 1.1 * min(operations)
    digits = [counts[str(digit)] for digit in range(10)]
    assert max(digits) < 1.1 * min(digits)
    # Repetitions are dropped, of which there are more among short expressions; otherwise a third each.
    assert set(arguments) == {2, 3, 4}
    assert arguments[4] > arguments[3] > arguments[2] > 400


def test_a_quarter_of_the_arguments_are_operations() -> None:
    config = listops(min_length=1, max_length=10_000, max_depth=3, max_args=10)
    inner = outer = 0
    for tokens, _ in islice(config.generate(), 4000):
        depth = 0
        for word in words(tokens):
            outer += depth == 1 and word != "]"
            inner += depth == 1 and word in OPERATORS
            depth += (word in OPERATORS) - (word == "]")
    assert inner / outer == pytest.approx(0.25, abs=0.02)


def test_the_same_seed_is_the_same_data(tmp_path: Path) -> None:
    first, again, other = (list(islice(listops(seed=seed).generate(), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    names = {listops(**change).dataset_name for change in ({}, {"seed": 1}, {"max_args": 9}, {"held_out": "val"})}
    assert len(names) == 4
    assert listops().dataset_name in names


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_splits_are_those_asked_for_and_share_nothing(held_out: str, tmp_path: Path) -> None:
    config = listops(held_out=held_out)
    folder = prepare(config, tmp_path)
    assert arrow.describe(folder).task == TokenClassificationTask(VOCAB_SIZE, 10)
    stored = {}
    for split in arrow.SPLITS:
        batch = arrow.read(folder, split)
        tokens = [bytes(row) for row in batch.column("tokens").to_pylist()]
        assert [evaluate(words(row))[0] for row in tokens] == batch.column("label").to_pylist()
        stored[split] = tokens
    stream = [tokens for tokens, _ in islice(config.generate(), 90)]
    assert stored["train"] == stream[:50]
    assert stored["val"] == (stream[50:70] if held_out == "val" else stream[70:])


def test_batches_are_filled_up_to_the_longest_of_all_workers(tmp_path: Path) -> None:
    folder = prepare(listops(), tmp_path)
    for step in range(1, 6):
        whole = TrainBatches(folder, None, 6, 0, 0, 1).at(step)
        parts = [TrainBatches(folder, None, 6, 0, rank, 3).at(step) for rank in range(3)]
        assert {part.inputs.shape[1] for part in parts} == {whole.inputs.shape[1]}
        used = (whole.inputs != 0).sum(1)
        assert int(used.max()) == whole.inputs.shape[1]
        for row, length, value in zip(whole.inputs.numpy(), used.tolist(), whole.targets.tolist(), strict=True):
            assert not row[length:].any()
            assert evaluate(words(row[:length].astype(np.uint8).tobytes()))[0] == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 20}, "max_length 20 must be at least 22"),
        ({"max_depth": 2, "max_args": 5}, "min_length 20 must be less than 7"),
        ({"path": "x", "seed": 1}, "for generating; with path it must be left out"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        listops(**settings)


def test_bounds_with_too_few_expressions_are_refused(tmp_path: Path) -> None:
    config = listops(min_length=3, max_length=5, max_depth=2, train_examples=500)  # 4 operations on 2 digits
    with pytest.raises(UserError, match=r"gave 400 expressions and then none in \d+ draws; wider bounds give more"):
        prepare(config, tmp_path / "data")
    assert not (tmp_path / "data").exists()


# --- the files of Long Range Arena ---

ROWS = {
    "train": [("( ( ( ( [MAX 2 ) 9 ) ( ( ( [SM 4 ) 8 ) ] ) ) ] )", 9), ("( ( ( [MED 1 ) 4 ) ] )", 2)],
    "val": [("( ( ( [MIN 3 ) 7 ) ] )", 3)],
    "test": [("( ( ( [SM 5 ) 6 ) ] )", 1)],
}


def release(folder: Path) -> Path:
    folder.mkdir()
    for split, rows in ROWS.items():
        lines = ["Source\tTarget", *(f"{source}\t{target}" for source, target in rows)]
        (folder / f"basic_{split}.tsv").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return folder


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_files_are_read_without_their_parentheses(held_out: str, tmp_path: Path) -> None:
    path = release(tmp_path / "listops-1000")
    folder = prepare(ListOps(source="listops", path=path, held_out=held_out), tmp_path / "data")
    for split, name in (("train", "train"), ("val", held_out)):
        batch = arrow.read(folder, split)
        tokens = [bytes(row) for row in batch.column("tokens").to_pylist()]
        expected = [source.replace("(", "").replace(")", "").split() for source, _ in ROWS[name]]
        assert [words(row) for row in tokens] == expected
        assert batch.column("label").to_pylist() == [target for _, target in ROWS[name]]
        assert [evaluate(words(row))[0] for row in tokens] == batch.column("label").to_pylist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no file basic_train\.tsv"),
        (b"", "the first line of .* must be Source and Target"),
        (b"Source\tTarget\r\n", "has no examples"),
        (b"Target\tSource\r\n", "the first line of .* must be Source and Target"),
        (b"Source\tTarget\r\n( ( [MAX 2 ) ] )\r\n", "line 2 of .* must be an expression and a digit"),
        (b"Source\tTarget\r\n( ( [MAX 2 ) ] )\t12\r\n", "line 2 of .* must be an expression and a digit"),
        (b"Source\tTarget\r\n( ( [AVG 2 ) ] )\t2\r\n", r"line 2 of .* has the word '\[AVG'; valid are 0 1"),
        (b"Source\tTarget\r\n( )\t2\r\n", "line 2 of .* has no expression"),
        (b"\xff\xfe\x00", "is not a table of Long Range Arena"),
    ],
)
def test_files_that_are_none_are_refused_in_a_sentence(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = release(tmp_path / "listops-1000")
    (path / "basic_train.tsv").unlink()
    if content is not None:
        (path / "basic_train.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        prepare(ListOps(source="listops", path=path), tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "data").exists()
