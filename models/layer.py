"""What every truncatable layer answers, whoever asks.

Shapes: B batch, M d_model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from compression.gramians import Statistics
from compression.moments import ParameterState
from compression.plan import LayerPlan
from compression.ranking import Dim

State = tuple[Tensor, ...]
"""What a layer remembers from one time step to the next; dimension 0 of every tensor is the batch."""


class StackConfig(BaseModel):
    """What all stacks of layers have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_layers: int = Field(ge=1, description="Number of blocks.")
    d_model: int = Field(ge=1, description="Width of the residual stream.")
    d_state: Dim | tuple[Dim, ...] = Field(
        description="State dimension before the first cut: of all layers, or of each."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of each mixer's output that a training step drops, before it is added."
    )

    @model_validator(mode="after")
    def _one_dimension_per_layer(self) -> StackConfig:
        if isinstance(self.d_state, tuple) and len(self.d_state) != self.n_layers:
            raise ValueError(f"d_state {list(self.d_state)} must be one number, or n_layers {self.n_layers} of them")
        return self

    @property
    def state_dims(self) -> list[int]:
        """State dimension of every layer before the first cut."""
        return list(self.d_state) if isinstance(self.d_state, tuple) else [self.d_state] * self.n_layers


class TruncatableLayer(nn.Module, ABC):
    """A state-space mixer whose state dimension can shrink in mid-training."""

    ssm_parameters: ClassVar[frozenset[str]]
    """Own names of parameters that get no weight decay and the learning-rate factor of the state space."""

    statistics_need_tokens: ClassVar[bool]
    """Whether the statistics come from what passes through, or from the weights alone."""

    d_state: int

    @abstractmethod
    def initial_state(self, batch: int) -> State:
        """The state before the first of `batch` sequences' time steps: zeros, float32, where the parameters are."""

    @abstractmethod
    def step(self, x_BM: Tensor, state: State) -> tuple[Tensor, State]:
        """One time step, (B, M) -> (B, M), and the state after it; over a sequence the same as `forward`."""

    @abstractmethod
    def start_statistics(self) -> None:
        """From now on every forward pass adds to the statistics."""

    @abstractmethod
    def finish_statistics(self) -> Statistics:
        """The statistics of this worker's tokens since `start_statistics`, on the CPU; collection ends."""

    @abstractmethod
    def shrink(self, plan: LayerPlan, states: Mapping[str, ParameterState]) -> dict[str, ParameterState]:
        """All of the layer's parameters, by own name, as they are after the cut; `states` as before it."""
