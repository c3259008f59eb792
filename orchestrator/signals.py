"""SIGINT and SIGTERM at the driver: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from orchestrator.errors import Interrupted


class StopRequest:
    """The signal that asked the run to end, None until one does."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Interrupted("ended at once; the same command continues from the last checkpoint", number)
        self.signal = number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Take both signals for the duration of the block. Only the main thread can: elsewhere nobody ever asks."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
