"""Models of documents and of pairs of them: padding makes no difference, and training them is training.

Shapes: B batch, L time, M d_model, K classes, 2 documents of a pair.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads import PADDING, DocumentClassifier, PairClassifier
from models.lru import LRUConfig
from models.mamba import MambaConfig
from models.mamba2 import Mamba2Config
from models.registry import (
    AnyConfig,
    ClassificationTask,
    LanguageTask,
    PairClassificationTask,
    RecallTask,
    Task,
    TokenClassificationTask,
    build_model,
)
from orchestrator.config_reading import parse_config
from orchestrator.data import arrow
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.sources import SOURCES, prepare
from orchestrator.engine import Engine
from orchestrator.group import Group
from orchestrator.inference import _task

CONFIGS: dict[str, AnyConfig] = {
    "lru": LRUConfig(kind="lru", n_layers=2, d_model=8, d_state=6),
    "mamba": MambaConfig(kind="mamba", n_layers=2, d_model=8, d_state=6),
    "mamba2": Mamba2Config(kind="mamba2", n_layers=2, d_model=8, d_state=6, headdim=4),
}
DOCUMENTS = TokenClassificationTask(vocab_size=12, n_classes=5)
PAIRS = PairClassificationTask(vocab_size=12, n_classes=3)


def model(name: str, task: Task) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]
    return build_model(config, task, config.state_dims)


def document(length: int, seed: int) -> Tensor:
    return torch.randint(1, 12, (length,), generator=torch.Generator().manual_seed(seed))


def padded(documents: list[Tensor], length: int) -> Tensor:
    return torch.stack([F.pad(tokens, (0, length - len(tokens)), value=PADDING) for tokens in documents])


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_makes_no_difference_to_a_document(name: str) -> None:
    classifier = model(name, DOCUMENTS)
    documents = [document(length, length) for length in (1, 9, 30, 17)]
    alone_BK = torch.cat([classifier(tokens[None]) for tokens in documents])
    assert alone_BK.shape == (4, 5)
    for length in (30, 31, 64, 100):
        torch.testing.assert_close(classifier(padded(documents, length)), alone_BK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_makes_no_difference_to_a_pair(name: str) -> None:
    classifier = model(name, PAIRS)
    pairs = [(document(3, 1), document(20, 2)), (document(11, 3), document(11, 4))]
    alone = [classifier(padded(list(pair), max(map(len, pair)))[None]) for pair in pairs]
    together_B2L = torch.stack([padded(list(pair), 50) for pair in pairs])
    torch.testing.assert_close(classifier(together_B2L), torch.cat(alone), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_pooled_is_the_mean_over_the_tokens() -> None:
    classifier = model("mamba", DOCUMENTS)
    assert isinstance(classifier, DocumentClassifier)
    tokens_L = document(13, 0)
    mean_M = classifier.backbone(tokens_L[None])[0].mean(0)
    torch.testing.assert_close(classifier.encode(padded([tokens_L], 40))[0], mean_M)
    torch.testing.assert_close(classifier(padded([tokens_L], 40))[0], classifier.head(mean_M))


@torch.no_grad()
def test_a_pair_is_its_encodings_their_product_and_their_difference() -> None:
    classifier = model("lru", PAIRS)
    assert isinstance(classifier, PairClassifier)
    first_L, second_L = document(7, 1), document(5, 2)
    x_M, y_M = (classifier.encode(tokens[None])[0] for tokens in (first_L, second_L))
    expected_K = classifier.head(torch.cat([x_M, y_M, x_M * y_M, x_M - y_M]))
    torch.testing.assert_close(classifier(padded([first_L, second_L], 9)[None])[0], expected_K)


@torch.no_grad()
def test_a_document_without_a_token_is_a_finite_answer() -> None:
    assert model("mamba", DOCUMENTS)(torch.full((2, 6), PADDING)).isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_learned_from_padding(name: str) -> None:
    """Gradients of all parameters are those without padding, and its own embedding has none."""

    def gradients(length: int) -> dict[str, Tensor]:
        classifier = model(name, DOCUMENTS)
        inputs_BL = padded([document(4, 1), document(10, 2)], length)
        classifier.loss(classifier(inputs_BL), torch.tensor([1, 3])).backward()
        return {parameter: value.grad for parameter, value in classifier.named_parameters()}

    short, long = gradients(10), gradients(48)
    for parameter, gradient in short.items():
        torch.testing.assert_close(long[parameter], gradient, rtol=1e-3, atol=1e-6)
    assert not long["backbone.embedding.weight"][PADDING].any()


TASKS: dict[str, tuple[dict[str, Any], Task]] = {
    "stdlib": ({}, LanguageTask(256)),
    "text": ({"path": "a"}, LanguageTask(300)),
    "digits": ({}, ClassificationTask(1, 10)),
    "recall": ({"seq_len": 16, "pairs": 2, "vocab_size": 20}, RecallTask(20)),
    "mnist": ({"path": "a"}, ClassificationTask(1, 10)),
    "fashion_mnist": ({"path": "a"}, ClassificationTask(1, 10)),
    "cifar10": ({"path": "a"}, ClassificationTask(3, 10)),
    "listops": ({}, TokenClassificationTask(16, 10)),
    "imdb": ({"path": "a"}, TokenClassificationTask(256, 2)),
    "aan": ({"path": "a"}, PairClassificationTask(256, 2)),
    "pathfinder": ({"path": "a"}, ClassificationTask(1, 2)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_checkpoint_is_enough_to_know_the_task(source: str, small_run: dict[str, Any]) -> None:
    settings, task = TASKS[source]
    config = parse_config(small_run | {"data": {"source": source} | settings})
    built = build_model(config.model, task, config.model.state_dims)
    assert _task(config, {name: tuple(p.shape) for name, p in built.named_parameters()}) == task
    assert config.has_accuracy == (not isinstance(task, LanguageTask))


# --- under DeepSpeed ---


def trained(raw: dict[str, Any]) -> tuple[list[float], dict[str, float]]:
    """Losses of the steps and what is measured at the end, by one worker with a real engine."""
    config = parse_config(raw)
    folder = prepare(config.data, config.data_root)
    group = Group(0, 1, torch.device("cpu"))
    engine = Engine(config, arrow.describe(folder).task, config.model.state_dims, group)
    batches = TrainBatches(folder, config.seq_len, config.train.batch_size, config.seed, 0, 1)
    losses = [float(engine.step(batches.at(step), step)) for step in range(1, config.train.steps + 1)]
    metrics = engine.evaluate(validation_batches(folder, config.seq_len, 64, 16, 0, 1))
    engine.close()
    return losses, metrics


@pytest.mark.parametrize("source", ["listops", "aan"])
def test_an_engine_learns_to_tell_documents_apart(
    source: str, small_run: dict[str, Any], tmp_path: Path, alone: ProcessPoolExecutor
) -> None:
    data: dict[str, Any]
    if source == "listops":
        data = {"min_length": 3, "max_length": 7, "max_args": 3, "train_examples": 400, "held_out_examples": 64}
    else:
        folder = tmp_path / "tsv_data"
        folder.mkdir()
        lines = ["{}.0\tp\tq\t{}\t{}\n".format(*row) for row in ((1, "aaaa", "aaaaaaa"), (0, "aaa", "bbbbbb"))]
        for name in ("train", "eval", "test"):
            (folder / f"new_aan_pairs.{name}.tsv").write_text("".join(lines * 16))
        data = {"path": str(folder)}
    train = small_run["train"] | {"steps": 20, "batch_size": 16, "warmup": 0, "lr": 0.02}
    cluster = {"workers": 1, "zero_stage": 3}
    raw = small_run | {"data": {"source": source} | data, "train": train, "cluster": cluster, "truncation": None}
    losses, metrics = alone.submit(trained, raw).result()
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    assert metrics["val_accuracy"] > (0.2 if source == "listops" else 0.9)
