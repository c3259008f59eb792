"""The table that `make chaos` ends with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

PROPERTY = "chaos"
HEAD = ("killed", "seconds", "final loss and weights equal")

AddRow = Callable[[str, str, str], None]


@pytest.fixture
def add_row(record_property: Callable[[str, object], None]) -> AddRow:
    """Adds case, seconds from the kill until other workers began, and whether the end is the undisturbed run's."""
    return lambda *row: record_property(PROPERTY, row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = sorted(row for report in called for name, row in report.user_properties if name == PROPERTY)
    if rows:
        terminalreporter.section("chaos")
        for row in [HEAD, *rows]:
            terminalreporter.write_line("{:<66} {:>13}  {}".format(*row))
