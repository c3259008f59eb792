"""What the person at the terminal sees: one progress line kept current, and everyone else's chatter in a file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# Without a terminal a progress line is printed this often, in seconds.
PLAIN_EVERY = 10.0


class Terminal:
    """Lines for a person, and below them one progress line that is rewritten in place. Any thread may write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._width = 0
        self._last_plain = -PLAIN_EVERY
        self._lock = threading.Lock()

    def line(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            self._write(text + "\n")

    def progress(self, text: str) -> None:
        """The current state; replaces the previous one on a terminal, appears now and then elsewhere."""
        with self._lock:
            if self._live:
                with contextlib.suppress(OSError):  # of a terminal that has gone
                    text = text[: os.get_terminal_size(self._stream.fileno()).columns - 1]
                self._write(text)
                self._width = len(text)
            elif time.monotonic() - self._last_plain >= PLAIN_EVERY:
                self._last_plain = time.monotonic()
                self._write(text + "\n")

    def finish(self) -> None:
        """Take the progress line away."""
        with self._lock:
            self._write("")

    def _write(self, text: str) -> None:
        """Write over the progress line. A reader that has gone (`… | head`, a closed terminal) does not end the run."""
        erase = "\r" + " " * self._width + "\r" if self._width else ""
        self._width = 0
        with contextlib.suppress(OSError):
            self._stream.write(erase + text)
            self._stream.flush()


@contextmanager
def chatter_to(path: Path) -> Iterator[Terminal]:
    """Within the block, everything that this process or Ray prints goes to `path`; the Terminal still reaches
    the person.

    The redirection is of the file descriptors, because Ray forwards its workers' output past sys.stdout.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log, os.fdopen(os.dup(1), "w", buffering=1) as person:
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            handlers = _console_handlers_to(log)
            try:
                yield Terminal(person)
            finally:
                for handler, stream in handlers:
                    handler.setStream(stream)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)


def _console_handlers_to(log: TextIO) -> list[tuple[logging.StreamHandler[TextIO], TextIO]]:
    """Point handlers that hold an own stream (under pytest, sys.stderr is not descriptor 2) to the log."""
    moved = []
    for name in (None, "ray", "ray.train", "ray.data", "mlflow", "alembic"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                moved.append((handler, handler.setStream(log)))
    return [(handler, stream) for handler, stream in moved if stream is not None]


def duration(seconds: float) -> str:
    """'8 s', '2:05' or '1:02:03'."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    hours, minutes = divmod(total // 60, 60)
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"


def dims(values: Sequence[float]) -> str:
    """State dimensions of all layers: '16 x 4 layers' where they are equal, '12 9 16 7' where they differ."""
    integers = [int(value) for value in values]
    if len(set(integers)) == 1:
        return f"{integers[0]} x {len(integers)} layers" if len(integers) > 1 else str(integers[0])
    return " ".join(map(str, integers))


def count(value: float) -> str:
    """'950', '12.3k' or '4.56M'."""
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    return f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"
