"""Plans and statistics that several tests share.

Shapes: N state, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compression.gramians import SelectiveMoments, Statistics
from compression.plan import LayerPlan, Reduction, TruncationPlan
from compression.planning import Occasion, Rule, plan_truncation
from compression.ranking import Target
from compression.scores import rank_states

ONLY = Occasion(step=1, attempt=1, event=1, events=1)


def rule(initial_dims: Sequence[int], target: Target | None = None, **changes: Any) -> Rule:
    """Plain Hankel ranking to one state, unless told otherwise."""
    defaults: dict[str, Any] = {"score": "hankel", "compensate": False, "stable": None, "seed": 0}
    return Rule(target=target or Target(dim=1), initial_dims=tuple(initial_dims), **defaults | changes)


def plan_of(*statistics: Statistics, **target: Any) -> TruncationPlan:
    """The plan of a run's only probe."""
    return plan_truncation(statistics, rule([part.d_state for part in statistics], Target(**target)), ONLY)


def selective_moments(d_state: int = 8, seed: int = 0, channels: int = 4) -> SelectiveMoments:
    """Random sums over one token, consistent with each other as far as scores can tell."""
    generator = torch.Generator().manual_seed(seed)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    one = torch.tensor(1.0, dtype=torch.float64)
    D, N = channels, d_state
    h_XN, c_XN = positive(3 * N, N) - 0.5, positive(3 * N, N) - 0.5
    return SelectiveMoments(
        tokens=one,
        samples=one.clone(),
        h2_DN=positive(D, N),
        a2_DN=0.99 * positive(D, N),
        hc2_N=positive(N),
        hh_NN=h_XN.mT @ h_XN,
        cc_NN=c_XN.mT @ c_XN,
        log_a_DN=-positive(D, N),
        b_DN=positive(D, N),
        c_N=positive(N),
        weight_N=positive(N),
    )


def cut_of(reduction: Reduction, dim_before: int, dim_after: int) -> LayerPlan:
    """The first layer's cut, as if it had been planned."""
    return LayerPlan(
        layer=0,
        dim_before=dim_before,
        dim_after=dim_after,
        reduction=reduction,
        spectrum=(),
        score_spectrum=(),
        order=(),
        mass_kept=1.0,
        drift=None,
        overlap=None,
        quiet=0,
        error_bound=None,
        output_error=None,
        reason="test",
    )


def hankel_of(moments: SelectiveMoments) -> Tensor:
    """The HSV of each state, in state order."""
    ranking = rank_states(moments, "hankel", seed=0)
    return torch.zeros_like(ranking.sigma_N).scatter(0, ranking.order_N, ranking.sigma_N)
