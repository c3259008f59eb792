"""The version of DeepSpeed whose inner attributes `zero` relies on, looked up without importing it."""

from __future__ import annotations

from importlib import metadata

from orchestrator.errors import UserError

SERIES = "0.19"
_REMEDY = f"pip install 'deepspeed~={SERIES}.0'"


def deepspeed_version() -> str:
    """The version of DeepSpeed that is installed here.

    Raises:
        UserError: there is none, or it is of another series.
    """
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UserError(f"DeepSpeed is not installed, and Rayduce needs {SERIES}: {_REMEDY}") from None
    if not found.startswith(f"{SERIES}."):
        raise UserError(f"DeepSpeed {found} is installed, but Rayduce works with {SERIES} alone: {_REMEDY}")
    return found
