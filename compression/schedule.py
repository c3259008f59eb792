"""When the state is probed."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Window(BaseModel):
    """Equidistant probes; by default four in the first tenth of training (CompreSSM, arXiv 2510.02823, 4.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    events: int = Field(4, ge=1, description="Number of probes.")
    start: float = Field(0.0, ge=0, lt=1, description="Share of the steps after which the window opens.")
    end: float = Field(0.1, gt=0, le=1, description="Share of the steps at which the last probe happens.")

    @model_validator(mode="after")
    def _opens_before_it_closes(self) -> Window:
        if self.start >= self.end:
            raise ValueError(f"start {self.start:g} must lie before end {self.end:g}")
        return self

    def probe_steps(self, total_steps: int) -> tuple[int, ...]:
        """Steps (from 1) after which the state is probed; `total_steps` is the length of the training."""
        first, width = self.start * total_steps, (self.end - self.start) * total_steps
        return tuple(round(first + width * event / self.events) for event in range(1, self.events + 1))


Steps = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
