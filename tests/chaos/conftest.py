"""The tables that `make chaos` ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest
from statistics import median

import pytest

PROPERTY = "chaos"
HEAD = ("case", "recovered", "seconds", "losses and final state equal")

Told = Callable[..., AbstractContextManager[list[float]]]


@pytest.fixture
def told(record_property: Callable[[str, object], None]) -> Told:
    """A block that tells of these cases, whichever way it ends; it fills a list with seconds from kill to new group.

    A case has recovered if there was one, or the block came to its end, which it does where all is as it should be.
    """

    @contextmanager
    def block(*cases: str) -> Iterator[list[float]]:
        seconds: list[float] = []
        equal = "NO"
        try:
            yield seconds
            equal = "yes"
        finally:
            for case, took in zip_longest(cases, seconds):
                recovered = equal if took is None else "yes"
                record_property(PROPERTY, (case, recovered, "" if took is None else f"{took:.0f}", equal))

    return block


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = sorted(row for report in called for name, row in report.user_properties if name == PROPERTY)
    if rows:
        terminalreporter.section("chaos")
        for row in [HEAD, *rows]:
            terminalreporter.write_line("{:<72} {:<9}  {:>7}  {}".format(*row))
        terminalreporter.section("chaos: seconds from a kill until another group of workers began")
        by_victim: dict[str, list[int]] = {}
        for case, _, seconds, _ in rows:
            if seconds:
                by_victim.setdefault(case.split(", ")[1], []).append(int(seconds))
        for victim, took in by_victim.items():
            spread = f"median {median(took):.0f}, {min(took)} to {max(took)}"
            terminalreporter.write_line(f"{victim:<16} {len(took):>3} kills: {spread}")
