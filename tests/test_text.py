"""Text from JSONL, Parquet and data sets by name, as bytes and as the tokens of a tokenizer."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models.heads import LanguageModel
from models.registry import LanguageTask, build_model
from orchestrator import generate
from orchestrator.config_reading import parse_config
from orchestrator.data import arrow, tokenizer
from orchestrator.data.batches import TrainBatches
from orchestrator.data.sources import prepare
from orchestrator.data.text import TextFiles
from orchestrator.errors import UserError

RECORDS = ["The first record.", "", "Zweiter \u2013 mit Umlaut: \u00e4\u00f6\u00fc", "a\nb\n", "\U0001f600 last"]
JOINED = "".join(f"{record}\n" for record in RECORDS).encode()


def text(**settings: Any) -> TextFiles:
    return TextFiles.model_validate({"source": "text"} | settings)


def content(folder: Path) -> np.ndarray:
    return np.concatenate([arrow.read(folder, split).column("tokens").to_numpy() for split in arrow.SPLITS])


def jsonl(path: Path, field: str = "text") -> Path:
    lines = [json.dumps({"id": i, field: record}, ensure_ascii=i % 2 == 0) for i, record in enumerate(RECORDS)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def parquet(path: Path, field: str = "text") -> Path:
    table = pa.table({"id": range(len(RECORDS)), field: RECORDS})
    pq.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("field", ["text", "content"])
def test_records_are_joined_line_by_line(write: Callable[[Path, str], Path], field: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"corpus.{write.__name__}", field)
    folder = prepare(text(path=path, field=field), tmp_path / "data")
    assert content(folder).tobytes() == JOINED
    assert arrow.describe(folder).task == LanguageTask(256)


def test_a_folder_may_mix_formats(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in" / "b.jsonl")
    parquet(tmp_path / "in" / "c.parquet")
    (tmp_path / "in" / "a.txt").write_bytes(b"plain\xff")
    folder = prepare(text(path=tmp_path / "in"), tmp_path / "data")
    assert content(folder).tobytes() == b"plain\xff" + JOINED + JOINED


def test_the_field_and_the_tokenizer_are_part_of_the_name_where_they_count(tmp_path: Path) -> None:
    plain, records = tmp_path / "plain.txt", jsonl(tmp_path / "records.jsonl")
    plain.write_text("text")
    assert text(path=plain).dataset_name == text(path=plain, field="other").dataset_name
    assert text(path=records).dataset_name != text(path=records, field="other").dataset_name
    words = small_tokenizer(tmp_path / "tokenizer.json")
    named = text(path=plain, tokenizer=str(words)).dataset_name
    assert named != text(path=plain).dataset_name
    small_tokenizer(words, 300)
    assert text(path=plain, tokenizer=str(words)).dataset_name != named


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"line 2 of .* has no text as text, which data\.field names"),
        ("a.jsonl", b'["text"]\n', "line 1 of .* has no text as text"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 of .* has no text as text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 of .* has a text that is no Unicode text"),
        ("a.jsonl", b"\n\n", "is empty: there is no text"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .* is not JSON"),
        ("a.parquet", b"PAR1 but not really", "is not a whole Parquet file"),
        ("a.parquet", b"", "is not a whole Parquet file"),
    ],
)
def test_damaged_records_are_refused_in_a_sentence(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as refused:
        prepare(text(path=tmp_path / name), tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "data").exists()


def test_parquet_without_that_column_or_with_holes_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column body, which data\.field names; there are id, text"):
        prepare(text(path=path, field="body"), tmp_path / "data")
    with pytest.raises(UserError, match=r"row 1 of .* has no text as id"):
        prepare(text(path=path, field="id"), tmp_path / "data")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    with pytest.raises(UserError, match=r"row 2 of .* has no text as text"):
        prepare(text(path=path), tmp_path / "data")
    path.write_bytes(parquet(tmp_path / "b.parquet").read_bytes()[:-30])
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        prepare(text(path=path), tmp_path / "data")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "takes one of path and hub"),
        ({"path": "a", "hub": "b"}, "takes one of path and hub"),
        ({"path": "a", "subset": "b"}, "subset and split belong to hub"),
        ({"path": "a", "split": "test"}, "subset and split belong to hub"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        text(**settings)


# --- by name ---


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_data_set_is_read_by_its_name(offline: None, tmp_path: Path) -> None:
    """A folder's name stands for one on the hub: what comes after is the library's, and the same."""
    (tmp_path / "stories").mkdir()
    parquet(tmp_path / "stories" / "train.parquet")
    (tmp_path / "stories" / "test.parquet").write_bytes(parquet(tmp_path / "x.parquet").read_bytes())
    for split in ("train", "test[:2]"):
        config = text(hub=str(tmp_path / "stories"), split=split)
        folder = prepare(config, tmp_path / "data")
        expected = JOINED if split == "train" else "".join(f"{record}\n" for record in RECORDS[:2]).encode()
        assert content(folder).tobytes() == expected
    with pytest.raises(UserError, match=r"data\.hub .*stories has no column body, which data\.field names"):
        prepare(text(hub=str(tmp_path / "stories"), field="body"), tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.hub .*stories \(subset None, split dev\) cannot be had"):
        prepare(text(hub=str(tmp_path / "stories"), split="dev"), tmp_path / "data")


def test_what_cannot_be_fetched_is_refused_in_a_sentence(offline: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.hub nobody/no-such-data .* cannot be had") as refused:
        prepare(text(hub="nobody/no-such-data"), tmp_path / "data")
    assert "\n" not in str(refused.value)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"data\.tokenizer nobody/no-such-tokenizer is no file") as refused:
        prepare(text(path=tmp_path / "a.txt", tokenizer="nobody/no-such-tokenizer"), tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("library", "settings"), [("datasets", {"hub": "some/data"}), ("tokenizers", {"tokenizer": "some/tokenizer"})]
)
def test_a_library_that_is_not_installed_is_named(
    library: str, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, library, raising=False)
    (tmp_path / "a.txt").write_text("text")
    origin = {} if "hub" in settings else {"path": tmp_path / "a.txt"}
    with pytest.raises(UserError, match=rf"needs the library {library}: pip install 'rayduce\[text\]'"):
        prepare(text(**settings, **origin), tmp_path / "data")


# --- tokens ---


def small_tokenizer(path: Path, size: int = 280) -> Path:
    """Byte-level BPE, trained here on this file's own text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    made.train_from_iterator([Path(__file__).read_text()] * 2, trainer)
    made.save(str(path))
    return path


@pytest.mark.parametrize("size", [270, 257])
def test_tokens_are_those_of_the_tokenizer(size: int, tmp_path: Path) -> None:
    path = small_tokenizer(tmp_path / "tokenizer.json", size)
    source = Path(__file__)
    folder = prepare(text(path=source, tokenizer=str(path)), tmp_path / "data")
    made, tokens = Tokenizer.from_file(str(path)), content(folder)
    assert tokens.dtype == np.uint16
    assert made.decode(tokens.tolist(), skip_special_tokens=False) == source.read_text()
    assert tokens.tolist() == made.encode(source.read_text()).ids
    assert arrow.describe(folder).task == LanguageTask(size)
    batch = TrainBatches(folder, 16, 4, 0, 0, 1).at(1)
    assert batch.inputs.dtype == torch.int64
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_large_vocabularies_have_wider_tokens(tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(70_000)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in range(0, 70_000, 7)))
    config = text(path=tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json"))
    folder = prepare(config, tmp_path / "data")
    assert content(folder).dtype == np.uint32
    assert content(folder).tolist() == list(range(0, 70_000, 7))
    assert arrow.describe(folder).task == LanguageTask(70_000)


def test_long_files_are_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.text.PIECE", 500)
    path, source = small_tokenizer(tmp_path / "tokenizer.json"), Path(__file__)
    config = text(path=source, tokenizer=str(path))
    pieces = list(config._pieces())
    assert "".join(pieces) == source.read_text()
    assert len(pieces) > 5
    assert all(piece.endswith("\n") for piece in pieces)
    tokens = tokenizer.encode(Tokenizer.from_file(str(path)), pieces)
    assert Tokenizer.from_file(str(path)).decode(tokens.tolist(), skip_special_tokens=False) == source.read_text()


def test_what_is_no_tokenizer_or_no_text_for_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xe9")
    good, bad = small_tokenizer(tmp_path / "tokenizer.json"), tmp_path / "bad.json"
    bad.write_text("{}")
    for name, message in (
        (good, "a.txt is not UTF-8, which data.tokenizer .* needs: .* at byte 3"),
        (bad, r"data\.tokenizer .*bad\.json is no tokenizer\.json"),
        (tmp_path / "absent.json", r"absent\.json cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            prepare(text(path=tmp_path / "a.txt", tokenizer=str(name)), tmp_path / "data")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "data").exists()


# --- generation ---


@pytest.fixture
def run(tmp_path: Path, small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run with a tokenizer would load: a fresh model, whose draws are hardly ever UTF-8."""
    path = small_tokenizer(tmp_path / "tokenizer.json")
    config = parse_config(small_run | {"data": small_run["data"] | {"tokenizer": str(path)}})
    torch.manual_seed(0)
    model = build_model(config.model, LanguageTask(280), config.model.state_dims)
    monkeypatch.setattr(generate, "load_run", lambda run: (model, config))
    return path


@pytest.mark.parametrize("prompt", ["", "def test", "\u00e4"])
def test_generated_tokens_are_decoded_by_the_tokenizer(run: Path, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as they come are the whole text, of which a character may need several tokens."""
    made = Tokenizer.from_file(str(run))
    given = made.encode(prompt or "\n").ids
    following = made.encode("café \U0001f600\U0001f600 and \u2013 so on").ids
    seen: list[list[int]] = []

    def spell(model: LanguageModel, prompt: list[int], *rest: object) -> Any:
        seen.append(prompt)
        return iter(following)

    monkeypatch.setattr(generate, "generate", spell)
    pieces = list(generate.generate_text("run", prompt, len(following), 1.0, None, 0))
    assert "".join(pieces) == prompt + "café \U0001f600\U0001f600 and \u2013 so on"
    assert seen == [given]
    assert len(pieces) > len(following)


def test_a_prompt_that_is_no_text_is_refused(run: Path) -> None:
    """Byte C3, as Python reads it among a command's arguments."""
    with pytest.raises(UserError, match=r"prompt '\\udcc3' must be UTF-8"):
        generate.generate_text(run, "\udcc3", 4, 0.8, None, None)


def test_tokens_that_are_no_text_stay_visible_and_bounded(run: Path) -> None:
    first, again = (list(generate.generate_text("run", "x", 60, 1.0, None, seed=5)) for _ in range(2))
    assert first == again
    assert "\ufffd" in "".join(first)
    for start in range(1, len(first) - 4):
        assert "".join(first[start : start + 4]), "no more than a character's tokens are held back"


def test_another_tokenizer_than_the_runs_is_refused(run: Path) -> None:
    small_tokenizer(run, 290)
    with pytest.raises(UserError, match=r"has 290 tokens, but the run was trained with 280"):
        generate.generate_text("run", "", 5, 1.0, None, 0)
    run.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        generate.generate_text("run", "", 5, 1.0, None, 0)
