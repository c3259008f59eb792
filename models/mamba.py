"""Mamba-1's mixer (arXiv 2312.00752), with the parameter names and initialisation of state-spaces/mamba.

Shapes: B batch, L time, M d_model, D d_inner, N d_state, R dt_rank, W width of the convolution, V = W - 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compression.moments import ParameterState
from compression.plan import LayerPlan, StateSelection
from compression.ranking import Dim
from models.layer import StackConfig, State
from models.scan.conv import causal_conv_silu, causal_conv_silu_step
from models.scan.selective import selective_scan
from models.selective import SelectiveLayer, initial_dt_bias


class MambaConfig(StackConfig):
    """A stack of Mamba-1 blocks."""

    kind: Literal["mamba"]
    d_state: Dim | tuple[Dim, ...] = Field(
        16, description="State dimension before the first cut: of all layers, or of each."
    )
    d_conv: int = Field(4, ge=1, description="Width of the causal convolution, in time steps.")
    expand: int = Field(2, ge=1, description="Inner width as a multiple of d_model.")


class Mamba(SelectiveLayer):
    """Selective state-space mixer, (B, L, M) -> (B, L, M)."""

    ssm_parameters = frozenset({"A_log", "D", "dt_proj.bias"})

    def __init__(self, config: MambaConfig, d_state: int) -> None:
        super().__init__()
        self.d_state = d_state
        self.d_inner = config.expand * config.d_model
        self.dt_rank = math.ceil(config.d_model / 16)
        self.in_proj = nn.Linear(config.d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, config.d_conv, groups=self.d_inner)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        A_N = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(A_N.log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=False)
        self._initialise(config.n_layers)

    @torch.no_grad()
    def _initialise(self, n_layers: int) -> None:
        """The output is scaled down with depth (mamba_simple.py)."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_proj.bias.copy_(initial_dt_bias(self.d_inner))
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight /= math.sqrt(n_layers)

    def forward(self, x_BLM: Tensor) -> Tensor:
        # Two products: the gradients of the halves of one would have to be put together, a copy of the widest tensor.
        x_BLD, z_BLD = (F.linear(x_BLM, half_DM) for half_DM in self.in_proj.weight.chunk(2))
        assert self.conv1d.bias is not None
        x_BLD = causal_conv_silu(x_BLD, self.conv1d.weight, self.conv1d.bias)
        dt_BLR, B_BLN, C_BLN = self.x_proj(x_BLD).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if dt_BLR.dtype == self.dt_proj.bias.dtype:
            r_BLD = self.dt_proj(dt_BLR)
        else:  # autocast would round the bias
            r_BLD = F.linear(dt_BLR, self.dt_proj.weight) + self.dt_proj.bias
        A_DN = -self.A_log.exp()
        if self._moments is not None:
            B_rows, C_rows = self.x_proj.weight[self.dt_rank :].chunk(2)
            dt_BLD = F.softplus(r_BLD.to(A_DN.dtype))
            self._moments.add_projections(dt_BLD, A_DN, B_BLN, C_BLN, B_rows.norm(dim=1) * C_rows.norm(dim=1))
        y_BLD = selective_scan(x_BLD, r_BLD, A_DN, B_BLN, C_BLN, self.D, z_BLD, self._moments)
        out_BLM: Tensor = self.out_proj(y_BLD)
        return out_BLM

    def initial_state(self, batch: int) -> State:
        """The last inputs of the convolution (B, D, V) and the state (B, D, N)."""
        V, device = self.conv1d.kernel_size[0] - 1, self.D.device
        past_BDV = torch.zeros(batch, self.d_inner, V, device=device)
        return past_BDV, torch.zeros(batch, self.d_inner, self.d_state, device=device)

    def step(self, x_BM: Tensor, state: State) -> tuple[Tensor, State]:
        past_BDV, h_BDN = state
        x_BD, z_BD = self.in_proj(x_BM).chunk(2, dim=-1)
        assert self.conv1d.bias is not None
        x_BD, past_BDV = causal_conv_silu_step(x_BD, past_BDV, self.conv1d.weight, self.conv1d.bias)
        dt_BR, B_BN, C_BN = self.x_proj(x_BD).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt_BD = F.softplus(self.dt_proj(dt_BR))
        decay_BDN = torch.exp(dt_BD.unsqueeze(-1) * -self.A_log.exp())
        h_BDN = decay_BDN * h_BDN + (dt_BD * x_BD).unsqueeze(-1) * B_BN.unsqueeze(1)
        y_BD = (h_BDN @ C_BN.unsqueeze(-1)).squeeze(-1) + self.D * x_BD
        out_BM: Tensor = self.out_proj(y_BD * F.silu(z_BD))
        return out_BM, (past_BDV, h_BDN)

    def shrink(self, plan: LayerPlan, states: Mapping[str, ParameterState]) -> dict[str, ParameterState]:
        """Keep the chosen states in all channels: columns of A_log, and their rows of x_proj for B and for C.

        Where C is folded, the gradient of a kept row is what it was: its state is the same.
        """
        cut, weight = plan.reduction, states["x_proj.weight"]
        assert isinstance(cut, StateSelection), "a Mamba layer is cut by choosing states"
        kept, first_C = torch.tensor(cut.kept), self.dt_rank + plan.dim_before
        rows = torch.cat([torch.arange(self.dt_rank), self.dt_rank + kept, first_C + kept])
        x_proj = weight.select(lambda part: part[rows])
        if cut.fold_RN is not None:
            fold_RN = cut.fold_RN.to(weight.value.device)
            x_proj.value[-len(kept) :] = (fold_RN @ weight.value[first_C:].double()).to(x_proj.value.dtype)
        return dict(states) | {
            "A_log": states["A_log"].select(lambda part: part[:, kept]),
            "x_proj.weight": x_proj,
        }
