"""Named points at which a test can hold a worker, to kill something exactly there.

Nothing happens unless the environment variable RAYDUCE_HOLD names a folder. A file POINT@PLACE in it arms that point,
once; a place is a step, or the name of a folder.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_FOLDER = os.environ.get("RAYDUCE_HOLD")


def reach(point: str, place: int | str) -> None:
    """The first worker that comes by an armed point leaves its process id, and waits to be let go."""
    if _FOLDER is None:
        return
    armed = Path(_FOLDER, f"{point}@{place}")
    try:
        held = armed.rename(f"{armed}.held")
    except FileNotFoundError:
        return
    held.write_text(str(os.getpid()))
    while not Path(f"{armed}.go").exists():
        time.sleep(0.02)
