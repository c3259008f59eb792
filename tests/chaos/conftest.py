"""The table that `make chaos` ends with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import zip_longest

import pytest

PROPERTY = "chaos"
HEAD = ("killed", "seconds", "recovered, and ended as undisturbed")

Told = Callable[..., AbstractContextManager[list[float]]]


@pytest.fixture
def told(record_property: Callable[[str, object], None]) -> Told:
    """A block that tells of these cases, whichever way it ends; it fills a list with seconds from kill to new group."""

    @contextmanager
    def block(*cases: str) -> Iterator[list[float]]:
        seconds: list[float] = []
        end = "NO"
        try:
            yield seconds
            end = "yes"
        finally:
            for case, took in zip_longest(cases, seconds):
                record_property(PROPERTY, (case, "" if took is None else f"{took:.0f}", end))

    return block


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = sorted(row for report in called for name, row in report.user_properties if name == PROPERTY)
    if rows:
        terminalreporter.section("chaos")
        for row in [HEAD, *rows]:
            terminalreporter.write_line("{:<72} {:>8}  {}".format(*row))
