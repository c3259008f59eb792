"""Contestants side by side: interleaved times, and peak memory in processes of their own.

Shapes: B batch, L time, M width.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
SEED = 0
# In a round a contestant runs for at least this long: one slow call, or the median of several fast ones.
SLICE_S = 0.3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
# Passes whose peak is taken: the second finds the memory as the first left it.
MEMORY_PASSES = 2
# Of the largest value of a tensor. Gradients sum over all tokens in another order than the peer's.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3

Step = Callable[[], object]
Build = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Shape:
    """The input of a block, (B, L, M)."""

    batch: int
    length: int
    width: int


class BlockPass:
    """Forward and backward of one block, input gradient included, as in the middle of a network.

    In float32, and with `rounds` set as training in bfloat16 computes it. On a GPU a call ends when its work has.
    """

    def __init__(self, block: nn.Module, shape: Shape, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(SEED)
        size = (shape.batch, shape.length, shape.width)
        self.block = block.to(device)
        self.rounds = False
        self._device = device
        self._x_BLM = torch.randn(size, generator=generator).to(device).requires_grad_()
        self._dy_BLM = torch.randn(size, generator=generator).to(device)
        self._y_BLM: Tensor | None = None

    def __call__(self) -> None:
        self.block.zero_grad(set_to_none=True)
        self._x_BLM.grad = None
        with torch.autocast(self._device, torch.bfloat16, enabled=self.rounds):
            y_BLM = self.block(self._x_BLM)
        y_BLM.backward(self._dy_BLM.to(y_BLM.dtype))
        self._y_BLM = y_BLM.detach()
        if self._device == "cuda":
            torch.cuda.synchronize()

    def assert_same_work(self, other: BlockPass, loosened: float = 1.0) -> None:
        """The last call of both gave the same output and gradients; a comparison of unequal work is worthless.

        Tolerances are those of float32, `loosened` times.
        """
        for name, mine in self._results().items():
            theirs = other._results()[name]
            tolerance = loosened * (OUTPUT_TOLERANCE if name == "the output" else GRADIENT_TOLERANCE)
            error = float((mine - theirs).abs().max() / mine.abs().max())
            if not error <= tolerance:
                raise RuntimeError(
                    f"{type(self.block).__name__} and {type(other.block).__name__} do not compute the same: "
                    f"{name} differs by {error:.1e} of its largest value (at most {tolerance:g})"
                )

    def _results(self) -> dict[str, Tensor]:
        results = {"the output": self._y_BLM, "the gradient of the input": self._x_BLM.grad}
        results |= {f"the gradient of {name}": p.grad for name, p in self.block.named_parameters()}
        return {name: part for name, part in results.items() if part is not None}


@dataclass(frozen=True)
class Duel:
    """Ours beside one peer: `ours` and `theirs` have one entry per round, in whatever unit the row compares."""

    peer: str
    ours_ms: float
    peer_ms: float
    ours: list[float]
    theirs: list[float]

    def ratio(self, of_peer: bool) -> float:
        """How many times the peer's cost ours has; else how many times faster ours is."""
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        return ours / theirs if of_peer else theirs / ours

    def spread(self, of_peer: bool) -> float:
        """The interquartile range of the rounds' ratios."""
        pairs = zip(self.ours, self.theirs, strict=True)
        ratios = [ours / theirs if of_peer else theirs / ours for ours, theirs in pairs]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return high - low


def duel(ours: Step, peers: Mapping[str, Step], seconds: float) -> Duel:
    """Time ours and all peers in turns; the opponent is the peer with the smallest median."""
    times = race([ours, *peers.values()], seconds)
    ours_ms = times.pop(0)
    theirs_ms, peer = min(zip(times, peers, strict=True), key=lambda pair: statistics.median(pair[0]))
    return Duel(peer, statistics.median(ours_ms), statistics.median(theirs_ms), ours_ms, theirs_ms)


def race(steps: list[Step], seconds: float) -> list[list[float]]:
    """Milliseconds per round of every step.

    Each round runs all of them, every other round in reverse, so that a drifting clock or a busy neighbour meets
    all alike. Rounds go on until the next would end after `seconds`, within FEWEST_ROUNDS and MOST_ROUNDS.
    """
    times: list[list[float]] = [[] for _ in steps]
    gc.collect()
    start = time.perf_counter()
    for done in range(1, MOST_ROUNDS + 1):
        for i in range(len(steps)) if done % 2 else reversed(range(len(steps))):
            times[i].append(_slice(steps[i]))
        elapsed = time.perf_counter() - start
        if done >= FEWEST_ROUNDS and elapsed * (done + 1) / done > seconds:
            break
    return times


def _slice(step: Step) -> float:
    calls: list[float] = []
    while sum(calls) < SLICE_S:
        start = time.perf_counter()
        step()
        calls.append(time.perf_counter() - start)
    return statistics.median(calls) * 1e3


def duel_for_memory(ours: Build, peer: Build, d_state: int, shape: Shape, seconds: float) -> Duel:
    """Peak memory of a pass through either block, every measurement in a fresh process; the unit is MiB."""
    mine: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    start = time.perf_counter()
    for done in range(1, FEWEST_ROUNDS + 1):
        mine.append(peak_memory(ours, d_state, shape))
        theirs.append(peak_memory(peer, d_state, shape))
        # The peak hardly varies: two rounds will do where a pass is slow.
        if done >= 2 and (time.perf_counter() - start) * (done + 1) / done > seconds:
            break
    (ours_mib, ours_ms), (peer_mib, peer_ms) = zip(*mine, strict=True), zip(*theirs, strict=True)
    sizes = f"{statistics.median(peer_mib):.0f} MiB, ours {statistics.median(ours_mib):.0f} MiB"
    label = f"{peer.__name__}: {sizes}"
    return Duel(label, statistics.median(ours_ms), statistics.median(peer_ms), list(ours_mib), list(peer_mib))


def peak_memory(build: Build, d_state: int, shape: Shape) -> tuple[float, float]:
    """MiB that passes through the block add to a process with everything loaded, and milliseconds of the last."""
    # exec hands on the peak of the process that called it: gigabytes of this one would count as the child's own.
    # So a small launcher stands between.
    launcher = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    job = [f"{build.__module__}:{build.__name__}", *map(str, (d_state, shape.batch, shape.length, shape.width))]
    command = [sys.executable, "-c", launcher, sys.executable, "-m", "benchmarks.measure", *job]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    mib, ms = json.loads(result.stdout.splitlines()[-1])
    return mib, ms


def _measure_peak(target: str, d_state: int, batch: int, length: int, width: int) -> tuple[float, float]:
    module, name = target.split(":")
    build: Build = getattr(importlib.import_module(module), name)
    # A tiny pass first loads what is loaded at first use: kernels, thread pools.
    BlockPass(build(d_state), Shape(1, 8, width))()
    # What is resident now, not the peak so far: imports may have peaked higher, and would hide a part of the pass.
    resident_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    step = BlockPass(build(d_state), Shape(batch, length, width))
    for _ in range(MEMORY_PASSES):
        start = time.perf_counter()
        step()
        ms = (time.perf_counter() - start) * 1e3
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak_bytes - resident_bytes) / 2**20, ms


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    target, *numbers = sys.argv[1:]
    print(json.dumps(_measure_peak(target, *map(int, numbers))))
