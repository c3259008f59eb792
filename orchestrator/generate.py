"""Text in the manner of what a run was trained on."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from models.generation import generate
from models.heads import LanguageModel
from orchestrator.errors import UserError
from orchestrator.inference import load_model


def generate_text(
    run: Path | str, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int | None
) -> Iterator[str]:
    """The prompt and `tokens` bytes that follow it, piece by piece as they come, decoded as UTF-8.

    Bytes that are no UTF-8 become U+FFFD. An empty prompt stands for the beginning of a line. Without a seed every
    call draws anew.

    Raises:
        UserError: at once, where a setting is out of its range or `run` has no language model to load; while
            pieces are drawn, where that model has diverged.
    """
    if tokens < 1:
        raise UserError(f"tokens {tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature:g} must be 0 (always the likeliest byte) or a positive number")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k {top_k} must be at least 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} must lie between 0 and 2^63 - 1")
    model = load_model(run)
    if not isinstance(model, LanguageModel):
        raise UserError(f"run {run} models no text; generate needs a run whose data.source is text, as stdlib is")
    # Products of one row are too small to share, and beside a training threads wait for each other: 20 times slower.
    torch.set_num_threads(1)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def pieces() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        given = prompt.encode(errors="surrogateescape")  # how arguments hold bytes that are no text
        yield decoder.decode(given)
        following = generate(model, given or b"\n", temperature, top_k, generator)
        try:
            for token in islice(following, tokens):
                yield decoder.decode(bytes([token]))
        except FloatingPointError as error:
            raise UserError(f"run {run} generates nothing: {error}") from error
        yield decoder.decode(b"", final=True)

    return pieces()
