"""The table that `make chaos` ends with."""

from __future__ import annotations

import pytest

ROWS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[tuple[str, str, str]]:
    """Rows of case, seconds from the kill until other workers began, and whether the end is the undisturbed run's."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if rows:
        terminalreporter.section("chaos")
        for row in [("killed", "seconds", "final loss and weights equal"), *rows]:
            terminalreporter.write_line("{:<66} {:>13}  {}".format(*row))
