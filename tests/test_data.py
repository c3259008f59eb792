"""Arrow datasets and batches: the batch of a step is a function of (seed, step) alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from models.heads import NOT_ASKED
from orchestrator.cli import main
from orchestrator.data import arrow
from orchestrator.data.batches import Batch, TrainBatches, validation_batches
from orchestrator.data.images import Digits
from orchestrator.data.recall import Recall
from orchestrator.data.sources import prepare
from orchestrator.data.text import BLOCK, StdlibText, TextFiles
from orchestrator.errors import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return prepare(TextFiles(source="text", path=corpus), tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(Digits(source="digits"), tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Recall(source="recall", seq_len=20, pairs=3, vocab_size=40, train_examples=90, val_examples=45)
    return prepare(config, tmp_path_factory.mktemp("recall"))


def rows(folder: Path, seq_len: int | None, step: int, rank: int = 0, workers: int = 1, seed: int = 7) -> Batch:
    return TrainBatches(folder, seq_len, 12, seed, rank, workers).at(step)


@pytest.mark.parametrize(("kind", "seq_len"), [("text", 32), ("digits", None), ("recall", 20)])
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_any_number_of_workers_sees_the_same_batches(
    kind: str, seq_len: int | None, workers: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    for step in (1, 2, 500):  # the last one is some epochs in
        alone = rows(folder, seq_len, step)
        parts = [rows(folder, seq_len, step, rank, workers) for rank in range(workers)]
        assert torch.equal(torch.cat([part.inputs for part in parts]), alone.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts]), alone.targets)
        for part in parts:
            for half in part.split(2):
                assert torch.equal(alone.targets[half.first : half.first + len(half.targets)], half.targets)


@pytest.mark.parametrize(("kind", "seq_len"), [("text", 32), ("digits", None), ("recall", 20)])
def test_validation_rows_are_the_same_on_any_number_of_workers(
    kind: str, seq_len: int | None, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)

    def share(rank: int, workers: int) -> list[Batch]:
        return list(validation_batches(folder, seq_len, 50, 10, rank, workers))

    def fingerprints(batches: list[Batch]) -> list[bytes]:
        """Of the rows in which something counts."""
        pairs = [pair for batch in batches for pair in zip(batch.inputs, batch.targets, strict=True)]
        return [row.numpy().tobytes() for row, targets in pairs if bool((targets != NOT_ASKED).any())]

    alone = fingerprints(share(0, 1))
    for workers in (2, 7, 12):
        shares = [share(rank, workers) for rank in range(workers)]
        assert len({len(batches) for batches in shares}) == 1  # all take part in every forward pass
        assert sorted(alone) == sorted(row for batches in shares for row in fingerprints(batches))


@pytest.mark.parametrize("size", [1, 7, 16])
def test_which_rows_are_held_out_does_not_depend_on_the_batches(text: Path, size: int) -> None:
    whole, parts = (list(validation_batches(text, 32, 50, part, 0, 1)) for part in (50, size))
    assert len(whole) == 1
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole[0].inputs)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_larger_batch_goes_on_through_the_same_order(text: Path, workers: int) -> None:
    """Three times as many sequences a step are the rows of three usual steps, on any number of workers."""
    parts = [TrainBatches(text, 32, 12, 7, rank, workers).at(4, 3).inputs for rank in range(workers)]
    usual = [rows(text, 32, step).inputs for step in (10, 11, 12)]
    assert torch.equal(torch.cat(parts), torch.cat(usual))


def test_steps_can_be_taken_in_any_order(text: Path) -> None:
    batches = TrainBatches(text, 32, 12, 7, 0, 1)
    later, earlier = batches.at(900), batches.at(3)
    assert torch.equal(later.inputs, rows(text, 32, 900).inputs)
    assert torch.equal(earlier.inputs, rows(text, 32, 3).inputs)


def test_an_epoch_shows_every_example_once(digits: Path) -> None:
    n = len(arrow.read(digits, "train").column("label"))
    batches = TrainBatches(digits, None, 1, 0, 0, 1)
    seen = {batches.at(step).inputs.numpy().tobytes() for step in range(1, n + 1)}
    assert len(seen) == len(np.unique(arrow.read(digits, "train").column("features").to_pylist(), axis=0))


def test_seed_and_step_change_the_batch(text: Path) -> None:
    base = rows(text, 32, 1).inputs
    assert not torch.equal(base, rows(text, 32, 2).inputs)
    assert not torch.equal(base, rows(text, 32, 1, seed=8).inputs)


def test_targets_are_the_next_tokens(text: Path) -> None:
    batch = rows(text, 32, 1)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs.shape == (12, 32)


def test_the_splits_hold_the_whole_corpus_once(text: Path, corpus: Path) -> None:
    train, val = (arrow.read(text, split).column("tokens").to_numpy() for split in arrow.SPLITS)
    assert len(train) > len(val) > 0
    counts = np.bincount(train, minlength=256) + np.bincount(val, minlength=256)
    assert (counts == np.bincount(np.fromfile(corpus, np.uint8), minlength=256)).all()


@pytest.mark.parametrize(
    "tokens", [20, 19 * BLOCK, 19 * BLOCK + 100, 20 * BLOCK, 39 * BLOCK, 39 * BLOCK + 7, 41 * BLOCK]
)
def test_at_most_a_twentieth_of_a_text_is_held_out_and_half_as_much_at_least(tokens: int, tmp_path: Path) -> None:
    """Though the last block may have just begun."""
    (tmp_path / "text.txt").write_bytes(np.random.default_rng(0).bytes(tokens))
    folder = prepare(TextFiles(source="text", path=tmp_path / "text.txt"), tmp_path / "data")
    train, val = (len(arrow.read(folder, split)) for split in arrow.SPLITS)
    assert train + val == tokens
    assert 1 / 40 < val / tokens <= 1 / 20


def test_a_folder_is_the_text_of_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "text" / "b").mkdir(parents=True)
    (tmp_path / "text" / "b" / "2.txt").write_text("world" * 3)
    (tmp_path / "text" / "a.txt").write_text("hello" * 3)
    folder = prepare(TextFiles(source="text", path=tmp_path / "text"), tmp_path / "data")
    parts = [arrow.read(folder, split).column("tokens").to_numpy().tobytes() for split in arrow.SPLITS]
    assert b"".join(parts) == b"hello" * 3 + b"world" * 3


def test_the_standard_library_is_a_few_megabytes_without_its_tests(tmp_path: Path) -> None:
    folder = prepare(StdlibText(source="stdlib"), tmp_path)
    tokens = arrow.read(folder, "train").column("tokens").to_numpy()
    assert 3e6 < len(tokens) < 4e7
    assert b"class TestCase(" in tokens.tobytes()  # unittest itself is part of it
    assert b"class TestGzip(" not in tokens.tobytes()  # the library's own tests are not


def test_preparing_twice_writes_once(tmp_path: Path) -> None:
    config = Digits(source="digits")
    description = prepare(config, tmp_path) / arrow.DESCRIPTION
    written = description.stat().st_mtime_ns
    prepare(config, tmp_path)
    config.prepare(description.parent)  # a second worker that raced the first
    assert description.stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_missing_and_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path .*absent does not exist"):
        prepare(TextFiles(source="text", path=tmp_path / "absent"), tmp_path / "data")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        prepare(TextFiles(source="text", path=tmp_path / "empty.txt"), tmp_path / "data")


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    folder = prepare(TextFiles(source="text", path=tmp_path / "short.txt"), tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.seq_len 32 needs 33 tokens"):
        rows(folder, 32, 1)


def test_damaged_datasets_are_refused_by_name(tmp_path: Path) -> None:
    folder = prepare(Digits(source="digits"), tmp_path)
    (folder / "train.arrow").write_bytes(b"not arrow")
    with pytest.raises(UserError, match=r"train\.arrow is missing or damaged"):
        rows(folder, None, 1)
    (folder / arrow.DESCRIPTION).write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        arrow.describe(folder)


def test_a_dataset_is_prepared_by_command(tmp_path: Path) -> None:
    settings = ["min_length=2", "max_length=9", "train_examples=30", "held_out_examples=5"]
    arguments = ["data", "prepare", "--data-root", str(tmp_path), "listops"]
    done = CliRunner().invoke(main, [*arguments, *settings])
    assert done.exit_code == 0
    assert arrow.read(Path(done.output.strip()), "train").num_rows == 30
    nobodys = CliRunner().invoke(main, ["data", "prepare", "stdlib", "--data-root", "~nobody-by-this-name/x"])
    assert (nobodys.exit_code, nobodys.stderr.count("\n")) == (2, 1)
    assert "--data-root: ~nobody-by-this-name/x names the home of an unknown user" in nobodys.stderr
    refused = CliRunner().invoke(main, [*arguments, "max_depth=1"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("rayduce: data.max_depth is 1: ")
