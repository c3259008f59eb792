"""Mamba-2: its scan against the plain recurrence in float64, its layer against transformers', and what a cut does.

Shapes: B batch, L time, M d_model, D d_inner, H heads, P width of a head, G groups, N state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from compression.gramians import SelectiveMoments
from compression.moments import ParameterState
from compression.plan import LayerPlan, StateSelection
from models.heads import LanguageModel
from models.mamba2 import Mamba2, Mamba2Config
from models.registry import LanguageTask, build_model
from models.scan import backends, reference
from models.scan.norm import GatedRMSNorm
from models.scan.ssd import ssd_scan
from models.scan.ssd_torch import CHUNK
from tests.errors import relative_error
from tests.plans import cut_of, plan_of

F64 = torch.float64
NAMES = ["x", "dt", "A", "B", "C", "D"]
Arguments = list[Tensor]


# --- the scan ---


def scan_arguments(B: int, L: int, H: int, P: int, G: int, N: int, dt: float = 0.1) -> Arguments:
    """x, dt, A, B, C, D in float64, representable in float32; dt spreads over a decade around `dt`."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=generator)

    arguments = [
        gaussian(B, L, H, P),
        dt * gaussian(B, L, H).exp(),
        -gaussian(H).exp(),
        gaussian(B, L, G, N),
        gaussian(B, L, G, N),
        gaussian(H),
    ]
    return [part.float().double().requires_grad_() for part in arguments]


def in_float32(arguments: Arguments) -> Arguments:
    return [part.detach().float().requires_grad_() for part in arguments]


SHAPES = [
    (2, 1, 2, 3, 1, 1),
    (1, CHUNK - 1, 4, 3, 2, 5),
    (2, CHUNK, 2, 4, 1, 4),
    (2, CHUNK + 1, 2, 3, 1, 1),
    (1, 3 * CHUNK + 7, 3, 8, 3, 16),
    (3, 4 * CHUNK, 4, 1, 2, 2),
    (1, 2 * CHUNK + 1, 1, 33, 1, 70),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_recurrence(shape: tuple[int, int, int, int, int, int]) -> None:
    exact = scan_arguments(*shape)
    ours = in_float32(exact)
    expected_BLHP, y_BLHP = reference.ssd_scan(*exact), ssd_scan(*ours)
    assert y_BLHP.dtype == torch.float32
    assert relative_error(y_BLHP, expected_BLHP) < 1e-5
    dy_BLHP = torch.randn(expected_BLHP.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(expected_BLHP, exact, dy_BLHP)
    actual = torch.autograd.grad(y_BLHP, ours, dy_BLHP.float())
    for name, grad, expected_grad in zip(NAMES, actual, expected, strict=True):
        assert relative_error(grad, expected_grad) < 1e-4, name


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 3, 4, 2, 2, 2), (1, CHUNK + 2, 1, 2, 1, 2)])
def test_gradcheck_in_float64(shape: tuple[int, int, int, int, int, int]) -> None:
    assert torch.autograd.gradcheck(ssd_scan, scan_arguments(*shape))


@pytest.mark.parametrize("dt", [1e-15, 1e-6, 3.0, 30.0, 1e4])
def test_it_bears_extreme_time_steps(dt: float) -> None:
    exact = scan_arguments(2, 2 * CHUNK + 3, 3, 4, 1, 4, dt)
    ours = in_float32(exact)
    y_BLHP, expected_BLHP = ssd_scan(*ours), reference.ssd_scan(*exact)
    assert relative_error(y_BLHP, expected_BLHP) < 1e-5
    expected = torch.autograd.grad(expected_BLHP.sum(), exact)
    for name, grad, expected_grad in zip(NAMES, torch.autograd.grad(y_BLHP.sum(), ours), expected, strict=True):
        assert bool(torch.isfinite(grad).all()), name
        # What is nothing in float32 may be something in float64.
        assert relative_error(grad, expected_grad) < 1e-4 or float(expected_grad.abs().max()) < 1e-35, name


def test_small_decays_survive_next_to_large_ones() -> None:
    """A chunk's decays come from one running sum, in which a large step must not swallow the steps after it."""
    exact = scan_arguments(1, CHUNK, 1, 2, 1, 2, dt=1e-3)
    with torch.no_grad():
        exact[1][:, 3] = 1e5
    ours = in_float32(exact)
    y_BLHP, expected_BLHP = ssd_scan(*ours), reference.ssd_scan(*exact)
    assert relative_error(y_BLHP[:, 4:], expected_BLHP[:, 4:]) < 1e-5
    grads, expected = (
        torch.autograd.grad(y[:, 4:].sum(), parts) for y, parts in ((y_BLHP, ours), (expected_BLHP, exact))
    )
    for name, grad, expected_grad in zip(NAMES, grads, expected, strict=True):
        assert relative_error(grad, expected_grad) < 1e-4, name


@pytest.mark.parametrize("mixed", [False, True], ids=["all", "x, B, C"])
def test_bfloat16_rounds_only_what_goes_in_and_out(mixed: bool) -> None:
    """States and decays are float32: the error is that of rounding the output, 2^-9 relative, however long it runs."""
    exact = [part.detach().bfloat16().double() for part in scan_arguments(2, 4 * CHUNK + 1, 4, 8, 2, 16)]
    exact = [part.requires_grad_() for part in exact]
    half = [True, not mixed, not mixed, True, True, not mixed]
    ours = [
        part.detach().to(torch.bfloat16 if rounds else torch.float32).requires_grad_()
        for part, rounds in zip(exact, half, strict=True)
    ]
    y_BLHP, expected_BLHP = ssd_scan(*ours), reference.ssd_scan(*exact)
    assert y_BLHP.dtype == torch.bfloat16
    assert relative_error(y_BLHP, expected_BLHP) < 2**-9
    dy_BLHP = torch.randn(y_BLHP.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.autograd.grad(expected_BLHP, exact, dy_BLHP.double())
    for name, part, grad, expected_grad in zip(
        NAMES, ours, torch.autograd.grad(y_BLHP, ours, dy_BLHP), expected, strict=True
    ):
        assert grad.dtype == part.dtype
        assert relative_error(grad, expected_grad) < (2**-8 if part.dtype == torch.bfloat16 else 1e-4), name


def test_autocast_leaves_the_scan_alone() -> None:
    ours = in_float32(scan_arguments(1, CHUNK + 3, 2, 3, 1, 4))
    with torch.autocast("cpu", torch.bfloat16):
        inside_BLHP = ssd_scan(*ours)
    assert torch.equal(inside_BLHP, ssd_scan(*ours))


@pytest.mark.parametrize("groups", [1, 2])
def test_it_takes_slices_and_any_layout(groups: int) -> None:
    exact = scan_arguments(2, CHUNK + 3, 4, 3, groups, 5)
    x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H = (part.detach() for part in in_float32(exact))
    wide_BLE = torch.cat([part.flatten(2) for part in (x_BLHP, B_BLGN, C_BLGN)], dim=-1)
    x, B, C = wide_BLE.split([12, 5 * groups, 5 * groups], dim=-1)
    dt_BLH = dt_BLH.transpose(1, 2).contiguous().transpose(1, 2)
    ours = [x.unflatten(2, (4, 3)), dt_BLH, A_H, B.unflatten(2, (groups, 5)), C.unflatten(2, (groups, 5)), D_H]
    ours = [part.requires_grad_() for part in ours]
    y_BLHP, expected_BLHP = ssd_scan(*ours), reference.ssd_scan(*exact)
    assert relative_error(y_BLHP, expected_BLHP) < 1e-5
    dy_BLHP = torch.ones(2, CHUNK + 3, 3, 4).transpose(2, 3)
    grads, expected = torch.autograd.grad(y_BLHP, ours, dy_BLHP), torch.autograd.grad(expected_BLHP.sum(), exact)
    for name, grad, expected_grad in zip(NAMES, grads, expected, strict=True):
        assert relative_error(grad, expected_grad) < 1e-4, name


@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 5])
def test_moments_are_the_sums_over_tokens_and_leave_the_scan_alone(backend: str, length: int) -> None:
    """A head is so many channels of a selective scan, whose sums the reference knows."""
    exact = scan_arguments(2, length, 5, 4, 1, 5)
    ours = in_float32(exact)
    moments, expected = SelectiveMoments.zeros(20, 5), SelectiveMoments.zeros(20, 5)
    y_BLHP, without_BLHP = ssd_scan(*ours, moments), ssd_scan(*ours)
    assert torch.equal(y_BLHP, without_BLHP)
    grads, grads_without = (torch.autograd.grad(y.square().sum(), ours) for y in (y_BLHP, without_BLHP))
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_without, strict=True))

    x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H = (part.detach() for part in exact)
    dt_BLD, A_D, D_D = (part.repeat_interleave(4, -1) for part in (dt_BLH, A_H, D_H))
    r_BLD = dt_BLD + torch.log(-torch.expm1(-dt_BLD))
    A_DN = A_D.unsqueeze(-1).expand(-1, 5)
    x_BLD = x_BLHP.flatten(2)
    reference.selective_scan(x_BLD, r_BLD, A_DN, B_BLGN[:, :, 0], C_BLGN[:, :, 0], D_D, x_BLD, expected)
    assert torch.equal(moments.samples, expected.samples)
    assert not moments.h2_DN.requires_grad
    for name in ("h2_DN", "a2_DN", "hc2_N", "hh_NN"):
        assert relative_error(getattr(moments, name), getattr(expected, name)) < 1e-5, name


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_nothing_but_rounding(batch: int) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = in_float32(scan_arguments(batch, 2 * CHUNK + 5, 4, 16, 2, 32))
            y_BLHP = ssd_scan(*ours)
            results.append([y_BLHP, *torch.autograd.grad(y_BLHP.sum(), ours)])
    finally:
        torch.set_num_threads(before)
    for alone, shared in zip(*results, strict=True):
        assert relative_error(shared, alone.double()) < 1e-6


# --- the gated norm ---


def gated_norm(y: Tensor, z: Tensor, weight_D: Tensor, groups: int) -> Tensor:
    """As its definition says, in plain autograd."""
    v_BLGS = (y * F.silu(z)).unflatten(-1, (groups, -1))
    return (v_BLGS / (v_BLGS.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * weight_D


@pytest.mark.parametrize(("length", "width", "groups"), [(1, 2, 1), (5, 12, 3), (70, 40, 2), (3, 16, 1)])
def test_the_gated_norm_is_its_definition(backend: str, length: int, width: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = GatedRMSNorm(width, groups)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=generator))
    y_BLD, z_BLD, dout_BLD = torch.randn(3, 2, length, width, generator=generator).unbind()
    inputs = [y_BLD.requires_grad_(), z_BLD.requires_grad_(), norm.weight]
    exact = [part.detach().double().requires_grad_() for part in inputs]
    out_BLD, expected_BLD = norm(y_BLD, z_BLD), gated_norm(*exact, groups)
    assert relative_error(out_BLD, expected_BLD) < 1e-6
    grads, expected = torch.autograd.grad(out_BLD, inputs, dout_BLD), torch.autograd.grad(expected_BLD, exact, dout_BLD)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert relative_error(grad, expected_grad) < 1e-5


def test_the_gated_norm_rounds_only_its_result(backend: str) -> None:
    y_BLD, z_BLD = torch.randn(2, 3, 5, 24, generator=torch.Generator().manual_seed(0)).bfloat16().unbind()
    norm = GatedRMSNorm(24, 2)
    out_BLD = norm(y_BLD, z_BLD)
    assert out_BLD.dtype == torch.bfloat16
    assert relative_error(out_BLD, gated_norm(y_BLD.double(), z_BLD.double(), norm.weight.double(), 2)) < 2**-8


def test_the_gated_norm_bears_extreme_inputs(backend: str) -> None:
    y_D, z_D = torch.tensor([[0.0, 0.0], [1e10, -1e10], [1.0, 1.0]]), torch.tensor([[1.0, 2.0], [90.0, -200.0], [0, 0]])
    norm = GatedRMSNorm(2, 1)
    out_D = norm(y_D.requires_grad_(), z_D.requires_grad_())
    for part in (out_D, *torch.autograd.grad(out_D.sum(), (y_D, z_D, norm.weight))):
        assert bool(torch.isfinite(part).all())


# --- the layer ---

CONFIG = Mamba2Config(kind="mamba2", n_layers=2, d_model=10, d_state=6, headdim=5)


def mamba2(d_state: int = 6, n_groups: int = 1, d_conv: int = 4) -> Mamba2:
    """In float64, with every parameter moved off its starting value."""
    torch.manual_seed(0)
    layer = Mamba2(CONFIG.model_copy(update={"n_groups": n_groups, "d_conv": d_conv}), d_state, d_state).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def sequence(length: int = CHUNK + 4) -> Tensor:
    return torch.randn(2, length, CONFIG.d_model, dtype=F64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("n_groups", "d_conv"), [(1, 4), (2, 4), (4, 1)])
@torch.no_grad()
def test_steps_equal_the_forward_pass(n_groups: int, d_conv: int) -> None:
    layer, x_BLM = mamba2(n_groups=n_groups, d_conv=d_conv), sequence()
    state = layer.initial_state(2)
    assert all(part.dtype == torch.float32 and not part.any() and part.shape[0] == 2 for part in state)
    steps = []
    for x_BM in x_BLM.unbind(1):
        out_BM, state = layer.step(x_BM, state)
        steps.append(out_BM)
    torch.testing.assert_close(torch.stack(steps, dim=1), layer(x_BLM))


@torch.no_grad()
def test_steps_in_bfloat16_keep_their_state_in_float32() -> None:
    layer, x_BLM = mamba2().bfloat16(), sequence(9).bfloat16()
    state = layer.initial_state(2)
    for x_BM in x_BLM.unbind(1):
        out_BM, state = layer.step(x_BM, state)
        assert out_BM.dtype == torch.bfloat16
        assert [part.dtype for part in state] == [torch.float32] * 2
    assert relative_error(out_BM, layer(x_BLM)[:, -1].double()) < 0.03


@pytest.mark.parametrize("t", [0, 3, CHUNK - 1, CHUNK])
@torch.no_grad()
def test_outputs_do_not_see_later_inputs(t: int) -> None:
    layer, x_BLM = mamba2(), sequence()
    changed_BLM = x_BLM.clone()
    changed_BLM[:, t] += 1
    before, after = layer(x_BLM), layer(changed_BLM)
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-14)
    assert bool(((after - before)[:, t:].abs().amax((0, 2)) > 0).all())


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    # 2,560 heads, so that what is drawn fills its range.
    layer = Mamba2(Mamba2Config(kind="mamba2", n_layers=3, d_model=40, expand=64, headdim=1, n_groups=2), 8, 8)
    shapes = {name: tuple(part.shape) for name, part in layer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (2 * 2560 + 2 * 2 * 8 + 2560, 40),
        "conv1d.weight": (2560 + 2 * 2 * 8, 1, 4),
        "conv1d.bias": (2560 + 2 * 2 * 8,),
        "dt_bias": (2560,),
        "A_log": (2560,),
        "D": (2560,),
        "norm.weight": (2560,),
        "out_proj.weight": (40, 2560),
    }
    assert layer.ssm_parameters == {"A_log", "D", "dt_bias", "B_map", "C_map"}
    assert bool((layer.D == 1).all())
    assert bool((layer.norm.weight == 1).all())
    A_H = layer.A_log.detach().exp()
    assert 1 - 1e-5 < float(A_H.min()) < 1.1
    assert 15.9 < float(A_H.max()) < 16 + 1e-4
    assert float(A_H.mean()) == pytest.approx(8.5, abs=0.5)
    dt_H = F.softplus(layer.dt_bias.detach().double())
    assert 1e-3 * (1 - 1e-5) <= float(dt_H.min()) < 1.01e-3
    assert 0.99e-1 < float(dt_H.max()) <= 1e-1 * (1 + 1e-5)
    assert float(dt_H.log().median()) == pytest.approx(math.log(1e-2), abs=0.15)
    largest = 1 / math.sqrt(2560) / math.sqrt(3)
    assert 0.99 * largest < float(layer.out_proj.weight.detach().abs().max()) <= largest * (1 + 1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"headdim": 48}, ["headdim 48", "inner width 64"]),
        ({"headdim": 128}, ["headdim 128", "inner width 64"]),
        ({"headdim": 16, "n_groups": 3}, ["n_groups 3", "4 heads"]),
        ({"n_groups": 0}, ["n_groups"]),
    ],
)
def test_a_wrong_config_is_told_what_would_be_valid(settings: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ValidationError) as raised:
        Mamba2Config(kind="mamba2", n_layers=1, d_model=32, **settings)
    assert all(word in str(raised.value) for word in words)


# --- beside transformers ---


@pytest.mark.parametrize("n_groups", [1, 2])
@torch.no_grad()
def test_logits_equal_those_of_transformers(n_groups: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = Mamba2Config(kind="mamba2", n_layers=3, d_model=24, d_state=7, d_conv=3, headdim=12, n_groups=n_groups)
    ours = build_model(config, LanguageTask(61), config.state_dims)
    assert isinstance(ours, LanguageModel)
    for parameter in ours.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    for mixer in ours.mixers():
        mixer.get_parameter("out_proj.weight").mul_(10)  # or the mixers would hardly show beside the residual
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=61,
            hidden_size=24,
            state_size=7,
            num_hidden_layers=3,
            conv_kernel=3,
            expand=2,
            head_dim=12,
            num_heads=4,
            n_groups=n_groups,
            chunk_size=16,
            layer_norm_epsilon=1e-5,
            tie_word_embeddings=True,
        )
    ).eval()
    weights = {name.replace("embedding.", "embeddings."): part for name, part in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    for length in (1, 2, 64, 133):
        tokens_BL = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(length))
        logits_BLV, expected_BLV = ours(tokens_BL), theirs(tokens_BL).logits
        assert float((logits_BLV - expected_BLV).norm() / expected_BLV.norm()) < 1e-5


# --- cutting the layer ---


def with_gradients(layer: Mamba2, x_BLM: Tensor) -> dict[str, ParameterState]:
    """Every parameter with its gradient as first and the gradient's square as second moment."""
    out_BLM = layer(x_BLM)
    weights_BLM = torch.randn(out_BLM.shape, dtype=F64, generator=torch.Generator().manual_seed(5))
    names, values = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad((out_BLM * weights_BLM).sum(), values)
    return {
        name: ParameterState(value.detach().clone(), grad, grad.square())
        for name, value, grad in zip(names, values, grads, strict=True)
    }


def selection_plan(kept: Sequence[int], d_state: int) -> LayerPlan:
    return cut_of(StateSelection(tuple(kept)), d_state, len(kept))


@torch.no_grad()
def silence(layer: Mamba2, states: Tensor, part: str) -> None:
    """B or C of these states is silu(0) = 0, whatever the input."""
    channels = layer.d_inner + states + (layer.d_state if part == "C" else 0)
    layer.in_proj.weight[layer.d_inner + channels] = 0
    layer.conv1d.weight[channels] = 0
    assert layer.conv1d.bias is not None
    layer.conv1d.bias[channels] = 0


@pytest.mark.parametrize("silent", ["B", "C", "BC"])
@pytest.mark.parametrize("kept", [(0, 2, 3), (5,), (0, 1, 2, 3, 4)])
def test_without_silent_states_it_is_the_same_layer(kept: tuple[int, ...], silent: str) -> None:
    """States that nothing enters, or that nothing reads, leave output and gradients as they are."""
    layer, x_BLM = mamba2(), sequence()
    for part in silent:
        silence(layer, torch.tensor([n for n in range(6) if n not in kept]), part)
    cut = layer.shrink(selection_plan(kept, 6), with_gradients(layer, x_BLM))
    smaller = mamba2(len(kept))
    smaller.load_state_dict({name: state.value for name, state in cut.items()})
    # Only the order of summation over the states may differ.
    torch.testing.assert_close(smaller(x_BLM), layer(x_BLM), rtol=0, atol=1e-13)
    for name, expected in with_gradients(smaller, x_BLM).items():
        torch.testing.assert_close(cut[name].exp_avg, expected.exp_avg, rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(cut[name].exp_avg_sq, expected.exp_avg_sq, rtol=1e-9, atol=1e-12, msg=name)


def test_a_cut_picks_the_same_entries_of_value_and_moments() -> None:
    layer = mamba2()
    tagged = {}
    for name, parameter in layer.named_parameters():
        tag = torch.arange(parameter.numel(), dtype=F64).reshape(parameter.shape)
        tagged[name] = ParameterState(tag, tag + 0.25, tag + 0.5)
    cut = layer.shrink(selection_plan((1, 4), 6), tagged)
    smaller = mamba2(2).state_dict()
    assert set(cut) == set(smaller)
    for name, state in cut.items():
        assert state.value.shape == smaller[name].shape, name
        assert torch.equal(state.exp_avg, state.value + 0.25), name
        assert torch.equal(state.exp_avg_sq, state.value + 0.5), name
    D, H = layer.d_inner, 4
    # Channels: x, then B of states 1 and 4, then C of states 1 and 4. Rows of in_proj: z before and dt after them.
    channels = [*range(D), D + 1, D + 4, D + 6 + 1, D + 6 + 4]
    assert cut["conv1d.bias"].value.tolist() == channels
    rows = [*range(D), *(D + channel for channel in channels), *range(2 * D + 12, 2 * D + 12 + H)]
    assert (cut["in_proj.weight"].value[:, 0] / CONFIG.d_model).tolist() == rows


def test_a_plan_keeps_what_the_data_uses() -> None:
    layer = mamba2()
    silence(layer, torch.tensor([1, 3]), "C")
    with torch.no_grad():
        layer.start_statistics()
        layer(sequence())
        plan = plan_of(layer.finish_statistics(), dim=4)
    assert plan.layers[0].reduction == StateSelection((0, 2, 4, 5))
    assert plan.layers[0].mass_kept == 1


def test_layers_of_several_groups_are_not_cut() -> None:
    layer = mamba2(n_groups=2)
    with pytest.raises(AssertionError, match="one group"):
        layer.shrink(selection_plan((0,), 6), with_gradients(layer, sequence()))


def test_the_reference_can_be_asked_for() -> None:
    """By any dtype that the scan takes."""
    ours = [part.detach() for part in in_float32(scan_arguments(1, 9, 2, 3, 1, 4))]
    ours[0] = ours[0].bfloat16()
    expected_BLHP = ssd_scan(*ours)
    backends.force("reference")
    try:
        y_BLHP = ssd_scan(*ours)
    finally:
        backends.force("auto")
    assert y_BLHP.dtype == torch.bfloat16
    assert relative_error(y_BLHP, expected_BLHP.double()) < 2**-8
