"""Trainings that share their beginning: a trunk that is never cut, and branches from wherever one is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from compression.planning import Occasion, plan_truncation
from models.registry import build_model
from orchestrator.config import RunConfig, parse_config
from orchestrator.data import arrow
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.sources import prepare
from orchestrator.engine import Engine
from orchestrator.group import Group
from orchestrator.sharded_state import ShardedState

# Steps whose gradients make up a first moment that is accumulated anew: of older ones beta^20 = 0.12 is left.
ACCUMULATED = 20

Json = dict[str, Any]


class Variation(Protocol):
    """What a branch changes."""

    truncation: Json | None
    model: Json | None


class Trunk:
    """The uncut training of one config, which goes on as far as branches ask."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self._base = dict(base)
        self._config = parse_config(self._base)
        self._data = prepare(self._config.data, self._config.data_root)
        self._task = arrow.describe(self._data).task
        self._group = Group(0, 1, torch.device("cpu"))
        self._step = 0
        config = self._config
        self._batches = TrainBatches(self._data, config.seq_len, config.train.batch_size, config.seed, 0, 1)
        self._engine = self._build(config)

    def first_probe(self, variation: Variation) -> int:
        """The step up to which a branch is the trunk; 0 for another model, the last step for no cut."""
        config = self._vary(variation)
        if config.model.state_dims != self._config.model.state_dims:
            return 0
        return config.probe_steps[0] if config.truncation else config.train.steps

    def branch(self, variation: Variation) -> Json:
        """Train to the end as the variation says; branches have to come in the order of their first probes."""
        config, start = self._vary(variation), self.first_probe(variation)
        while self._step < start:
            self._step += 1
            self._engine.step(self._batches.at(self._step), self._step)
        if config.truncation is None and start == config.train.steps:
            return self._evaluate(self._engine)
        engine = self._build(config)
        if start:
            engine.load(self._engine.state())
        result = self._train(config, engine, start)
        engine.close()
        return result

    def _train(self, config: RunConfig, engine: Engine, start: int) -> Json:
        probes, rule, plan = config.probe_steps, config.truncation_rule, None
        result: Json = {"steps_cut": []}
        for step in range(max(start, 1), config.train.steps + 1):
            if step > start:
                engine.step(self._batches.at(step), step)
            if step not in probes:
                continue
            assert rule is not None
            if not rule.may_cut(engine.state_dims):
                continue
            assert config.truncation is not None
            first = step - config.truncation.probe_batches
            statistics = engine.statistics(self._batches.at(s) for s in range(step, max(0, first), -1))
            occasion = Occasion(step, 1, probes.index(step) + 1, len(probes))
            plan = plan_truncation(statistics, rule, occasion, plan)
            if plan.truncates:
                plan, before = engine.certify(plan, self._held_out(config))
                states, dims = [engine.state()], [engine.state_dims]
                engine.reshape(plan)
                states.append(engine.state())
                dims.append(engine.state_dims)
                changed = [name for name, shape in states[1].shapes.items() if states[0].shapes.get(name) != shape]
                shared = [name for name in changed if name in states[0].shapes]
                uncut, cut = (self._cosine(step, *pair, shared) for pair in zip(states, dims, strict=True))
                after = self._evaluate(engine)
                errors = [layer.output_error for layer in plan.layers if layer.output_error]
                result["steps_cut"].append(step)
                result |= {
                    "output_error": sum(errors) / len(errors),
                    "loss_before": before["val_loss"],
                    "loss_after": after["val_loss"],
                    "cosine": cut,
                    "cosine_uncut": uncut,
                }
        return result | {"dims": engine.state_dims} | self._evaluate(engine)

    def _cosine(self, step: int, state: ShardedState, dims: list[int], names: list[str]) -> float | None:
        """Of Adam's first moments with such as are accumulated anew, at the present weights, over the last batches."""
        if not names:  # the rotated basis changes no shape but those of its own maps
            return None
        model = build_model(self._config.model, self._task, dims)
        model.load_state_dict({name: part.value for name, part in state.own.items()}, strict=False)
        beta, moments = self._config.train.betas[0], dict.fromkeys(state.own, torch.zeros(()))
        for before in reversed(range(ACCUMULATED)):
            batch = self._batches.at(max(1, step - before))
            model.zero_grad()
            model.loss(model(batch.inputs), batch.targets).backward()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                moments[name] = beta * moments[name] + (1 - beta) * parameter.grad

        def flat(parts: Mapping[str, Tensor]) -> Tensor:
            return torch.cat([parts[name].flatten().double() for name in names])

        carried = {name: part.exp_avg for name, part in state.own.items()}
        return float(torch.cosine_similarity(flat(carried), flat(moments), dim=0))

    def _vary(self, variation: Variation) -> RunConfig:
        model = self._base["model"] | (variation.model or {})
        return parse_config(self._base | {"model": model, "truncation": variation.truncation})

    def _build(self, config: RunConfig) -> Engine:
        return Engine(config, self._task, config.model.state_dims, self._group)

    def _held_out(self, config: RunConfig) -> Any:
        train = config.train
        return validation_batches(self._data, config.seq_len, train.batch_size, train.eval_batches, 0, 1)

    def _evaluate(self, engine: Engine) -> dict[str, float]:
        return engine.evaluate(self._held_out(self._config))
