"""Which states are kept: every score against a system where the answer is known, and compensation as a regression.

Shapes: B batch, L time, M d_model, D channels, N state, R states kept.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import get_args

import pytest
import torch
from torch import Tensor

from compression.gramians import LTISystem, SelectiveMoments
from compression.hankel import lti_balancing
from compression.moments import ParameterState
from compression.planning import plan_truncation
from compression.ranking import Target
from compression.scores import Score, compensation, rank_states
from models.mamba import Mamba, MambaConfig
from tests.plans import ONLY, rule, selective_moments

F64 = torch.float64
SCORES: tuple[Score, ...] = get_args(Score)
RANKING = [score for score in SCORES if score not in ("smallest", "random")]
MODE = ((1,), (1, 1), (1, 1))  # shapes of a pole, its B and its C
CONFIG = MambaConfig(kind="mamba", n_layers=1, d_model=8, d_state=6)


def mamba(d_state: int = 6, seed: int = 0) -> Mamba:
    """In float64, with every parameter moved off its starting value."""
    torch.manual_seed(seed)
    layer = Mamba(CONFIG, d_state).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def sequence(seed: int = 1) -> Tensor:
    return torch.randn(16, 64, CONFIG.d_model, dtype=F64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def moments_of(layer: Mamba, x_BLM: Tensor) -> SelectiveMoments:
    layer.start_statistics()
    layer(x_BLM)
    return layer.finish_statistics()


@torch.no_grad()
def cut_error(layer: Mamba, x_BLM: Tensor, dim: int, score: Score, compensate: bool = False) -> float:
    """Relative error of the layer's output on `x_BLM` after a cut planned from other data."""
    rules = rule([layer.d_state], Target(dim=dim), score=score, compensate=compensate)
    (plan,) = plan_truncation([moments_of(layer, sequence(2))], rules, ONLY).layers
    states = {name: ParameterState.fresh(part.detach()) for name, part in layer.named_parameters()}
    smaller = mamba(dim)
    smaller.load_state_dict({name: state.value for name, state in layer.shrink(plan, states).items()})
    expected_BLM = layer(x_BLM)
    return float((smaller(x_BLM) - expected_BLM).norm() / expected_BLM.norm())


@pytest.mark.parametrize("score", RANKING)
def test_states_that_nothing_reads_come_last(score: Score) -> None:
    layer, silent = mamba(), [1, 4]
    with torch.no_grad():
        layer.x_proj.weight[layer.dt_rank + 6 + torch.tensor(silent)] = 0
    ranking = rank_states(moments_of(layer, sequence()), score, seed=0)
    assert sorted(ranking.order_N[-2:].tolist()) == silent
    assert ranking.sigma_N.tolist() == sorted(ranking.sigma_N.tolist(), reverse=True)
    assert float(ranking.sigma_N[3]) > 0
    assert float(ranking.sigma_N[4]) <= 1e-6 * float(ranking.sigma_N[0])


@pytest.mark.parametrize("score", [score for score in RANKING if score != "magnitude"])
def test_states_that_nothing_reaches_come_last_and_cost_nothing(score: Score) -> None:
    """However loudly they are read."""
    layer, dead = mamba(), [0, 3]
    with torch.no_grad():
        layer.x_proj.weight[layer.dt_rank + torch.tensor(dead)] = 0
        layer.x_proj.weight[layer.dt_rank + 6 + torch.tensor(dead)] *= 1e6
    ranking = rank_states(moments_of(layer, sequence()), score, seed=0)
    assert sorted(ranking.order_N[-2:].tolist()) == dead
    assert ranking.sigma_N[-2:].tolist() == [0, 0]
    assert float(ranking.sigma_N[3]) > 0


@pytest.mark.parametrize("score", SCORES)
def test_a_layer_that_nothing_reaches_yet_is_left_alone(score: Score) -> None:
    layer = mamba()
    with torch.no_grad():
        layer.x_proj.weight[layer.dt_rank + torch.arange(6)] = 0
    rules = rule([6], Target(dim=2), score=score, compensate=True)
    (plan,) = plan_truncation([moments_of(layer, sequence())], rules, ONLY).layers
    assert (plan.dim_after, plan.reduction) == (6, None)
    assert plan.reason == "kept: no state carries anything yet"


@pytest.mark.parametrize(("score", "rotates"), [*((score, False) for score in SCORES), ("hankel", True)])
def test_a_single_state_goes_through_a_plan(score: Score, rotates: bool) -> None:
    moments = replace(selective_moments(d_state=1), rotates=rotates)
    rules = rule([1], Target(dim=1, tolerance=0.5), score=score, compensate=not rotates)
    (plan,) = plan_truncation([moments], rules, ONLY).layers
    assert (plan.dim_before, plan.dim_after, plan.reduction, plan.mass_kept) == (1, 1, None, 1)
    assert plan.spectrum[0] > 0


@pytest.mark.parametrize("score", SCORES)
def test_an_order_is_a_permutation_and_does_not_depend_on_how_states_are_numbered(score: Score) -> None:
    moments = selective_moments(d_state=7, seed=3)
    order_N = torch.randperm(7, generator=torch.Generator().manual_seed(5))
    renumbered = SelectiveMoments(
        *(
            part[order_N][:, order_N] if name in ("hh_NN", "cc_NN") else part[..., order_N] if part.ndim else part
            for name, part in vars(moments).items()
            if isinstance(part, Tensor)
        )
    )
    ranking, again = (rank_states(part, score, seed=9) for part in (moments, renumbered))
    assert sorted(ranking.order_N.tolist()) == list(range(7))
    torch.testing.assert_close(again.sigma_N, ranking.sigma_N, rtol=1e-10, atol=0)
    assert order_N[again.order_N].tolist() == ranking.order_N.tolist()


@pytest.mark.parametrize("score", [score for score in RANKING if score != "magnitude"])
def test_scores_see_what_a_state_carries_not_its_units(score: Score) -> None:
    """B of one state times 50 and C of it over 50 is the same layer."""
    layer = mamba()
    before = rank_states(moments_of(layer, sequence()), score, seed=0)
    with torch.no_grad():
        layer.x_proj.weight[layer.dt_rank + 1] *= 50
        layer.x_proj.weight[layer.dt_rank + 6 + 1] /= 50
    after = rank_states(moments_of(layer, sequence()), score, seed=0)
    assert after.order_N.tolist() == before.order_N.tolist()
    torch.testing.assert_close(after.sigma_N, before.sigma_N, rtol=1e-8, atol=0)


def test_ablations_keep_what_hankel_would_cut_and_anything() -> None:
    moments = selective_moments(d_state=64, seed=1)
    hankel, smallest = (rank_states(moments, score, seed=0) for score in ("hankel", "smallest"))
    assert smallest.order_N.tolist() == hankel.order_N.flip(0).tolist()
    assert torch.equal(smallest.sigma_N, hankel.sigma_N)  # so that a tolerance means the same rank
    assert torch.equal(smallest.own_N, hankel.sigma_N.flip(0))
    draws = [rank_states(moments, "random", seed).order_N.tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_ghost_is_the_root_mean_square_of_a_contribution() -> None:
    """The contribution of state n alone is what the output loses without it, before the gate."""
    moments = selective_moments(d_state=5)
    moments.tokens.fill_(4)
    ranking = rank_states(moments, "ghost", seed=0)
    assert ranking.sigma_N[0] == (moments.hc2_N.max() / 4).sqrt()


def test_magnitude_is_the_product_of_norms_of_weights() -> None:
    layer = mamba()
    ranking = rank_states(moments_of(layer, sequence()), "magnitude", seed=0)
    B_ND, C_ND = layer.x_proj.weight[layer.dt_rank :].detach().chunk(2)
    torch.testing.assert_close(ranking.sigma_N, (B_ND.norm(dim=1) * C_ND.norm(dim=1))[ranking.order_N])


def test_averaged_is_the_hsv_of_each_mode_of_the_averaged_system() -> None:
    """Of a channel whose dt, B and C are their means at all times, each state alone, over the channels."""
    layer, x_BLM = mamba(), sequence()
    moments = moments_of(layer, x_BLM)
    ranking = rank_states(moments, "averaged", seed=0)
    mean = {name: getattr(moments, name) / moments.tokens for name in ("log_a_DN", "b_DN", "c_N")}
    squares_N = torch.zeros(6, dtype=F64)
    for d in range(moments.d_inner):
        for n in range(6):
            parts = (mean["log_a_DN"][d, n].exp(), mean["b_DN"][d, n], mean["c_N"][n])
            mode = LTISystem(
                *(part.reshape(shape).to(torch.complex128) for part, shape in zip(parts, MODE, strict=True))
            )
            squares_N[n] += lti_balancing(mode).sigma_N[0] ** 2
    torch.testing.assert_close(ranking.sigma_N, squares_N.sqrt()[ranking.order_N])


def pooled_error(moments: SelectiveMoments, kept: tuple[int, ...], fold_RN: Tensor) -> float:
    """E|C h - C' h_kept|^2 if C does not depend on h, with the pooled moments of both."""
    lost_NN = torch.eye(moments.d_state, dtype=F64)
    lost_NN[:, list(kept)] -= fold_RN.T
    return float(torch.trace(lost_NN @ moments.hh_NN @ lost_NN.T @ moments.cc_NN))


@pytest.mark.parametrize("seed", range(5))
def test_compensation_is_the_best_linear_one(seed: int) -> None:
    moments, kept = selective_moments(d_state=6, seed=seed), (0, 2, 5)
    fold_RN = compensation(moments, kept)
    assert torch.equal(fold_RN[:, list(kept)], torch.eye(3, dtype=F64))
    best = pooled_error(moments, kept, fold_RN)
    plain_RN = torch.zeros_like(fold_RN)
    plain_RN[:, list(kept)] = torch.eye(3, dtype=F64)
    assert best < pooled_error(moments, kept, plain_RN)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        direction_RN = torch.randn(fold_RN.shape, dtype=F64, generator=generator)
        direction_RN[:, list(kept)] = 0
        # The ridge moves the optimum by 1e-6 of it, which costs the square of that.
        assert pooled_error(moments, kept, fold_RN + 1e-2 * direction_RN) > best * (1 - 1e-9)


def test_compensation_of_nothing_is_the_identity() -> None:
    assert torch.equal(compensation(selective_moments(d_state=6), range(6)), torch.eye(6, dtype=F64))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_finds_the_best_single_elimination_and_the_best_after_it(seed: int) -> None:
    moments = selective_moments(d_state=7, seed=seed)
    order = rank_states(moments, "greedy", seed=0).order_N.tolist()

    def error(cut: tuple[int, ...]) -> float:
        kept = tuple(n for n in range(7) if n not in cut)
        return pooled_error(moments, kept, compensation(moments, kept))

    singles = {(n,): error((n,)) for n in range(7)}
    assert (order[-1],) == min(singles, key=singles.__getitem__)
    pairs = {pair: error(pair) for pair in combinations(range(7), 2)}
    # The second elimination is the best after the first.
    extensions = {pair: value for pair, value in pairs.items() if order[-1] in pair}
    assert set(min(extensions, key=extensions.__getitem__)) == set(order[-2:])


def test_greedy_says_what_each_elimination_costs() -> None:
    moments = selective_moments(d_state=6, seed=2)
    ranking = rank_states(moments, "greedy", seed=0)
    kept = tuple(sorted(ranking.order_N[:-1].tolist()))
    error = pooled_error(moments, kept, compensation(moments, kept))
    scale = float(moments.tokens * moments.samples)
    assert float(ranking.sigma_N[-1]) ** 2 == pytest.approx(error / scale, rel=1e-4)  # up to the ridge


# Averages of a C that changes its sign say nothing of how loudly a state is read.
@pytest.mark.parametrize("score", [score for score in RANKING if score != "averaged"])
def test_a_state_that_others_replace_is_cut_for_nothing_with_compensation(score: Score) -> None:
    """States 2 and 4 are the same as state 1 but for their units, so their sum can be read from any one of them."""
    layer = mamba()
    with torch.no_grad():
        for twin, factor in ((2, 0.5), (4, -0.7)):
            layer.A_log[:, twin] = layer.A_log[:, 1]
            layer.x_proj.weight[layer.dt_rank + twin] = factor * layer.x_proj.weight[layer.dt_rank + 1]
        # The others are read ten times as loudly, so that every score cuts among the three.
        layer.x_proj.weight[layer.dt_rank + 6 + torch.tensor([0, 3, 5])] *= 10
    if score == "magnitude":  # norms of weights know nothing of what passes through; these do
        with torch.no_grad():
            layer.x_proj.weight[layer.dt_rank + torch.tensor([0, 3, 5])] *= 10
    error = cut_error(layer, sequence(), 4, score, compensate=True)
    # The ridge takes 1e-6 of the variance for noise.
    assert error < 1e-5
    assert cut_error(layer, sequence(), 4, score) > 100 * error


@pytest.mark.parametrize("seed", range(4))
def test_compensation_lowers_the_measured_error_on_other_data(seed: int) -> None:
    layer = mamba(seed=seed)
    for score in ("hankel", "ghost"):
        plain, compensated = (cut_error(layer, sequence(), 3, score, compensate) for compensate in (False, True))
        assert compensated < plain
    assert cut_error(layer, sequence(), 3, "greedy", compensate=True) < cut_error(layer, sequence(), 3, "smallest")
