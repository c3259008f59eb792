"""Gramians and Hankel singular values: the equations they solve and what leaves them unchanged."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from compression.gramians import LTISystem, SelectiveMoments, lti_gramians, selective_gramians
from compression.hankel import Balancing, lti_balancing
from models.mamba import Mamba, MambaConfig
from tests.plans import hankel_of
from tests.systems import padded_system, random_system


def system_at(eigenvalues: list[complex], seed: int = 0) -> LTISystem:
    system = random_system(len(eigenvalues), 2, seed)
    return replace(system, eigenvalues_N=torch.tensor(eigenvalues, dtype=torch.complex128))


SYSTEMS = {
    "random": random_system(12, 3),
    "more inputs than states": random_system(4, 9, seed=1),
    "near the unit circle": random_system(16, 2, seed=2, radius=(0.99, 0.99999)),
    "one state": random_system(1, 1, seed=3),
    "clustered": system_at([0.7 + 0.2j + 1e-9 * k for k in range(5)]),
    "equal": system_at([0.5j, 0.5j, 0.5j]),
    "real positive": system_at([0.1, 0.5, 0.9, 0.99]),
    "zero eigenvalue": system_at([0, 0.5, -0.5]),
    "unreachable": padded_system(random_system(5, 2, seed=4), "unreachable"),
}


def sigma_of(system: LTISystem) -> Tensor:
    return lti_balancing(system).sigma_N


@pytest.mark.parametrize("name", SYSTEMS)
def test_gramians_solve_their_stein_equations(name: str) -> None:
    system = SYSTEMS[name]
    A_NN = torch.diag(system.eigenvalues_N)
    P_NN, Q_NN = lti_gramians(system)
    for X_NN, F_NN, G_NN in (
        (P_NN, A_NN, system.B_NH @ system.B_NH.mH),
        (Q_NN, A_NN.mH, system.C_HN.mH @ system.C_HN),
    ):
        residual_NN = F_NN @ X_NN @ F_NN.mH + G_NN - X_NN
        assert float(residual_NN.norm()) <= 1e-13 * float(X_NN.norm())
        assert torch.equal(X_NN, X_NN.mH)
        assert float(torch.linalg.eigvalsh(X_NN).min()) >= -1e-13 * float(X_NN.norm())


@pytest.mark.parametrize("name", SYSTEMS)
def test_factors_multiply_to_the_gramians(name: str) -> None:
    factors = lti_balancing(SYSTEMS[name])
    for factor_NN, gramian_NN in zip((factors.L_P_NN, factors.L_Q_NN), lti_gramians(SYSTEMS[name]), strict=True):
        error_NN = factor_NN @ factor_NN.mH - gramian_NN
        assert float(error_NN.norm()) <= 1e-13 * float(gramian_NN.norm())
    assert bool((factors.sigma_N.diff() <= 0).all())
    assert bool((factors.sigma_N >= 0).all())


@pytest.mark.parametrize("decades", [0, 1, 2.5, 7])
def test_the_decomposition_is_one_at_any_decay_of_the_hsvs(decades: float) -> None:
    generator = torch.Generator().manual_seed(10)
    basis_NN = torch.linalg.qr(torch.randn(30, 30, dtype=torch.complex128, generator=generator)).Q
    expected_N = torch.logspace(0, -decades, 30, dtype=torch.float64)
    factors = Balancing.of(torch.eye(30, dtype=torch.complex128), basis_NN * expected_N.square() @ basis_NN.mH)
    product_NN = factors.L_Q_NN.mH @ factors.L_P_NN
    U_NN, V_NN = factors.svd.vectors(range(30))
    assert float((U_NN * factors.sigma_N @ V_NN.mH - product_NN).norm()) <= 1e-13
    for unitary_NN in (U_NN, V_NN):
        assert float((unitary_NN @ unitary_NN.mH - torch.eye(30)).norm()) <= 1e-11
    some = [7, 0, 3]
    U_NR, V_NR = factors.svd.vectors(some)
    assert float((product_NN @ V_NR - U_NR * factors.sigma_N[some]).norm()) <= 1e-13
    assert float((U_NR.mH @ product_NN - factors.sigma_N[some, None] * V_NR.mH).norm()) <= 1e-11
    # Forming a Gramian has rounded the squares.
    torch.testing.assert_close(factors.sigma_N.square(), expected_N.square(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("d_state", "width"), [(1, 1), (3, 3), (6, 8)])
def test_hsvs_equal_a_dense_solution(d_state: int, width: int, seed: int) -> None:
    system = random_system(d_state, width, seed, radius=(0.3, 0.9))
    A_NN = np.diag(system.eigenvalues_N.numpy())
    B_NH, C_HN = system.B_NH.numpy(), system.C_HN.numpy()
    P_NN = scipy.linalg.solve_discrete_lyapunov(A_NN, B_NH @ B_NH.conj().T)
    Q_NN = scipy.linalg.solve_discrete_lyapunov(A_NN.conj().T, C_HN.conj().T @ C_HN)
    expected_N = np.sqrt(np.sort(np.linalg.eigvals(P_NN @ Q_NN).real)[::-1])
    # eig(PQ) loses digits with the square of the spread of the HSVs, which is below 1e3 here.
    np.testing.assert_allclose(sigma_of(system).numpy(), expected_N, rtol=1e-8)


def test_one_state_has_the_hsv_of_the_formula() -> None:
    system = LTISystem(*(torch.tensor(part, dtype=torch.complex128) for part in ([0.6j], [[3 + 4j]], [[2j]])))
    torch.testing.assert_close(sigma_of(system), torch.tensor([5 * 2 / (1 - 0.36)], dtype=torch.float64))


@pytest.mark.parametrize("name", SYSTEMS)
def test_hsvs_do_not_depend_on_the_order_of_the_states(name: str) -> None:
    system = SYSTEMS[name]
    order_N = torch.randperm(system.d_state, generator=torch.Generator().manual_seed(7))
    shuffled = LTISystem(system.eigenvalues_N[order_N], system.B_NH[order_N], system.C_HN[:, order_N])
    assert_same_hsvs(sigma_of(shuffled), sigma_of(system))


@pytest.mark.parametrize("decades", [1, 3])
@pytest.mark.parametrize("name", SYSTEMS)
def test_hsvs_do_not_depend_on_the_scale_of_the_states(name: str, decades: int) -> None:
    system = SYSTEMS[name]
    generator = torch.Generator().manual_seed(8)
    exponent_N = decades * (2 * torch.rand(system.d_state, dtype=torch.float64, generator=generator) - 1)
    scale_N = torch.polar(10**exponent_N, torch.arange(system.d_state, dtype=torch.float64))
    scaled = replace(system, B_NH=scale_N[:, None] * system.B_NH, C_HN=system.C_HN / scale_N)
    assert_same_hsvs(sigma_of(scaled), sigma_of(system))


def assert_same_hsvs(actual_N: Tensor, expected_N: Tensor) -> None:
    """A Gramian that is singular to rounding has factors right to the root of eps, scaled by its spread."""
    torch.testing.assert_close(actual_N, expected_N, rtol=1e-9, atol=1e-6 * float(expected_N[0]))


def test_hsvs_scale_with_input_and_output() -> None:
    system = random_system(6, 2)
    louder = replace(system, B_NH=3 * system.B_NH, C_HN=2j * system.C_HN)
    torch.testing.assert_close(sigma_of(louder), 6 * sigma_of(system), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["unreachable", "unobservable", "both"])
def test_states_that_carry_nothing_have_hsv_zero(kind: str) -> None:
    minimal = random_system(5, 2, seed=9)
    padded = lti_balancing(padded_system(minimal, kind))
    torch.testing.assert_close(padded.sigma_N[:5], sigma_of(minimal), rtol=1e-10, atol=0)
    # A factor of a singular Gramian is right to the root of eps, 1.5e-8.
    assert float(padded.sigma_N[5:].max()) <= 1e-7 * float(padded.sigma_N[0])


def test_numerical_rank_counts_the_states_that_carry_something() -> None:
    for kind in ("unreachable", "unobservable", "both"):
        assert lti_balancing(padded_system(random_system(5, 2, seed=9), kind)).numerical_rank == 5


@pytest.mark.parametrize("eigenvalue", [1, -1, 1j, 1.5, 0.8 + 0.8j])
def test_unstable_systems_are_refused(eigenvalue: complex) -> None:
    with pytest.raises(ValueError, match="unit circle"):
        lti_balancing(system_at([0.5, eigenvalue, 0.2]))


@pytest.mark.parametrize("part", ["eigenvalues_N", "B_NH", "C_HN"])
@pytest.mark.parametrize("value", [math.nan, math.inf, complex(0, math.nan)])
def test_systems_that_are_not_finite_are_refused(part: str, value: complex) -> None:
    system = random_system(4, 2)
    broken = getattr(system, part).clone()
    broken.view(-1)[-1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        lti_balancing(replace(system, **{part: broken}))


CONFIG = MambaConfig(kind="mamba", n_layers=1, d_model=8, d_state=6)


def mamba_and_batch() -> tuple[Mamba, Tensor]:
    torch.manual_seed(0)
    # float64, so that equal sums in another order are equal to 1e-12.
    return Mamba(CONFIG, CONFIG.d_state).double(), torch.randn(4, 20, CONFIG.d_model, dtype=torch.float64)


@torch.no_grad()
def moments_of(layer: Mamba, *batches: Tensor) -> SelectiveMoments:
    layer.start_statistics()
    for x_BLM in batches:
        layer(x_BLM)
    return layer.finish_statistics()


def test_selective_moments_are_additive() -> None:
    layer, x_BLM = mamba_and_batch()
    whole = moments_of(layer, x_BLM)
    parts = [moments_of(layer, part) for part in (x_BLM[:1], x_BLM[1:])]
    in_turn = moments_of(layer, x_BLM[:3], x_BLM[3:])
    assert int(whole.tokens) == 80
    summed = parts[0].to_vector() + parts[1].to_vector()
    torch.testing.assert_close(summed, whole.to_vector(), rtol=1e-12, atol=0)
    torch.testing.assert_close(in_turn.to_vector(), whole.to_vector(), rtol=1e-12, atol=0)


def test_float32_moments_are_summed_in_float64() -> None:
    layer, x_BLM = mamba_and_batch()
    exact = moments_of(layer, x_BLM)
    rounded = moments_of(layer.float(), x_BLM.float())
    assert all(part.dtype == torch.float64 for part in vars(rounded).values() if isinstance(part, Tensor))
    torch.testing.assert_close(rounded.to_vector(), exact.to_vector(), rtol=1e-5, atol=0)


def test_moments_survive_the_way_through_a_vector() -> None:
    layer, x_BLM = mamba_and_batch()
    moments = moments_of(layer, x_BLM)
    vector = moments.to_vector()
    D, N = layer.d_inner, CONFIG.d_state
    assert vector.dtype == torch.float64
    assert vector.shape == (2 + 4 * D * N + 2 * N * N + 3 * N,)
    back = SelectiveMoments.zeros(D, N).from_vector(vector)
    for name, part in vars(moments).items():
        same = torch.equal(getattr(back, name), part) if isinstance(part, Tensor) else getattr(back, name) == part
        assert same, name
    assert back.d_state == N


def test_selective_hsvs_are_positive_and_zero_without_an_output() -> None:
    layer, x_BLM = mamba_and_batch()
    assert bool((hankel_of(moments_of(layer, x_BLM)) > 0).all())
    first_C = layer.dt_rank + layer.d_state
    with torch.no_grad():
        layer.x_proj.weight[first_C + 2] = 0
    sigma_N = hankel_of(moments_of(layer, x_BLM))
    assert float(sigma_N[2]) == 0
    assert int((sigma_N > 0).sum()) == layer.d_state - 1


def test_selective_hsvs_see_what_a_state_carries_not_its_units() -> None:
    layer, x_BLM = mamba_and_batch()
    before_N = hankel_of(moments_of(layer, x_BLM))
    with torch.no_grad():
        layer.x_proj.weight[layer.dt_rank + 1] *= 50
        layer.x_proj.weight[layer.dt_rank + layer.d_state + 1] /= 50
        layer.x_proj.weight[layer.dt_rank + layer.d_state + 4] *= 3
    factor_N = torch.tensor([1, 1, 1, 1, 3, 1], dtype=torch.float64)
    after_N = hankel_of(moments_of(layer, x_BLM))
    torch.testing.assert_close(after_N, factor_N * before_N, rtol=1e-10, atol=0)


def test_selective_gramians_of_a_constant_system() -> None:
    """With constant dt, B and C the observability is the LTI one, and a state that never decays stays finite."""
    decay_DN = torch.tensor([[0.5, 0.9], [0.99, 1.0]], dtype=torch.float64)
    tokens, c_N = 1000, torch.tensor([2.0, 3.0], dtype=torch.float64)
    moments = SelectiveMoments.zeros(2, 2)
    moments.tokens += tokens
    moments.h2_DN += 7 * tokens
    moments.a2_DN += decay_DN.square() * tokens
    moments.cc_NN += torch.outer(c_N, c_N) * tokens
    controllability_DN, observability_DN = selective_gramians(moments)
    torch.testing.assert_close(controllability_DN, torch.full((2, 2), 7.0, dtype=torch.float64))
    expected_DN = c_N.square() / (1 - decay_DN.square()).clamp_min(1 / tokens)
    torch.testing.assert_close(observability_DN, expected_DN)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["tokens", "h2_DN", "hh_NN", "cc_NN", "weight_N"])
def test_selective_moments_that_are_not_finite_are_refused(part: str, value: float) -> None:
    layer, x_BLM = mamba_and_batch()
    moments = moments_of(layer, x_BLM)
    getattr(moments, part).view(-1)[0] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        hankel_of(moments)
