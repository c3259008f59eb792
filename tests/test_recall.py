"""Multi-query associative recall: what its sequences hold, what is asked, and how answers are counted."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from models.heads import NOT_ASKED, TokenModel
from models.registry import LanguageTask, RecallTask, Task, build_model
from orchestrator.cli import main
from orchestrator.config_reading import parse_config
from orchestrator.data import arrow
from orchestrator.data.batches import Batch, TrainBatches, validation_batches
from orchestrator.data.recall import FILLER, Recall
from orchestrator.data.sources import prepare
from orchestrator.errors import UserError
from orchestrator.group import Group
from orchestrator.inference import load_model
from orchestrator.run_folder import read_metrics
from orchestrator.summary import describe_summary
from tests.runs import train

SMALL = {"source": "recall", "seq_len": 24, "pairs": 4, "vocab_size": 40, "train_examples": 60, "val_examples": 20}


def recall(**settings: Any) -> Recall:
    return Recall.model_validate(SMALL | settings)


@pytest.mark.parametrize(
    "config",
    [
        recall(),
        recall(random_non_queries=True),
        recall(seq_len=33, vocab_size=41),
        recall(seq_len=16, vocab_size=10),  # neither a slot nor a key to spare
    ],
    ids=str,
)
@pytest.mark.parametrize("split", arrow.SPLITS)
def test_every_key_is_asked_once_for_the_value_it_came_with(config: Recall, split: arrow.Split) -> None:
    tokens_XL, targets_XL = config.generate(split)
    beginning, half = 2 * config.pairs, config.vocab_size // 2
    for tokens, targets in zip(tokens_XL.tolist(), targets_XL.tolist(), strict=True):
        value_of = dict(zip(tokens[:beginning:2], tokens[1:beginning:2], strict=True))
        asked = [t for t, target in enumerate(targets) if target != NOT_ASKED]
        assert len(tokens) == len(targets) == config.seq_len
        assert len(value_of) == config.pairs, "keys are distinct"
        assert all(0 < key < half <= value < config.vocab_size for key, value in value_of.items())
        assert min(asked) >= beginning
        assert sorted(tokens[t] for t in asked) == sorted(value_of)
        assert all(targets[t] == value_of[tokens[t]] for t in asked)
        others = [token for t, token in enumerate(tokens) if t >= beginning and t not in asked]
        assert config.random_non_queries or set(others) == {FILLER}
    assert tokens_XL.max() < config.vocab_size


def test_random_tokens_come_from_the_whole_vocabulary() -> None:
    tokens_XL, targets_XL = recall(train_examples=500, random_non_queries=True).generate("train")
    filled = (targets_XL == NOT_ASKED) & (np.arange(24) >= 8)
    assert len(np.unique(tokens_XL[filled])) == 40


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_queries_follow_the_power_law(power: float) -> None:
    """Of a single pair, whose place depends on no other's; six standard deviations for each place."""
    config = recall(pairs=1, seq_len=22, train_examples=4000, power=power)
    _, targets_XL = config.generate("train")
    places = (targets_XL != NOT_ASKED).argmax(1)
    counts = np.bincount(places, minlength=22)
    weights = np.array([gap ** (power - 1) for gap in range(1, 11)])
    expected = 4000 * weights / weights.sum()
    assert (np.abs(counts[2::2] - expected) <= 6 * np.sqrt(expected)).all()
    assert counts[1::2].sum() == 0
    if power < 1:
        assert counts[2:8].sum() > counts[16:22].sum()


def test_with_many_pairs_early_places_are_asked_more_often() -> None:
    _, targets_XL = recall(seq_len=64, train_examples=500).generate("train")
    asked = (targets_XL != NOT_ASKED).sum(0)
    assert asked[8:22].sum() > asked[22:36].sum() > asked[50:64].sum() > 0


def test_sequences_are_a_function_of_the_settings() -> None:
    for split in arrow.SPLITS:
        for first, again in zip(recall().generate(split), recall().generate(split), strict=True):
            assert np.array_equal(first, again)
    held_out, _ = recall(val_examples=60).generate("val")
    train, _ = recall().generate("train")
    other, _ = recall(seed=1).generate("train")
    assert len({array[:, :8].tobytes() for array in (held_out, train, other)}) == 3
    assert not {row.tobytes() for row in train[:, :8]} & {row.tobytes() for row in held_out[:, :8]}


def test_other_settings_are_another_dataset() -> None:
    changes = {
        "seq_len": 25,
        "pairs": 3,
        "vocab_size": 41,
        "train_examples": 61,
        "val_examples": 21,
        "power": 0.02,
        "random_non_queries": True,
        "seed": 1,
    }
    assert changes.keys() == Recall.model_fields.keys() - {"source"}
    names = {recall(**{key: value}).dataset_name for key, value in changes.items()} | {recall().dataset_name}
    assert len(names) == len(changes) + 1
    assert recall().dataset_name == recall().dataset_name


def test_a_dataset_gives_back_what_was_generated(tmp_path: Path) -> None:
    folder = prepare(recall(), tmp_path)
    assert arrow.describe(folder).task == RecallTask(40)
    tokens, targets = recall().generate("val")
    batches = list(validation_batches(folder, 24, 594, 6, 0, 1))
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), torch.from_numpy(tokens.astype(np.int64)))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.from_numpy(targets.astype(np.int64)))
    assert TrainBatches(folder, 24, 6, 0, 0, 1).tokens_per_step == 6 * 24


def test_the_largest_tokens_survive_the_file(tmp_path: Path) -> None:
    config = recall(vocab_size=65_536)
    folder = prepare(config, tmp_path)
    batch = TrainBatches(folder, 24, 60, 0, 0, 1).at(1)
    assert int(batch.inputs.max()) == int(batch.targets.max()) == config.generate("train")[0].max() > 32_768


def test_a_damaged_dataset_is_refused(tmp_path: Path) -> None:
    folder = prepare(recall(), tmp_path)
    content = (folder / "val.arrow").read_bytes()
    (folder / "val.arrow").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"val\.arrow is missing or damaged"):
        next(validation_batches(folder, 24, 6, 6, 0, 1))
    (folder / arrow.DESCRIPTION).unlink()
    with pytest.raises(UserError, match=r"dataset\.json is missing or unreadable"):
        TrainBatches(folder, 24, 6, 0, 0, 1)


def test_the_command_prepares_it(tmp_path: Path) -> None:
    settings = [f"{key}={value}" for key, value in SMALL.items() if key != "source"]
    options = ["data", "prepare", "recall", *settings, "--data-root", str(tmp_path)]
    prepared = CliRunner().invoke(main, options, catch_exceptions=False)
    assert prepared.output == f"{tmp_path / recall().dataset_name}\n"


def test_the_loss_is_of_what_is_asked_alone(tmp_path: Path) -> None:
    batch = TrainBatches(prepare(recall(), tmp_path), 24, 6, 0, 0, 1).at(1)
    config = parse_config(settings(tmp_path))
    torch.manual_seed(0)
    model = build_model(config.model, RecallTask(40), config.model.state_dims)
    logits = model(batch.inputs)
    asked = batch.targets != NOT_ASKED
    expected = F.cross_entropy(logits[asked], batch.targets[asked])
    torch.testing.assert_close(model.loss(logits, batch.targets), expected)
    logits_elsewhere = torch.where(asked[..., None], logits, torch.randn_like(logits))
    torch.testing.assert_close(model.loss(logits_elsewhere, batch.targets), expected)


def settings(folder: Path) -> dict[str, Any]:
    return {
        "name": "recall",
        "storage": str(folder / "runs"),
        "data_root": str(folder / "data"),
        "data": SMALL,
        "model": {"kind": "mamba", "n_layers": 2, "d_model": 16, "d_state": 8},
        "train": {"steps": 6, "batch_size": 4, "lr": 0.01, "eval_every": 3, "eval_batches": 2, "log_every": 2},
        "truncation": {"target": {"dim": 4}, "steps": [2]},
        "cluster": {"workers": 2, "zero_stage": 2, "timeout_s": 60},
        "tracking": {"mlflow": False},
    }


def evaluated(folder: Path, task: Task, batches: list[Batch]) -> dict[str, float]:
    """What a real engine, freshly initialised, says of these batches."""
    from orchestrator.engine import Engine

    config = parse_config(settings(folder) | {"cluster": {"workers": 1}})
    engine = Engine(config, task, config.model.state_dims, Group(0, 1, torch.device("cpu")))
    metrics = engine.evaluate(batches)
    engine.close()
    return metrics


def test_evaluation_counts_every_answer_once(tmp_path: Path, alone: ProcessPoolExecutor) -> None:
    """Also where batches are asked unequally much. In a process of its own, for DeepSpeed's process group."""
    config = parse_config(settings(tmp_path))
    torch.manual_seed(config.seed)
    model = build_model(config.model, RecallTask(40), config.model.state_dims).eval()
    tokens_BL = torch.randint(40, (6, 24))
    with torch.no_grad():
        logits_BLV = model(tokens_BL)
    answers_BL = logits_BLV.argmax(-1)
    targets_BL = torch.where(torch.rand(6, 24) < 0.5, answers_BL, tokens_BL)  # about half are answered right
    asked_BL = torch.rand(6, 24) < torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8, 0.9])[:, None]
    masked_BL = targets_BL.where(asked_BL, NOT_ASKED)
    batches = [Batch(tokens_BL[rows], masked_BL[rows]) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
    whole = [Batch(tokens_BL[:2], targets_BL[:2]), Batch(tokens_BL[2:], targets_BL[2:])]

    of_recall = alone.submit(evaluated, tmp_path, RecallTask(40), batches).result()
    of_text = alone.submit(evaluated, tmp_path, LanguageTask(40), whole).result()

    assert of_recall["val_accuracy"] == pytest.approx(float((answers_BL == targets_BL)[asked_BL].double().mean()))
    assert of_recall["val_loss"] == pytest.approx(
        float(F.cross_entropy(logits_BLV[asked_BL], targets_BL[asked_BL])), rel=1e-5
    )
    assert of_text == {
        "val_loss": pytest.approx(float(F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())), rel=1e-5)
    }


@pytest.mark.cluster
def test_a_run_reports_accuracy_and_generates_no_text(tmp_path: Path, local_ray: None) -> None:
    config = parse_config(settings(tmp_path))
    summary = train(config)
    folder = tmp_path / "runs" / "recall"
    assert summary["final_dims"] == [4, 4]

    model = load_model(folder)
    assert type(model) is TokenModel
    right = asked = 0
    for batch in validation_batches(prepare(config.data, config.data_root), config.seq_len, 8, 4, 0, 1):
        right += int((model(batch.inputs).argmax(-1) == batch.targets).sum())
        asked += int((batch.targets != NOT_ASKED).sum())
    assert asked == 4 * 2 * 4
    assert summary["val_accuracy_final"] == right / asked
    assert [row["step"] for row in read_metrics(folder) if "val_accuracy" in row] == [2, 3, 6]
    assert f"accuracy {right / asked:.1%} after 6 steps" in describe_summary(summary)[0]

    refused = CliRunner().invoke(main, ["generate", str(folder)])
    assert refused.exit_code == 2
    assert f"run {folder} models no text; generate needs a run whose data.source is text" in refused.stderr
