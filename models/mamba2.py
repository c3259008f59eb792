"""Mamba-2's mixer (arXiv 2405.21060, section 7), with the parameter names and initialisation of state-spaces/mamba.

Shapes: B batch, L time, M d_model, D d_inner, H heads, P width of a head, G groups, R heads of a group, N d_state,
E all channels of the convolution (D + 2 K), K those of B, and of C (G U), U d_state before the first cut, Q = K + H,
W the convolution's width, V = W - 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from compression.moments import ParameterState
from compression.plan import LayerPlan, StateRotation, StateSelection
from compression.ranking import Dim
from models.layer import StackConfig, State
from models.scan.conv import causal_conv_silu, causal_conv_silu_step
from models.scan.norm import GatedRMSNorm
from models.scan.ssd import ssd_scan
from models.selective import SelectiveLayer, initial_dt_bias


class Mamba2Config(StackConfig):
    """A stack of Mamba-2 blocks."""

    kind: Literal["mamba2"]
    d_state: Dim | tuple[Dim, ...] = Field(
        128, description="State dimension before the first cut: of all layers, or of each."
    )
    d_conv: int = Field(4, ge=1, description="Width of the causal convolution, in time steps.")
    expand: int = Field(2, ge=1, description="Inner width as a multiple of d_model.")
    headdim: int = Field(64, ge=1, description="Channels of a head, which share one decay.")
    n_groups: int = Field(1, ge=1, description="Groups of heads; those of a group share B and C.")
    basis: Literal["axis", "rotated"] = Field(
        "axis",
        description="What a cut keeps: some of the states, in stock shapes; or the best combinations of them, through "
        "two small matrices behind the convolution.",
    )

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @model_validator(mode="after")
    def _channels_divide_into_heads_and_groups(self) -> Mamba2Config:
        if self.d_inner % self.headdim:
            raise ValueError(
                f"headdim {self.headdim} does not divide the inner width {self.d_inner} (expand x d_model); "
                "it has to be one of its divisors"
            )
        heads = self.d_inner // self.headdim
        if heads % self.n_groups:
            raise ValueError(
                f"n_groups {self.n_groups} does not divide the {heads} heads (expand x d_model / headdim); "
                "it has to be a divisor of their number"
            )
        return self


class Mamba2(SelectiveLayer):
    """Selective state-space mixer with one decay per head, (B, L, M) -> (B, L, M).

    In the rotated basis, a layer with fewer states than it began with has `B_map` and `C_map`, (N, U) each: B and C
    are U wide up to the convolution and its activation, and go through these maps to the scan's N states.
    """

    ssm_parameters = frozenset({"A_log", "D", "dt_bias", "B_map", "C_map"})

    def __init__(self, config: Mamba2Config, d_state: int, initial_dim: int) -> None:
        super().__init__()
        self.d_state = d_state
        self.rotates = config.basis == "rotated"
        self._projected = initial_dim if self.rotates else d_state
        self.B_map = self.C_map = None
        if self._projected > d_state:
            self.B_map, self.C_map = (nn.Parameter(torch.eye(d_state, initial_dim)) for _ in range(2))
        self.d_inner = config.d_inner
        self.headdim = config.headdim
        self.n_groups = config.n_groups
        self.n_heads = self.d_inner // self.headdim
        width = self.n_groups * self._projected
        self._convolved = [self.d_inner, width, width]  # x, B and C
        channels = sum(self._convolved)
        self.in_proj = nn.Linear(config.d_model, self.d_inner + channels + self.n_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels)
        self.dt_bias = nn.Parameter(initial_dt_bias(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = GatedRMSNorm(self.d_inner, self.n_groups)
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.n_layers)

    def forward(self, x_BLM: Tensor) -> Tensor:
        D, K, _ = self._convolved
        # Four products: the gradients of the parts of one would have to be put together, a copy of the widest tensor.
        # dt alone is too narrow for a product of its own.
        rows = torch.split(self.in_proj.weight, [D, D, K, K + self.n_heads])
        z_BLD, x_BLD, B_BLK, C_dt_BLQ = (F.linear(x_BLM, part) for part in rows)
        C_BLK, dt_BLH = torch.split(C_dt_BLQ, [K, self.n_heads], dim=-1)
        assert self.conv1d.bias is not None
        weights, biases = (torch.split(part, self._convolved) for part in (self.conv1d.weight, self.conv1d.bias))
        convolved = map(causal_conv_silu, (x_BLD, B_BLK, C_BLK), weights, biases)
        x_BLHP, B_BLGN, C_BLGN = self._heads_and_groups(*convolved)
        dt_BLH, A_H = self._dt(dt_BLH), self._A()
        if self._moments is not None:
            self._add_projections(dt_BLH, A_H, B_BLGN, C_BLGN)
        y_BLHP = ssd_scan(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, self.D, self._moments)
        out_BLM: Tensor = self.out_proj(self.norm(y_BLHP.flatten(2), z_BLD))
        return out_BLM

    def initial_state(self, batch: int) -> State:
        """The last inputs of the convolution (B, E, V) and the state (B, G, R, P, N)."""
        E, W = self.conv1d.out_channels, self.conv1d.kernel_size[0]
        heads = self.n_heads // self.n_groups
        past_BEV = torch.zeros(batch, E, W - 1, device=self.D.device)
        return past_BEV, torch.zeros(batch, self.n_groups, heads, self.headdim, self.d_state, device=self.D.device)

    def step(self, x_BM: Tensor, state: State) -> tuple[Tensor, State]:
        """States and decays are float32 at least, as in `ssd_scan`."""
        past_BEV, h_BGRPN = state
        z_BD, xBC_BE, dt_BH = torch.split(
            self.in_proj(x_BM), [self.d_inner, sum(self._convolved), self.n_heads], dim=-1
        )
        assert self.conv1d.bias is not None
        xBC_BE, past_BEV = causal_conv_silu_step(xBC_BE, past_BEV, self.conv1d.weight, self.conv1d.bias)
        x_BHP, B_BGN, C_BGN = self._heads_and_groups(*torch.split(xBC_BE, self._convolved, dim=-1))
        dt_BH = self._dt(dt_BH)
        groups = (self.n_groups, -1)
        decay_BGR = torch.unflatten((dt_BH * self._A()).exp(), 1, groups)
        input_BGRP = torch.unflatten(dt_BH.unsqueeze(-1) * x_BHP, 1, groups)
        h_BGRPN = decay_BGR[..., None, None] * h_BGRPN + input_BGRP.unsqueeze(-1) * B_BGN[:, :, None, None]
        y_BHP = (h_BGRPN * C_BGN[:, :, None, None]).sum(-1).flatten(1, 2) + self.D.unsqueeze(-1) * x_BHP
        out_BM: Tensor = self.out_proj(self.norm(y_BHP.flatten(1).to(z_BD.dtype), z_BD))
        return out_BM, (past_BEV, h_BGRPN)

    def _heads_and_groups(self, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H, P), B and C (..., G, N)."""
        if self.B_map is not None and self.C_map is not None:
            B, C = F.linear(B, self.B_map), F.linear(C, self.C_map)
        groups = (self.n_groups, self.d_state)
        x = torch.unflatten(x, -1, (-1, self.headdim))
        return x, torch.unflatten(B, -1, groups), torch.unflatten(C, -1, groups)

    def _add_projections(self, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor) -> None:
        assert self._moments is not None
        parts = [self.d_inner, *self._convolved, self.n_heads]
        _, _, B_rows, C_rows, _ = torch.split(self.in_proj.weight, parts)
        if self.B_map is not None and self.C_map is not None:
            B_rows, C_rows = self.B_map @ B_rows, self.C_map @ C_rows
        dt_BLD, A_1D = (part.repeat_interleave(self.headdim, -1) for part in (dt_BLH, A_H.unsqueeze(0)))
        weight_N = B_rows.norm(dim=1) * C_rows.norm(dim=1)
        self._moments.add_projections(dt_BLD, A_1D.T, B_BLGN.squeeze(2), C_BLGN.squeeze(2), weight_N)

    def _dt(self, raw: Tensor) -> Tensor:
        return F.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32)) + self.dt_bias)

    def _A(self) -> Tensor:
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    def shrink(self, plan: LayerPlan, states: Mapping[str, ParameterState]) -> dict[str, ParameterState]:
        """Keep the chosen states in all heads: their channels of the convolution and rows of in_proj, for B and C.

        In the rotated basis both maps go through the plan's projections, their gradients through the transposed
        inverses of those. The maps of a first cut are new, so Adam knows nothing of them, while its count of steps
        goes on: its averages of them begin at zero uncorrected, and steps of up to 1.1 times the learning rate follow
        with betas (0.9, 0.95), of 6.6 times with (0.9, 0.999).
        """
        assert self.n_groups == 1, "a Mamba-2 layer is cut only with one group"
        if isinstance(plan.reduction, StateRotation):
            left_RN, right_NR = (part.to(self.D.device) for part in (plan.reduction.left_RN, plan.reduction.right_NR))
            fresh = ParameterState.fresh(torch.eye(plan.dim_before, device=self.D.device))
            return dict(states) | {
                "B_map": states.get("B_map", fresh).through(left_RN, right_NR.mT),
                "C_map": states.get("C_map", fresh).through(right_NR.mT, left_RN),
            }
        assert isinstance(plan.reduction, StateSelection), "a Mamba-2 layer is cut by choosing or combining states"
        assert plan.reduction.fold_RN is None, "behind the activation of C there is nothing to fold into"
        kept, D, N = torch.tensor(plan.reduction.kept), self.d_inner, plan.dim_before
        channels = torch.cat([torch.arange(D), D + kept, D + N + kept])
        rows = torch.cat([torch.arange(D), D + channels, 2 * D + 2 * N + torch.arange(self.n_heads)])
        return dict(states) | {
            "in_proj.weight": states["in_proj.weight"].select(lambda part: part[rows]),
            "conv1d.weight": states["conv1d.weight"].select(lambda part: part[channels]),
            "conv1d.bias": states["conv1d.bias"].select(lambda part: part[channels]),
        }
