"""Tasks on top of a backbone: what goes in, what the loss is.

Shapes: B batch, L time, M d_model, V vocabulary, I input features, K classes, 2 documents of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.layer import State, TruncatableLayer

# The target where nothing is asked; what F.cross_entropy leaves out by default.
NOT_ASKED = -100
# The token that fills documents up to the longest of a batch.
PADDING = 0


class SequenceModel(nn.Module):
    """A backbone with a head: forward gives the logits, `loss` the mean cross-entropy in nats."""

    sequences = 1
    """Rows of the backbone's batch for each example."""

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

    def seed_dropout(self, key: tuple[int, ...], first: int) -> None:
        """What the next examples drop: those of the global batch from place `first` on, of the step `key` names."""
        self.backbone.seed_dropout(key, self.sequences * first)

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


class DocumentModel(SequenceModel):
    """Tokens to one vector each: embedding, backbone, and the mean over all that is no padding."""

    def __init__(self, vocab_size: int, d_model: int, mixers: Sequence[TruncatableLayer]) -> None:
        super().__init__(Backbone(nn.Embedding(vocab_size, d_model), mixers, d_model))

    def encode(self, tokens_BL: Tensor) -> Tensor:
        """(B, L) int64, documents with PADDING behind them -> (B, M); zeros for a document without a token.

        The mixers look back only, so how much padding there is makes no difference.
        """
        x_BLM: Tensor = self.backbone(tokens_BL)
        is_padding_BL = tokens_BL == PADDING
        sums_BM = x_BLM.masked_fill(is_padding_BL[:, :, None], 0).sum(1)
        return sums_BM / (~is_padding_BL).sum(1, keepdim=True).clamp(min=1)


class DocumentClassifier(DocumentModel):
    """Documents to classes: tokens (B, L) int64 -> logits (B, K)."""

    def __init__(self, vocab_size: int, n_classes: int, d_model: int, mixers: Sequence[TruncatableLayer]) -> None:
        super().__init__(vocab_size, d_model, mixers)
        self.head = nn.Linear(d_model, n_classes)

    @property
    def answers(self) -> int:
        return self.head.out_features

    def forward(self, tokens_BL: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(self.encode(tokens_BL))
        return logits_BK


class PairClassifier(DocumentModel):
    """Pairs of documents to classes: tokens (B, 2, L) int64 -> logits (B, K).

    Both are encoded alike; their encodings, product and difference go through two hidden layers, as in the retrieval
    task of Long Range Arena (arXiv 2011.04006, `classifier_head_dual` of its code).
    """

    sequences = 2

    def __init__(self, vocab_size: int, n_classes: int, d_model: int, mixers: Sequence[TruncatableLayer]) -> None:
        super().__init__(vocab_size, d_model, mixers)
        self._n_classes = n_classes
        half = max(1, d_model // 2)
        self.head = nn.Sequential(
            nn.Linear(4 * d_model, d_model), nn.ReLU(), nn.Linear(d_model, half), nn.ReLU(), nn.Linear(half, n_classes)
        )

    @property
    def answers(self) -> int:
        return self._n_classes

    def forward(self, tokens_B2L: Tensor) -> Tensor:
        first_BM, second_BM = self.encode(tokens_B2L.flatten(0, 1)).reshape(len(tokens_B2L), 2, -1).unbind(1)
        both = torch.cat([first_BM, second_BM, first_BM * second_BM, first_BM - second_BM], dim=-1)
        logits_BK: Tensor = self.head(both)
        return logits_BK
