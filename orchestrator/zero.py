"""The state of a live ZeRO engine, read and written parameter by parameter.

A rank holds its own parameters and, while reading or writing, one group of one layer. This is the only module
that touches DeepSpeed's inner attributes.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

from compression.moments import ParameterState
from orchestrator.group import Group
from orchestrator.sharded_state import ShardedState, States, assign_owners

# `create_optimizer_state` relies on attributes of this series.
assert version("deepspeed").startswith("0.19."), f"written for DeepSpeed 0.19, found {version('deepspeed')}"


def avoid_impossible_builds() -> None:
    """Leave collectives to gloo where nothing can be compiled: DeepSpeed builds its own for CPUs, and else fails."""
    compiler = shlex.split(get_cxx_compiler())[0]  # type: ignore[no-untyped-call]
    if shutil.which(compiler) is None or not is_ninja_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def create_optimizer_state(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Give a fresh engine the optimizer state that torch's AdamW would create at its first step.

    DeepSpeed links its fragments to that state after the first parameter group's first step, when the other
    groups have none yet, and never again (0.19.8, stage_1_and_2.py, `_optimizer_step`): with more than one group
    the moments could neither be read nor written.
    """
    for flat in optimizer.single_partition_of_fp32_groups:
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    optimizer._lazy_init_hp_params_optimizer_state()


def read_state(
    model: nn.Module,
    optimizer: DeepSpeedZeroOptimizer,
    groups: Iterable[tuple[str, list[str]]],
    reshape: Callable[[str, States], States],
    group: Group,
) -> ShardedState:
    """Stream every parameter of a live engine through `reshape`; collective.

    `reshape` takes a group's prefix and its states by full name, and returns the states after the cut.
    """
    parameters = dict(model.named_parameters())
    owners = assign_owners({name: p.numel() for name, p in parameters.items()}, group.size)
    state = ShardedState(owners, {}, {}, _optimizer_step(optimizer))
    for prefix, names in groups:
        full = reshape(prefix, {name: _read(parameters[name]) for name in names})
        for name, parameter in full.items():
            state.shapes[name] = tuple(parameter.value.shape)
            # A cut may bring new parameters, small ones.
            if owners.setdefault(name, len(owners) % group.size) == group.rank:
                state.own[name] = ParameterState(*(part.cpu() for part in parameter.tensors()))
    return state


def write_state(model: nn.Module, optimizer: DeepSpeedZeroOptimizer, state: ShardedState, group: Group) -> None:
    """Put a state into a fresh engine, parameter by parameter from its owner; collective."""
    for flat_state in optimizer.optimizer.state.values():
        flat_state["step"].fill_(state.optimizer_step)
    for name, parameter in model.named_parameters():
        owner = state.owners[name]
        own = state.own.get(name)
        if owner == group.rank:
            assert own is not None
            full = torch.stack([part.float() for part in own.tensors()])
        else:
            full = torch.empty(3, *state.shapes[name])
        value, exp_avg, exp_avg_sq = group.broadcast(full, owner)
        assert value.shape == parameter.shape, f"{name}: state {tuple(value.shape)}, model {tuple(parameter.shape)}"
        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        safe_set_full_optimizer_state(parameter, exp_avg, "exp_avg")
        safe_set_full_optimizer_state(parameter, exp_avg_sq, "exp_avg_sq")


def _read(parameter: Tensor) -> ParameterState:
    # Every rank must take part in each of these calls, also for parameters it does not keep.
    return ParameterState(
        safe_get_full_fp32_param(parameter),
        safe_get_full_optimizer_state(parameter, "exp_avg"),
        safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
    )


def _optimizer_step(optimizer: DeepSpeedZeroOptimizer) -> int:
    steps = {int(state["step"]) for state in optimizer.optimizer.state.values()}
    assert len(steps) == 1, f"the optimizer's groups count different steps: {steps}"
    return steps.pop()
