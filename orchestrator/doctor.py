"""What this machine has and lacks for training: looked at, never changed, within a few seconds."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from orchestrator.errors import UserError
from orchestrator.versions import deepspeed_version

GIB = 2**30
REINSTALL = "install Rayduce again into this environment: pip install --editable ."


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `missing`: training does not work without it. `note`: it does, but mind this."""

    subject: str
    state: Literal["ok", "missing", "note"]
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at what training needs, in the current folder, below which runs are written.

    Returns one finding per subject and raises nothing: what is absent is a finding. Ray is not started, nor
    DeepSpeed imported: that takes seconds, and the accelerator that it will choose follows from torch.
    """
    local = [_python(), _compiler(), _headers(), _ninja(), _cores(), _memory(), _disk()]
    return [*local, *_torch_gpu_deepspeed(), _ray(), _package("MLflow", "mlflow")]


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as aligned lines, each remedy under its finding, and what is missing at the end."""
    width = max((len(finding.subject) for finding in findings), default=0)
    lines = []
    for finding in findings:
        remedy = f"\n{'':<{width + 10}}→ {finding.remedy}" if finding.remedy else ""
        lines.append(f"{finding.state:<8}{finding.subject:<{width}}  {finding.detail}{remedy}")
    missing = [finding.subject for finding in findings if finding.state == "missing"]
    verdict = f"Missing: {', '.join(missing)}." if missing else "Everything training needs is here."
    return "\n".join([*lines, "", verdict])


SLOWER = "no C++ kernels can be built: training on CPUs works, several times slower"


def _python() -> Finding:
    good, version = (3, 11) <= sys.version_info < (3, 14), ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", "ok" if good else "missing", version, "" if good else "use Python 3.11 to 3.13")


def _cxx() -> str:
    """What torch, and DeepSpeed through it, calls: the first word of $CXX, else `c++`; it does not look for `g++`."""
    given = os.environ.get("CXX", "")
    try:
        return (shlex.split(given) or ["c++"])[0]
    except ValueError:  # a quote without its partner
        return given


def _compiler() -> Finding:
    chosen = _cxx()
    if path := shutil.which(chosen):
        return Finding("C++ compiler", "ok", _version_of(path))
    if other := shutil.which("g++"):
        return Finding("C++ compiler", "note", f"{chosen} is not on PATH, g++ is; {SLOWER}", f"export CXX={other}")
    detail = f"neither {chosen} nor g++ on PATH; {SLOWER}"
    return Finding("C++ compiler", "note", detail, "install g++ (Debian, Ubuntu: apt install g++)")


def _headers() -> Finding:
    """What DeepSpeed's collectives are built with, where there is what builds them; else torch's serve."""
    header, remedy = Path(sysconfig.get_path("include"), "Python.h"), "apt install python3-dev, or the like"
    if header.is_file():
        return Finding("Python headers", "ok", str(header))
    builds = shutil.which("ninja") and shutil.which(_cxx())
    return Finding("Python headers", "missing" if builds else "note", str(header), remedy)


def _ninja() -> Finding:
    if path := shutil.which("ninja"):
        return Finding("ninja", "ok", _version_of(path))
    beside = Path(sys.executable).with_name("ninja")
    remedy = f"put {beside.parent} on PATH, or activate that environment" if beside.is_file() else REINSTALL
    return Finding("ninja", "note", f"not on PATH; {SLOWER}", remedy)


def _version_of(program: str) -> str:
    try:
        run = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program}, which does not tell its version ({type(error).__name__})"
    return f"{program}: {run.stdout.partition(chr(10))[0].strip()}"


def _cores() -> Finding:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    limit = _words("cpu.max") or _words("cpu/cpu.cfs_quota_us") + _words("cpu/cpu.cfs_period_us")
    if len(limit) == 2 and limit[0].isdigit():
        cores = min(cores, int(limit[0]) / int(limit[1]))
    return Finding("CPU cores", "ok" if cores >= 2 else "note", f"{cores:g} available to this process")


def _memory() -> Finding:
    try:
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return Finding("memory", "note", "unknown: this system has no /proc/meminfo")
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    limits = _words("memory.max") + _words("memory/memory.limit_in_bytes")
    free = min([free, *(int(limit) for limit in limits if limit.isdigit())])
    remedy = "" if free >= 4 * GIB else "train with fewer workers"
    return Finding("memory", "note" if remedy else "ok", f"{free / GIB:.1f} GiB available", remedy)


def _words(control: str) -> list[str]:
    """The words of a control-group file (version 2, or version 1 below its controller), none if absent."""
    return path.read_text().split() if (path := Path("/sys/fs/cgroup", control)).is_file() else []


def _disk() -> Finding:
    place = Path.cwd()
    free = shutil.disk_usage(place).free / GIB
    if not os.access(place, os.W_OK):
        return Finding("disk", "missing", f"{place} cannot be written to", "choose another folder, or set storage")
    remedy = "" if free >= 5 else "free some: checkpoints may fill it"
    return Finding("disk", "note" if remedy else "ok", f"{free:.1f} GiB free at {place}", remedy)


def _package(subject: str, distribution: str) -> Finding:
    try:
        return Finding(subject, "ok", metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return Finding(subject, "missing", "not installed", REINSTALL)


def _deepspeed() -> Finding:
    try:
        return Finding("DeepSpeed", "ok", deepspeed_version())
    except UserError as error:
        return Finding("DeepSpeed", "missing", str(error))


def _torch_gpu_deepspeed() -> list[Finding]:
    deepspeed = _deepspeed()
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("torch", "missing", f"cannot be imported: {error}", REINSTALL), deepspeed]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in found)
    remedy = "" if found or not shutil.which("nvidia-smi") else "install torch's CUDA build for this driver"
    gpu = Finding("GPU", "ok" if found else "note", names or "none: training runs on the CPU", remedy)
    if deepspeed.state == "ok":
        accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if found else "cpu")
        deepspeed = replace(deepspeed, detail=f"{deepspeed.detail}, accelerator {accelerator}")
    return [Finding("torch", "ok", str(torch.__version__)), gpu, deepspeed]


def _ray() -> Finding:
    finding, address = _package("Ray", "ray"), os.environ.get("RAY_ADDRESS", "")
    if finding.state == "missing" or address in ("", "local", "auto"):
        return finding
    try:
        from orchestrator.ray_cluster import cluster_address  # Ray, or what it needs, may be what is missing

        cluster_address()
    except (UserError, ImportError, OSError) as error:
        return Finding("Ray", "missing", str(error))
    return replace(finding, detail=f"{finding.detail}, cluster at {address} answers")
