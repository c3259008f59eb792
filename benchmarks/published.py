"""The published code of CompreSSM as it is, in a process of its own: two libraries' threads would fight.

It is not on a package index; the benchmark looks for a clone:
    git clone https://github.com/camail-official/compressm data/compressm      (read at commit 8814b12)

Shapes: N state, H width.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import ROOT
from compression.gramians import LTISystem

CLONE = ROOT / "data" / "compressm"
SYSTEM = ("eigenvalues_N", "B_NH", "C_HN")


class PublishedCut:
    """HSVs of one system and its cut, as the published LRU layer calls for them: complex64, method "sqrtm"."""

    def __init__(self, system: LTISystem, rank: int) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "system.npz"
            np.savez(path, **{name: getattr(system, name).numpy() for name in SYSTEM})
            command = [sys.executable, "-m", "benchmarks.published", str(path), str(rank)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=ROOT
            )
            self()  # when it has answered, it has read the system

    def __call__(self) -> None:
        """Do it once."""
        self._ask("cut")

    def result(self) -> tuple[Tensor, LTISystem]:
        """HSVs (N,), descending, and the reduced system."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "result.npz"
            self._ask(str(path))
            with np.load(path) as parts:
                sigma_N, *system = (torch.from_numpy(parts[name]) for name in ("sigma_N", *SYSTEM))
        return sigma_N.double(), LTISystem(*(part.to(torch.complex128) for part in system))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(line + "\n")
        if not self._process.stdout.readline():
            raise RuntimeError(f"the published code in {CLONE} ended with {self._process.wait()}")
        self._process.send_signal(signal.SIGSTOP)  # or its idle threads spin into our turn


def _load() -> tuple[Any, Any]:
    """Its two modules of linear algebra; the packages around them would import JAX and Equinox."""
    for name, folder in (
        ("compressm", CLONE / "compressm"),
        ("compressm.reduction", CLONE / "compressm" / "reduction"),
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    from compressm.reduction import balanced_truncation, hsv  # type: ignore[import-not-found]

    return hsv, balanced_truncation


def _serve(path: str, rank: int) -> None:
    hsv, balanced_truncation = _load()
    with np.load(path) as parts:
        system = [parts[name].astype(np.complex64) for name in SYSTEM]
    for line in map(str.strip, sys.stdin):
        if line == "cut":
            P_NN, Q_NN, sigma_N = hsv.hankel_singular_values_diagonal(*system)
            reduced = balanced_truncation.reduce_discrete_lti(*system, P_NN, Q_NN, rank=rank, method="sqrtm")
            nu_log, theta_log, B_re, B_im, C_re, C_im, _ = balanced_truncation.lti_to_lru(*reduced)
        else:
            eigenvalues = np.exp(-np.exp(nu_log) + 1j * np.exp(theta_log))
            reduced = (eigenvalues, np.asarray(B_re + 1j * B_im), np.asarray(C_re + 1j * C_im))
            np.savez(line, sigma_N=np.sort(sigma_N)[::-1].copy(), **dict(zip(SYSTEM, reduced, strict=True)))
        print("done", flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
