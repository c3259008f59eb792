"""The residual stack that all mixers share: norm, mixer, add.

Shapes: B batch, L time, M d_model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.dropout import RowDropout
from models.layer import State, TruncatableLayer


class Block(nn.Module):
    """x + mixer(norm(x)), as in state-spaces/mamba."""

    def __init__(self, mixer: TruncatableLayer, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.dropout = RowDropout()

    def forward(self, x_BLM: Tensor) -> Tensor:
        out_BLM: Tensor = self.dropout(self.mixer(self.norm(x_BLM)))
        return x_BLM + out_BLM

    def step(self, x_BM: Tensor, state: State) -> tuple[Tensor, State]:
        out_BM, state = self.mixer.step(self.norm(x_BM), state)
        return x_BM + out_BM, state


class Backbone(nn.Module):
    """`embedding` turns a batch into (B, L, M); the blocks and a last norm keep that shape."""

    activation_checkpointing = False
    """Whether training recomputes each block in the backward pass instead of keeping its activations."""

    def __init__(self, embedding: nn.Module, mixers: Sequence[TruncatableLayer], d_model: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(Block(mixer, nn.RMSNorm(d_model, eps=1e-5)) for mixer in mixers)
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)

    def forward(self, batch: Tensor) -> Tensor:
        x_BLM = self.embedding(batch)
        for block in self.layers:
            if self.training and self.activation_checkpointing:
                x_BLM = checkpoint(block, x_BLM, use_reentrant=False)
            else:
                x_BLM = block(x_BLM)
        out_BLM: Tensor = self.norm_f(x_BLM)
        return out_BLM

    def seed_dropout(self, key: tuple[int, ...], first: int) -> None:
        """What the next rows drop: those of the global batch from place `first` on, of the step that `key` names."""
        for layer, block in enumerate(self.blocks()):
            block.dropout.key, block.dropout.first = (*key, layer), first

    def initial_state(self, batch: int) -> list[State]:
        return [mixer.initial_state(batch) for mixer in self.mixers()]

    def step(self, batch: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """One time step of a batch, (B,) or (B, I) -> (B, M), and the blocks' states after it."""
        x_BM = self.embedding(batch)
        after = []
        for block, state in zip(self.blocks(), states, strict=True):
            x_BM, state = block.step(x_BM, state)
            after.append(state)
        out_BM: Tensor = self.norm_f(x_BM)
        return out_BM, after

    def blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]

    def mixers(self) -> list[TruncatableLayer]:
        return [block.mixer for block in self.blocks()]
