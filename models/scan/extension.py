"""The C++ kernels, built once per machine and kept: torch's extension loader caches them.

Without a compiler everything works, more slowly, in plain torch.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NAMES = ("selective.cpp", "conv.cpp", "linear.cpp", "spectral.cpp", "norm.cpp", "ssd_moments.cpp")
SOURCES = tuple(Path(__file__).with_name(name) for name in NAMES)
HEADERS = (Path(__file__).with_name("lanes.h"),)
# The library is used without its own OpenMP: symbols come from the runtime that torch has loaded, because two
# runtimes would fight for the cores.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-std=c++20")


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """The folder of what a machine builds once, for one process at a time, and no longer than that process lives."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "rayduce"
    folder = Path(cache) / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "in_use").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield folder


@functools.cache
def _build() -> tuple[Any, str]:
    """The operators and an empty string, or None and why there are none."""
    from torch.utils.cpp_extension import load  # looks for compilers when imported

    # A home that several kinds of machine share must not mix up their instructions.
    processor = Path("/proc/cpuinfo")
    features = processor.read_text().split("\n\n")[0] if processor.exists() else platform.machine()
    features = "".join(line for line in features.splitlines() if line.startswith(("flags", "Features", "model name")))
    key = repr((torch.__version__, features, FLAGS, [file.read_text() for file in SOURCES + HEADERS]))
    name = f"rayduce_scan_{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    try:
        with locked(name) as folder:
            library = folder / f"{name}.so"
            if library.exists():
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            else:
                # Elsewhere first: half a library is never found, nor the lock file that torch's loader leaves when it
                # is killed; and ninja, which compiles again for each checkout's path, never sees one that is whole.
                with tempfile.TemporaryDirectory(dir=folder) as build:
                    load(
                        name,
                        [str(source) for source in SOURCES],
                        extra_cflags=list(FLAGS),
                        build_directory=build,
                        is_python_module=False,
                    )
                    Path(build, library.name).rename(library)
    except (RuntimeError, OSError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, next((line for line in lines if "error:" in line or "not found" in line), lines[0])[:200]
    return torch.ops.rayduce, ""


def load() -> Any | None:
    """The operators; None, with one warning, where they cannot be built. The first call on a machine takes a while."""
    module, reason = _build()
    if module is None:
        _warn(reason)
    return module


def kernels() -> Any:
    """The operators, for a backend that is chosen only where they are built."""
    module, reason = _build()
    assert module is not None, reason
    return module


def rows(part: Tensor) -> Tensor:
    """As the kernels read tensors: slices of wider ones too, as long as channels are contiguous."""
    return part if part.stride(-1) == 1 else part.contiguous()


def why_not() -> str:
    return _build()[1]


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("scans run in plain torch, several times slower: the CPU kernels cannot be built (%s)", reason)
