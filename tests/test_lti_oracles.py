"""Hankel singular values and balanced truncation beside independent oracles, and what the theory promises of them.

The oracles: pyMOR's discrete-time models, dense Lyapunov solutions, 60 digits, and the Hankel operator itself.

Shapes: N state, R states after a cut, H width, F frequencies, K time steps; a suffix X is any of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from mpmath import mp
from pymor.core.logger import set_log_levels
from pymor.models.iosys import LTIModel
from pymor.reductors.bt import BTReductor
from threadpoolctl import threadpool_limits
from torch import Tensor

from compression.gramians import LTISystem, lti_gramians
from compression.hankel import lti_balancing
from tests.plans import plan_of
from tests.systems import frequency_response, impulse_response, largest_gain, random_system

set_log_levels({"pymor": "ERROR"})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """numpy's threads and torch's wait for each other's; matrices of this size need neither."""
    with threadpool_limits(1):
        yield


EPS = torch.finfo(torch.float64).eps
C128 = torch.complex128


def system_of(eigenvalues: list[complex], B: Tensor | None = None, C: Tensor | None = None) -> LTISystem:
    """These poles; B and C are Gaussian unless given."""
    random = random_system(len(eigenvalues), 2, seed=11)
    poles_N = torch.tensor(eigenvalues, dtype=C128)
    return LTISystem(poles_N, random.B_NH if B is None else B.to(C128), random.C_HN if C is None else C.to(C128))


def real_system(d_state: int, width: int, seed: int, radius: float = 0.95) -> tuple[LTISystem, list[np.ndarray]]:
    """A real system with conjugate pairs: its modal form, and the real A, B, C that this is the modal form of."""
    generator = np.random.default_rng(seed)
    A_NN = generator.standard_normal((d_state, d_state))
    A_NN *= radius / np.abs(np.linalg.eigvals(A_NN)).max()
    B_NH, C_HN = generator.standard_normal((d_state, width)), generator.standard_normal((width, d_state))
    poles_N, V_NN = np.linalg.eig(A_NN)
    assert np.iscomplex(poles_N).sum() >= 4
    modal = (poles_N, np.linalg.solve(V_NN, B_NH), C_HN @ V_NN)
    return LTISystem(*(torch.from_numpy(np.asarray(part, dtype=complex)) for part in modal)), [A_NN, B_NH, C_HN]


def cut_to(system: LTISystem, rank: int) -> tuple[LTISystem, float]:
    """The system of this rank, and its certificate: 2 x the sum of the discarded HSVs."""
    [layer] = plan_of(system, dim=rank).layers
    assert layer.dim_after == rank
    cut, bound = layer.reduction, layer.error_bound
    assert cut is not None
    assert bound is not None
    return LTISystem(cut.eigenvalues_R, cut.left_RN @ system.B_NH, system.C_HN @ cut.right_NR), bound


def sigma_of(system: LTISystem) -> np.ndarray:
    return lti_balancing(system).sigma_N.numpy()


def assert_hsvs(system: LTISystem, expected_N: np.ndarray, factor: float) -> None:
    """HSVs as right as float64 Gramians allow: their squares to `factor` eps |P| |Q| / (1 - rho^2).

    1 - a conj(a') cancels next to the unit circle, so that P and Q are known to eps / (1 - rho^2). By Weyl's
    inequality the eigenvalues of P Q, which are the squares, then move by at most that times |P| |Q|.
    """
    P_NN, Q_NN = lti_gramians(system)
    norms = float(torch.linalg.matrix_norm(P_NN, 2) * torch.linalg.matrix_norm(Q_NN, 2))
    gap = 1 - float(system.eigenvalues_N.abs().max()) ** 2
    np.testing.assert_allclose(sigma_of(system) ** 2, expected_N**2, rtol=0, atol=factor * EPS * norms / gap)


ONES = torch.ones(8, 1)
HARD = {
    "well conditioned": random_system(8, 2),
    "near the unit circle": random_system(8, 2, seed=2, radius=(0.9999, 0.999999)),
    "clustered": system_of([0.7 + 0.2j + 1e-3 * k for k in range(4)]),
    "tightly clustered": system_of([0.7 + 0.2j + 1e-6 * k for k in range(4)]),
    "real positive": system_of([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99]),
    "real poles up to the unit circle": system_of([1 - 10 ** -(0.5 + k / 1.5) for k in range(8)]),
    "ten decades": system_of([0.1 * (k + 1) for k in range(8)], ONES, ONES.T),
    "states of unequal scale": replace(
        random_system(8, 2), B_NH=random_system(8, 2).B_NH * torch.logspace(-6, 6, 8, dtype=C128)[:, None]
    ),
}


# --- 60 digits ---


def factors_in_60_digits(system: LTISystem) -> tuple[mp.matrix, mp.matrix]:
    """Cholesky factors of the closed-form Gramians P and Q."""
    a = [mpmath.mpmathify(value) for value in system.eigenvalues_N.tolist()]
    B, C = mp.matrix(system.B_NH.tolist()), mp.matrix(system.C_HN.tolist())
    P, Q = B * B.H, C.H * C
    for i in range(len(a)):
        for j in range(len(a)):
            decay = 1 - a[i] * mp.conj(a[j])
            P[i, j] /= decay
            Q[i, j] /= mp.conj(decay)
    return mp.cholesky(P), mp.cholesky(Q)


def hsvs_in_60_digits(system: LTISystem) -> np.ndarray:
    """The singular values of the product of Gramian factors, by mpmath."""
    with mp.workdps(60):
        L_P, L_Q = factors_in_60_digits(system)
        return np.array([float(value) for value in mp.svd_c(L_Q.H * L_P, compute_uv=False)])


def reduced_response_in_60_digits(system: LTISystem, rank: int, phase_F: Tensor) -> Tensor:
    """Square-root balanced truncation and its C (z - A)^-1 B, (F, H, H), with a full A; nothing of ours in it."""
    with mp.workdps(60):
        L_P, L_Q = factors_in_60_digits(system)
        U, sigma, Vh = mp.svd_c(L_Q.H * L_P)
        root = mp.diag([1 / mp.sqrt(sigma[i]) for i in range(rank)])
        left, right = root * U[:, :rank].H * L_Q.H, L_P * Vh[:rank, :].H * root
        A = left * mp.diag([mpmath.mpmathify(value) for value in system.eigenvalues_N.tolist()]) * right
        B, C = left * mp.matrix(system.B_NH.tolist()), mp.matrix(system.C_HN.tolist()) * right
        z_F = [mp.expj(phase) for phase in phase_F.tolist()]
        response = [(C * mp.inverse(z * mp.eye(rank) - A) * B).tolist() for z in z_F]
        return torch.tensor([[[complex(value) for value in row] for row in matrix] for matrix in response], dtype=C128)


@pytest.mark.parametrize("name", HARD)
def test_hsvs_equal_those_of_60_digits(name: str) -> None:
    # Sums of N terms.
    assert_hsvs(HARD[name], hsvs_in_60_digits(HARD[name]), factor=HARD[name].d_state)


def test_small_hsvs_keep_digits_that_the_eigenvalues_of_the_product_lose() -> None:
    """What the square-root method is for: with HSVs over ten decades, eig(P Q) does not even get the last's order."""
    system = HARD["ten decades"]
    expected_N = hsvs_in_60_digits(system)
    assert expected_N[-1] < 1e-9 * expected_N[0]
    np.testing.assert_allclose(sigma_of(system), expected_N, rtol=1e-6)
    P_NN, Q_NN = lti_gramians(system)
    by_product_N = torch.linalg.eigvals(P_NN @ Q_NN).abs().sqrt().sort(descending=True).values
    assert float(by_product_N[-1]) > 2 * expected_N[-1]


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("name", HARD)
def test_reduced_systems_equal_those_of_60_digits(name: str, share: float) -> None:
    system = HARD[name]
    rank = max(1, round(share * (system.d_state - 1)))
    smaller, _ = cut_to(system, rank)
    # Where the poles resonate, and between.
    phase_F = torch.cat([system.eigenvalues_N.angle(), torch.arange(8) * (math.pi / 4)])
    z_F = torch.polar(torch.ones_like(phase_F), phase_F)
    response_FHH = torch.einsum("hn,fn,ni->fhi", smaller.C_HN, 1 / (z_F[:, None] - smaller.eigenvalues_N), smaller.B_NH)
    expected_FHH = reduced_response_in_60_digits(system, rank, phase_F)
    # Gramians are known to eps / (1 - rho^2), and their leading coordinates to that over the distance of the HSVs
    # that are cut: of the largest gain, whatever the scale of the states.
    sigma_N, gap = sigma_of(system), 1 - float(system.eigenvalues_N.abs().max()) ** 2
    tolerance = 10 * system.d_state * EPS / gap / (1 - sigma_N[rank] / sigma_N[rank - 1])
    assert largest_gain(response_FHH - expected_FHH) <= tolerance * largest_gain(expected_FHH)


# --- dense Lyapunov solutions ---


def dense_hsvs(A_NN: np.ndarray, B_NH: np.ndarray, C_HN: np.ndarray) -> np.ndarray:
    """From eigen-factors of the Gramians that scipy's solver gives for a full A."""
    P_NN = scipy.linalg.solve_discrete_lyapunov(A_NN, B_NH @ B_NH.conj().T)
    Q_NN = scipy.linalg.solve_discrete_lyapunov(A_NN.conj().T, C_HN.conj().T @ C_HN)
    roots = []
    for gramian_NN in (P_NN, Q_NN):
        values_N, vectors_NN = np.linalg.eigh((gramian_NN + gramian_NN.conj().T) / 2)
        roots.append(vectors_NN * np.sqrt(values_N.clip(0)))
    return np.linalg.svd(roots[1].conj().T @ roots[0], compute_uv=False)


@pytest.mark.parametrize("name", HARD)
def test_hsvs_equal_those_of_dense_gramians(name: str) -> None:
    system = HARD[name]
    dense = dense_hsvs(np.diag(system.eigenvalues_N.numpy()), system.B_NH.numpy(), system.C_HN.numpy())
    # The dense solver inverts I - A (x) conj(A), of N^2 rows.
    assert_hsvs(system, dense, factor=system.d_state**2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("radius", [0.9, 0.999])
@pytest.mark.parametrize(("d_state", "width"), [(7, 1), (8, 3), (24, 2)])
def test_a_real_system_with_conjugate_pairs_keeps_its_hsvs_in_modal_form(
    d_state: int, width: int, radius: float, seed: int
) -> None:
    system, matrices = real_system(d_state, width, seed, radius)
    # The modal form multiplies rounding by the condition of the eigenvectors, 2 to 60 here, in P and in Q.
    assert_hsvs(system, dense_hsvs(*matrices), factor=100 * d_state)


# --- pyMOR ---


def embedded(matrix: Tensor) -> np.ndarray:
    """A complex matrix as a real one of twice the size; pyMOR's solvers for discrete time take real matrices only."""
    re, im = matrix.real.numpy(), matrix.imag.numpy()
    return np.block([[re, -im], [im, re]])


def pymor_model(system: LTISystem) -> LTIModel:
    """The embedded system: this one beside its conjugate, so that every HSV appears twice."""
    matrices = (torch.diag(system.eigenvalues_N), system.B_NH, system.C_HN)
    return LTIModel.from_matrices(*map(embedded, matrices), sampling_time=1)


def pymor_response(model: LTIModel, points: int) -> Tensor:
    """The complex half of an embedded model on the unit circle, (F, H, H)."""
    embedded_FXX = np.array([model.transfer_function.eval_tf(np.exp(2j * np.pi * k / points)) for k in range(points)])
    width = embedded_FXX.shape[1] // 2
    # [X, -Y; Y, X] [1; -i] = [1; -i] (X + i Y)
    half_XH = np.vstack([np.eye(width), -1j * np.eye(width)]) / math.sqrt(2)
    return torch.from_numpy(half_XH.conj().T @ embedded_FXX @ half_XH)


WIDE = {
    "random": random_system(12, 3),
    "one input": random_system(10, 1, seed=1, radius=(0.8, 0.99)),
    "the LRU's ring": random_system(32, 4, seed=2, radius=(0.9, 0.999)),
    "conjugate pairs": real_system(12, 2, seed=5)[0],
}


@pytest.mark.parametrize("name", WIDE)
def test_hsvs_equal_pymors(name: str) -> None:
    twice_X = pymor_model(WIDE[name]).hsv()
    for half_N in (twice_X[::2], twice_X[1::2]):
        assert_hsvs(WIDE[name], half_N, factor=WIDE[name].d_state)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("name", WIDE)
def test_reduced_systems_equal_pymors(name: str, share: float) -> None:
    system = WIDE[name]
    rank = round(share * system.d_state)
    sigma_N = sigma_of(system)
    # Only between distinct HSVs is the reduced system unique.
    assert sigma_N[rank - 1] > 1.01 * sigma_N[rank]
    reductor = BTReductor(pymor_model(system))
    theirs = reductor.reduce(r=2 * rank, projection="sr")
    assert theirs.order == 2 * rank
    ours, bound = cut_to(system, rank)
    points = 64
    response_FHH = frequency_response(ours, points)
    scale = largest_gain(response_FHH)
    # Rounding of 1e-13 in the projections, over a relative distance of at least 1e-2 to the next HSV.
    assert largest_gain(response_FHH - pymor_response(theirs, points)) <= 1e-11 * scale
    # pyMOR's bound counts every HSV twice, once per half.
    assert reductor.error_bounds()[2 * rank - 1] == pytest.approx(2 * bound, rel=1e-9)


# --- the Hankel operator ---


@pytest.mark.parametrize("system", [random_system(6, 2, 3, (0.2, 0.8)), random_system(5, 1, 4, (0.2, 0.8))])
def test_hsvs_are_the_singular_values_of_the_hankel_operator(system: LTISystem) -> None:
    """The definition: from past inputs to future outputs, entry (i, j) is C A^(i + j) B. 0.8^150 is 3e-15."""
    steps, width = 150, system.B_NH.shape[1]
    response_KHH = impulse_response(system, 2 * steps)
    blocks_KKHH = response_KHH[torch.arange(steps)[:, None] + torch.arange(steps)]
    operator_XX = blocks_KKHH.permute(0, 2, 1, 3).reshape(steps * width, steps * width)
    sigma_X = torch.linalg.svdvals(operator_XX).numpy()
    np.testing.assert_allclose(sigma_X[: system.d_state], sigma_of(system), rtol=1e-10)
    assert sigma_X[system.d_state] <= 1e-12 * sigma_X[0]


# --- balanced coordinates ---


@pytest.mark.parametrize("name", WIDE)
def test_balanced_coordinates_see_both_gramians_equal_and_diagonal(name: str) -> None:
    system = WIDE[name]
    factors = lti_balancing(system)
    left_NN, right_NN = (part.resolve_conj().numpy() for part in factors.projections(range(system.d_state)))
    A_NN = left_NN @ (system.eigenvalues_N.numpy()[:, None] * right_NN)
    B_NH, C_HN = left_NN @ system.B_NH.numpy(), system.C_HN.numpy() @ right_NN
    P_NN = scipy.linalg.solve_discrete_lyapunov(A_NN, B_NH @ B_NH.conj().T)
    Q_NN = scipy.linalg.solve_discrete_lyapunov(A_NN.conj().T, C_HN.conj().T @ C_HN)
    expected_NN = np.diag(factors.sigma_N.numpy())
    # Rounding grows with the spread of the HSVs, below 1e4 here, and with 1 / (1 - rho^2), below 1e3.
    np.testing.assert_allclose(P_NN, expected_NN, rtol=0, atol=1e-8 * expected_NN.max())
    np.testing.assert_allclose(Q_NN, expected_NN, rtol=0, atol=1e-8 * expected_NN.max())

    # All states kept: a similarity, so the same impulse response.
    np.testing.assert_allclose(left_NN @ right_NN, np.eye(system.d_state), rtol=0, atol=1e-10)
    expected_KHH = impulse_response(system, 50).numpy()
    actual_KHH = [C_HN @ np.linalg.matrix_power(A_NN, k) @ B_NH for k in range(50)]
    np.testing.assert_allclose(actual_KHH, expected_KHH, rtol=0, atol=1e-10 * np.abs(expected_KHH).max())


@pytest.mark.parametrize("radius", [0, 0.5, 0.999, 1 - 1e-9])
def test_one_state_of_any_width_has_the_hsv_of_the_formula(radius: float) -> None:
    """|b| |c| / (1 - |a|^2), with a real pole, whose distance to the unit circle is known to every digit."""
    wide = random_system(1, 5, seed=6)
    system = replace(wide, eigenvalues_N=torch.tensor([radius], dtype=C128))
    expected = float(wide.B_NH.norm() * wide.C_HN.norm()) / ((1 - radius) * (1 + radius))
    assert_hsvs(system, np.array([expected]), factor=10)


# --- what a cut does ---


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("name", WIDE)
def test_a_cut_does_not_depend_on_the_states_coordinates(name: str, share: float) -> None:
    """Order, scale and phase of the states are a choice of coordinates: the reduced system is the same."""
    system = WIDE[name]
    generator = torch.Generator().manual_seed(3)
    order_N = torch.randperm(system.d_state, generator=generator)
    exponent_N = 2 * torch.rand(system.d_state, dtype=torch.float64, generator=generator) - 1
    scale_N = torch.polar(10**exponent_N, 5 * exponent_N)
    other = LTISystem(
        system.eigenvalues_N[order_N], (scale_N[:, None] * system.B_NH)[order_N], (system.C_HN / scale_N)[:, order_N]
    )
    rank = round(share * system.d_state)
    (ours, bound), (theirs, their_bound) = cut_to(system, rank), cut_to(other, rank)
    assert their_bound == pytest.approx(bound, rel=1e-9)
    response_KHH = impulse_response(ours, 100)
    # As beside pyMOR, and a decade for the scale.
    error = largest_gain(response_KHH - impulse_response(theirs, 100))
    assert error <= 1e-10 * largest_gain(response_KHH)


@pytest.mark.parametrize("rank", [1, 3, 6, 9])
@pytest.mark.parametrize("name", WIDE)
def test_the_impulse_response_stays_within_the_certificate(name: str, rank: int) -> None:
    """Its energy, for any direction of the impulse, is at most the H-infinity norm of the error."""
    system = WIDE[name]
    smaller, bound = cut_to(system, rank)
    error_KHH = impulse_response(system, 2000) - impulse_response(smaller, 2000)
    stacked_XH = error_KHH.flatten(0, 1)
    assert 0 < float(torch.linalg.matrix_norm(stacked_XH, 2)) <= bound


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_a_real_system_stays_real(seed: int, rank: int) -> None:
    """Conjugate pairs are cut as pairs: real impulse response, spectrum closed under conjugation."""
    system, _ = real_system(9, 2, seed)
    smaller, _ = cut_to(system, rank)
    response_KHH = impulse_response(smaller, 100)
    assert float(response_KHH.imag.abs().max()) <= 1e-10 * float(response_KHH.abs().max())
    distance_RR = (smaller.eigenvalues_N[:, None] - smaller.eigenvalues_N.conj()[None, :]).abs()
    assert float(distance_RR.min(dim=1).values.max()) <= 1e-10


@pytest.mark.parametrize("ranks", [(12, 6), (8, 7), (4, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_certificates_of_successive_cuts_add_up(ranks: tuple[int, int], seed: int) -> None:
    first = random_system(16, 2, seed, radius=(0.8, 0.99))
    second, bound = cut_to(first, ranks[0])
    last, second_bound = cut_to(second, ranks[1])
    response_FHH = frequency_response(first)
    error = largest_gain(response_FHH - frequency_response(last))
    assert error <= bound + second_bound
    # A cut lowers the HSVs, so the two never promise less than one cut to the same rank would.
    assert second_bound <= 2 * float(sigma_of(first)[ranks[1] :].sum())


# --- states that carry nothing ---


@pytest.mark.parametrize("dim", [1, 3])
def test_a_layer_whose_inputs_reach_no_output_is_left_alone(dim: int) -> None:
    """B and C are not zero, but what one drives the other does not see."""
    system = random_system(6, 2)
    driven_N = torch.tensor([1, 1, 1, 0, 0, 0])
    silent = replace(system, B_NH=system.B_NH * driven_N[:, None], C_HN=system.C_HN * (1 - driven_N))
    assert sigma_of(silent).max() == 0
    [layer] = plan_of(silent, dim=dim).layers
    assert (layer.dim_after, layer.reduction, layer.mass_kept) == (6, None, 1)


@pytest.mark.parametrize("scale", [1, 1e-4, 1e-8, 1e-12])
def test_a_state_hardly_reached_but_seen_well_counts_beside_a_redundant_one(scale: float) -> None:
    """Two states are the same, so the Gramian is singular; the third may be written in any scale."""
    B_NH, C_HN = torch.tensor([[1], [1], [scale]], dtype=C128), torch.tensor([[1, 1, 1 / scale]], dtype=C128)
    system = system_of([0.5, 0.5, -0.5], B_NH, C_HN)
    # Without the redundant state: a C of 2 for the pole 0.5.
    minimal = system_of([0.5, -0.5], torch.ones(2, 1), torch.tensor([[2, 1]]))
    np.testing.assert_allclose(sigma_of(system), [*sigma_of(minimal), 0], rtol=1e-12)
    for rank in (1, 2):
        smaller, bound = cut_to(system, rank)
        response_FHH = frequency_response(system)
        error = largest_gain(response_FHH - frequency_response(smaller))
        assert error <= bound + 1e-12 * largest_gain(response_FHH)


@pytest.mark.parametrize("scale", [1e-4, 1e-8])
@pytest.mark.parametrize("silent", ["B_NH", "C_HN"])
def test_a_silent_state_does_not_break_the_certificate_of_states_in_another_scale(silent: str, scale: float) -> None:
    ring = random_system(24, 4, seed=7, radius=(0.9, 0.999))
    (ring.B_NH if silent == "B_NH" else ring.C_HN.T)[3] = 0
    scale_N = torch.where(torch.arange(24) < 12, 1.0, scale if silent == "B_NH" else 1 / scale)
    scaled = replace(ring, B_NH=ring.B_NH * scale_N[:, None], C_HN=ring.C_HN / scale_N)
    expected_N = sigma_of(ring)
    np.testing.assert_allclose(sigma_of(scaled), expected_N, rtol=1e-9, atol=1e-12 * expected_N[0])
    smaller, bound = cut_to(scaled, 6)
    assert 0 < largest_gain(frequency_response(ring) - frequency_response(smaller)) <= bound
