"""The certificate of a cut: what the engine measures beforehand is what the cut then does."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.planning import Occasion, plan_truncation
from orchestrator.config import parse_config
from orchestrator.data.batches import Batch
from orchestrator.group import Group
from tests.test_trajectory import TASK

SETTINGS = {"n_layers": 2, "d_model": 8, "d_state": 8}
MODELS: list[dict[str, Any]] = [
    {"kind": "mamba", **SETTINGS},
    {"kind": "mamba2", "headdim": 4, "basis": "rotated", **SETTINGS},
    {"kind": "lru", **SETTINGS},
]


def measured_and_done(model: dict[str, Any]) -> tuple[float, float, dict[str, float], dict[str, float]]:
    """The first layer's certificate and the change that it comes to, and two evaluations of the uncut model."""
    from orchestrator.engine import Engine

    raw = {"name": "alone", "data": {"source": "digits"}, "train": {"steps": 9, "batch_size": 4, "lr": 0.01}}
    config = parse_config(raw | {"model": model, "truncation": {"target": {"dim": 3}, "steps": [1]}})
    engine = Engine(config, TASK, config.model.state_dims, Group(0, 1, torch.device("cpu")))
    generator = torch.Generator().manual_seed(1)
    batches = [Batch(torch.randn(4, 40, 3, generator=generator), torch.arange(4)) for _ in range(3)]
    outputs: list[list[Tensor]] = []

    def first_outputs() -> dict[str, float]:
        """The first layer's input is the same before and after: its embedding is not cut."""
        found: list[Tensor] = []
        hook = engine._model.mixers()[0].register_forward_hook(lambda *args: found.append(args[-1]))
        metrics = engine.evaluate(batches)
        hook.remove()
        outputs.append(found)
        return metrics

    rule = config.truncation_rule
    assert rule is not None
    plan = plan_truncation(engine.statistics(batches), rule, Occasion(1, 1, 1, 1))
    plan, metrics = engine.certify(plan, batches)
    again = first_outputs()
    engine.reshape(plan)
    first_outputs()
    engine.close()
    before, after = (torch.cat(part).double() for part in outputs)
    certificate = plan.layers[0].output_error
    assert certificate is not None
    return certificate, float((after - before).norm() / before.norm()), metrics, again


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["kind"])
def test_the_measured_error_is_what_the_cut_does(model: dict[str, Any], alone: ProcessPoolExecutor) -> None:
    certificate, done, metrics, again = alone.submit(measured_and_done, model).result()
    # Of a fresh Mamba-1 a cut hardly takes anything; float32 rounds at 1e-7 of the output.
    assert done > 1e-4
    assert certificate == pytest.approx(done, rel=2e-3)
    assert metrics == again  # measuring changes nothing
