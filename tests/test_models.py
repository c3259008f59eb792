"""Scans against naive recurrences, layers against their definition, and what a cut does to a layer and its optimizer.

Shapes: B batch, L time, H width of an LRU, M d_model, D d_inner, N state, R state after a cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compression.gramians import LTISystem
from compression.moments import ComplexMoments, ParameterState
from compression.plan import LayerPlan, StateSelection, StateTransform
from models.backbone import Backbone
from models.heads import Classifier, LanguageModel
from models.layer import TruncatableLayer
from models.lru import LRU, LRUConfig
from models.mamba import Mamba, MambaConfig
from models.registry import ClassificationTask, LanguageTask, PairClassificationTask, build_model
from models.scan import reference, selective_torch
from tests.errors import relative_error
from tests.plans import cut_of, plan_of
from tests.systems import frequency_response, largest_gain, nearly_defective_system

F64 = torch.float64
CHUNK = selective_torch.CHUNK

Arguments = tuple[Tensor, ...]


# --- layers ---

MAMBA = MambaConfig(kind="mamba", n_layers=2, d_model=10, d_state=6)
LRU_RING = LRUConfig(kind="lru", n_layers=1, d_model=4, d_state=8, r_min=0.5, r_max=0.95)


def mamba(d_state: int = 6) -> Mamba:
    torch.manual_seed(0)
    return Mamba(MAMBA, d_state).double()


def lru(d_state: int = 8, config: LRUConfig = LRU_RING) -> LRU:
    torch.manual_seed(0)
    return LRU(config, d_state).double()


def sequence(width: int, length: int = 2 * CHUNK + 4) -> Tensor:
    return torch.randn(2, length, width, dtype=F64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_mamba_follows_its_definition() -> None:
    """Step by step, as a decoder would: a window of inputs for the convolution and one state."""
    layer = mamba()
    x_BLM = sequence(MAMBA.d_model)
    D, N, R = layer.d_inner, layer.d_state, layer.dt_rank
    assert (D, R) == (20, 1)
    window_BDK = torch.zeros(2, D, MAMBA.d_conv, dtype=F64)
    h_BDN = torch.zeros(2, D, N, dtype=F64)
    steps = []
    for x_BM in x_BLM.unbind(1):
        u_BD, gate_BD = (layer.in_proj.weight @ x_BM.T).T.split(D, dim=1)
        window_BDK = torch.cat([window_BDK[..., 1:], u_BD.unsqueeze(-1)], dim=-1)
        u_BD = F.silu((window_BDK * layer.conv1d.weight[:, 0]).sum(-1) + layer.conv1d.bias)
        dt_BR, B_BN, C_BN = (u_BD @ layer.x_proj.weight.T).split([R, N, N], dim=1)
        dt_BD = F.softplus(layer.dt_proj(dt_BR))
        h_BDN = torch.exp(dt_BD.unsqueeze(-1) * -layer.A_log.exp()) * h_BDN
        h_BDN = h_BDN + (dt_BD * u_BD).unsqueeze(-1) * B_BN.unsqueeze(1)
        y_BD = (h_BDN * C_BN.unsqueeze(1)).sum(-1) + layer.D * u_BD
        steps.append((y_BD * F.silu(gate_BD)) @ layer.out_proj.weight.T)
    torch.testing.assert_close(layer(x_BLM), torch.stack(steps, dim=1))


@torch.no_grad()
def test_lru_follows_its_definition() -> None:
    layer = lru()
    x_BLH = sequence(4)
    system = layer.finish_statistics()
    a_N, B_NH, C_HN = system.eigenvalues_N, system.B_NH, system.C_HN
    parts = (a_N.real, a_N.imag, B_NH.real, B_NH.imag, C_HN.real, C_HN.imag)
    y_BLH = reference.linear_recurrence(x_BLH, *parts) + layer.D * x_BLH
    value_BLH, gate_BLH = layer.glu(F.gelu(y_BLH)).split(4, dim=-1)
    torch.testing.assert_close(layer(x_BLH), value_BLH * gate_BLH.sigmoid())


@pytest.mark.parametrize("t", [0, 3, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("layer", [mamba(), lru()], ids=["mamba", "lru"])
@torch.no_grad()
def test_outputs_do_not_see_later_inputs(layer: TruncatableLayer, t: int) -> None:
    x_BLM = sequence(MAMBA.d_model if isinstance(layer, Mamba) else LRU_RING.d_model)
    changed_BLM = x_BLM.clone()
    changed_BLM[:, t] += 1
    before, after = layer(x_BLM), layer(changed_BLM)
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-14)
    assert bool(((after - before)[:, t:].abs().amax((0, 2)) > 0).all())


@pytest.mark.parametrize("d_state", [1, 6, 128])
def test_mamba_starts_as_published(d_state: int) -> None:
    torch.manual_seed(0)
    # 2,560 channels, so that the drawn time steps fill their range.
    layer = Mamba(MambaConfig(kind="mamba", n_layers=3, d_model=40, expand=64), d_state)
    assert layer.dt_rank == 3
    expected_N = torch.arange(1, d_state + 1).float().log()
    torch.testing.assert_close(layer.A_log.detach(), expected_N.expand(2560, -1))
    assert bool((layer.D == 1).all())
    dt_D = F.softplus(layer.dt_proj.bias.detach().double())
    # The bias rounds to float32, which moves dt by about 1e-6 relative.
    assert 1e-3 * (1 - 1e-5) <= float(dt_D.min()) < 1.01e-3
    assert 0.99e-1 < float(dt_D.max()) <= 1e-1 * (1 + 1e-5)
    assert float(dt_D.log().median()) == pytest.approx(math.log(1e-2), abs=0.15)
    assert float(layer.dt_proj.weight.detach().abs().max()) <= layer.dt_rank**-0.5


def test_lru_starts_on_its_ring_with_unit_gain() -> None:
    layer = LRU(LRUConfig(kind="lru", n_layers=1, d_model=4, d_state=200, r_min=0.9, r_max=0.999), 200)
    eigenvalues_N = layer.finish_statistics().eigenvalues_N
    assert 0.9 - 1e-6 <= float(eigenvalues_N.abs().min()) < 0.92
    assert 0.99 < float(eigenvalues_N.abs().max()) <= 0.999 + 1e-6
    assert float(layer.theta_log.detach().exp().diff().abs().max()) > 3
    gamma_N = (1 - eigenvalues_N.abs().square()).sqrt()
    torch.testing.assert_close(layer.gamma_log.detach().double().exp(), gamma_N, rtol=1e-4, atol=0)


@pytest.mark.parametrize("max_phase", [0.3, 2 * math.pi])
def test_lru_phases_stay_below_their_limit(max_phase: float) -> None:
    torch.manual_seed(0)
    config = LRUConfig(kind="lru", n_layers=1, d_model=2, d_state=500, max_phase=max_phase)
    theta_N = LRU(config, 500).theta_log.detach().exp()
    assert 0 < float(theta_N.min()) < 0.1 * max_phase
    assert 0.9 * max_phase < float(theta_N.max()) <= max_phase * (1 + 1e-6)


# --- models ---


def test_language_model_has_the_published_parameter_names() -> None:
    model = build_model(MAMBA, LanguageTask(vocab_size=11), (4, 2))
    mixer = [
        "A_log",
        "D",
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "x_proj.weight",
        "dt_proj.weight",
        "dt_proj.bias",
        "out_proj.weight",
    ]
    expected = {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}
    for i in range(2):
        expected |= {f"backbone.layers.{i}.norm.weight"}
        expected |= {f"backbone.layers.{i}.mixer.{name}" for name in mixer}
    state = model.state_dict()
    assert set(state) == expected
    assert state["lm_head.weight"].data_ptr() == state["backbone.embedding.weight"].data_ptr()
    assert state["backbone.layers.0.mixer.conv1d.weight"].shape == (20, 1, 4)
    for i, dim in enumerate((4, 2)):
        assert state[f"backbone.layers.{i}.mixer.A_log"].shape == (20, dim)
        assert state[f"backbone.layers.{i}.mixer.x_proj.weight"].shape == (1 + 2 * dim, 20)


@pytest.mark.parametrize("config", [MAMBA, LRU_RING.model_copy(update={"n_layers": 2})], ids=["mamba", "lru"])
def test_models_take_a_state_dimension_per_layer(config: LRUConfig | MambaConfig) -> None:
    language = build_model(config, LanguageTask(vocab_size=11), (5, 2))
    assert isinstance(language, LanguageModel)
    assert language.state_dims == [5, 2]
    tokens_BL = torch.arange(14).reshape(2, 7) % 11
    assert language(tokens_BL).shape == (2, 7, 11)

    classifier = build_model(config, ClassificationTask(n_features=3, n_classes=5), (1, 6))
    assert isinstance(classifier, Classifier)
    assert classifier.state_dims == [1, 6]
    assert classifier(torch.randn(2, 9, 3)).shape == (2, 5)
    logits_BK = torch.zeros(2, 5)
    assert float(classifier.loss(logits_BK, torch.tensor([0, 4]))) == pytest.approx(math.log(5))


@torch.no_grad()
def test_blocks_add_to_the_residual_stream() -> None:
    torch.manual_seed(0)
    backbone = Backbone(torch.nn.Identity(), [lru(3), lru(2)], 4).double()
    x_BLM = sequence(4)
    expected_BLM = x_BLM
    for layer in backbone.mixers():
        normed_BLM = expected_BLM / (expected_BLM.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected_BLM = expected_BLM + layer(normed_BLM)
    expected_BLM = expected_BLM / (expected_BLM.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(backbone(x_BLM), expected_BLM)


# --- cutting a Mamba layer ---


def test_training_drops_a_share_of_what_a_block_adds() -> None:
    """And scales the rest up; outside of training nothing is dropped."""
    config = MambaConfig(kind="mamba", n_layers=1, d_model=8, d_state=4, dropout=0.25)
    [block] = build_model(config, ClassificationTask(1, 2), [4]).backbone.blocks()
    x_BLM = torch.randn(64, 40, 8)
    added_BLM, whole_BLM = block(x_BLM) - x_BLM, block.mixer(block.norm(x_BLM))
    kept_BLM = added_BLM.abs() > 1e-6
    assert float(kept_BLM.float().mean()) == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(added_BLM[kept_BLM], whole_BLM[kept_BLM] / 0.75, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(block.eval()(x_BLM), x_BLM + whole_BLM)


@pytest.mark.parametrize("task", [ClassificationTask(1, 2), PairClassificationTask(12, 2)], ids=["whole", "pairs"])
def test_what_a_row_drops_follows_from_its_place(task: ClassificationTask | PairClassificationTask) -> None:
    """Whoever computes it, and with whatever others; another step, layer or row drops something else."""
    config = MambaConfig(kind="mamba", n_layers=2, d_model=8, d_state=4, dropout=0.5)
    model = build_model(config, task, [4, 4])
    inputs = torch.ones(6, 20, 1) if isinstance(task, ClassificationTask) else torch.ones(6, 2, 20, dtype=torch.int64)

    def answers(step: int, rows: slice) -> Tensor:
        model.seed_dropout((7, step), rows.start)
        found: Tensor = model(inputs[rows])
        return found

    whole = answers(1, slice(0, 6))
    torch.testing.assert_close(torch.cat([answers(1, slice(0, 4)), answers(1, slice(4, 6))]), whole)
    assert len(whole.unique(dim=0)) == 6
    assert not torch.isclose(answers(2, slice(0, 6)), whole).any()
    blocks = model.backbone.blocks()
    x_BLM = torch.ones(6, 20, 8)
    assert not torch.equal(blocks[0].dropout(x_BLM), blocks[1].dropout(x_BLM))


def with_gradients(layer: TruncatableLayer, x_BLM: Tensor) -> dict[str, ParameterState]:
    """Every parameter with its gradient as first and the gradient's square as second moment."""
    out_BLM = layer(x_BLM)
    weights_BLM = torch.randn(out_BLM.shape, dtype=F64, generator=torch.Generator().manual_seed(5))
    names, values = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad((out_BLM * weights_BLM).sum(), values)
    return {
        name: ParameterState(value.detach().clone(), grad, grad.square())
        for name, value, grad in zip(names, values, grads, strict=True)
    }


def values_of(states: dict[str, ParameterState]) -> dict[str, Tensor]:
    return {name: state.value for name, state in states.items()}


def selection_plan(kept: Sequence[int], d_state: int) -> LayerPlan:
    return cut_of(StateSelection(tuple(kept)), d_state, len(kept))


@pytest.mark.parametrize("silent", ["B", "C", "BC"])
@pytest.mark.parametrize("kept", [(0, 2, 3), (5,), (0, 1, 2, 3, 4)])
def test_mamba_without_silent_states_is_the_same_layer(kept: tuple[int, ...], silent: str) -> None:
    """States that nothing enters, or that nothing reads, leave output and gradients as they are."""
    layer, x_BLM = mamba(), sequence(MAMBA.d_model)
    dropped = torch.tensor([n for n in range(6) if n not in kept])
    with torch.no_grad():
        for offset, part in ((layer.dt_rank, "B"), (layer.dt_rank + 6, "C")):
            if part in silent:
                layer.x_proj.weight[offset + dropped] = 0
    cut = layer.shrink(selection_plan(kept, 6), with_gradients(layer, x_BLM))
    smaller = mamba(len(kept))
    smaller.load_state_dict(values_of(cut))
    # Only the order of summation over the states may differ.
    torch.testing.assert_close(smaller(x_BLM), layer(x_BLM), rtol=0, atol=1e-13)
    for name, expected in with_gradients(smaller, x_BLM).items():
        torch.testing.assert_close(cut[name].exp_avg, expected.exp_avg, rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(cut[name].exp_avg_sq, expected.exp_avg_sq, rtol=1e-9, atol=1e-12, msg=name)


def test_mamba_picks_the_same_entries_of_value_and_moments() -> None:
    layer = mamba()
    tagged = {}
    for name, parameter in layer.named_parameters():
        tag = torch.arange(parameter.numel(), dtype=F64).reshape(parameter.shape)
        tagged[name] = ParameterState(tag, tag + 0.25, tag + 0.5)
    cut = layer.shrink(selection_plan((1, 4), 6), tagged)
    smaller = mamba(2).state_dict()
    assert set(cut) == set(smaller)
    for name, state in cut.items():
        assert state.value.shape == smaller[name].shape, name
        assert torch.equal(state.exp_avg, state.value + 0.25), name
        assert torch.equal(state.exp_avg_sq, state.value + 0.5), name
    # Rows: the time step, then B of states 1 and 4, then C of states 1 and 4.
    assert (cut["x_proj.weight"].value[:, 0] / layer.d_inner).tolist() == [0, 2, 5, 8, 11]
    assert cut["A_log"].value[0].tolist() == [1, 4]


def test_mamba_plan_keeps_what_the_data_uses() -> None:
    layer, x_BLM = mamba(), sequence(MAMBA.d_model)
    with torch.no_grad():
        layer.x_proj.weight[layer.dt_rank + 6 + torch.tensor([1, 3])] = 0
        layer.start_statistics()
        layer(x_BLM)
        plan = plan_of(layer.finish_statistics(), dim=4)
    assert plan.layers[0].reduction == StateSelection((0, 2, 4, 5))
    assert plan.layers[0].mass_kept == 1


# --- cutting an LRU layer ---


def padded_lru(kind: str) -> LRU:
    """Eight states, of which 1, 2 and 6 carry nothing."""
    layer, silent = lru(), torch.tensor([1, 2, 6])
    with torch.no_grad():
        if kind in ("unreachable", "both"):
            layer.B_re[silent], layer.B_im[silent] = 0, 0
        if kind in ("unobservable", "both"):
            layer.C_re[:, silent], layer.C_im[:, silent] = 0, 0
    return layer


def lru_plan(system: LTISystem, dim: int) -> LayerPlan:
    return plan_of(system, dim=dim).layers[0]


def loaded(cut: dict[str, ParameterState], config: LRUConfig = LRU_RING) -> LRU:
    layer = lru(cut["nu_log"].value.numel(), config)
    layer.load_state_dict(values_of(cut))
    return layer


@pytest.mark.parametrize("kind", ["unreachable", "unobservable", "both"])
def test_lru_without_silent_states_is_the_same_layer(kind: str) -> None:
    layer, x_BLH = padded_lru(kind), sequence(4, length=100)
    cut = layer.shrink(lru_plan(layer.finish_statistics(), 5), with_gradients(layer, x_BLH))
    assert all(part.dtype == torch.float32 for part in cut["nu_log"].tensors())
    smaller = loaded(cut)
    assert smaller.d_state == 5
    # The new parameters are float32: 6e-8 in a phase of up to 2 pi, over a memory of 1 / (1 - 0.95) steps.
    assert relative_error(smaller(x_BLH), layer(x_BLH)) < 2e-5

    expected = with_gradients(smaller, x_BLH)
    assert set(cut) == set(expected)
    for name, state in cut.items():
        assert relative_error(state.exp_avg.double(), expected[name].exp_avg) < 2e-4, name
        assert state.value.shape == state.exp_avg.shape == state.exp_avg_sq.shape
        assert bool((state.exp_avg_sq >= 0).all()), name
    # A lossless cut turns every kept state by one complex factor: eigenvalues and gamma keep their second moments, and
    # B and C the sum over real and imaginary part.
    for name in ("nu_log", "theta_log", "gamma_log"):
        assert relative_error(cut[name].exp_avg_sq.double(), expected[name].exp_avg_sq) < 2e-4, name
    for name in ("B", "C"):
        actual = cut[f"{name}_re"].exp_avg_sq + cut[f"{name}_im"].exp_avg_sq
        wanted = expected[f"{name}_re"].exp_avg_sq + expected[f"{name}_im"].exp_avg_sq
        assert relative_error(actual.double(), wanted) < 2e-4, name


def test_lru_parts_without_a_state_are_left_alone() -> None:
    layer = lru()
    states = with_gradients(layer, sequence(4))
    cut = layer.shrink(lru_plan(layer.finish_statistics(), 3), states)
    for name in ("D", "glu.weight", "glu.bias"):
        assert cut[name] is states[name]


@pytest.mark.parametrize("dim", [1, 4, 7])
def test_lru_cut_is_the_planned_system_and_keeps_its_bound(dim: int) -> None:
    layer = lru(d_state=20)
    system = layer.finish_statistics()
    plan = lru_plan(system, dim)
    assert isinstance(plan.reduction, StateTransform)
    assert plan.error_bound is not None
    states = with_gradients(layer, sequence(4))
    cut = layer.shrink(plan, states)
    smaller = loaded(cut).finish_statistics()
    expected = LTISystem(
        plan.reduction.eigenvalues_R,
        plan.reduction.left_RN @ system.B_NH,
        system.C_HN @ plan.reduction.right_NR,
    )
    for name, part in vars(smaller).items():
        torch.testing.assert_close(part, getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name)
    assert largest_gain(frequency_response(system) - frequency_response(smaller)) <= plan.error_bound
    # gamma starts again at the value that normalises each state.
    gamma_R = (1 - smaller.eigenvalues_N.abs().square()).sqrt()
    torch.testing.assert_close(cut["gamma_log"].value.double().exp(), gamma_R, rtol=1e-5, atol=0)


@torch.no_grad()
def conjugated(layer: LRU, states: slice) -> None:
    """Conjugate some states of a layer in place, which changes no output: that is a real part."""
    layer.theta_log[states] = (2 * math.pi - layer.theta_log[states].exp()).log()
    layer.B_im[states] *= -1
    layer.C_im[:, states] *= -1


def test_an_lru_is_cut_alike_whichever_of_its_states_are_conjugated() -> None:
    x_BLH, layer, other = sequence(4), lru(d_state=20), lru(d_state=20)
    other.load_state_dict(layer.state_dict())
    conjugated(other, slice(0, None, 2))
    torch.testing.assert_close(other(x_BLH), layer(x_BLH))
    plan, other_plan = (lru_plan(part.finish_statistics(), 5) for part in (layer, other))
    assert other_plan.spectrum == pytest.approx(plan.spectrum, rel=1e-9)
    assert other_plan.error_bound == pytest.approx(plan.error_bound, rel=1e-9)
    smaller, other_smaller = (
        loaded(part.shrink(cut, with_gradients(part, x_BLH)))(x_BLH)
        for part, cut in ((layer, plan), (other, other_plan))
    )
    assert relative_error(other_smaller, smaller) < 2e-5  # float32, as above


def test_states_that_are_each_others_conjugates_are_one() -> None:
    """What is read from both can be read from one of them, and balanced truncation finds that."""
    x_BLH, layer = sequence(4), lru(d_state=8)
    with torch.no_grad():
        for name in ("nu_log", "theta_log", "gamma_log", "B_re", "B_im"):
            part = layer.get_parameter(name)
            part[4:] = part[:4]
    conjugated(layer, slice(4, 8))
    plan = lru_plan(layer.finish_statistics(), 4)
    # Gramians are singular to rounding then, whose root is what HSVs can be told from 0 by.
    assert max(plan.spectrum[4:]) < 1e-6 * plan.spectrum[0] < plan.spectrum[3]
    cut = layer.shrink(plan, with_gradients(layer, x_BLH))
    assert relative_error(loaded(cut)(x_BLH), layer(x_BLH)) < 2e-5


def test_lru_carries_eigenvalue_gradients_through_a_lossy_cut() -> None:
    """Any gradient on the new eigenvalues, pulled back to the old ones by autograd, comes forward again."""
    layer = lru(d_state=20)
    plan = lru_plan(layer.finish_statistics(), 4)
    assert isinstance(plan.reduction, StateTransform)
    eigenvalues_N = layer.system().eigenvalues_N
    A_RR = plan.reduction.left_RN @ (eigenvalues_N[:, None] * plan.reduction.right_NR)
    found_R = torch.linalg.eigvals(A_RR)
    order_R = (plan.reduction.eigenvalues_R[:, None] - found_R).abs().argmin(1)
    new_R = found_R[order_R]
    nu_log_R = (-new_R.abs().log()).log()
    below_R = (layer.theta_log.exp().sin() < 0)[plan.reduction.ancestors_R]
    theta_log_R = (torch.where(below_R, -new_R.angle(), new_R.angle()) % (2 * math.pi)).log()
    generator = torch.Generator().manual_seed(0)
    by_nu_R, by_theta_R = torch.randn(2, 4, dtype=F64, generator=generator)
    loss = (by_nu_R * nu_log_R + by_theta_R * theta_log_R).sum()

    states = with_gradients(layer, sequence(4))
    for name, grad in zip(
        ("nu_log", "theta_log"), torch.autograd.grad(loss, (layer.nu_log, layer.theta_log)), strict=True
    ):
        states[name] = replace(states[name], exp_avg=grad)
    cut = layer.shrink(plan, states)
    torch.testing.assert_close(cut["nu_log"].exp_avg.double(), by_nu_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut["theta_log"].exp_avg.double(), by_theta_R, rtol=1e-5, atol=1e-5)


def lru_of(system: LTISystem) -> LRU:
    """A layer that is this system, in float64."""
    d_state, width = system.B_NH.shape
    layer = lru(d_state, LRU_RING.model_copy(update={"d_model": width}))
    phase_N = system.eigenvalues_N.angle()
    gamma_N = (1 - system.eigenvalues_N.abs().square()).sqrt()
    B_NH = system.B_NH / gamma_N[:, None]
    values = {
        "nu_log": (-system.eigenvalues_N.abs().log()).log(),
        "theta_log": torch.where(phase_N > 0, phase_N, phase_N + 2 * math.pi).log(),
        "gamma_log": gamma_N.log(),
        "B_re": B_NH.real,
        "B_im": B_NH.imag,
        "C_re": system.C_HN.real,
        "C_im": system.C_HN.imag,
    }
    layer.load_state_dict(layer.state_dict() | values)
    return layer


def test_a_nearly_defective_cut_keeps_its_bound_in_float32() -> None:
    system = nearly_defective_system()
    layer = lru_of(system)
    plan = lru_plan(layer.finish_statistics(), 2)
    smaller = loaded(layer.shrink(plan, with_gradients(layer, sequence(1))), LRU_RING.model_copy(update={"d_model": 1}))
    error = largest_gain(frequency_response(system) - frequency_response(smaller.finish_statistics()))
    assert plan.error_bound is not None
    assert error <= plan.error_bound


@pytest.mark.parametrize(
    "eigenvalue",
    [
        complex(0.5, 0.0),
        complex(0.5, -0.0),
        complex(0.5, -1e-17),
        complex(0.5, 1e-17),
        complex(-0.5, 0.0),
        complex(-0.5, -0.0),
        0j,
        complex(1 - 1e-12, 0),
    ],
)
def test_real_zero_and_slow_eigenvalues_have_parameters(eigenvalue: complex) -> None:
    layer = lru(2)
    left_RN = torch.tensor([[1, 0]], dtype=torch.complex128)
    transform = StateTransform(left_RN, left_RN.mH, torch.tensor([eigenvalue], dtype=torch.complex128))
    plan = cut_of(transform, 2, 1)
    cut = layer.shrink(plan, with_gradients(layer, sequence(4)))
    for name, state in cut.items():
        assert all(bool(torch.isfinite(part).all()) for part in state.tensors()), name
    # exp(theta_log) scales the gradient of the phase: far below 1e-3 the phase would not move any more.
    assert float(cut["theta_log"].value.exp()) >= 1e-3
    smaller = loaded(cut).finish_statistics().eigenvalues_N
    assert float(smaller.abs()) < 1
    assert abs(complex(smaller) - eigenvalue) < 1e-6


def test_a_system_with_real_positive_poles_goes_through_plan_and_shrink() -> None:
    system = LTISystem(
        torch.tensor([0.9, 0.6, 0.3, 0.1], dtype=torch.complex128),
        torch.ones(4, 1, dtype=torch.complex128),
        torch.ones(1, 4, dtype=torch.complex128),
    )
    layer = lru_of(system)
    plan = lru_plan(layer.finish_statistics(), 2)
    cut = layer.shrink(plan, with_gradients(layer, sequence(1)))
    assert all(bool(torch.isfinite(part).all()) for state in cut.values() for part in state.tensors())
    smaller = loaded(cut, LRU_RING.model_copy(update={"d_model": 1})).finish_statistics()
    assert plan.error_bound is not None
    assert largest_gain(frequency_response(system) - frequency_response(smaller)) <= plan.error_bound


def test_complex_moments_follow_the_gradient() -> None:
    """Against the map written out over real and imaginary parts: squares go through squared entries."""
    generator = torch.Generator().manual_seed(0)
    map_RN = torch.randn(3, 5, dtype=torch.complex128, generator=generator)
    parts = [torch.randn(5, 2, dtype=F64, generator=generator) for _ in range(4)]
    real = ParameterState(torch.zeros(5, 2), parts[0], parts[1].square())
    imag = ParameterState(torch.zeros(5, 2), parts[2], parts[3].square())
    moments = ComplexMoments.of(real, imag).through(map_RN)
    whole = torch.cat([torch.cat([map_RN.real, -map_RN.imag], 1), torch.cat([map_RN.imag, map_RN.real], 1)])
    first = whole @ torch.cat([real.exp_avg, imag.exp_avg])
    second = whole.square() @ torch.cat([real.exp_avg_sq, imag.exp_avg_sq])
    torch.testing.assert_close(torch.cat([moments.first.real, moments.first.imag]), first)
    torch.testing.assert_close(torch.cat([moments.second_re, moments.second_im]), second)

    scaled = moments.scaled(torch.tensor(3.0), torch.tensor(-2.0))
    torch.testing.assert_close(scaled.first, torch.complex(3 * moments.first.real, -2 * moments.first.imag))
    torch.testing.assert_close(scaled.second_re, 9 * moments.second_re)
    torch.testing.assert_close(scaled.second_im, 4 * moments.second_im)
