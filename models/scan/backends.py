"""Which implementation a scan uses: by device and availability, or as the setting says."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from models.scan import extension

Backend = Literal["auto", "torch", "cpu"]
_forced: Backend = "auto"


def force(backend: Backend) -> None:
    """Use this backend for all scans of this process; "auto" chooses again.

    Raises:
        RuntimeError: the CPU kernels were asked for by name and cannot be built here.
    """
    global _forced
    if backend == "cpu" and extension.load() is None:
        raise RuntimeError(f"the CPU kernels cannot be built: {extension.why_not()}")
    _forced = backend


def describe(device: torch.device) -> str:
    """The choice for float32 models on `device`, in words for a person."""
    if choose(torch.empty(0, device=device)) == "cpu":
        return "scans in C++"
    if device.type != "cpu" or _forced == "torch":
        return "scans in plain torch"
    return f"scans in plain torch, because the C++ kernels cannot be built ({extension.why_not()})"


def choose(tensor: Tensor) -> Literal["torch", "cpu"]:
    """The backend for a scan over `tensor`: the C++ kernels for float32 on a CPU, else plain torch."""
    fits = tensor.device.type == "cpu" and tensor.dtype == torch.float32
    if _forced == "torch" or not fits or extension.load() is None:
        return "torch"
    return "cpu"
