"""From rows of comparisons to one table and one JSON file."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.measure import THREADS, Duel

RESULTS = Path(__file__).resolve().parent / "results"
AT_MOST = True


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


def report(
    program: str,
    description: str,
    rows: Sequence[Row],
    head: Callable[[], str],
    output: Path,
    arguments: Sequence[str] | None,
) -> int:
    """Run the rows that the command line asks for, print their table under `head()`, write the JSON file.

    Exit status 0 if every row that ran passed.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="run the rows whose name contains this")
    parser.add_argument("--output", type=Path, default=output, metavar="PATH", help=f"JSON file (default: {output})")
    options = parser.parse_args(arguments)
    chosen = [row for row in rows if options.only.lower() in row.name.lower()]
    if not chosen:
        parser.error(f"--only {options.only!r} is in no row's name; the rows are:\n" + "\n".join(r.name for r in rows))
    torch.set_num_threads(THREADS)
    try:
        heading = head()
    except metadata.PackageNotFoundError as error:
        parser.error(f"the peer {error.name} is not installed: pip install -e '.[bench]', and mamba-ssm for a GPU")

    results: list[Result] = []
    lines: list[tuple[str, ...]] = [HEADINGS]
    for row in chosen:
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


def setting(*libraries: str, said: str = "") -> str:
    """What the numbers depend on: versions, processor and threads, and what else is to be said of them."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in libraries)
    return (
        f"{versions}; {cpu_model()}, {torch.get_num_threads()} threads\n{said}"
        "medians of interleaved rounds; spread is the interquartile range of the rounds' ratios"
    )


def run(row: Row) -> tuple[Result, int]:
    """The row's result, and its number of rounds."""
    measured = row.measure(row.seconds)
    ratio, spread = measured.ratio(row.at_most), measured.spread(row.at_most)
    numbers = (measured.ours_ms, measured.peer, measured.peer_ms, ratio, spread, row.at_least, row.aim)
    return Result(row.name, *numbers, row.passed(ratio)), len(measured.ours)


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


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
