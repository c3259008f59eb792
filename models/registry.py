"""From a model's config and its task to a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from models.heads import (
    Classifier,
    DocumentClassifier,
    LanguageModel,
    PairClassifier,
    SequenceModel,
    TokenModel,
)
from models.layer import TruncatableLayer
from models.lru import LRU, LRUConfig
from models.mamba import Mamba, MambaConfig
from models.mamba2 import Mamba2, Mamba2Config

AnyConfig = LRUConfig | MambaConfig | Mamba2Config
ModelConfig = Annotated[AnyConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class LanguageTask:
    """Predict the next of `vocab_size` tokens."""

    vocab_size: int


@dataclass(frozen=True)
class RecallTask:
    """Answer with one of `vocab_size` tokens where something is asked, equally often in every sequence."""

    vocab_size: int


@dataclass(frozen=True)
class ClassificationTask:
    """Tell a sequence of `n_features` numbers per step apart into `n_classes`."""

    n_features: int
    n_classes: int


@dataclass(frozen=True)
class TokenClassificationTask:
    """Tell documents of `vocab_size` tokens, of which 0 is padding, apart into `n_classes`."""

    vocab_size: int
    n_classes: int


@dataclass(frozen=True)
class PairClassificationTask:
    """The same for pairs of documents."""

    vocab_size: int
    n_classes: int


Task = LanguageTask | RecallTask | ClassificationTask | TokenClassificationTask | PairClassificationTask


def build_model(
    config: AnyConfig, task: Task, state_dims: Sequence[int], place: Callable[[TruncatableLayer], None] | None = None
) -> SequenceModel:
    """A freshly initialised model with one state dimension per layer, in float32, on the CPU.

    `place` may take each mixer elsewhere before the next is made, so that not all of them need to be here at once.
    """
    assert len(state_dims) == config.n_layers
    mixers = []
    for layer, dim in enumerate(state_dims):
        mixers.append(build_mixer(config, layer, dim))
        if place is not None:
            place(mixers[-1])
    model = _with_head(task, config.d_model, mixers)
    for block in model.backbone.blocks():
        block.dropout.share = config.dropout
    return model


def _with_head(task: Task, d_model: int, mixers: Sequence[TruncatableLayer]) -> SequenceModel:
    match task:
        case LanguageTask():
            return LanguageModel(task.vocab_size, d_model, mixers)
        case RecallTask():
            return TokenModel(task.vocab_size, d_model, mixers)
        case ClassificationTask():
            return Classifier(task.n_features, task.n_classes, d_model, mixers)
        case TokenClassificationTask():
            return DocumentClassifier(task.vocab_size, task.n_classes, d_model, mixers)
        case PairClassificationTask():
            return PairClassifier(task.vocab_size, task.n_classes, d_model, mixers)


def build_mixer(config: AnyConfig, layer: int, d_state: int) -> TruncatableLayer:
    """The mixer of one layer with `d_state` states left, freshly initialised, on the CPU, in float32."""
    match config:
        case LRUConfig():
            return LRU(config, d_state)
        case MambaConfig():
            return Mamba(config, d_state)
        case Mamba2Config():
            return Mamba2(config, d_state, config.state_dims[layer])
