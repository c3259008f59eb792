"""What a space is made of: knobs, each with a range and a line that says what it turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Float:
    """Any number from `low` to `high`; with `log`, every ratio is as likely."""

    low: float
    high: float
    doc: str
    log: bool = False


@dataclass(frozen=True)
class Integer:
    """Any integer from `low` to `high`, both included; with `log`, every ratio is as likely."""

    low: int
    high: int
    doc: str
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]
    doc: str


Knob = Float | Integer | Choice
