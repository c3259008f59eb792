"""Named points at which a test can hold a worker, to kill something exactly there.

Nothing happens unless the environment variable RAYDUCE_HOLD is `POINT@STEP=FILE`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_WHERE, _, _FILE = os.environ.get("RAYDUCE_HOLD", "").partition("=")


def reach(point: str, step: int) -> None:
    """The first worker that comes by writes its process id to FILE, and waits until FILE.go is there."""
    if not _WHERE or f"{point}@{step}" != _WHERE:
        return
    held = Path(_FILE)
    try:
        with held.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    while not held.with_name(held.name + ".go").exists():
        time.sleep(0.02)
