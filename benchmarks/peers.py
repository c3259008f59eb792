"""The blocks and steps that are compared: ours, other libraries', a plain loop, and floors that no scan can beat.

All blocks of one kind take the same parameter names, so ours can lend its weights to every other.

Shapes: B batch, L time, M d_model, D d_inner, N d_state, R dt_rank, H LRU width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import SEED, Shape, Step
from compression.gramians import LTISystem
from models.lru import LRU, LRUConfig
from models.mamba import Mamba, MambaConfig
from models.mamba2 import Mamba2, Mamba2Config
from models.registry import ClassificationTask, build_model

D_MODEL = 256


def ours(d_state: int, d_model: int = D_MODEL) -> nn.Module:
    torch.manual_seed(SEED)
    return Mamba(MambaConfig(kind="mamba", n_layers=1, d_model=d_model, d_state=d_state), d_state)


def mambapy(d_state: int) -> nn.Module:
    """mambapy's block with its parallel scan."""
    from mambapy.mamba import MambaBlock, MambaConfig  # type: ignore[import-untyped, unused-ignore]

    block: nn.Module = MambaBlock(MambaConfig(d_model=D_MODEL, n_layers=1, d_state=d_state, pscan=True))
    return block


def transformers(d_state: int) -> nn.Module:
    """transformers' mixer over mambapy's scan; its own default in plain torch is far slower."""
    import mambapy.pscan  # type: ignore[import-untyped, unused-ignore]  # noqa: F401  # else it falls back in silence
    from transformers import MambaConfig, logging
    from transformers.models.mamba.modeling_mamba import MambaMixer

    # Else it tells, once per kernel, that there is no CUDA one.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call, unused-ignore]
    config: Any = MambaConfig(hidden_size=D_MODEL, state_size=d_state, num_hidden_layers=1, use_mambapy=True)
    mixer: nn.Module = MambaMixer(config, layer_idx=0)
    return mixer


def our_mamba2(d_state: int, d_model: int = D_MODEL) -> nn.Module:
    torch.manual_seed(SEED)
    return Mamba2(Mamba2Config(kind="mamba2", n_layers=1, d_model=d_model, d_state=d_state), d_state, d_state)


def transformers_mamba2(d_state: int) -> nn.Module:
    """transformers' mixer in plain torch, with its own chunk length."""
    from transformers import Mamba2Config, logging
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    logging.set_verbosity_error()  # type: ignore[no-untyped-call, unused-ignore]
    config: Any = Mamba2Config(
        hidden_size=D_MODEL, state_size=d_state, expand=2, head_dim=64, num_heads=2 * D_MODEL // 64, n_groups=1
    )
    mixer: nn.Module = Mamba2Mixer(config, layer_idx=0)
    return mixer


def naive(d_state: int) -> nn.Module:
    return NaiveMamba(D_MODEL, d_state)


class NaiveMamba(nn.Module):
    """Mamba-1 as one writes it down: every decay and input at once, then a loop over unbound time steps."""

    def __init__(self, d_model: int, d_state: int, expand: int = 2, d_conv: int = 4) -> None:
        super().__init__()
        D, R = expand * d_model, -(-d_model // 16)
        self.splits = [R, d_state, d_state]
        self.in_proj = nn.Linear(d_model, 2 * D, bias=False)
        self.conv1d = nn.Conv1d(D, D, d_conv, groups=D, padding=d_conv - 1)
        self.x_proj = nn.Linear(D, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(R, D)
        self.A_log = nn.Parameter(torch.zeros(D, d_state))
        self.D = nn.Parameter(torch.ones(D))
        self.out_proj = nn.Linear(D, d_model, bias=False)

    def forward(self, x_BLM: Tensor) -> Tensor:
        x_BLD, z_BLD = self.in_proj(x_BLM).chunk(2, dim=-1)
        x_BLD = F.silu(self.conv1d(x_BLD.transpose(1, 2))[..., : x_BLM.shape[1]].transpose(1, 2))
        dt_BLR, B_BLN, C_BLN = self.x_proj(x_BLD).split(self.splits, dim=-1)
        dt_BLD = F.softplus(self.dt_proj(dt_BLR))
        decay_BLDN = torch.exp(dt_BLD.unsqueeze(-1) * -self.A_log.exp())
        u_BLDN = (dt_BLD * x_BLD).unsqueeze(-1) * B_BLN.unsqueeze(2)
        h_BDN = torch.zeros_like(u_BLDN[:, 0])
        y = []
        for decay_BDN, u_BDN, C_BN in zip(decay_BLDN.unbind(1), u_BLDN.unbind(1), C_BLN.unbind(1), strict=True):
            h_BDN = torch.addcmul(u_BDN, decay_BDN, h_BDN)
            y.append((h_BDN @ C_BN.unsqueeze(-1)).squeeze(-1))
        out_BLM: Tensor = self.out_proj((torch.stack(y, dim=1) + self.D * x_BLD) * F.silu(z_BLD))
        return out_BLM


def matrix_products(block: nn.Module, shape: Shape) -> Step:
    """The projections of a block, forward and backward, on contiguous inputs: no bias, nothing between."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = shape.batch * shape.length
    weights = [layer.weight for layer in block.modules() if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(tokens, w.shape[1], generator=generator, requires_grad=True) for w in weights]
    gradients = [torch.randn(tokens, w.shape[0], generator=generator) for w in weights]

    def step() -> None:
        for leaf in (*weights, *inputs):
            leaf.grad = None
        torch.autograd.backward([F.linear(x, w) for x, w in zip(inputs, weights, strict=True)], gradients)

    return step


class StatelessLRU(nn.Module):
    """What is left of an LRU block without its state space: y = D x, GELU and the gated linear unit."""

    def __init__(self, lru: LRU) -> None:
        super().__init__()
        self.D, self.glu = lru.D, lru.glu

    def forward(self, x_BLH: Tensor) -> Tensor:
        return F.glu(self.glu(F.gelu(self.D * x_BLH)), dim=-1)


Penalty = Callable[[LTISystem], Tensor]
PENALTY_WEIGHT = 1e-5


@dataclass(frozen=True)
class LRUTask:
    """One LRU block between an embedding and a head that tells ten classes apart."""

    d_state: int
    d_model: int
    n_features: int
    batch: int
    length: int


# What the paper's sequential MNIST is trained with.
SMNIST = LRUTask(d_state=256, d_model=8, n_features=1, batch=50, length=784)


def lru_training_step(
    task: LRUTask, stateless: bool = False, penalty: Penalty | None = None, device: str = "cpu"
) -> Step:
    """Loss, gradients and AdamW on one fixed batch, with the recurrence or without it, and with a penalty on it."""
    torch.manual_seed(SEED)
    config = LRUConfig(kind="lru", n_layers=1, d_model=task.d_model, d_state=task.d_state)
    model = build_model(config, ClassificationTask(task.n_features, n_classes=10), [task.d_state])
    if stateless:
        [block], [mixer] = model.backbone.layers, model.mixers()
        assert isinstance(mixer, LRU)
        block.mixer = StatelessLRU(mixer)
    model.to(device)
    features_BLI = torch.randn(task.batch, task.length, task.n_features).to(device)
    targets_B = torch.randint(10, (task.batch,)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(model(features_BLI), targets_B)
        if penalty is not None:
            [mixer] = model.mixers()
            assert isinstance(mixer, LRU)
            loss = loss + PENALTY_WEIGHT * penalty(mixer.system())
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step
