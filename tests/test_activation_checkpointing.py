"""Recomputing activations changes how much memory a step takes, and nothing else.

Shapes: B batch, L time, I features.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from compression.gramians import SelectiveMoments
from models.heads import SequenceModel
from models.lru import LRUConfig
from models.mamba import MambaConfig
from models.registry import ClassificationTask, LanguageTask, build_model
from orchestrator.config_reading import parse_config
from orchestrator.data.batches import Batch
from orchestrator.group import Group

MAMBA = MambaConfig(kind="mamba", n_layers=3, d_model=16, d_state=8)
LRU = LRUConfig(kind="lru", n_layers=3, d_model=16, d_state=8)
TOKENS_BL = torch.randint(11, (2, 65), generator=torch.Generator().manual_seed(0))


def models(config: MambaConfig | LRUConfig) -> tuple[SequenceModel, SequenceModel]:
    """The same model twice, of which the second recomputes."""
    pair = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(config, LanguageTask(11), [config.d_state] * config.n_layers)
        model.backbone.activation_checkpointing = recompute
        pair.append(model)
    return pair[0], pair[1]


@contextmanager
def counting_saved_bytes() -> Iterator[dict[int, int]]:
    """Size by address of all storage that autograd keeps for a backward pass."""
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # or its address would be given to the next one
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@pytest.mark.parametrize("config", [MAMBA, LRU], ids=["mamba", "lru"])
def test_loss_and_gradients_are_equal_bit_for_bit_and_less_is_saved(
    config: MambaConfig | LRUConfig, backend: str
) -> None:
    results = []
    for model in models(config):
        with counting_saved_bytes() as saved:
            loss = model.loss(model(TOKENS_BL[:, :-1]), TOKENS_BL[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((loss.detach(), gradients, sum(saved.values())))
    (loss, gradients, bytes_kept), (same_loss, same_gradients, bytes_recomputed) = results
    assert torch.equal(loss, same_loss)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, same_gradients[name])
    # Left are the blocks' inputs, the parameters, and what lies around the blocks.
    assert bytes_recomputed < bytes_kept / 3


def test_a_probe_counts_every_token_once(backend: str) -> None:
    """In training mode and without gradients, as the engine does it."""
    results = []
    for model in models(MAMBA):
        for mixer in model.mixers():
            mixer.start_statistics()
        with torch.no_grad():
            model(TOKENS_BL)
        statistics = [mixer.finish_statistics() for mixer in model.mixers()]
        results.append([part.to_vector() for part in statistics if isinstance(part, SelectiveMoments)])
        assert all(int(vector[0]) == TOKENS_BL.numel() for vector in results[-1])
    for vector, same in zip(*results, strict=True):
        assert torch.equal(vector, same)


@torch.no_grad()
def test_evaluation_gives_the_same_logits(backend: str) -> None:
    plain, recomputing = models(MAMBA)
    assert torch.equal(plain.eval()(TOKENS_BL), recomputing.eval()(TOKENS_BL))


def two_engine_steps(recompute: bool) -> tuple[int, str]:
    """Bytes that the first of two steps of a real engine keeps, and the parameters' checksum after both."""
    from orchestrator.engine import Engine

    config = parse_config(
        {
            "name": "alone",
            "data": {"source": "digits"},
            "model": MAMBA.model_dump(),
            "train": {"steps": 9, "batch_size": 4, "lr": 0.01, "activation_checkpointing": recompute},
        }
    )
    task = ClassificationTask(n_features=3, n_classes=4)
    engine = Engine(config, task, [MAMBA.d_state] * MAMBA.n_layers, Group(0, 1, torch.device("cpu")))
    features_BLI = torch.randn(4, 64, 3, generator=torch.Generator().manual_seed(1))
    batch = Batch(features_BLI, torch.arange(4))
    with counting_saved_bytes() as saved:
        engine.step(batch, 1)
    engine.step(batch, 2)
    checksum = engine.checksum()
    engine.close()
    return sum(saved.values()), checksum


def test_the_engine_does_as_the_config_says(alone: ProcessPoolExecutor) -> None:
    (kept, checksum), (kept_recomputing, same_checksum) = alone.map(two_engine_steps, (False, True))
    assert kept_recomputing < kept / 2
    assert checksum == same_checksum
