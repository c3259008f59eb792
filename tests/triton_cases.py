"""What `tests.test_triton` asks of the kernels, for a process of its own: prints relative errors as JSON.

    TRITON_INTERPRET=1 python -m tests.triton_cases cpu     through Triton's interpreter
    python -m tests.triton_cases cuda                       compiled, on a GPU
    python -m tests.triton_cases compile                    compiled for a GPU that need not be there

The interpreter takes milliseconds for each time step of each program: shapes are small, and so are chunks.

Shapes: B batch, L time, D channels (d_inner), N state.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compression.gramians import SAMPLE_EVERY, SelectiveMoments
from models.scan import backends, reference
from models.scan.selective import selective_scan

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
NAMES = ["x", "r", "A", "B", "C", "D", "z"]
SHORT_CHUNK = 8
Errors = dict[str, float]
Shape = tuple[int, ...]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of norms. Gradients that float32 cannot hold count as zero."""
    difference = actual.detach().double().cpu() - expected.detach()
    return float(difference.norm() / expected.detach().norm().clamp_min(1e-30))


def gaussians(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, dtype=F64, generator=generator) for shape in shapes]


def scan_arguments(B: int, L: int, D: int, N: int, dtype: torch.dtype = F32, dt: float = 0.1) -> list[Tensor]:
    """x, r, A, B, C, D, z in float64, representable in `dtype`, A and D in float32; softplus(r) is around `dt`."""
    x, r, A, B_BLN, C, skip, z = gaussians((B, L, D), (B, L, D), (D, N), (B, L, N), (B, L, N), (D,), (B, L, D))
    dt_BLD = dt * r.exp()
    arguments = [x, dt_BLD + torch.log(-torch.expm1(-dt_BLD)), -A.exp(), B_BLN, C, skip, z]
    stored = [F32 if name in "AD" else dtype for name in NAMES]
    return [part.to(kind).double().requires_grad_() for part, kind in zip(arguments, stored, strict=True)]


def on(device: str, exact: list[Tensor], dtype: torch.dtype = F32) -> list[Tensor]:
    stored = [F32 if name in "AD" else dtype for name in NAMES]
    return [part.detach().to(device, kind).requires_grad_() for part, kind in zip(exact, stored, strict=True)]


def compare(exact: list[Tensor], ours: list[Tensor]) -> Errors:
    """Result and all gradients against the recurrence in float64."""
    expected_BLD, out_BLD = reference.selective_scan(*exact), selective_scan(*ours)
    dout_BLD = gaussians(tuple(out_BLD.shape))[0].to(out_BLD.dtype)
    expected = torch.autograd.grad(expected_BLD, exact, dout_BLD.double())
    grads = torch.autograd.grad(out_BLD, ours, dout_BLD.to(out_BLD.device))
    assert [part.dtype for part in (out_BLD, *grads)] == [part.dtype for part in (ours[0], *ours)]
    errors = [relative_error(*pair) for pair in zip(grads, expected, strict=True)]
    return {"out": relative_error(out_BLD, expected_BLD), **dict(zip(NAMES, errors, strict=True))}


def selective_case(device: str, shape: Shape, dtype: torch.dtype = F32, dt: float = 0.1) -> Errors:
    exact = scan_arguments(*shape, dtype=dtype, dt=dt)
    return compare(exact, on(device, exact, dtype))


def full_chunk_case(device: str) -> Errors:
    from models.scan import selective_triton

    selective_triton.CHUNK, before = 32, selective_triton.CHUNK
    try:
        return selective_case(device, (1, 33, 2, 5))
    finally:
        selective_triton.CHUNK = before


def gate_case(device: str, z: float) -> Errors:
    exact = scan_arguments(1, 3, 3, 2)
    exact[6] = torch.full_like(exact[6], z).requires_grad_()
    return compare(exact, on(device, exact))


def layout_case(device: str) -> Errors:
    """Slices of one wide tensor, channels that are not contiguous, and gradients of both kinds."""
    exact = scan_arguments(2, SHORT_CHUNK + 3, 6, 4)
    x, r, A, B, C, skip, z = (part.detach().requires_grad_() for part in on(device, exact))
    wide = torch.cat([x, z, B, C], dim=-1).detach().requires_grad_()
    x_BLD, z_BLD, B_BLN, C_BLN = wide.split([6, 6, 4, 4], dim=-1)
    r_BLD = r.detach().mT.contiguous().mT.requires_grad_()
    A_DN = A.detach().T.contiguous().T.requires_grad_()
    out_BLD = selective_scan(x_BLD, r_BLD, A_DN, B_BLN, C_BLN, skip, z_BLD)
    expected_BLD = reference.selective_scan(*exact)
    errors = {"out": relative_error(out_BLD, expected_BLD)}
    weight = gaussians((2, 6, SHORT_CHUNK + 3))[0].mT
    for name, ours, theirs in (("sum", 1, 1), ("permuted", weight.to(device, F32), weight.float().double())):
        inputs = [wide, r_BLD, A_DN, skip]
        dwide, *others = torch.autograd.grad((out_BLD * ours).sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad((expected_BLD * theirs).sum(), exact, retain_graph=True)
        grads = dict(zip("xzBCrAD", (*dwide.split([6, 6, 4, 4], dim=-1), *others), strict=True))
        errors |= {f"{part} of {name}": relative_error(grads[part], g) for part, g in zip(NAMES, expected, strict=True)}
    return errors


def moments_case(device: str, length: int, dtype: torch.dtype = F32) -> Errors:
    """The sums, and how many numbers of the result and the gradients they change."""
    exact = scan_arguments(2, length, 5, 3, dtype=dtype)
    ours = on(device, exact, dtype)
    moments, expected = SelectiveMoments.zeros(5, 3, device), SelectiveMoments.zeros(5, 3)
    reference.selective_scan(*exact, expected)
    out_BLD, without_BLD = selective_scan(*ours, moments), selective_scan(*ours)
    grads, grads_without = (torch.autograd.grad(out.square().sum(), ours) for out in (out_BLD, without_BLD))
    pairs = zip((out_BLD, *grads), (without_BLD, *grads_without), strict=True)
    pieces = ("samples", "h2_DN", "a2_DN", "hc2_N", "hh_NN")
    return {"changed": sum(float((a != b).sum()) for a, b in pairs)} | {
        piece: relative_error(getattr(moments, piece), getattr(expected, piece)) for piece in pieces
    }


def linear_case(device: str, shape: Shape, radius: float = 0.9, sliced: bool = False) -> Errors:
    """The recurrence of the reference takes and gives pairs (re, im) as channels, through unit matrices."""
    from models.scan.linear_triton import linear_scan

    B, L, N = shape
    u, magnitude, phase = gaussians((B, L, 2 * N), (N,), (N,))
    a = torch.polar(radius ** magnitude.abs().clamp_max(2), phase) if radius else torch.zeros(N, dtype=torch.complex128)
    exact = [part.float().double().requires_grad_() for part in (a.real, a.imag, u)]
    eye, zero = torch.eye(N, dtype=F64), torch.zeros(N, N, dtype=F64)
    unit = torch.cat([eye, zero], 1), torch.cat([zero, eye], 1), torch.cat([eye, zero]), -torch.cat([zero, eye])
    expected_BLM = reference.linear_recurrence(exact[2], exact[0], exact[1], *unit)
    a_re_N, a_im_N, u_BLM = ours = [part.detach().to(device, F32).requires_grad_() for part in exact]
    u_re_BLN, u_im_BLN = u_BLM.split(N, dim=-1)
    if not sliced:
        u_re_BLN, u_im_BLN = u_re_BLN.contiguous(), u_im_BLN.mT.contiguous().mT
    h_BLM = torch.cat(linear_scan(a_re_N, a_im_N, u_re_BLN, u_im_BLN), dim=-1)
    dh_BLM = gaussians(tuple(h_BLM.shape))[0].float()
    grads = torch.autograd.grad(h_BLM, ours, dh_BLM.to(device))
    expected = torch.autograd.grad(expected_BLM, exact, dh_BLM.double())
    errors = [relative_error(*pair) for pair in zip(grads, expected, strict=True)]
    return {"out": relative_error(h_BLM, expected_BLM), **dict(zip(("a_re", "a_im", "u"), errors, strict=True))}


SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 3, 4),
    (1, SHORT_CHUNK - 1, 5, 3),
    (2, SHORT_CHUNK, 4, 2),
    (1, SHORT_CHUNK + 1, 2, 1),
    (1, 2 * SHORT_CHUNK + 3, 3, 17),
    (2, 3 * SHORT_CHUNK + 1, 33, 3),  # two blocks of channels, one of them nearly empty
    *[tuple(random.Random(seed).randint(1, top) for top in (2, 30, 9, 9)) for seed in range(3)],
]
LINEAR_SHAPES = [(1, 1, 1), (2, 11, 5), (3, 12, 33), (1, 9, 64)]
CASES: dict[str, Callable[[str], Errors]] = {
    **{f"selective {shape}": partial(selective_case, shape=shape) for shape in SHAPES},
    "selective with chunks of 32": full_chunk_case,
    **{f"selective dt {dt:g}": partial(selective_case, shape=(1, 19, 3, 4), dt=dt) for dt in (1e-15, 1e-6, 30.0, 1e4)},
    **{f"selective z {z:g}": partial(gate_case, z=z) for z in (-200.0, -80.0, 80.0, 200.0)},
    "selective layouts": layout_case,
    **{f"moments over {length}": partial(moments_case, length=length) for length in (1, SAMPLE_EVERY + 5)},
    **{f"linear {shape}": partial(linear_case, shape=shape) for shape in LINEAR_SHAPES},
    **{f"linear radius {radius:g}": partial(linear_case, shape=(1, 12, 3), radius=radius) for radius in (0.0, 0.99999)},
    "linear slices": partial(linear_case, shape=(2, 9, 3), sliced=True),
    "bfloat16 selective": partial(selective_case, shape=(1, 2 * SHORT_CHUNK + 3, 33, 5), dtype=BF16),
    "bfloat16 moments": partial(moments_case, length=SHORT_CHUNK + 1, dtype=BF16),
}


def evaluate(device: str) -> dict[str, Errors]:
    from models.scan import selective_triton

    selective_triton.CHUNK = SHORT_CHUNK
    backends.force("triton")
    warnings.simplefilter("ignore")  # numpy's, of exponentials that overflow as they should
    return {name: case(device) for name, case in CASES.items()}


def compile_all() -> list[str]:
    """The names of the kernels, each compiled for an H100 as the host code would launch it on aligned tensors.

    The compiler takes a size of one for a constant, which has fewer methods than a number.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.scan import linear_triton, selective_triton, selective_triton_kernels

    _, tile = selective_triton._launch(1, 64, 16)
    warps = tile.pop("num_warps")
    selective: dict[str, Any] = {"CHUNK": selective_triton.CHUNK, **tile}
    wide = {"starts_ptr", "states_ptr", "h2_ptr", "a2_ptr", "hc2_ptr"}  # float32 whatever the inputs are
    wide |= {f"{d}{name}_ptr" for name in "AD" for d in ("", "d")} | {"dB_ptr", "dC_ptr"}
    ones = {"L": 1, "D": 1, "N": 1}
    compiled = []
    for kernel, constants, num_warps, dtype in [
        (selective_triton_kernels.forward, selective | {"MOMENTS": False}, warps, "bf16"),
        (selective_triton_kernels.forward, selective | {"MOMENTS": True}, warps, "fp32"),
        (selective_triton_kernels.backward, selective, warps, "bf16"),
        (selective_triton_kernels.forward, selective | {"MOMENTS": True} | ones, warps, "fp32"),
        (selective_triton_kernels.backward, selective | ones, warps, "fp32"),
        (linear_triton._forward, {"BLOCK": linear_triton.BLOCK}, 1, "fp32"),
        (linear_triton._backward, {"BLOCK": linear_triton.BLOCK}, 1, "fp32"),
    ]:
        signature = {name: "*" + ("fp32" if name in wide else dtype) for name in kernel.arg_names}
        signature |= {name: "i32" for name in kernel.arg_names if not name.endswith("_ptr")}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name not in constants and name != "L"
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        compiled.append(kernel.fn.__name__)
    return compiled


if __name__ == "__main__":
    print(json.dumps(compile_all() if sys.argv[1] == "compile" else evaluate(sys.argv[1])))
