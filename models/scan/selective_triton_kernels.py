# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"
"""The Triton kernels behind `models.scan.selective_triton`.

A program takes BLOCK_D channels of one sequence, with all their states, and walks through time. Tiles have channels
last, one to a thread of a warp: activations load contiguously, and sums over states stay within a thread. Inputs
have any strides over batch and time, and contiguous channels or states; everything else is contiguous.

Shapes: B batch, L time, D channels (d_inner), N state; G blocks of channels, T chunks, K steps of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(r):
    """log(1 + exp(r)) with small relative error everywhere: the second term is what rounding took from 1 + e."""
    e = tl.exp(-tl.abs(r))
    w = 1 + e
    return tl.maximum(r, 0.0) + (tl.log(w) + (e - (w - 1)) / w)


@triton.jit
def _at(rows, t, stride, mask):
    """One time step, from pointers to the first; zero outside the mask."""
    return tl.load(rows + t * stride, mask, other=0.0)


@triton.jit
def forward(
    x_ptr,
    r_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    out_ptr,
    starts_ptr,
    h2_ptr,
    a2_ptr,
    hc2_ptr,
    last_ptr,
    x_b,
    x_t,
    r_b,
    r_t,
    B_b,
    B_t,
    C_b,
    C_t,
    z_b,
    z_t,
    L,
    D,
    N,
    CHUNK: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d, in_n = d < D, n < N
    in_nd, at_nd = in_n[:, None] & in_d[None, :], n[:, None] * D + d[None, :]
    A = tl.load(A_ptr + at_nd, in_nd, other=0.0) * LOG2E
    skip = tl.load(D_ptr + d, in_d, other=0.0)
    xs, rs, zs = x_ptr + b * x_b + d, r_ptr + b * r_b + d, z_ptr + b * z_b + d
    Bs, Cs = B_ptr + b * B_b + n, C_ptr + b * C_b + n
    outs = out_ptr + b * L * D + d
    starts = starts_ptr + b * tl.cdiv(L, CHUNK) * N * D + at_nd
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    h2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    a2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    hc2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Each step loads what the next one needs, so that the arithmetic does not wait.
    next_x, next_r, next_z = _at(xs, 0, x_t, in_d), _at(rs, 0, r_t, in_d), _at(zs, 0, z_t, in_d)
    next_B, next_C = _at(Bs, 0, B_t, in_n), _at(Cs, 0, C_t, in_n)
    for t in range(tl.cast(L, tl.int64)):
        x, r, z = next_x.to(tl.float32), next_r.to(tl.float32), next_z.to(tl.float32)
        B, C = next_B.to(tl.float32), next_C.to(tl.float32)
        ahead = tl.minimum(t + 1, L - 1)
        next_x, next_r, next_z = _at(xs, ahead, x_t, in_d), _at(rs, ahead, r_t, in_d), _at(zs, ahead, z_t, in_d)
        next_B, next_C = _at(Bs, ahead, B_t, in_n), _at(Cs, ahead, C_t, in_n)
        if t % CHUNK == 0:
            tl.store(starts + t // CHUNK * N * D, h, in_nd)
        dt = softplus(r)
        a = tl.exp2(dt[None, :] * A)
        h = a * h + (dt * x)[None, :] * B[:, None]
        hc = h * C[:, None]
        y = tl.sum(hc, 0) + skip * x
        tl.store(outs + t * D, (y * z * tl.sigmoid(z)).to(out_ptr.dtype.element_ty), in_d)
        if MOMENTS:
            h2 += h * h
            a2 += a * a
            hc2 += hc * hc
    if MOMENTS:
        tl.store(h2_ptr + b * N * D + at_nd, h2, in_nd)
        tl.store(a2_ptr + b * N * D + at_nd, a2, in_nd)
        tl.store(hc2_ptr + b * N * D + at_nd, hc2, in_nd)
        tl.store(last_ptr + b * N * D + at_nd, h, in_nd)


@triton.jit
def backward(
    x_ptr,
    r_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    dout_ptr,
    starts_ptr,
    dx_ptr,
    dr_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dD_ptr,
    dz_ptr,
    states_ptr,
    x_b,
    x_t,
    r_b,
    r_t,
    B_b,
    B_t,
    C_b,
    C_t,
    z_b,
    z_t,
    dout_b,
    dout_t,
    L,
    D,
    N,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    g, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    G, batch = tl.num_programs(0), tl.num_programs(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d, in_n = d < D, n < N
    in_nd, at_nd = in_n[:, None] & in_d[None, :], n[:, None] * D + d[None, :]
    A = tl.load(A_ptr + at_nd, in_nd, other=0.0) * LOG2E
    skip = tl.load(D_ptr + d, in_d, other=0.0)
    xs, rs, zs = x_ptr + b * x_b + d, r_ptr + b * r_b + d, z_ptr + b * z_b + d
    douts = dout_ptr + b * dout_b + d
    Bs, Cs = B_ptr + b * B_b + n, C_ptr + b * C_b + n
    dxs, drs, dzs = dx_ptr + b * L * D + d, dr_ptr + b * L * D + d, dz_ptr + b * L * D + d
    dBs, dCs = dB_ptr + (g * batch + b) * L * N + n, dC_ptr + (g * batch + b) * L * N + n
    chunks = tl.cdiv(L, CHUNK)
    starts = starts_ptr + b * chunks * N * D + at_nd
    tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    states = states_ptr + (b * G + g) * CHUNK * BLOCK_N * BLOCK_D + tile
    # What the states after this step add to the gradient of its state.
    carry = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dA = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dD = tl.zeros([BLOCK_D], tl.float32)
    for index in range(tl.cast(chunks, tl.int64)):
        first = (chunks - 1 - index) * CHUNK
        last = tl.minimum(first + CHUNK, L) - 1
        h = tl.load(starts + first // CHUNK * N * D, in_nd, other=0.0)
        next_x, next_r, next_z = _at(xs, first, x_t, in_d), _at(rs, first, r_t, in_d), _at(zs, first, z_t, in_d)
        next_B, next_C = _at(Bs, first, B_t, in_n), _at(Cs, first, C_t, in_n)
        next_dout = _at(douts, first, dout_t, in_d)
        for t in range(first, last + 1):
            x, r, z = next_x.to(tl.float32), next_r.to(tl.float32), next_z.to(tl.float32)
            B, C, dout = next_B.to(tl.float32), next_C.to(tl.float32), next_dout.to(tl.float32)
            ahead = tl.minimum(t + 1, last)
            next_x, next_r, next_z = _at(xs, ahead, x_t, in_d), _at(rs, ahead, r_t, in_d), _at(zs, ahead, z_t, in_d)
            next_B, next_C = _at(Bs, ahead, B_t, in_n), _at(Cs, ahead, C_t, in_n)
            next_dout = _at(douts, ahead, dout_t, in_d)
            tl.store(states + (t - first) * BLOCK_N * BLOCK_D, h)
            dt = softplus(r)
            h = tl.exp2(dt[None, :] * A) * h + (dt * x)[None, :] * B[:, None]
            y = tl.sum(h * C[:, None], 0) + skip * x
            gate = tl.sigmoid(z)
            dy = dout * z * gate
            tl.store(dzs + t * D, (dout * y * gate * (1 + z * (1 - gate))).to(dz_ptr.dtype.element_ty), in_d)
            tl.store(dCs + t * N, tl.sum(h * dy[None, :], 1), in_n)
            dD += dy * x
        # The two loops may hold the states in different threads.
        tl.debug_barrier()
        next_x, next_r, next_z = _at(xs, last, x_t, in_d), _at(rs, last, r_t, in_d), _at(zs, last, z_t, in_d)
        next_B, next_C = _at(Bs, last, B_t, in_n), _at(Cs, last, C_t, in_n)
        next_dout = _at(douts, last, dout_t, in_d)
        for back in range(last + 1 - first):
            t = last - back
            before = tl.load(states + (t - first) * BLOCK_N * BLOCK_D)
            x, r, z = next_x.to(tl.float32), next_r.to(tl.float32), next_z.to(tl.float32)
            B, C, dout = next_B.to(tl.float32), next_C.to(tl.float32), next_dout.to(tl.float32)
            ahead = tl.maximum(t - 1, first)
            next_x, next_r, next_z = _at(xs, ahead, x_t, in_d), _at(rs, ahead, r_t, in_d), _at(zs, ahead, z_t, in_d)
            next_B, next_C = _at(Bs, ahead, B_t, in_n), _at(Cs, ahead, C_t, in_n)
            next_dout = _at(douts, ahead, dout_t, in_d)
            dt = softplus(r)
            dy = dout * z * tl.sigmoid(z)
            dh = carry + dy[None, :] * C[:, None]
            tl.store(dBs + t * N, tl.sum(dh * (dt * x)[None, :], 1), in_n)
            du = tl.sum(dh * B[:, None], 0)
            carry = dh * tl.exp2(dt[None, :] * A)
            dlog = carry * before  # the gradient of dt A
            ddt = tl.sum(dlog * A, 0) * LN2 + du * x
            dA += dlog * dt[None, :]
            tl.store(dxs + t * D, (du * dt + dy * skip).to(dx_ptr.dtype.element_ty), in_d)
            tl.store(drs + t * D, (ddt * tl.sigmoid(r)).to(dr_ptr.dtype.element_ty), in_d)
        tl.debug_barrier()
    tl.store(dA_ptr + b * N * D + at_nd, dA, in_nd)
    tl.store(dD_ptr + b * D + d, dD, in_d)
