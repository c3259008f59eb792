"""What a cut costs a large model: `python -m benchmarks.reshape`.

A Mamba-1 of 110 million parameters on two workers, at ZeRO 1 to 3: seconds from the agreed plan to the rebuilt engine,
and what it adds to a worker's memory, beside the size of the whole state (masters and both moments).
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.report import RESULTS, cpu_model
from compression.plan import LayerPlan, StateSelection, TruncationPlan
from models.registry import LanguageTask
from orchestrator.config_reading import parse_config
from orchestrator.data.batches import Batch
from orchestrator.group import Group

STAGES = (1, 2, 3)
WORKERS = 2
DIMS = (64, 48, 32, 16)
MODEL = {"kind": "mamba", "n_layers": 26, "d_model": 768, "d_state": DIMS[0]}
TASK = LanguageTask(vocab_size=8192)


@dataclass(frozen=True)
class Reshape:
    """Medians over the cuts, of the worker that has most of it."""

    stage: int
    parameters: int
    state_mib: float
    seconds: float
    peak_mib: float


def main() -> None:
    print(f"{cpu_model()}, {WORKERS} workers of one thread; cuts of all layers, {' -> '.join(map(str, DIMS))} states")
    print(f"{'ZeRO':>6}{'parameters':>14}{'whole state':>14}{'cut':>10}{'peak beyond':>14}")
    rows = []
    for stage in STAGES:
        row = measure(stage)
        rows.append(row)
        sizes = f"{row.state_mib:>10.0f} MiB{row.seconds:>8.1f} s{row.peak_mib:>10.0f} MiB"
        print(f"{stage:>6}{row.parameters:>14,}{sizes}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reshape.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def measure(stage: int) -> Reshape:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        # New processes for every stage: a peak is one of a process.
        pools = [ProcessPoolExecutor(1, spawn) for _ in range(WORKERS)]
        futures = [pool.submit(cut_often, rank, stage, f"{folder}/store") for rank, pool in enumerate(pools)]
        found = [future.result() for future in futures]
        for pool in pools:
            pool.shutdown()
    parameters = found[0][0]
    seconds, peaks = (max(statistics.median(part[i]) for part in found) for i in (1, 2))
    return Reshape(stage, parameters, 12 * parameters / 2**20, seconds, peaks)


def cut_often(rank: int, stage: int, store: str) -> tuple[int, list[float], list[float]]:
    """Parameters before the first cut; of each cut the seconds and the MiB that its peak adds."""
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    # Every tensor of 64 KiB or more is mapped by itself (M_MMAP_THRESHOLD): what is resident is then in use.
    assert ctypes.CDLL(None).mallopt(-3, 2**16) == 1
    dist.init_process_group("gloo", store=dist.FileStore(store, WORKERS), rank=rank, world_size=WORKERS)
    from orchestrator.engine import Engine

    raw: dict[str, Any] = {"name": "reshape", "data": {"source": "stdlib"}, "model": MODEL}
    raw |= {"train": {"steps": 1000, "batch_size": WORKERS, "lr": 1e-3}}
    raw |= {"truncation": {"target": {"dim": DIMS[-1]}}, "cluster": {"workers": WORKERS, "zero_stage": stage}}
    config, group = parse_config(raw), Group(rank, WORKERS, torch.device("cpu"))
    engine = Engine(config, TASK, config.model.state_dims, group)
    parameters, seconds, peaks = engine.parameter_count, [], []
    tokens = torch.arange(33).unsqueeze(0)
    for step, dim in enumerate(DIMS[1:], start=1):
        engine.step(Batch(tokens[:, :-1], tokens[:, 1:]), step)
        layers = [keep_first(layer, before, dim) for layer, before in enumerate(engine.state_dims)]
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide a part of the peak
        before_mib = _status_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        dist.barrier()
        started = time.perf_counter()
        engine.reshape(TruncationPlan(step, 1, 1, tuple(layers)))
        dist.barrier()
        seconds.append(time.perf_counter() - started)
        peaks.append(_status_mib("VmHWM") - before_mib)
    engine.close()
    return parameters, seconds, peaks


def keep_first(layer: int, before: int, after: int) -> LayerPlan:
    return LayerPlan(
        layer=layer,
        dim_before=before,
        dim_after=after,
        reduction=StateSelection(tuple(range(after)), None),
        spectrum=(),
        score_spectrum=(),
        order=(),
        mass_kept=1.0,
        drift=None,
        overlap=None,
        quiet=0,
        error_bound=None,
        output_error=None,
        reason="benchmark",
    )


def _status_mib(key: str) -> float:
    """A line of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) / 2**10


if __name__ == "__main__":
    main()
