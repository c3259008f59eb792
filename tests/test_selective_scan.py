"""Every backend of the selective scan against the plain recurrence in float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compression.gramians import SAMPLE_EVERY, SelectiveMoments
from models.scan import backends, extension, reference, selective_torch
from models.scan.selective import selective_scan
from tests.errors import relative_error

F64 = torch.float64
CHUNK = selective_torch.CHUNK
NAMES = ["x", "r", "A", "B", "C", "D", "z"]
Arguments = list[Tensor]


def scan_arguments(batch: int, length: int, d_inner: int, d_state: int, dt: float = 0.1, seed: int = 0) -> Arguments:
    """x, r, A, B, C, D, z in float64, representable in float32; softplus(r) spreads over a decade around `dt`."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=generator)

    dt_BLD = dt * gaussian(batch, length, d_inner).exp()
    arguments = [
        gaussian(batch, length, d_inner),
        dt_BLD + torch.log(-torch.expm1(-dt_BLD)),
        -gaussian(d_inner, d_state).exp(),
        gaussian(batch, length, d_state),
        gaussian(batch, length, d_state),
        gaussian(d_inner),
        gaussian(batch, length, d_inner),
    ]
    return [part.float().double().requires_grad_() for part in arguments]


def in_float32(arguments: Arguments) -> Arguments:
    return [part.detach().float().requires_grad_() for part in arguments]


SHAPES = [
    (2, 1, 3, 4),
    (1, CHUNK - 5, 4, 3),
    (2, CHUNK, 16, 4),
    (2, CHUNK + 1, 3, 1),
    (1, 3 * CHUNK + 7, 37, 6),
    (3, 4 * CHUNK, 1, 2),
    (1, 40, 70, 33),  # more than one block of channels, none of them full at the end
]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_recurrence(backend: str, shape: tuple[int, int, int, int]) -> None:
    exact = scan_arguments(*shape)
    ours = in_float32(exact)
    expected_BLD, out_BLD = reference.selective_scan(*exact), selective_scan(*ours)
    assert out_BLD.dtype == torch.float32
    assert relative_error(out_BLD, expected_BLD) < 1e-5
    dout_BLD = torch.randn(expected_BLD.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(expected_BLD, exact, dout_BLD)
    actual = torch.autograd.grad(out_BLD, ours, dout_BLD.float())
    for name, grad, expected_grad in zip(NAMES, actual, expected, strict=True):
        assert relative_error(grad, expected_grad) < 1e-4, name


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 2, 2), (1, CHUNK + 2, 1, 2)])
def test_gradcheck_in_float64(shape: tuple[int, int, int, int]) -> None:
    """float64 always takes the torch backend."""
    assert torch.autograd.gradcheck(selective_scan, scan_arguments(*shape))


@pytest.mark.parametrize("dt", [1e-15, 1e-6, 30.0, 1e4])
def test_it_bears_extreme_time_steps(backend: str, dt: float) -> None:
    exact = scan_arguments(2, 2 * CHUNK + 3, 3, 4, dt)
    ours = in_float32(exact)
    out_BLD, expected_BLD = selective_scan(*ours), reference.selective_scan(*exact)
    assert relative_error(out_BLD, expected_BLD) < 1e-5
    grads = torch.autograd.grad(out_BLD.sum(), ours)
    expected = torch.autograd.grad(expected_BLD.sum(), exact)
    # exp(dt A) at an exponent of some 100 carries 100 times the rounding of dt and A.
    for name, grad, expected_grad in zip(NAMES, grads, expected, strict=True):
        assert relative_error(grad, expected_grad) < 1e-3, name


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_stays_none(backend: str, name: str) -> None:
    """In every output that it has a part in."""
    exact = [part.detach() for part in scan_arguments(1, CHUNK + 3, 20, 5)]
    exact[NAMES.index(name)][(0,) * exact[NAMES.index(name)].ndim] = torch.nan
    ours = [part.float() for part in exact]
    assert torch.equal(selective_scan(*ours).isnan(), reference.selective_scan(*exact).isnan())


@pytest.mark.parametrize("z", [-200.0, -90.0, 90.0, 200.0])
def test_the_gate_bears_extreme_inputs(backend: str, z: float) -> None:
    exact = scan_arguments(1, 5, 3, 2)
    exact[6] = torch.full_like(exact[6], z).requires_grad_()
    ours = in_float32(exact)
    out_BLD, expected_BLD = selective_scan(*ours), reference.selective_scan(*exact)
    # Next to the smallest float32 the kernels hold the exponential instead of following it into subnormals.
    torch.testing.assert_close(out_BLD.double(), expected_BLD, rtol=1e-5, atol=1e-34)
    for name, grad in zip(NAMES, torch.autograd.grad(out_BLD.sum(), ours), strict=True):
        assert bool(torch.isfinite(grad).all()), name


def test_it_takes_slices_and_any_layout(backend: str) -> None:
    exact = scan_arguments(2, CHUNK + 3, 6, 4)
    x_BLD, r_BLD, A_DN, B_BLN, C_BLN, D_D, z_BLD = in_float32(exact)
    wide = torch.cat([x_BLD, z_BLD, B_BLN, C_BLN], dim=-1).detach()
    x_BLD, z_BLD, B_BLN, C_BLN = wide.split([6, 6, 4, 4], dim=-1)
    r_BLD = r_BLD.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out_BLD = selective_scan(x_BLD, r_BLD, A_DN.detach(), B_BLN, C_BLN, D_D.detach(), z_BLD)
    assert relative_error(out_BLD, reference.selective_scan(*exact)) < 1e-5
    (grad,) = torch.autograd.grad(out_BLD.sum(), [r_BLD])
    (expected,) = torch.autograd.grad(reference.selective_scan(*exact).sum(), [exact[1]])
    assert relative_error(grad, expected) < 1e-4


@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 5])
def test_moments_are_the_sums_over_tokens_and_leave_the_scan_alone(backend: str, length: int) -> None:
    exact = scan_arguments(2, length, 19, 4)
    ours = in_float32(exact)
    moments = SelectiveMoments.zeros(19, 4)
    out_BLD, without_BLD = selective_scan(*ours, moments), selective_scan(*ours)
    assert torch.equal(out_BLD, without_BLD)
    grads, grads_without = (torch.autograd.grad(out.square().sum(), ours) for out in (out_BLD, without_BLD))
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_without, strict=True))
    expected = SelectiveMoments.zeros(19, 4)
    reference.selective_scan(*exact, expected)
    assert int(moments.samples) == int(expected.samples) == 2 * (-(-length // SAMPLE_EVERY))
    for name in ("h2_DN", "a2_DN", "hc2_N", "hh_NN"):
        part = getattr(moments, name)
        assert not part.requires_grad
        assert relative_error(part, getattr(expected, name)) < 1e-5, name


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, CHUNK + 5, 37, 6)])
def test_bfloat16_keeps_float32_states(backend: str, shape: tuple[int, int, int, int]) -> None:
    """Against the recurrence over the same rounded inputs, only the results are rounded, to 8 bits."""
    exact = scan_arguments(*shape)
    halves = {"x", "B", "C", "z"}
    ours = [
        part.detach().to(torch.bfloat16 if name in halves else torch.float32).requires_grad_()
        for name, part in zip(NAMES, exact, strict=True)
    ]
    exact = [part.detach().double().requires_grad_() for part in ours]
    out_BLD, expected_BLD = selective_scan(*ours), reference.selective_scan(*exact)
    assert out_BLD.dtype == torch.bfloat16
    assert relative_error(out_BLD, expected_BLD) < 2**-8
    dout_BLD = torch.randn(expected_BLD.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    actual = torch.autograd.grad(out_BLD, ours, dout_BLD)
    expected = torch.autograd.grad(expected_BLD, exact, dout_BLD.double())
    for name, part, grad, expected_grad in zip(NAMES, ours, actual, expected, strict=True):
        assert grad.dtype == part.dtype, name
        assert relative_error(grad, expected_grad) < (2**-8 if name in halves else 1e-4), name


def test_autocast_leaves_the_scan_and_its_moments_alone(backend: str) -> None:
    """In products of bfloat16, states that go together could not be told apart."""
    ours = [part.detach() for part in in_float32(scan_arguments(2, CHUNK + 5, 19, 4))]
    _, *projections, _, _ = ours
    outside, inside = SelectiveMoments.zeros(19, 4), SelectiveMoments.zeros(19, 4)
    out_BLD = selective_scan(*ours, outside)
    outside.add_projections(*projections, torch.ones(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(*ours, inside), out_BLD)
        inside.add_projections(*projections, torch.ones(4))
    assert torch.equal(inside.to_vector(), outside.to_vector())


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_nothing_but_rounding(backend: str, batch: int) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = in_float32(scan_arguments(batch, 50, 40, 5))
            out_BLD = selective_scan(*ours)
            results.append([out_BLD, *torch.autograd.grad(out_BLD.sum(), ours)])
    finally:
        torch.set_num_threads(before)
    for alone, shared in zip(*results, strict=True):
        assert relative_error(shared, alone.double()) < 1e-6


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_what_is_built_serves_every_checkout(backend: str, tmp_path: Path) -> None:
    """Without a compiler on the path, a copy of the sources elsewhere finds the library of this one."""
    shutil.copytree(Path(__file__).parents[1] / "models", tmp_path / "models")
    shutil.copytree(Path(__file__).parents[1] / "compression", tmp_path / "compression")
    code = "from models.scan import extension; assert extension.load() is not None; print(extension.__file__)"
    environment = os.environ | {"PATH": "", "CXX": "/nonexistent/c++", "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.stdout.startswith(str(tmp_path)), found.stderr


def test_without_a_compiler_plain_torch_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    extension._build.cache_clear()
    extension._warn.cache_clear()
    monkeypatch.setattr(extension, "FLAGS", (*extension.FLAGS, "-DFRESH"))  # not the kernels that are cached already
    try:
        ours = in_float32(scan_arguments(1, 3, 2, 2))
        for _ in range(2):
            assert backends.choose(ours[0]) == "torch"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        with pytest.raises(RuntimeError, match="cannot be built"):
            backends.force("cpu")
    finally:
        extension._build.cache_clear()
        extension._warn.cache_clear()
