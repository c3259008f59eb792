"""The certificate of a cut: what the engine measures beforehand is what the cut then does."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression.planning import Occasion, plan_truncation
from orchestrator.config_reading import parse_config
from orchestrator.data.batches import Batch
from orchestrator.group import Group
from tests.test_trajectory import TASK

SETTINGS = {"n_layers": 2, "d_model": 8, "d_state": 8}
MODELS: list[dict[str, Any]] = [
    {"kind": "mamba", **SETTINGS},
    {"kind": "mamba2", "headdim": 4, **SETTINGS},
    {"kind": "mamba2", "headdim": 4, "basis": "rotated", **SETTINGS},
    {"kind": "lru", **SETTINGS},
]


class Seen:
    """What has gone into a layer and come out of it."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, mixer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(arguments[0])
        self.outputs.append(output)


def measured_and_done(model: dict[str, Any]) -> tuple[list[float], list[float], dict[str, float], dict[str, float]]:
    """Each layer's certificate and the change that it comes to, and two evaluations of the uncut model."""
    from orchestrator.engine import Engine

    raw = {"name": "alone", "data": {"source": "digits"}, "train": {"steps": 9, "batch_size": 4, "lr": 0.01}}
    config = parse_config(raw | {"model": model, "truncation": {"target": {"dim": 3}, "steps": [1]}})
    engine = Engine(config, TASK, config.model.state_dims, Group(0, 1, torch.device("cpu")))
    generator = torch.Generator().manual_seed(1)
    batches = [Batch(torch.randn(4, 40, 3, generator=generator), torch.arange(4)) for _ in range(3)]
    rule = config.truncation_rule
    assert rule is not None
    plan = plan_truncation(engine.statistics(batches), rule, Occasion(1, 1, 1, 1))
    plan, metrics = engine.certify(plan, batches)
    mixers, seen = engine._model.mixers(), [Seen() for _ in plan.layers]
    hooks = [mixer.register_forward_hook(part) for mixer, part in zip(mixers, seen, strict=True)]
    again = engine.evaluate(batches)
    for hook in hooks:
        hook.remove()
    engine.reshape(plan)
    changes = []
    for mixer, part in zip(engine._model.mixers(), seen, strict=True):
        with torch.no_grad():  # fed with what the uncut model fed it with, whatever was cut before it
            after = torch.cat([mixer(x_BLM) for x_BLM in part.inputs]).double()
        before = torch.cat(part.outputs).double()
        changes.append(float((after - before).norm() / before.norm()))
    engine.close()
    certificates = [layer.output_error for layer in plan.layers if layer.output_error is not None]
    return certificates, changes, metrics, again


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model['kind']} {model.get('basis', '')}")
def test_the_measured_error_is_what_the_cut_does(model: dict[str, Any], alone: ProcessPoolExecutor) -> None:
    certificates, changes, metrics, again = alone.submit(measured_and_done, model).result()
    # Of a fresh Mamba-1 a cut hardly takes anything; float32 rounds at 1e-7 of the output.
    assert min(changes) > 1e-4
    assert certificates == pytest.approx(changes, rel=2e-3)
    assert metrics == again  # measuring changes nothing
