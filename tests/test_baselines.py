"""What truncation is compared with: penalties, distillation, and pruning by magnitude.

Shapes: N state, H width, X what is asked, K answers, R states kept.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compression.baselines.distillation import distillation_loss
from compression.baselines.regularization import dense_lyapunov, dense_nuclear_norm, hankel_sum, squarings
from compression.gramians import LTISystem, lti_gramians
from compression.hankel import lti_balancing
from compression.moments import ParameterState
from compression.planning import Occasion, Rule, plan_truncation
from compression.ranking import Budget, Target
from models.heads import NOT_ASKED
from models.lru import LRU, LRUConfig
from models.registry import ClassificationTask, RecallTask, build_model
from orchestrator.config import DistillConfig, RegularizeConfig, TrainConfig
from orchestrator.group import Group
from orchestrator.objective import Objective
from tests.errors import relative_error
from tests.systems import random_system

PENALTIES = [hankel_sum, dense_nuclear_norm]
GROUP = Group(0, 1, torch.device("cpu"))


def layer(d_state: int = 8, width: int = 4, seed: int = 0) -> LRU:
    torch.manual_seed(seed)
    return LRU(LRUConfig(kind="lru", n_layers=1, d_model=width, d_state=d_state), d_state)


# --- penalties ---


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_penalty_is_the_sum_of_the_hankel_singular_values(penalty: object, seed: int) -> None:
    system = random_system(10, 3, seed)
    assert callable(penalty)
    assert float(penalty(system)) == pytest.approx(float(lti_balancing(system).sigma_N.sum()), rel=1e-9)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_its_gradient_matches_finite_differences(penalty: object) -> None:
    system = random_system(6, 3, seed=1)
    parts = [torch.view_as_real(part).clone().requires_grad_() for part in (system.B_NH, system.C_HN)]
    parts.insert(0, torch.view_as_real(system.eigenvalues_N).clone().requires_grad_())
    assert callable(penalty)

    def value(*parts: Tensor) -> Tensor:
        total: Tensor = penalty(LTISystem(*map(torch.view_as_complex, parts)))
        return total

    assert torch.autograd.gradcheck(value, parts)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_its_gradient_reaches_the_layers_own_parameters(penalty: object) -> None:
    """Finite differences in what is trained: logarithms of decays, phases and scales, and parts of B and C."""
    lru = layer(d_state=4, width=3).double()
    parameters = {name: value.detach().requires_grad_() for name, value in lru.named_parameters(recurse=False)}
    assert callable(penalty)

    def value(*values: Tensor) -> Tensor:
        for name, part in zip(parameters, values, strict=True):
            delattr(lru, name)
            setattr(lru, name, part)
        total: Tensor = penalty(lru.system())
        return total

    assert torch.autograd.gradcheck(value, tuple(parameters.values()))
    value(*parameters.values()).backward()  # type: ignore[no-untyped-call]
    moved = {name for name, part in parameters.items() if part.grad is not None and part.grad.any()}
    assert moved == {"nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im"}


@pytest.mark.parametrize("silent", [slice(2, 4), slice(6)], ids=["some", "all"])
def test_states_that_carry_nothing_leave_the_penalty_finite(silent: slice) -> None:
    """Where a state is not reached, its HSV is 0, whose root has no slope."""
    system = random_system(6, 3)
    system.B_NH[silent] = 0
    for penalty in PENALTIES:
        B_NH = system.B_NH.clone().requires_grad_()
        penalty(LTISystem(system.eigenvalues_N, B_NH, system.C_HN)).backward()
        assert B_NH.grad is not None
        assert torch.isfinite(torch.view_as_real(B_NH.grad)).all()


@pytest.mark.parametrize("radius", [(0.0, 0.1), (0.9, 0.9999), (0.9, 0.99999)])
def test_the_dense_solve_leaves_no_residual(radius: tuple[float, float]) -> None:
    system = random_system(12, 3, seed=2, radius=radius)
    A_NN, W_NN = torch.diag(system.eigenvalues_N), system.B_NH @ system.B_NH.mH
    X_NN = dense_lyapunov(squarings(A_NN, float(system.eigenvalues_N.abs().max())), W_NN)
    assert relative_error(torch.view_as_real(A_NN @ X_NN @ A_NN.mH + W_NN), torch.view_as_real(X_NN)) < 1e-12
    assert relative_error(torch.view_as_real(X_NN), torch.view_as_real(lti_gramians(system)[0])) < 1e-9


@pytest.mark.parametrize("form", ["hankel", "nuclear"])
def test_descending_it_concentrates_a_layer(form: str) -> None:
    """The objective's penalty is its weight times all layers' sum; following it lets fewer states carry more."""
    train = TrainConfig(steps=1, batch_size=1, lr=1.0, regularize=RegularizeConfig(weight=0.5, form=form))
    config = LRUConfig(kind="lru", n_layers=2, d_model=4, d_state=8)
    torch.manual_seed(0)
    model = build_model(config, ClassificationTask(1, 3), config.state_dims)
    objective = Objective(train, GROUP)

    def spectra() -> list[Tensor]:
        return [lti_balancing(mixer.finish_statistics()).sigma_N for mixer in model.mixers()]  # type: ignore[arg-type]

    before = spectra()
    first = objective.penalty(model)
    assert isinstance(first, Tensor)
    assert first.item() == pytest.approx(0.5 * float(sum(map(torch.sum, before))), rel=1e-6)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        penalty = objective.penalty(model)
        assert isinstance(penalty, Tensor)
        penalty.backward()
        optimizer.step()
    for old_N, new_N in zip(before, spectra(), strict=True):
        assert new_N.sum() < 0.5 * old_N.sum()
        assert new_N[2:].sum() / new_N.sum() < old_N[2:].sum() / old_N.sum()


# --- distillation ---


def test_distillation_is_the_divergence_from_the_softened_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    student_XK, teacher_XK = torch.randn(2, 7, 5, generator=generator)
    assert float(distillation_loss(teacher_XK, teacher_XK, 2.0)) == pytest.approx(0.0, abs=1e-6)
    for temperature in (1.0, 2.0, 5.0):
        student_XK.requires_grad_().grad = None
        distillation_loss(student_XK, teacher_XK, temperature).backward()
        soft = [F.softmax(part.detach() / temperature, dim=-1) for part in (student_XK, teacher_XK)]
        assert student_XK.grad is not None
        torch.testing.assert_close(student_XK.grad, temperature * (soft[0] - soft[1]) / 7)


def test_a_students_loss_falls_towards_its_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the teacher's answers alone, on labels that mean nothing; `alpha` 1 would not look at them."""
    config = LRUConfig(kind="lru", n_layers=1, d_model=8, d_state=8)
    task = ClassificationTask(1, 4)
    torch.manual_seed(0)
    teacher = build_model(config, task, [8])
    with torch.no_grad():
        teacher.head.weight *= 10  # type: ignore[operator]  # answers that differ
    student = build_model(config, task, [2])
    monkeypatch.setattr("orchestrator.objective.load_model", lambda path: teacher)
    x_BLI, labels_B = torch.randn(64, 12, 1), torch.randint(4, (64,))

    def objective(alpha: float) -> Objective:
        distil = DistillConfig(teacher="/teacher", alpha=alpha)
        return Objective(TrainConfig(steps=1, batch_size=1, lr=1.0, distill=distil), GROUP)

    def loss(alpha: float) -> Tensor:
        return objective(alpha).loss(student, student(x_BLI), x_BLI, labels_B)

    assert torch.equal(loss(1.0), student.loss(student(x_BLI), labels_B))
    assert float(loss(0.3)) == pytest.approx(0.3 * float(loss(1.0)) + 0.7 * float(loss(0.0)))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    first = float(loss(0.0))
    for _ in range(150):
        optimizer.zero_grad()
        loss(0.0).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(loss(0.0)) < 0.2 * first
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_only_what_is_asked_is_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a recall sequence, the places that have an answer."""
    torch.manual_seed(0)
    config = LRUConfig(kind="lru", n_layers=1, d_model=8, d_state=4)
    teacher, student = (build_model(config, RecallTask(20), [dim]) for dim in (4, 2))
    monkeypatch.setattr("orchestrator.objective.load_model", lambda path: teacher)
    tokens_BL = torch.randint(20, (3, 9))
    targets_BL = torch.where(torch.rand(3, 9) < 0.3, torch.randint(20, (3, 9)), NOT_ASKED)
    train = TrainConfig(steps=1, batch_size=1, lr=1.0, distill=DistillConfig(teacher="/teacher", alpha=0.0))
    answers_BLV = student(tokens_BL)
    lesson = Objective(train, GROUP).loss(student, answers_BLV, tokens_BL, targets_BL)
    asked_BL = targets_BL != NOT_ASKED
    expected = distillation_loss(answers_BLV[asked_BL], teacher(tokens_BL)[asked_BL], train.distill.temperature)
    assert float(lesson) == pytest.approx(float(expected), rel=1e-6)


# --- magnitude pruning ---


def magnitudes(lru: LRU) -> Tensor:
    B_N = torch.complex(lru.B_re, lru.B_im).norm(dim=1) * lru.gamma_log.exp()
    return (B_N * torch.complex(lru.C_re, lru.C_im).norm(dim=0)).detach()


def test_pruning_to_a_budget_removes_what_all_layers_rank_last() -> None:
    """By its share of its layer's sum, as a comparison prunes."""
    layers = [layer(seed=seed) for seed in range(3)]
    shares_LN = torch.stack([weight_N / weight_N.sum() for weight_N in map(magnitudes, layers)])
    kept_LN = shares_LN > shares_LN.flatten().sort(descending=True).values[10]
    rule = Rule(Target(budget=Budget(states=10), allocation="global"), "magnitude", False, None, (8, 8, 8), 0)
    plan = plan_truncation([lru.finish_statistics() for lru in layers], rule, Occasion(1, 1, 1, 1))
    assert plan.dims_after == tuple(kept_LN.sum(1).tolist())
    for lru, cut, kept_N in zip(layers, plan.layers, kept_LN, strict=True):
        states = {name: ParameterState.fresh(p.detach()) for name, p in lru.named_parameters()}
        assert relative_error(lru.shrink(cut, states)["nu_log"].value, lru.nu_log[kept_N]) < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_pruning_removes_exactly_what_it_ranks_last(rank: int) -> None:
    """Of an LRU: the modes with the smallest products of norms go, and the others' parameters and moments stay."""
    lru = layer()
    generator = torch.Generator().manual_seed(1)
    states = {
        name: ParameterState(p.detach(), *(torch.rand(p.shape, generator=generator) for _ in range(2)))
        for name, p in lru.named_parameters()
    }
    weight_N = magnitudes(lru)
    kept_R = weight_N.sort(descending=True).indices[:rank].sort().values
    rule = Rule(Target(dim=rank), "magnitude", False, None, (8,), 0)
    plan = plan_truncation([lru.finish_statistics()], rule, Occasion(1, 1, 1, 1))
    assert plan.dims_after == (rank,)
    shrunk = lru.shrink(plan.layers[0], states)
    for name, state in states.items():
        axis = {"B_re": 0, "B_im": 0, "C_re": 1, "C_im": 1, "nu_log": 0, "theta_log": 0, "gamma_log": 0}.get(name)
        old = state.tensors() if axis is None else [part.index_select(axis, kept_R) for part in state.tensors()]
        for part, new, expected in zip(vars(state), shrunk[name].tensors(), old, strict=True):
            assert relative_error(new, expected) < 1e-5, (name, part)
