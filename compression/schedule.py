"""When the state is probed, and when a probe may cut."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Part = Annotated[float, Field(gt=0, le=1)]


class Window(BaseModel):
    """Equidistant probes; by default four in the first tenth of training (CompreSSM, arXiv 2510.02823, 4.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    events: int = Field(4, ge=1, description="Number of probes.")
    start: float = Field(0.0, ge=0, lt=1, description="Share of the steps after which the window opens.")
    end: Part = Field(0.1, description="Share of the steps at which the last probe happens.")

    @model_validator(mode="after")
    def _opens_before_it_closes(self) -> Window:
        if self.start >= self.end:
            raise ValueError(f"start {self.start:g} must lie before end {self.end:g}")
        return self

    def probe_steps(self, total_steps: int) -> tuple[int, ...]:
        """Steps (from 1) after which the state is probed; `total_steps` is the length of the training."""
        return _equidistant(self.start * total_steps, self.end * total_steps, self.events)


class Stable(BaseModel):
    """One cut for each layer, as soon as its ranking has come to rest.

    A layer is quiet at a probe when its spectrum has drifted little since the probe before, and mostly the same
    states come first. Layers that are decided on together wait for each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    probes: int = Field(10, ge=2, description="Number of equidistant probes up to the deadline.")
    start: float = Field(0.0, ge=0, lt=1, description="Share of the steps after which probing begins.")
    deadline: Part = Field(0.25, description="Share of the steps at which every layer is cut, quiet or not.")
    drift: Part = Field(0.1, description="Largest share of the HSV mass that may move between quiet probes.")
    overlap: Part = Field(0.75, description="Least share of the kept states that quiet probes have in common.")
    patience: int = Field(2, ge=1, description="Quiet probes in succession before a layer is cut.")

    @model_validator(mode="after")
    def _starts_before_its_deadline(self) -> Stable:
        if self.start >= self.deadline:
            raise ValueError(f"start {self.start:g} must lie before deadline {self.deadline:g}")
        if self.patience >= self.probes:
            raise ValueError(f"patience {self.patience} must be less than probes {self.probes}")
        return self

    def probe_steps(self, total_steps: int) -> tuple[int, ...]:
        """Steps (from 1) after which the state is probed; `total_steps` is the length of the training."""
        return _equidistant(self.start * total_steps, self.deadline * total_steps, self.probes)

    def is_quiet(self, drift: float | None, overlap: float | None) -> bool:
        """Whether nothing has moved since the last probe; an overlap of None is not known and does not count."""
        return drift is not None and drift <= self.drift and (overlap is None or overlap >= self.overlap)


def _equidistant(first: float, last: float, count: int) -> tuple[int, ...]:
    return tuple(round(first + (last - first) * i / count) for i in range(1, count + 1))


Steps = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
