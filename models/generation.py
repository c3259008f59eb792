"""Text from a language model, token by token.

Shapes: B batch (1 here), V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.heads import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Sequence[int], temperature: float, top_k: int | None, generator: torch.Generator
) -> Iterator[int]:
    """Tokens that follow `prompt`, without end: take as many as are wanted.

    Each costs one step of the recurrence, and the state is all that is remembered. `generator` is on the CPU, so
    that a seed means the same on every device; the other arguments are as in `sample`.

    Raises:
        FloatingPointError: as `sample`.
    """
    assert len(prompt) > 0, "the first token needs one before it"
    device = next(model.parameters()).device
    states = model.initial_state(1)
    for token in prompt:
        logits_BV, states = model.step(torch.tensor([token], device=device), states)
    while True:
        token = sample(logits_BV[0], temperature, top_k, generator)
        yield token
        logits_BV, states = model.step(torch.tensor([token], device=device), states)


def sample(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """A token drawn from softmax(logits / temperature) over the `top_k` likeliest; the likeliest at temperature 0.

    Raises:
        FloatingPointError: a logit is NaN or infinite.
    """
    if not bool(torch.isfinite(logits_V).all()):
        raise FloatingPointError("its logits are NaN or infinite; the training has diverged")
    vocab_size = logits_V.numel()
    k = 1 if temperature == 0 else min(top_k or vocab_size, vocab_size)
    logits_K, tokens_K = logits_V.double().cpu().topk(k)
    # Differences to the largest: these stay finite, or end at -inf, however small the temperature.
    probabilities_K = torch.softmax((logits_K - logits_K[0]) / (temperature or 1.0), dim=0)
    return int(tokens_K[torch.multinomial(probabilities_K, 1, generator=generator)])
