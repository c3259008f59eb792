"""What a config says of targets and of Adam's moments, as a real engine does it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from compression.plan import TruncationPlan
from compression.planning import Occasion, plan_truncation
from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.data.batches import Batch
from orchestrator.group import Group
from orchestrator.sharded_state import States
from tests.test_trajectory import TASK

CUTS = (2, 4)
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"kind": "mamba", "n_layers": 2, "d_model": 8, "d_state": [16, 8]},
    "lru": {"kind": "lru", "n_layers": 2, "d_model": 8, "d_state": [16, 8]},
}


def config_of(model: str, **truncation: Any) -> RunConfig:
    raw = {"name": "alone", "data": {"source": "digits"}, "train": {"steps": 9, "batch_size": 4, "lr": 0.01}}
    return parse_config(raw | {"model": MODELS[model], "truncation": {"steps": list(CUTS), **truncation}})


def train(config: RunConfig) -> list[tuple[States, TruncationPlan, States]]:
    """Around each cut: the state, the plan and the state."""
    from orchestrator.engine import Engine

    rule = config.truncation_rule
    assert rule is not None
    engine = Engine(config, TASK, config.model.state_dims, Group(0, 1, torch.device("cpu")))
    cuts = []
    for step in range(1, CUTS[-1] + 1):
        generator = torch.Generator().manual_seed(step)
        batch = Batch(torch.randn(4, 40, 3, generator=generator), torch.arange(4))
        engine.step(batch, step)
        if step in CUTS:
            plan = plan_truncation(engine.statistics([batch]), rule, Occasion(step, 1, CUTS.index(step) + 1, len(CUTS)))
            before = engine.state().own
            engine.reshape(plan)
            assert engine.state_dims == list(plan.dims_after)
            cuts.append((before, plan, engine.state().own))
    engine.close()
    return cuts


@pytest.mark.parametrize(
    ("model", "how"),
    [
        *(("mamba", how) for how in ("transport", "slice", "reset")),
        ("lru", "transport"),
        *(pytest.param("lru", how, marks=pytest.mark.long) for how in ("slice", "reset")),
    ],
)
def test_the_moments_go_the_way_that_the_config_says(model: str, how: str, alone: ProcessPoolExecutor) -> None:
    cuts = alone.submit(train, config_of(model, target={"dim": 4}, moments=how)).result()
    for before, _, after in cuts:
        for name, state in after.items():
            old = before[name]
            if state.value.shape == old.value.shape:
                for part, old_part in zip(state.tensors(), old.tensors(), strict=True):
                    assert torch.equal(part, old_part), name
                continue
            for part, old_part in zip(state.tensors()[1:], old.tensors()[1:], strict=True):
                leading = old_part[tuple(map(slice, part.shape))]
                assert (float(part.abs().max()) == 0) == (how == "reset"), name
                assert torch.equal(part, leading) == (how == "slice"), name
    assert cuts[-1][1].dims_after == (4, 4)


TARGETS: dict[str, tuple[dict[str, Any], Callable[[int, int], bool]]] = {
    "states": ({"budget": {"states": 11}}, lambda a, b: a + b == 11),
    "cost": ({"budget": {"cost": 0.25}}, lambda a, b: a + b == 6),
    "ladder": ({"budget": {"states": 13}, "ladder": [2, 4, 8]}, lambda a, b: {a, b} <= {2, 4, 8} and a + b <= 13),
    "uniform": ({"budget": {"states": 11}, "uniform": True}, lambda a, b: a == b == 5),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_budget_of_all_layers_is_met(name: str, alone: ProcessPoolExecutor) -> None:
    target, met = TARGETS[name]
    (_, first, _), (_, last, _) = alone.submit(
        train, config_of("mamba", target=target | {"allocation": "global"})
    ).result()
    assert sum(last.dims_after) < sum(first.dims_after) < 24
    assert met(*last.dims_after)
