"""The table that `make chaos` ends with; what prints it is in tests/conftest.py, which every session loads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import CHAOS

AddRow = Callable[[str, str, str], None]


@pytest.fixture
def add_row(record_property: Callable[[str, object], None]) -> AddRow:
    """Of case, seconds from the kill until other workers began, and whether the end is the undisturbed run's."""
    return lambda *cells: record_property(CHAOS, cells)
