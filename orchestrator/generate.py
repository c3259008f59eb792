"""Text in the manner of what a run was trained on, byte by byte or token by token of the run's tokenizer."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from models.generation import generate
from models.heads import LanguageModel
from orchestrator.data import tokenizer
from orchestrator.errors import UserError
from orchestrator.inference import load_run

# Tokens after which what is no character by then will be none; UTF-8 has four bytes at most.
LONGEST_CHARACTER = 4


def generate_text(
    run: Path | str, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int | None
) -> Iterator[str]:
    """The prompt and `tokens` bytes that follow it, piece by piece as they come, decoded as UTF-8.

    Bytes that are no UTF-8 become U+FFFD. Where the run has a tokenizer, its tokens are meant. An empty prompt stands
    for the beginning of a line. Without a seed every call draws anew.

    Raises:
        UserError: at once, where a setting is out of its range, `run` has no language model to load, its tokenizer is
            gone, or the prompt is nothing for it; while pieces are drawn, where that model has diverged.
    """
    if tokens < 1:
        raise UserError(f"tokens {tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature:g} must be 0 (always the likeliest byte) or a positive number")
    if top_k is not None and top_k < 1:
        raise UserError(f"top-k {top_k} must be at least 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} must lie between 0 and 2^63 - 1")
    model, config = load_run(run)
    if not isinstance(model, LanguageModel):
        raise UserError(f"run {run} models no text; generate needs a run whose data.source is text, as stdlib is")
    # Products of one row are too small to share, and beside a training threads wait for each other: 20 times slower.
    torch.set_num_threads(1)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    name = getattr(config.data, "tokenizer", None)
    given, decode = _bytes(prompt) if name is None else _tokens(prompt, name, model)

    def pieces() -> Iterator[str]:
        yield prompt if name is not None else decode(given)
        following = generate(model, given or b"\n", temperature, top_k, generator)
        try:
            for token in islice(following, tokens):
                yield decode([token])
        except FloatingPointError as error:
            raise UserError(f"run {run} generates nothing: {error}") from error
        yield decode([])

    return pieces()


Decode = Callable[[Sequence[int]], str]
"""Tokens to as much text as they complete; no tokens for what is left at the end."""


def _bytes(prompt: str) -> tuple[Sequence[int], Decode]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(tokens: Sequence[int]) -> str:
        return decoder.decode(bytes(tokens), final=not tokens)

    return prompt.encode(errors="surrogateescape"), decode  # how arguments hold bytes that are no text


def _tokens(prompt: str, name: str, model: LanguageModel) -> tuple[Sequence[int], Decode]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"prompt {prompt!r} must be UTF-8, which data.tokenizer {name} takes") from error
    loaded = tokenizer.load(name)
    if (size := tokenizer.vocab_size(loaded)) != (trained := model.lm_head.out_features):
        raise UserError(f"data.tokenizer {name} has {size} tokens, but the run was trained with {trained}")
    given = tokenizer.encode(loaded, [prompt or "\n"]).tolist()
    if not given:
        raise UserError(f"prompt {prompt!r} has no token in data.tokenizer {name}")
    before, pending = list(given), list[int]()

    def decode(tokens: Sequence[int]) -> str:
        nonlocal before, pending
        pending += tokens
        # A token's text depends on the one before it, which may bring or take a space.
        context, text = (loaded.decode(ids, skip_special_tokens=False) for ids in (before, before + pending))
        incomplete = text.endswith("\ufffd")
        if tokens and incomplete and len(pending) < LONGEST_CHARACTER:
            return ""
        # What was shown of half a character must not become another one with what follows.
        before, pending = [] if incomplete else pending or before, []
        return text[len(context) :]

    return given, decode
