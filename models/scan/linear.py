"""The LRU's linear recurrence: the one function that a layer calls, whatever computes it.

Shapes: B batch, L time, H width, N state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.scan import reference
from models.scan.backends import choose
from models.scan.linear_convolution import causal_convolution, impulse_response
from models.scan.linear_states import linear_scan


def linear_recurrence(
    x_BLH: Tensor,
    a_re_N: Tensor,
    a_im_N: Tensor,
    B_re_NH: Tensor,
    B_im_NH: Tensor,
    C_re_HN: Tensor,
    C_im_HN: Tensor,
) -> Tensor:
    """y_t = Re(C h_t) of h_t = a h_(t-1) + B x_t from a zero state (LRU, arXiv 2303.06349, eq. 1), (B, L, H).

    Complex parameters come as real and imaginary parts, float32 or float64. x may be bfloat16, which the result then
    is too; states are float32.
    """
    parameters = (a_re_N, a_im_N, B_re_NH, B_im_NH, C_re_HN, C_im_HN)
    if choose(x_BLH) == "reference":
        return reference.linear_recurrence(x_BLH, *parameters)
    with torch.autocast(x_BLH.device.type, enabled=False):
        through = _as_convolution if is_convolution(x_BLH.shape[0], x_BLH.shape[2], a_re_N.shape[0]) else _as_states
        return through(x_BLH.to(a_re_N.dtype), *parameters).to(x_BLH.dtype)


def is_convolution(batch: int, width: int, d_state: int) -> bool:
    """Whether the sequences go through the impulse response and not through states.

    Transforms cost the same at any number of states, but the response takes width^2 entries, each a sum over all
    states, before the first sequence can use it. The factors are measured (docs/log.md, the LRU's two ways).
    """
    return width <= batch and 2 * width * (batch + width) <= batch * d_state


def _as_convolution(x_BLH: Tensor, *parameters: Tensor) -> Tensor:
    return causal_convolution(x_BLH, impulse_response(x_BLH.shape[1], *parameters))


def _as_states(
    x_BLH: Tensor,
    a_re_N: Tensor,
    a_im_N: Tensor,
    B_re_NH: Tensor,
    B_im_NH: Tensor,
    C_re_HN: Tensor,
    C_im_HN: Tensor,
) -> Tensor:
    h_re_BLN, h_im_BLN = linear_scan(a_re_N, a_im_N, x_BLH @ B_re_NH.T, x_BLH @ B_im_NH.T)
    return h_re_BLN @ C_re_HN.T - h_im_BLN @ C_im_HN.T
