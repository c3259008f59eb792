"""One run, held at a named point of its life, with one of its processes killed there by SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runs import start, wait_until

# A process of the run, as `ps` shows it. `worker` is the one that is held; `other` is the one that is not, which has
# gone on into the next collective: into the middle of a reshape, for example.
TITLES = {"coordinator": "ray::Coordinator", "controller": "ray::TrainController", "other": "ray::RayTrainWorker"}


@dataclass(frozen=True)
class Outcome:
    """How a disturbed run has ended, and how long it took from the kill on."""

    output: str
    seconds: float


def disturbed(raw: dict[str, Any], victim: str, point: str, step: int) -> Outcome:
    """Run `raw` to its end through the death of `victim`; a killed driver is started again by the same command."""
    held = Path(raw["storage"]).parent / "held"
    driver = start(raw, RAYDUCE_HOLD=f"{point}@{step}={held}")
    wait_until(lambda: (held.exists() and held.read_text()) or driver.poll() is not None, f"{point} at step {step}")
    assert driver.poll() is None, driver.communicate()
    time.sleep(0.5)  # for the others to go on until they need the one that is held
    os.kill(_process(driver, victim, int(held.read_text())), signal.SIGKILL)
    held.with_name("held.go").touch()
    killed = time.monotonic()
    session = driver.pid
    if victim == "driver":
        driver.wait()
        wait_until(lambda: not _left(session), "the processes of a killed driver end", within=60)
        driver = start(raw)
    output, said = driver.communicate(timeout=400)
    seconds = time.monotonic() - killed
    assert driver.returncode == 0, output + said
    wait_until(lambda: not _left(session) and not _left(driver.pid), "all processes end", within=60)
    return Outcome(output, seconds)


def _process(driver: subprocess.Popen[str], victim: str, held: int) -> int:
    if victim == "driver":
        return driver.pid
    if victim == "worker":
        return held
    found = [pid for pid, title in _left(driver.pid) if title.startswith(TITLES[victim]) and pid != held]
    assert len(found) == 1, found
    return found[0]


def _left(session: int) -> list[tuple[int, str]]:
    """Process id and title of everything that lives in the session of a driver."""
    listing = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
    return [(int(pid), title) for pid, state, title in rows if not state.startswith("Z")]
