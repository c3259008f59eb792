"""The Triton kernels against the plain recurrences in float64, and the choice between backends.

Triton decides at its import whether kernels are interpreted, so that they run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from compression.gramians import SelectiveMoments
from models.scan import backends, extension, reference
from models.scan.selective import selective_scan
from tests.triton_cases import CASES, Errors, scan_arguments

ROOT = Path(__file__).parents[1]


def evaluate(mode: str, folder: Path) -> Any:
    pytest.importorskip("triton", reason="Triton is not installed here; there is none but for Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    if mode == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "tests.triton_cases", mode]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Errors]:
    """Of all cases: through the interpreter on a CPU, and compiled on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return cast(dict[str, Errors], evaluate(request.param, tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_recurrence(errors: dict[str, Errors], case: str) -> None:
    found = errors[case]
    rounded = set("xrBCz") | {"out"} if case.startswith("bfloat16 selective") else set()
    for part, error in found.items():
        if part == "changed":
            assert error == 0
        elif part in rounded:
            # bfloat16 keeps 8 bits. The interpreter cuts the others off, a GPU rounds.
            assert error < 1e-2, part
        else:
            # What is no gradient is a result or a sum over tokens.
            assert error < (1e-5 if part in {"out", "samples", "h2_DN", "a2_DN", "hc2_N", "hh_NN"} else 1e-4), part


def test_kernels_compile_without_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses."""
    assert len(evaluate("compile", tmp_path)) == 7


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    backends.force("auto")


def somewhere(device: str, dtype: torch.dtype) -> Tensor:
    """As much of a tensor as the choice looks at, also on devices that are not here."""
    return cast(Tensor, SimpleNamespace(device=torch.device(device), dtype=dtype))


@pytest.mark.usefixtures("restored")
def test_the_device_and_the_dtype_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_import_error", lambda module: "")
    cpp: backends.Choice = "torch" if extension.load() is None else "cpu"
    for device, dtype, choice in [
        ("cpu", torch.float32, cpp),
        ("cpu", torch.float64, "torch"),
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float64, "torch"),
        ("meta", torch.float32, "torch"),
    ]:
        assert backends.choose(somewhere(device, dtype)) == choice, (device, dtype)
    monkeypatch.setattr(backends, "_import_error", lambda module: f"{module} is broken")
    assert backends.choose(somewhere("cuda", torch.float32)) == "torch"


@pytest.mark.usefixtures("restored")
def test_a_name_wins_over_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_import_error", lambda module: "")
    names: list[backends.Choice] = ["torch", "reference", "triton"]
    for name in names:
        backends.force(name)
        for device in ("cpu", "cuda"):
            assert backends.choose(somewhere(device, torch.float32)) == name
            assert backends.describe(torch.device("cpu")) == backends.WORDS[name]
    backends.force("mamba_ssm")
    assert backends.choose(somewhere("cuda", torch.float32), mamba_ssm=True) == "mamba_ssm"
    assert backends.choose(somewhere("cuda", torch.float32)) == "triton"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", ["triton", "mamba_ssm"])
def test_what_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, name: backends.Backend) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    backends._import_error.cache_clear()
    try:
        with pytest.raises(backends.UnavailableError, match=f"asked for, but {name} cannot be imported"):
            backends.force(name)
    finally:
        backends._import_error.cache_clear()
    assert backends.choose(torch.empty(0)) in {"cpu", "torch"}


@pytest.mark.usefixtures("restored")
def test_mamba_ssm_gets_its_layout_and_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package needs a GPU: this stands in for its function, whose tensors are (B, D, L) and (B, N, L)."""
    calls = []

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_softplus: bool
    ) -> Tensor:
        calls.append(delta_softplus)
        return reference.selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT).mT

    parts = ["mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"]
    for part in parts:
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setattr(sys.modules[parts[-1]], "selective_scan_fn", selective_scan_fn, raising=False)
    backends._import_error.cache_clear()
    try:
        backends.force("mamba_ssm")
        arguments = [part.detach().float() for part in scan_arguments(2, 5, 3, 4)]
        torch.testing.assert_close(selective_scan(*arguments), reference.selective_scan(*arguments))
        assert calls == [True]
        moments = SelectiveMoments.zeros(3, 4)
        selective_scan(*arguments, moments)
        assert calls == [True]
        assert int(moments.samples) == 2
    finally:
        backends._import_error.cache_clear()
