"""Mamba-2 in the rotated basis: a cut keeps the best combinations of states, through two small maps.

Shapes: B batch, L time, M d_model, N state, U state before the first cut, R states kept.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compression.gramians import SelectiveMoments, pooled_gramians
from compression.hankel import Balancing
from compression.moments import ParameterState
from compression.plan import StateRotation
from compression.planning import plan_truncation
from compression.ranking import Target
from models.mamba2 import Mamba2, Mamba2Config
from tests.errors import relative_error
from tests.plans import ONLY, plan_of, rule

F64 = torch.float64
CONFIG = Mamba2Config(kind="mamba2", n_layers=1, d_model=10, d_state=6, headdim=5, basis="rotated")


def mamba2(d_state: int = 6, seed: int = 0, basis: str = "rotated") -> Mamba2:
    """In float64, with every parameter moved off its starting value."""
    torch.manual_seed(seed)
    layer = Mamba2(CONFIG.model_copy(update={"basis": basis}), d_state, 6).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def sequence(seed: int = 1, batch: int = 8) -> Tensor:
    return torch.randn(batch, 70, CONFIG.d_model, dtype=F64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def moments_of(layer: Mamba2, x_BLM: Tensor) -> SelectiveMoments:
    layer.start_statistics()
    layer(x_BLM)
    return layer.finish_statistics()


def with_gradients(layer: Mamba2, x_BLM: Tensor) -> dict[str, ParameterState]:
    """Every parameter with its gradient as first moment, and the gradient's square as second."""
    layer.zero_grad()
    layer(x_BLM).square().sum().backward()
    states = {}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad.clone()
        states[name] = ParameterState(parameter.detach().clone(), gradient, gradient.square())
    return states


def cut(layer: Mamba2, rank: int, states: dict[str, ParameterState] | None = None) -> tuple[Mamba2, dict]:
    plan = plan_of(moments_of(layer, sequence(2)), dim=rank).layers[0]
    assert isinstance(plan.reduction, StateRotation) or not layer.rotates
    states = states or {name: ParameterState.fresh(part.detach()) for name, part in layer.named_parameters()}
    shrunk = layer.shrink(plan, states)
    smaller = mamba2(rank, basis="rotated" if layer.rotates else "axis")
    smaller.load_state_dict({name: state.value for name, state in shrunk.items()})
    return smaller, shrunk


def low_rank(layer: Mamba2, rank: int) -> Mamba2:
    """The same, but C only ever reads `rank` combinations of the states."""
    shrunk = mamba2(5)
    shrunk.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for name in ("B_map", "C_map"):
            getattr(shrunk, name).copy_(torch.randn(5, 6, dtype=F64, generator=generator))
        shrunk.C_map.copy_(torch.randn(5, rank, dtype=F64, generator=generator) @ shrunk.C_map[:rank])
    return shrunk


def test_combinations_that_nothing_reads_are_cut_exactly() -> None:
    layer, x_BLM = low_rank(mamba2(), 3), sequence()
    before = with_gradients(layer, x_BLM)
    smaller, shrunk = cut(layer, 3, before)
    assert relative_error(smaller(x_BLM), layer(x_BLM)) < 1e-9
    # What is unchanged has the gradients that it had, and so have the maps, in the new basis.
    after = with_gradients(smaller, x_BLM)
    for name in after:
        assert relative_error(shrunk[name].exp_avg, after[name].exp_avg) < 1e-7, name


def test_second_moments_are_those_of_independent_gradients() -> None:
    """Over all signs of its entries a gradient's entries are independent, and the mean of its squares is known."""
    generator = torch.Generator().manual_seed(0)
    map_RN, gradient_map_RN = torch.randn(2, 3, 5, dtype=F64, generator=generator)
    sizes_NH = torch.rand(5, 2, dtype=F64, generator=generator)
    signs_KN = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 5)
    gradients_KNH = signs_KN[:, :, None] * sizes_NH
    state = ParameterState(torch.zeros(5, 2, dtype=F64), sizes_NH, gradients_KNH.square().mean(0))
    moved = state.through(map_RN, gradient_map_RN)
    torch.testing.assert_close(moved.exp_avg_sq, (gradient_map_RN @ gradients_KNH).square().mean(0))


def test_the_maps_of_a_first_cut_are_new_to_adam() -> None:
    layer = mamba2()
    assert layer.B_map is None
    _, shrunk = cut(layer, 4, with_gradients(layer, sequence()))
    for name in ("B_map", "C_map"):
        assert shrunk[name].value.shape == (4, 6)
        assert float(shrunk[name].exp_avg.abs().max()) == float(shrunk[name].exp_avg_sq.max()) == 0
    assert float(shrunk["in_proj.weight"].exp_avg.abs().max()) > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_what_is_kept_sees_both_gramians_equal_and_diagonal(seed: int, rank: int) -> None:
    P_NN, Q_NN = pooled_gramians(moments_of(mamba2(seed=seed), sequence(2)))
    balancing = Balancing.of(P_NN, Q_NN)
    left_RN, right_NR = balancing.projections(range(rank))
    sigma_RR = torch.diag(balancing.sigma_N[:rank])
    for gramian_RR in (left_RN @ P_NN @ left_RN.T, right_NR.T @ Q_NN @ right_NR):
        torch.testing.assert_close(gramian_RR, sigma_RR, rtol=0, atol=1e-10 * float(sigma_RR[0, 0]))
    torch.testing.assert_close(left_RN @ right_NR, torch.eye(rank, dtype=F64), rtol=0, atol=1e-10)
    if rank == 6:  # nothing is cut
        torch.testing.assert_close(right_NR @ left_RN, torch.eye(6, dtype=F64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_rotated_loses_less_than_axis(seed: int, rank: int) -> None:
    """In the pooled error that both minimise, choices of states being combinations too."""
    layer = mamba2(seed=seed)
    moments = moments_of(layer, sequence(2))
    P_NN, Q_NN = pooled_gramians(moments)

    def error(projector_NN: Tensor) -> float:
        lost_NN = torch.eye(6, dtype=F64) - projector_NN
        return float(torch.trace(lost_NN @ P_NN @ lost_NN.T @ Q_NN))

    (rotated,) = plan_of(moments, dim=rank).layers
    assert isinstance(rotated.reduction, StateRotation)
    lost = error(rotated.reduction.right_NR @ rotated.reduction.left_RN)
    # The error is the sum of the squares of what is cut (for these two Gramians, Antoulas 2005, section 7.3).
    assert lost == pytest.approx(sum(sigma**2 for sigma in rotated.spectrum[rank:]), rel=1e-8)
    by_axis = min(
        error(torch.diag(torch.eye(6, dtype=F64)[list(kept)].sum(0)))
        for kept in torch.combinations(torch.arange(6), rank).tolist()
    )
    assert lost <= by_axis * (1 + 1e-9)


def test_two_cuts_compose_and_the_scan_runs_at_the_rank() -> None:
    layer = mamba2()
    smaller, _ = cut(layer, 4)
    smallest, shrunk = cut(smaller, 2)
    assert {name: tuple(state.value.shape) for name, state in shrunk.items() if "map" in name} == {
        "B_map": (2, 6),
        "C_map": (2, 6),
    }
    assert smallest.in_proj.weight.shape == layer.in_proj.weight.shape
    assert smallest.initial_state(3)[1].shape[-1] == 2


def test_steps_equal_the_forward_pass() -> None:
    layer, x_BLM = cut(mamba2(), 3)[0], sequence(batch=2)
    state = tuple(part.double() for part in layer.initial_state(2))
    out = []
    for x_BM in x_BLM.unbind(1):
        out_BM, state = layer.step(x_BM, state)
        out.append(out_BM)
    assert relative_error(torch.stack(out, 1), layer(x_BLM)) < 1e-10


def test_ablations_keep_other_coordinates() -> None:
    moments = moments_of(mamba2(), sequence())
    best, worst = (
        plan_truncation([moments], rule([6], Target(dim=2), score=score), ONLY).layers[0]
        for score in ("hankel", "smallest")
    )
    assert worst.spectrum == best.spectrum
    assert worst.mass_kept == pytest.approx(sum(best.spectrum[-2:]) / sum(best.spectrum))
