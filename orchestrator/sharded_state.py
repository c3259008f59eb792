"""fp32 masters and Adam moments of a run, parameter by parameter, apart from any engine.

A `ShardedState` is what survives an engine: each parameter, whole, belongs to one rank. Reshaping, saving and
restoring all pass through it, so none of them depends on how DeepSpeed lays out its partitions, nor on the
number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from compression.moments import ParameterState

States = dict[str, ParameterState]


@dataclass
class ShardedState:
    """The parameters that this rank owns, and who owns the others."""

    owners: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    own: States
    optimizer_step: int

    def is_finite(self) -> bool:
        """Whether this rank's parameters and moments are all numbers; their sums tell, faster than each of them."""
        parts = (part for parameter in self.own.values() for part in parameter.tensors())
        return all(math.isfinite(part.sum(dtype=torch.float64)) for part in parts)


def assign_owners(sizes: Mapping[str, int], workers: int) -> dict[str, int]:
    """Each parameter to the rank with the least so far, largest first; the same on every rank."""
    load = [0] * workers
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = load.index(min(load))
        owners[name] = owner
        load[owner] += sizes[name]
    return owners


def parameter_groups(model: nn.Module, layer_prefixes: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Parameters that are reshaped together: a whole mixer under its prefix, any other parameter alone."""
    groups: dict[str, list[str]] = {}
    prefixes = tuple(layer_prefixes)
    for name, _ in model.named_parameters():
        prefix = next((p for p in prefixes if name.startswith(p)), name)
        groups.setdefault(prefix, []).append(name)
    return list(groups.items())
