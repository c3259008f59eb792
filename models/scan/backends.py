"""Which implementation a scan uses: by device and availability, or as the setting says."""

from __future__ import annotations

import functools
import importlib
from typing import Literal

import torch
from torch import Tensor

from models.scan import extension

Choice = Literal["torch", "cpu", "triton", "mamba_ssm", "reference"]
Backend = Literal["auto"] | Choice
_forced: Backend = "auto"

DTYPES: dict[Choice, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16),
    "mamba_ssm": (torch.float32, torch.bfloat16),
}
WORDS: dict[Choice, str] = {
    "torch": "scans in plain torch",
    "cpu": "scans in C++",
    "triton": "scans in Triton",
    "mamba_ssm": "scans in mamba_ssm",
    "reference": "scans step by step, as in the papers",
}


class UnavailableError(RuntimeError):
    """A backend that was asked for cannot be had here."""


def force(backend: Backend) -> None:
    """Use this backend for all scans of this process that it can do; "auto" chooses again.

    Raises:
        UnavailableError: it is not available here.
    """
    global _forced
    if backend != "auto" and (reason := _obstacle(backend)):
        raise UnavailableError(f"{WORDS[backend]} were asked for, but {reason}")
    _forced = backend


def describe(device: torch.device) -> str:
    """The choice for float32 models on `device`, in words for a person."""
    choice = choose(torch.empty(0, device=device), mamba_ssm=True)
    reason = _obstacle(_fastest(device)) if choice == "torch" and _forced == "auto" else ""
    return f"{WORDS[choice]}, because {reason}" if reason else WORDS[choice]


def choose(tensor: Tensor, mamba_ssm: bool = False) -> Choice:
    """The backend for a scan over `tensor`: the forced one, or the fastest for its device; else plain torch.

    mamba_ssm has only the selective scan: it takes what the caller says it can, and the fastest takes the rest.
    """
    choice = _forced
    if choice == "auto" or (choice == "mamba_ssm" and not mamba_ssm):
        choice = _fastest(tensor.device)
    on_another_device = choice == "cpu" and tensor.device.type != "cpu"
    unknown_dtype = choice in DTYPES and tensor.dtype not in DTYPES[choice]
    return "torch" if on_another_device or unknown_dtype or _obstacle(choice) else choice


def _fastest(device: torch.device) -> Choice:
    """Where it can be had."""
    by_device: dict[str, Choice] = {"cpu": "cpu", "cuda": "triton"}
    return by_device.get(device.type, "torch")


def _obstacle(choice: Choice) -> str:
    """Why a backend cannot be had here; empty if it can."""
    if choice == "cpu":
        return "" if extension.load() is not None else f"the C++ kernels cannot be built ({extension.why_not()})"
    if choice == "triton":
        return _import_error("triton")
    if choice == "mamba_ssm":
        return _import_error("mamba_ssm.ops.selective_scan_interface")
    return ""


@functools.cache
def _import_error(module: str) -> str:
    """Only on demand: most processes need neither of these libraries, and loading them takes a second."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module.split('.')[0]} cannot be imported ({error})"
    return ""
