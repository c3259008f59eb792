"""What every truncatable layer answers, whoever asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from compression.gramians import Statistics
from compression.moments import ParameterState
from compression.truncation import LayerPlan


class TruncatableLayer(nn.Module, ABC):
    """A state-space mixer whose state dimension can shrink in mid-training."""

    ssm_parameters: ClassVar[frozenset[str]]
    """Own names of parameters that get no weight decay and the learning-rate factor of the state space."""

    statistics_need_tokens: ClassVar[bool]
    """Whether the statistics come from what passes through, or from the weights alone."""

    d_state: int

    @abstractmethod
    def start_statistics(self) -> None:
        """From now on every forward pass adds to the statistics."""

    @abstractmethod
    def finish_statistics(self) -> Statistics:
        """The statistics of this worker's tokens since `start_statistics`, on the CPU; collection ends."""

    @abstractmethod
    def shrink(self, plan: LayerPlan, states: Mapping[str, ParameterState]) -> dict[str, ParameterState]:
        """All of the layer's parameters, by own name, as they are after the cut; `states` as before it."""
