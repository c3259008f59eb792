"""Tasks on top of a backbone: what goes in, what the loss is.

Shapes: B batch, L time, M d_model, V vocabulary, I input features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.layer import State, TruncatableLayer

# The target where nothing is asked; what F.cross_entropy leaves out by default.
NOT_ASKED = -100


class SequenceModel(nn.Module):
    """A backbone with a head: forward gives the logits, `loss` the mean cross-entropy in nats."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def answers(self) -> int:
        """Entries in a row of logits."""
        raise NotImplementedError

    def mixers(self) -> list[TruncatableLayer]:
        return self.backbone.mixers()

    @property
    def state_dims(self) -> list[int]:
        return [mixer.d_state for mixer in self.mixers()]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over everything that is asked, float32; `targets` int64, one per row of the logits, or NOT_ASKED.

        Workers average their means. That is the mean over all of them because every sequence is asked equally often.
        """
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


class TokenModel(SequenceModel):
    """Tokens to tokens with tied embeddings: (B, L) int64 -> logits (B, L, V)."""

    def __init__(self, vocab_size: int, d_model: int, mixers: Sequence[TruncatableLayer]) -> None:
        super().__init__(Backbone(nn.Embedding(vocab_size, d_model), mixers, d_model))
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)  # type: ignore[arg-type]
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False, device="meta")
        self.lm_head.weight = self.backbone.embedding.weight  # type: ignore[assignment]

    @property
    def answers(self) -> int:
        return self.lm_head.out_features

    def forward(self, tokens_BL: Tensor) -> Tensor:
        logits_BLV: Tensor = self.lm_head(self.backbone(tokens_BL))
        return logits_BLV


class LanguageModel(TokenModel):
    """Next-token prediction, which can also go on token by token."""

    def initial_state(self, batch: int) -> list[State]:
        """The layers' states before the first token."""
        return self.backbone.initial_state(batch)

    def step(self, tokens_B: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """One token of every sequence, (B,) int64 -> logits (B, V) of the next, and the states after it."""
        x_BM, states = self.backbone.step(tokens_B, states)
        logits_BV: Tensor = self.lm_head(x_BM)
        return logits_BV, states


class Classifier(SequenceModel):
    """Mean pooling over time and a linear layer: features (B, L, I) -> logits (B, K)."""

    def __init__(self, n_features: int, n_classes: int, d_model: int, mixers: Sequence[TruncatableLayer]) -> None:
        super().__init__(Backbone(nn.Linear(n_features, d_model), mixers, d_model))
        self.head = nn.Linear(d_model, n_classes)

    @property
    def answers(self) -> int:
        return self.head.out_features

    def forward(self, features_BLI: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(self.backbone(features_BLI).mean(1))
        return logits_BK
