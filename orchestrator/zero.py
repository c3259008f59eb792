"""The state of a live DeepSpeed engine, read and written parameter by parameter, at every ZeRO stage.

A rank holds its own part and, while reading or writing, one group of one layer. This is the only module that
touches DeepSpeed's inner attributes.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn
from torch.utils.cpp_extension import _get_build_directory, get_cxx_compiler, is_ninja_available

from compression.moments import ParameterState
from models.scan.extension import locked
from orchestrator.group import Group
from orchestrator.sharded_state import ShardedState, States, assign_owners
from orchestrator.versions import deepspeed_version

# `forget_engines`, `_masters` and `_create_optimizer_state` rely on attributes of one series. The driver has looked
# before it started anything; a worker may be on another machine.
deepspeed_version()
COLLECTIVES = "deepspeed_shm_comm"


def prepare_collectives() -> None:
    """Build DeepSpeed's own collectives for CPUs, or leave them to gloo where nothing can be compiled.

    DeepSpeed would fail there. And torch's loader leaves a lock file where it is killed, for which every later one
    would wait for ever: whoever builds holds a lock of the kernel's, and then such a file is nobody's.
    """
    compiler = shlex.split(get_cxx_compiler())[0]  # type: ignore[no-untyped-call]
    if shutil.which(compiler) is None or not is_ninja_available():
        deepspeed.ops.__compatible_ops__[COLLECTIVES] = False
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(COLLECTIVES, False):
        return
    with locked(COLLECTIVES):
        Path(_get_build_directory(COLLECTIVES, verbose=False), "lock").unlink(missing_ok=True)
        builder.load()


def partition(module: nn.Module, config: dict[str, Any]) -> None:
    """Under ZeRO-3, leave this rank its own part of a module's parameters; collective. Else nothing happens."""
    if config["zero_optimization"]["stage"] == 3:
        deepspeed.zero.Init(module=module, config_dict_or_path=config)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Within it every rank may read these parameters whole; collective."""
    return deepspeed.zero.GatheredParameters(list(parameters))  # type: ignore[no-any-return]


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, however little of it this rank holds."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def optimizer_step(engine: Any) -> Tensor:
    """The optimizer's step, after the last part of a batch; the norm of the gradient over all workers, unclipped.

    NaN or infinite where the gradient is: ZeRO 1 to 3 then skip the step without a word, ZeRO-0 spoils the parameters.
    """
    if engine.zero_optimization_stage() == 0:  # DeepSpeed keeps no norm
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        engine.step()
        return norm
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm(), device=engine.device)


def forget_engines() -> None:
    """Drop what DeepSpeed keeps, in the whole process, of ZeRO-3 engines that have been destroyed.

    The stack that tells which module's forward pass is on begins with the model and is never emptied
    (0.19.8, parameter_offload.py, `setup_zero_stage3_hooks`), and a cache holds every coordinator that asked it
    (partitioned_param_coordinator.py, `__params_to_release`).
    """
    parameter_offload.FWD_MODULE_STACK.clear()
    cached = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    [cache] = [cell.cell_contents for cell in cached.__closure__ if hasattr(cell.cell_contents, "cache_clear")]
    cache.cache_clear()


class EngineState:
    """Masters and Adam's moments of one engine, which keeps one stage."""

    def __init__(self, engine: Any, units: Iterable[type[nn.Module]]) -> None:
        """`units` are the modules that read the parameters of their parts: ZeRO-3 has to gather each as a whole."""
        self._stage: int = engine.zero_optimization_stage()
        self._model: nn.Module = engine.module
        self._optimizer: Any = engine.optimizer
        self._adam: torch.optim.Optimizer = self._optimizer if self._stage == 0 else self._optimizer.optimizer
        if self._stage == 3:
            set_z3_leaf_modules(self._model, list(units))
        self._create_optimizer_state()

    def _create_optimizer_state(self) -> None:
        """Give a fresh engine the optimizer state that torch's AdamW would create at its first step.

        DeepSpeed links its fragments to that state after the first parameter group's first step, when the other
        groups have none yet, and never again (0.19.8, stage_1_and_2.py, `_optimizer_step`): with more than one
        group the moments could neither be read nor written.
        """
        for master in self._masters():
            self._adam.state[master] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[Tensor]:
        """What AdamW steps on: parameters, or flat float32 parts of them."""
        if self._stage == 0:
            return [parameter for group in self._adam.param_groups for parameter in group["params"]]
        name = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        flat: list[Tensor] = getattr(self._optimizer, name)
        return flat

    def read(
        self, groups: Iterable[tuple[str, list[str]]], reshape: Callable[[str, States], States], group: Group
    ) -> ShardedState:
        """Stream every parameter through `reshape`; collective.

        `reshape` takes a group's prefix and its states by full name, and returns the states after the cut.
        """
        parameters = dict(self._model.named_parameters())
        owners = assign_owners({name: whole_shape(p).numel() for name, p in parameters.items()}, group.size)
        state = ShardedState(owners, {}, {}, self._steps())
        for prefix, names in groups:
            full = reshape(prefix, {name: self._read(parameters[name]) for name in names})
            for name, parameter in full.items():
                state.shapes[name] = tuple(parameter.value.shape)
                # A cut may bring new parameters, small ones.
                if owners.setdefault(name, len(owners) % group.size) == group.rank:
                    # A copy even where the parts are on the CPU already: training goes on.
                    state.own[name] = ParameterState(*(part.to("cpu", copy=True) for part in parameter.tensors()))
        return state

    def write(self, state: ShardedState, group: Group) -> None:
        """Put a state in, parameter by parameter from its owner; collective."""
        for kept in self._adam.state.values():
            kept["step"].fill_(state.optimizer_step)
        for name, parameter in self._model.named_parameters():
            owner = state.owners[name]
            own = state.own.get(name)
            if owner == group.rank:
                assert own is not None
                full = torch.stack([part.float() for part in own.tensors()])
            else:
                full = torch.empty(3, *state.shapes[name])
            full = group.broadcast(full, owner)
            shape = whole_shape(parameter)
            assert full.shape[1:] == shape, f"{name}: state {tuple(full.shape[1:])}, model {tuple(shape)}"
            self._write(parameter, full, group)

    def _read(self, parameter: nn.Parameter) -> ParameterState:
        if self._stage == 0:
            kept = self._adam.state[parameter]
            return ParameterState(parameter.detach(), kept["exp_avg"], kept["exp_avg_sq"])
        # Every rank must take part in each of these calls, also for parameters it does not keep.
        return ParameterState(
            safe_get_full_fp32_param(parameter),
            safe_get_full_optimizer_state(parameter, "exp_avg"),
            safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        )

    def _write(self, parameter: nn.Parameter, full: Tensor, group: Group) -> None:
        value, exp_avg, exp_avg_sq = full
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if self._stage == 0:
            for key, moment in moments.items():
                self._adam.state[parameter][key].copy_(moment)
        elif self._stage == 3:
            # By part: DeepSpeed's call for whole values fails where a size is no multiple of the ranks (0.19.8).
            safe_set_local_fp32_param(parameter, _part(parameter, value, group))
            for key, moment in moments.items():
                safe_set_local_optimizer_state(parameter, _part(parameter, moment, group), key)
        else:
            safe_set_full_fp32_param(parameter, value)
            for key, moment in moments.items():
                safe_set_full_optimizer_state(parameter, moment, key)

    def _steps(self) -> int:
        steps = {int(kept["step"]) for kept in self._adam.state.values()}
        assert len(steps) == 1, f"the optimizer's groups count different steps: {steps}"
        return steps.pop()


def _part(parameter: Any, whole: Tensor, group: Group) -> Tensor:
    """This rank's part as ZeRO-3 lays it out: equal parts, the last one filled up with zeros."""
    size = parameter.ds_tensor.numel()
    padded = whole.new_zeros(size * group.size)
    padded[: whole.numel()] = whole.flatten()
    return padded[size * group.rank : size * (group.rank + 1)]
