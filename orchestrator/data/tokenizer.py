"""Tokenizers of the `tokenizers` library: where they come from, and text to tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.source import absolute, digest, read
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Pieces that are tokenized at once, on all cores.
PIECES = 256


def is_file(name: str) -> bool:
    """Whether data.tokenizer names a file; else it is a name on the Hugging Face Hub."""
    return name.endswith(".json")


def rooted(name: str) -> str:
    """The name, from the root where it is a file's: workers run in another directory than the driver."""
    return str(absolute(Path(name))) if is_file(name) else name


def facts(name: str) -> str:
    """What changes with the tokenizer: its file's content, or its name.

    Raises:
        UserError: the file cannot be read.
    """
    return digest(read(Path(name))) if is_file(name) else name


def load(name: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or the one of this name on the Hugging Face Hub.

    Raises:
        UserError: the library is not installed, or there is no such tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(f"data.tokenizer {name} needs the library tokenizers: pip install 'rayduce[text]'") from error
    try:
        return Tokenizer.from_str(read(Path(name)).decode()) if is_file(name) else Tokenizer.from_pretrained(name)
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        reason = " ".join(str(error).split())
        what = "is no tokenizer.json" if is_file(name) else "is no file *.json, nor to be had from the Hugging Face Hub"
        raise UserError(f"data.tokenizer {name} {what}: {reason}") from error


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token: added tokens count, and so do holes."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def encode(tokenizer: Tokenizer, pieces: Iterable[str]) -> NDArray[np.unsignedinteger]:
    """The tokens of all pieces, one behind the other, without special tokens; the smallest dtype that holds them."""
    dtype = np.min_scalar_type(max(0, vocab_size(tokenizer) - 1))
    arrays = [np.empty(0, dtype)]
    rest: Iterator[str] = iter(pieces)
    while some := list(islice(rest, PIECES)):
        arrays += [np.array(e.ids, dtype) for e in tokenizer.encode_batch_fast(some, add_special_tokens=False)]
    return np.concatenate(arrays)
