"""One run, held at named points of its life, with one of its processes killed at each by SIGKILL."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.ray_cluster import START_TRIES
from tests.runs import HANGS_S, alive_in, start, wait_until

# A process of the run, as `ps` shows it. `worker` is the one that is held; `other` is the one that is not, which has
# gone on into the next collective: into the middle of a reshape, for example.
TITLES = {"coordinator": "ray::Foreman", "controller": "ray::TrainController", "other": "ray::RayTrainWorker"}

# Where a worker is held, in the order of a run: the cuts are at steps 3 and 7, and checkpoints are due at 5 and 10. Two
# points of one checkpoint would be one too many: those who live on may complete it. A write is held when the content is
# handed over but does not have its name yet: beside it on a disk, in a stream to a store.
POINTS: dict[str, tuple[str, int | str]] = {
    "before the first checkpoint": ("step", 2),
    "while its part of a checkpoint is written": ("write", "step-00000005"),
    "between two probes": ("step", 6),
    "while statistics are gathered": ("statistics", 7),
    "once the plan is agreed": ("plan", 7),
    "in the middle of the reshape": ("rebuild", 7),
    "right after the reshape": ("reshape", 7),
    "before a checkpoint is complete": ("manifest", 10),
}


# Who of these dies takes nobody along: the worker that is held has to find out for itself.
SURVIVED = ("coordinator", "other")


@dataclass(frozen=True)
class Strike:
    """A signal to one process of a run, at the moment that a worker reaches a point at a step or a folder."""

    victim: str
    point: str
    place: int | str
    signal: signal.Signals = signal.SIGKILL
    once: str | None = None
    """A file in the run's folder that has to be there first."""


@dataclass(frozen=True)
class Outcome:
    """How a disturbed run has ended.

    `first` is what the first group took, from the command on. `output` is that of all drivers, `code` and `errors` are
    the last one's.
    """

    code: int
    output: str
    errors: str
    first: float


class Points:
    """Where workers are held: each point once. `folder` is what RAYDUCE_HOLD names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def arm(self, point: str, place: int | str) -> None:
        (self.folder / f"{point}@{place}").touch()

    def held(self, driver: subprocess.Popen[str], point: str, place: int | str) -> int:
        """Wait until a worker is held; its process id."""
        file = self.folder / f"{point}@{place}.held"
        wait_until(lambda: (file.exists() and file.read_text()) or driver.poll() is not None, f"{point} at {place}")
        assert driver.poll() is None, driver.communicate()
        return int(file.read_text())

    def let_go(self, point: str, place: int | str) -> None:
        (self.folder / f"{point}@{place}.go").touch()


def disturbed(raw: dict[str, Any], strikes: Iterable[Strike], seconds: list[float]) -> Outcome:
    """Run `raw` to its end through all strikes, in this order; a killed driver is started again.

    `seconds` gets how long it took from each strike until another group of workers began.
    """
    points = Points(Path(raw["storage"]).parent / f"points-of-{raw['name']}")
    attempts = Path(raw["storage"]) / raw["name"] / "attempt"
    environment = {"RAYDUCE_HOLD": str(points.folder)}
    driver = start(raw, **environment)
    drivers, outputs, began_at = [driver], [], time.monotonic()
    wait_until(lambda: attempts.exists() or driver.poll() is not None, "the first group")
    first = time.monotonic() - began_at
    for strike in strikes:
        # Not earlier: a group that is dying from the strike before may still come by.
        points.arm(strike.point, strike.place)
        held = points.held(driver, strike.point, strike.place)
        time.sleep(0.5)  # for the others to go on until they need the one that is held
        if strike.once is not None:
            wait_until((attempts.parent / strike.once).exists, strike.once)
        attempt, struck = attempts.read_text(), time.monotonic()
        os.kill(_process(driver, strike.victim, held), strike.signal)
        if strike.victim in SURVIVED:
            points.let_go(strike.point, strike.place)
        if strike.victim == "driver":
            outputs.append(driver.communicate()[0])
            driver = start(raw, **environment)  # at once, though its workers may still be dying
            drivers.append(driver)
        another = functools.partial(began, attempts, attempt, driver)
        wait_until(another, f"another group after {strike}")
        if attempts.read_text() != attempt:
            seconds.append(time.monotonic() - struck)
    output, errors = driver.communicate(timeout=HANGS_S)
    # Of a killed driver's, Ray's own agents take longest: they ask for a while where the rest has gone.
    wait_until(lambda: not any(alive_in(ended.pid) for ended in drivers), "all processes end", within=120)
    return Outcome(driver.returncode, "".join([*outputs, output]), errors, first)


def finished(raw: dict[str, Any]) -> Path:
    """The folder of a run that nothing disturbs."""
    driver = start(raw)
    output, errors = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 0, output + errors
    return Path(raw["storage"]) / raw["name"]


def began(attempts: Path, before: str, driver: subprocess.Popen[str]) -> bool:
    """Whether another group of workers has begun than in attempt `before`, or the driver has ended."""
    return attempts.read_text() != before or driver.poll() is not None


def _process(driver: subprocess.Popen[str], victim: str, held: int) -> int:
    if victim == "driver":
        return driver.pid
    if victim == "worker":
        return held
    # Of one that is dying from the strike before there may still be a trace.
    wait_until(lambda: len(_named(driver, victim, held)) == 1, f"one {victim}")
    return _named(driver, victim, held)[0]


def _named(driver: subprocess.Popen[str], victim: str, held: int) -> list[int]:
    return [pid for pid, title in alive_in(driver.pid) if title.startswith(TITLES[victim]) and pid != held]


@contextmanager
def shared_cluster() -> Iterator[str]:
    """A Ray cluster of its own session, which drivers come to and leave again; its address."""
    # In a folder of its own, short enough for sockets: from the usual one, any other Ray would learn of this cluster.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    with ExitStack() as ends:
        ends.callback(shutil.rmtree, folder, ignore_errors=True)
        for _ in range(START_TRIES):  # as `ray_cluster`, for the same reason
            head, address = _head(folder)
            ends.callback(_end, head)
            wait_until(functools.partial(_decided, head), "the cluster is up", within=120)
            if head.poll() is None:
                break
        assert head.poll() is None, (folder / "said").read_text()
        yield address


def _head(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The process of a head that starts, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    with (folder / "said").open("wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True), f"127.0.0.1:{port}"


def _decided(head: subprocess.Popen[bytes]) -> bool:
    """Whether a head is up or has ended."""
    return head.poll() is not None or any("raylet" in title for _, title in alive_in(head.pid))


def _end(head: subprocess.Popen[bytes]) -> None:
    if head.poll() is None:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


def actors_alive(address: str) -> list[str]:
    """Class names, seen by a driver that comes for this alone; without one that Ray Train leaves to the cluster."""
    code = f"""
import ray, ray._private.state as state
ray.init({address!r}, logging_level="ERROR", log_to_driver=False)
print(*[actor["ActorClassName"] for actor in state.actors().values() if actor["State"] != "DEAD"])
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return [name for name in asked.stdout.split() if name != "_AutoscalingCoordinatorActor"]
