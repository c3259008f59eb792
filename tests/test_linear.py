"""Every way through a linear recurrence against the plain one in float64.

Shapes: B batch, L time, H width, N state.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.scan import linear, linear_states, reference
from models.scan.linear import linear_recurrence
from tests.errors import relative_error

F64 = torch.float64
CHUNK = linear_states.CHUNK
NAMES = ["x", "a_re", "a_im", "B_re", "B_im", "C_re", "C_im"]
Arguments = list[Tensor]


def arguments(batch: int, length: int, width: int, d_state: int, seed: int = 0) -> Arguments:
    """All in float64, representable in float32; the first eigenvalue is zero and the second real and slow."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=F64, generator=generator)

    a_N = torch.polar(0.5 + 0.49 * uniform(d_state), 6 * uniform(d_state))
    a_N[:2] = torch.tensor([0, 0.999][:d_state], dtype=torch.complex128)
    shapes = [(d_state, width)] * 2 + [(width, d_state)] * 2
    parts = [gaussian(batch, length, width), a_N.real, a_N.imag, *(gaussian(*shape) for shape in shapes)]
    return [part.float().double().requires_grad_() for part in parts]


def in_float32(exact: Arguments) -> Arguments:
    return [part.detach().float().requires_grad_() for part in exact]


@pytest.fixture(params=["convolution", "states"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in turn, whatever the rule would choose."""
    monkeypatch.setattr(linear, "is_convolution", lambda *sizes: request.param == "convolution")
    return str(request.param)


SHAPES = [
    (2, 1, 3, 4),
    (1, 7, 1, 1),
    (2, CHUNK, 5, 17),
    (3, CHUNK + 1, 4, 64),
    (2, 5 * CHUNK + 3, 6, 70),  # vectors of states in a group, alone, and one that is not full
    (1, 1000, 2, 9),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_recurrence(way: str, backend: str, shape: tuple[int, int, int, int]) -> None:
    exact = arguments(*shape)
    ours = in_float32(exact)
    expected_BLH, y_BLH = reference.linear_recurrence(*exact), linear_recurrence(*ours)
    assert y_BLH.dtype == torch.float32
    assert relative_error(y_BLH, expected_BLH) < 1e-5
    dy_BLH = torch.randn(expected_BLH.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(expected_BLH, exact, dy_BLH)
    for name, grad, expected_grad in zip(
        NAMES, torch.autograd.grad(y_BLH, ours, dy_BLH.float()), expected, strict=True
    ):
        assert relative_error(grad, expected_grad) < 1e-4, name


@pytest.mark.parametrize("length", [1, 4, CHUNK + 2])
def test_gradients_in_float64(way: str, length: int) -> None:
    assert torch.autograd.gradcheck(linear_recurrence, arguments(2, length, 2, 3))


@pytest.mark.parametrize("shape", [(64, 40, 2, 64), (2, 40, 2, 64), (64, 40, 2, 8), (1, 3, 1, 1)])
def test_the_rule_changes_nothing_but_rounding(shape: tuple[int, int, int, int]) -> None:
    exact = arguments(*shape)
    assert relative_error(linear_recurrence(*in_float32(exact)), reference.linear_recurrence(*exact)) < 1e-5


def test_the_rule_takes_both_ways() -> None:
    for d_state in (256, 28):  # a cut layer must not become slower than it was
        assert linear.is_convolution(batch=50, width=8, d_state=d_state)
    assert not linear.is_convolution(batch=50, width=8, d_state=8)
    assert not linear.is_convolution(batch=4, width=512, d_state=384)


def test_slices_and_any_layout(way: str, backend: str) -> None:
    exact = arguments(2, CHUNK + 5, 6, 20)
    x_BLH, *parameters = in_float32(exact)
    wide = torch.cat([x_BLH, x_BLH], dim=-1).detach()
    for x in (wide[..., :6], x_BLH.detach().transpose(1, 2).contiguous().transpose(1, 2)):
        assert relative_error(linear_recurrence(x, *parameters), reference.linear_recurrence(*exact)) < 1e-5


def test_bfloat16_sequences_keep_float32_states(way: str) -> None:
    """What is lost is the rounding of the result to 8 bits alone."""
    exact = arguments(2, 3 * CHUNK, 4, 12)
    rounded = exact[0].detach().bfloat16()
    y_BLH = linear_recurrence(rounded, *in_float32(exact)[1:])
    assert y_BLH.dtype == torch.bfloat16
    assert relative_error(y_BLH, reference.linear_recurrence(rounded.double(), *exact[1:])) < 2**-8


def test_a_slow_state_neither_fades_nor_grows_over_a_long_sequence(way: str) -> None:
    """An eigenvalue next to 1 remembers the first step after 20,000 others: a^k x_0 exactly."""
    length = 20_000
    x_BLH = torch.zeros(1, length, 1)
    x_BLH[0, 0] = 1
    a_re_1, zero_11, one_11 = torch.tensor([1 - 2.0**-15]), torch.zeros(1, 1), torch.ones(1, 1)
    y_BLH = linear_recurrence(x_BLH, a_re_1, torch.zeros(1), one_11, zero_11, one_11, zero_11)
    expected_L = a_re_1.double() ** torch.arange(length)
    # Rounding errors of 20,000 products in float32 add up in the states; the response's powers have none.
    assert relative_error(y_BLH[0, :, 0], expected_L) < (1e-6 if way == "convolution" else 3e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_nothing_but_rounding(way: str, backend: str, batch: int) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = in_float32(arguments(batch, 50, 5, 40))
            y_BLH = linear_recurrence(*ours)
            results.append([y_BLH, *torch.autograd.grad(y_BLH.sum(), ours)])
    finally:
        torch.set_num_threads(before)
    for alone, shared in zip(*results, strict=True):
        assert relative_error(shared, alone.double()) < 1e-6
