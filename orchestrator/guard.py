"""Whether a cut has hurt more than allowed: what is watched after a cut, and the verdict at each evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.config import GuardConfig

Verdict = Literal["recovered", "waiting", "hurt"]


class Watch(BaseModel):
    """An open question: the state before the cut at `step` is kept until it is answered. Part of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    before: float
    """The metric right before the cut."""
    evaluations_left: int

    def verdict(self, guard: GuardConfig, value: float, last: bool) -> Verdict:
        """After one more evaluation, `last` where no other follows. NaN is worse than anything."""
        if guard.metric == "val_loss":
            good = value <= self.before * (1 + guard.tolerance)
        else:
            good = value >= self.before * (1 - guard.tolerance)
        if good:
            return "recovered"
        return "waiting" if self.evaluations_left > 0 and not last else "hurt"

    def after_another(self) -> Watch:
        return self.model_copy(update={"evaluations_left": self.evaluations_left - 1})
