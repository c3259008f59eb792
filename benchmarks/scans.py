"""How fast the scans are beside other code: `python -m benchmarks.scans [--only SUBSTRING]`.

Every row is one comparison, timed in turns in this process. To add a row: a function from a time box in seconds to
a `Duel`, and an entry in ROWS.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.measure import THREADS, BlockPass, Build, Duel, Shape, duel, duel_for_memory
from models.mamba import Mamba

RESULTS = Path(__file__).resolve().parent / "results" / "latest.json"
BLOCK = Shape(batch=8, length=256, width=peers.D_MODEL)
LONG_BLOCK = Shape(batch=8, length=1024, width=peers.D_MODEL)


def block_beside(build_ours: Build, shape: Shape, d_state: int, builds: Sequence[Build], seconds: float) -> Duel:
    """Our block beside others with its weights; the first, untimed call proves that the work is equal."""
    ours = BlockPass(build_ours(d_state), shape)
    ours()
    others = {}
    for build in builds:
        other = build(d_state)
        other.load_state_dict(ours.block.state_dict())
        others[build.__name__] = BlockPass(other, shape)
        others[build.__name__]()
        ours.assert_same_work(others[build.__name__])
    return duel(ours, others, seconds)


def block_beside_products(build: Build, shape: Shape, d_state: int, seconds: float) -> Duel:
    ours, products = BlockPass(build(d_state), shape), peers.matrix_products(build(d_state), shape)
    ours()
    products()
    return duel(ours, {"its matrix products": products}, seconds)


def block_after_cut(before: int, after: int, seconds: float) -> Duel:
    large, small = BlockPass(peers.ours(before), BLOCK), BlockPass(peers.ours(after), BLOCK)
    large()
    small()
    return duel(small, {f"N={before}": large}, seconds)


def block_with_statistics(d_state: int, seconds: float) -> Duel:
    without, gathering = BlockPass(peers.ours(d_state), BLOCK), BlockPass(peers.ours(d_state), BLOCK)
    assert isinstance(gathering.block, Mamba)
    without()
    gathering.block.start_statistics()
    gathering()
    gathering.assert_same_work(without)
    if int(gathering.block.finish_statistics().tokens) != BLOCK.batch * BLOCK.length:
        raise RuntimeError("the block did not gather the statistics of every token")
    gathering.block.start_statistics()
    return duel(gathering, {"without statistics": without}, seconds)


def lru_step(task: peers.LRUTask, seconds: float) -> Duel:
    ours, floor = (peers.lru_training_step(task, stateless) for stateless in (False, True))
    ours()
    floor()
    return duel(ours, {"without the recurrence": floor}, seconds)


@dataclass(frozen=True)
class Row:
    """One comparison, timed within about `seconds`, and what its ratio has to reach.

    The ratio says how many times faster ours is, or, with `at_most`, how many times the peer's cost ours has;
    `at_least` and `aim` bound it from below, or with `at_most` from above.
    """

    name: str
    measure: Callable[[float], Duel]
    at_least: float
    aim: float
    seconds: float
    at_most: bool = False

    def passed(self, ratio: float) -> bool:
        return ratio <= self.at_least if self.at_most else ratio >= self.at_least


AT_MOST = True
LIBRARIES = (peers.mambapy, peers.transformers)
SMNIST = peers.LRUTask(d_state=256, d_model=8, n_features=1, batch=50, length=784)
SCIFAR = peers.LRUTask(d_state=384, d_model=512, n_features=3, batch=4, length=1024)
MEMORY = partial(duel_for_memory, peers.ours, peers.mambapy, 128, BLOCK)
BESIDE = partial(block_beside, peers.ours, BLOCK)
BESIDE2 = partial(block_beside, peers.our_mamba2, LONG_BLOCK, 128, [peers.transformers_mamba2])
PRODUCTS = partial(block_beside_products, peers.ours, BLOCK)
ROWS = (
    Row("Mamba-1 block N=16, times faster than torch libraries", partial(BESIDE, 16, LIBRARIES), 12, 20, 40),
    Row("Mamba-1 block N=128, times faster than torch libraries", partial(BESIDE, 128, LIBRARIES), 65, 90, 100),
    Row("Mamba-1 block N=16, times faster than a loop", partial(BESIDE, 16, [peers.naive]), 10, 16, 30),
    Row("Mamba-1 block N=128, times faster than a loop", partial(BESIDE, 128, [peers.naive]), 38, 50, 50),
    Row("Mamba-1 block N=12, times its matrix products", partial(PRODUCTS, 12), 2.2, 1.6, 15, AT_MOST),
    Row("Mamba-1 block N=128, times its matrix products", partial(PRODUCTS, 128), 3.5, 2.7, 15, AT_MOST),
    Row("Mamba-1 block cut from N=128 to 12, times faster", partial(block_after_cut, 128, 12), 1.9, 2.5, 15),
    Row("Mamba-1 block N=128, times mambapy's peak memory", MEMORY, 1 / 6, 1 / 8, 75, AT_MOST),
    Row(
        "Mamba-1 block N=64 with statistics, times without", partial(block_with_statistics, 64), 1.15, 1.05, 15, AT_MOST
    ),
    Row("Mamba-2 block N=128 headdim 64 L=1024, times faster than transformers", BESIDE2, 6, 12, 40),
    Row("LRU step N=256 H=8 L=784 B=50, times without recurrence", partial(lru_step, SMNIST), 2.1, 1.7, 20, AT_MOST),
    Row("LRU step N=384 H=512 L=1024 B=4, times without recurrence", partial(lru_step, SCIFAR), 1.8, 1.4, 20, AT_MOST),
)


@dataclass(frozen=True)
class Result:
    """A row of the JSON file. The unit of `ratio`, and whether `at_least` bounds it from above, is in the name."""

    name: str
    ours_ms: float
    peer: str
    peer_ms: float
    ratio: float
    spread: float
    at_least: float
    aim: float
    passed: bool


HEADINGS = ("", "ours ms", "peer", "peer ms", "ratio", "spread", "at least", "aim", "passed", "rounds")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every row that ran passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scans", description="Benchmarks of the scans.")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="run the rows whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="PATH", help=f"JSON file (default: {RESULTS})")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if options.only.lower() in row.name.lower()]
    if not rows:
        parser.error(f"--only {options.only!r} is in no row's name; the rows are:\n" + "\n".join(r.name for r in ROWS))
    torch.set_num_threads(THREADS)
    try:
        heading = head()
    except metadata.PackageNotFoundError as error:
        parser.error(f"the peer {error.name} is not installed: pip install -e '.[bench]'")

    results: list[Result] = []
    lines: list[tuple[str, ...]] = [HEADINGS]
    for row in rows:
        start = time.perf_counter()
        print(f"{row.name} ...", end=" ", flush=True, file=sys.stderr)
        result, rounds = run(row)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
        results.append(result)
        lines.append(cells(row, result, rounds))
    print(heading)
    print(table(lines))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    return 0 if all(result.passed for result in results) else 1


def run(row: Row) -> tuple[Result, int]:
    """The row's result, and its number of rounds."""
    measured = row.measure(row.seconds)
    ratio, spread = measured.ratio(row.at_most), measured.spread(row.at_most)
    numbers = (measured.ours_ms, measured.peer, measured.peer_ms, ratio, spread, row.at_least, row.aim)
    return Result(row.name, *numbers, row.passed(ratio)), len(measured.ours)


def head() -> str:
    """What the numbers depend on."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "mambapy", "transformers"))
    return (
        f"{versions}; {cpu_model()}, {torch.get_num_threads()} threads\n"
        f"float32, forward and backward; blocks: B {BLOCK.batch}, d_model {BLOCK.width}, L {BLOCK.length} unless said\n"
        "medians of interleaved rounds; spread is the interquartile range of the rounds' ratios"
    )


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cells(row: Row, result: Result, rounds: int) -> tuple[str, ...]:
    bound = "≤" if row.at_most else "≥"
    return (
        row.name,
        f"{result.ours_ms:.1f}",
        result.peer,
        f"{result.peer_ms:.1f}",
        f"{result.ratio:.3g}",
        f"{result.spread:.2g}",
        f"{bound} {row.at_least:.3g}",
        f"{bound} {row.aim:.3g}",
        "yes" if result.passed else "no",
        str(rounds),
    )


def table(lines: Sequence[Sequence[str]]) -> str:
    """Names and peers to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    layout = "  ".join(f"{{:{'<' if i in (0, 2) else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(layout.format(*line) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
