"""The residual stack that all mixers share: norm, mixer, add.

Shapes: B batch, L time, M d_model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.layer import TruncatableLayer


class Block(nn.Module):
    """x + mixer(norm(x)), as in state-spaces/mamba."""

    def __init__(self, mixer: TruncatableLayer, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(self, x_BLM: Tensor) -> Tensor:
        out_BLM: Tensor = x_BLM + self.mixer(self.norm(x_BLM))
        return out_BLM


class Backbone(nn.Module):
    """`embedding` turns a batch into (B, L, M); the blocks and a last norm keep that shape."""

    def __init__(self, embedding: nn.Module, mixers: Sequence[TruncatableLayer], d_model: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(Block(mixer, nn.RMSNorm(d_model, eps=1e-5)) for mixer in mixers)
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)

    def forward(self, batch: Tensor) -> Tensor:
        x_BLM = self.embedding(batch)
        for layer in self.layers:
            x_BLM = layer(x_BLM)
        out_BLM: Tensor = self.norm_f(x_BLM)
        return out_BLM

    def mixers(self) -> list[TruncatableLayer]:
        return [layer.mixer for layer in self.layers if isinstance(layer, Block)]
