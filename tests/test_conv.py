"""Every backend of the causal convolution against its definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.scan.conv import causal_conv_silu

F64 = torch.float64


def arguments(batch: int, length: int, channels: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, channels), (channels, 1, width), (channels,)]
    parts = [torch.randn(shape, dtype=F64, generator=generator) for shape in shapes]
    return [part.float().double().requires_grad_() for part in parts]


def definition(x_BLD: Tensor, weight_D1W: Tensor, bias_D: Tensor) -> Tensor:
    width = weight_D1W.shape[-1]
    rows = []
    for t in range(x_BLD.shape[1]):
        taps = [weight_D1W[:, 0, w] * x_BLD[:, t - width + 1 + w] for w in range(width) if t - width + 1 + w >= 0]
        rows.append(F.silu(bias_D + sum(taps)))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (1, 3, 16, 4), (2, 33, 37, 4), (3, 70, 1, 1), (1, 65, 40, 7)])
def test_it_equals_its_definition(backend: str, shape: tuple[int, int, int, int]) -> None:
    exact = arguments(*shape)
    ours = [part.detach().float().requires_grad_() for part in exact]
    expected_BLD, out_BLD = definition(*exact), causal_conv_silu(*ours)
    torch.testing.assert_close(out_BLD.double(), expected_BLD, rtol=1e-5, atol=1e-6)
    dout_BLD = torch.randn(expected_BLD.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(expected_BLD, exact, dout_BLD)
    for grad, exact_grad in zip(torch.autograd.grad(out_BLD, ours, dout_BLD.float()), expected, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5)


def test_bfloat16_sequences(backend: str) -> None:
    """The C++ kernels round only the result; torch rounds the weights and what lies between too."""
    x_BLD, *weights = (part.detach() for part in arguments(2, 40, 20, 4))
    x_BLD = x_BLD.bfloat16()
    out_BLD = causal_conv_silu(x_BLD, *(part.float() for part in weights))
    assert out_BLD.dtype == torch.bfloat16
    expected_BLD = definition(x_BLD.double(), *weights)
    error = float((out_BLD.double() - expected_BLD).norm() / expected_BLD.norm())
    assert error < (2**-8 if backend == "cpu" else 2**-6)


def test_it_takes_slices(backend: str) -> None:
    x_BLD, weight_D1W, bias_D = (part.detach().float() for part in arguments(2, 40, 20, 4))
    wide = torch.cat([x_BLD, x_BLD + 1], dim=-1).requires_grad_()
    out_BLD = causal_conv_silu(wide[..., :20], weight_D1W, bias_D)
    torch.testing.assert_close(out_BLD, causal_conv_silu(x_BLD, weight_D1W, bias_D))
    (grad,) = torch.autograd.grad(out_BLD.sum(), [wide])
    assert bool((grad[..., 20:] == 0).all())
    assert bool((grad[..., :20] != 0).any())


def test_gradcheck_in_float64() -> None:
    assert torch.autograd.gradcheck(causal_conv_silu, arguments(1, 5, 2, 3))
