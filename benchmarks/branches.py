"""Trainings that share their beginning: a trunk that is never cut, and branches from wherever one is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from compression.plan import TruncationPlan
from compression.planning import Occasion, plan_truncation
from models.registry import build_model
from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.data import arrow
from orchestrator.data.batches import TrainBatches, validation_batches
from orchestrator.data.sources import prepare
from orchestrator.engine import Engine
from orchestrator.group import Group
from orchestrator.sharded_state import ShardedState

# Steps whose gradients make up a first moment that is accumulated anew: of older ones beta^20 = 0.12 is left.
REPLAYED = 20

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
        self._before: deque[ShardedState] = deque(maxlen=REPLAYED)  # the states that the last steps began with

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
            if self._step > start - REPLAYED:
                self._before.append(self._engine.state())
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
                uncut = engine.state()
                engine.reshape(plan)
                if step == start and "moments" in config.truncation.model_fields_set:
                    result |= self._cosines(config, plan, uncut, engine.state())
                after = self._evaluate(engine)
                errors = [layer.output_error for layer in plan.layers if layer.output_error]
                result["steps_cut"].append(step)
                result |= {
                    "output_error": sum(errors) / len(errors),
                    "loss_before": before["val_loss"],
                    "loss_after": after["val_loss"],
                }
        return result | {"dims": engine.state_dims} | self._evaluate(engine)

    def _cosines(self, config: RunConfig, plan: TruncationPlan, uncut: ShardedState, cut: ShardedState) -> Json:
        """Of Adam's first moments right after a cut with those that the cut model would have gathered itself.

        That is, had it been cut before the last steps and gone the same way. The same without a cut says how much of a
        moment these steps are.
        """
        names = [name for name, shape in cut.shapes.items() if uncut.shapes.get(name, shape) != shape]
        if not names:  # the rotated basis changes no shape but those of its own maps
            return {}
        spare = self._build(config)
        dims, cut_before = spare.state_dims, []
        for state in self._before:
            spare.restore(dims, state)
            spare.reshape(plan)
            cut_before.append(spare.state())
        spare.close()
        return {
            "cosine": _cosine(cut, self._replay(cut_before, plan.dims_after), names),
            "cosine_uncut": _cosine(uncut, self._replay(self._before, dims), names),
        }

    def _replay(self, states: Sequence[ShardedState], dims: Sequence[int]) -> dict[str, Tensor]:
        """First moments of the gradients that the last steps would have had from these states."""
        train = self._config.train
        model = build_model(self._config.model, self._task, dims)
        parameters = dict(model.named_parameters())
        moments = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        for step, state in enumerate(states, self._step - len(states) + 1):
            model.load_state_dict({name: part.value for name, part in state.own.items()}, strict=False)
            model.zero_grad()
            batch = self._batches.at(step)
            model.loss(model(batch.inputs), batch.targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                moments[name].lerp_(parameter.grad, 1 - train.betas[0])
        return moments

    def _vary(self, variation: Variation) -> RunConfig:
        model = self._base["model"] | (variation.model or {})
        return parse_config(self._base | {"model": model, "truncation": variation.truncation})

    def _build(self, config: RunConfig) -> Engine:
        return Engine(config, self._task, config.model.state_dims, self._group)

    def _held_out(self, config: RunConfig) -> Any:
        rows, size = config.train.eval_batches * config.train.batch_size, config.train.batch_size
        return validation_batches(self._data, config.seq_len, rows, size, 0, 1)

    def _evaluate(self, engine: Engine) -> dict[str, float]:
        return engine.evaluate(self._held_out(self._config))


def _cosine(state: ShardedState, moments: Mapping[str, Tensor], names: Sequence[str]) -> float:
    def flat(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([part.flatten().double() for part in parts])

    carried, anew = flat(state.own[name].exp_avg for name in names), flat(moments[name] for name in names)
    return float(torch.cosine_similarity(carried, anew, dim=0))
