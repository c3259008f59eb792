"""What checkpoints cost the quickstart's training, and how fast they come back: `python -m benchmarks.checkpointing`.

Two workers train the quickstart's model at full size. Stretches of steps with a save in front take turns with stretches
without; what they take longer, less the copy out of the engine, is what a save keeps training from doing. Then a larger
state is written by two ranks and restored on three, against plain reading of the same files, none of it cached.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import ray
import torch
import torch.distributed as dist

from benchmarks.measure import ROOT
from benchmarks.report import RESULTS, cpu_model
from compression.moments import ParameterState
from models.registry import LanguageTask
from orchestrator import checkpoint
from orchestrator.checkpoint import Manifest
from orchestrator.checkpoint_writer import Writer
from orchestrator.config import RunConfig
from orchestrator.config_reading import load_config
from orchestrator.data.batches import TrainBatches
from orchestrator.data.sources import prepare
from orchestrator.filesystem import Folder
from orchestrator.group import Group
from orchestrator.sharded_state import ShardedState, assign_owners

ROUNDS = 7
STEPS = 15  # of a stretch: longer than a write takes
AT_MOST_STEPS = 1.0
# 64 parameters with moments, 768 MiB in all.
LARGE_SHAPES: dict[str, tuple[int, ...]] = {f"layer.{i}": (1024, 1024) for i in range(64)}
SAVED_ON, RESTORED_ON = 2, 3
AT_LEAST_OF_DISK = 0.5


@dataclass(frozen=True)
class Saving:
    """Milliseconds of the slowest worker, medians over rounds; `blocked` is in steps."""

    step_ms: float
    copy_ms: float
    blocked_steps: float


@dataclass(frozen=True)
class Restoring:
    """GiB/s of shard files; `verified` is of SHA-256 and restore together, which is how a run resumes."""

    disk: float
    restored: float
    verified: float


def manifest(state: ShardedState) -> Manifest:
    return Manifest(
        step=1,
        optimizer_step=state.optimizer_step,
        train_seconds=0.0,
        state_dims=[],
        shapes=state.shapes,
        shard_of=state.owners,
        shards=[],
        truncations=[],
        probe=None,
        val_loss=None,
        after_cut=False,
        config={},
        data_sha256="",
    )


@ray.remote(num_cpus=1)
class Worker:
    """One rank of the quickstart's training."""

    def __init__(self, config: RunConfig, rank: int, store: str) -> None:
        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
        from orchestrator.engine import Engine  # which loads DeepSpeed, for this accelerator

        torch.set_num_threads(1)
        size = config.cluster.workers.max
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        self.group = Group(rank, size, torch.device("cpu"))
        data = prepare(config.data, config.data_root)
        self.batches = TrainBatches(data, config.seq_len, config.train.batch_size, config.seed, rank, size)
        self.engine = Engine(config, LanguageTask(256), config.model.state_dims, self.group)
        self.writer = Writer(rank, size, timeout_s=60)
        self.step = 0

    def stretch(self, folder: Path | None) -> tuple[float, float]:
        """Seconds of a stretch of steps, and of the copy out of the engine before it, if it saves into `folder`."""
        dist.barrier()
        started, copied = time.perf_counter(), 0.0
        if folder is not None:
            state = self.engine.state()
            copied = time.perf_counter() - started
            assert float(self.group.sum(torch.tensor([float(not state.is_finite())]))) == 0  # as the loop finds out
            self.writer.save(Folder.of(folder, "folder"), f"{self.step:016x}", manifest(state), state)
        for _ in range(STEPS):
            self.step += 1
            self.engine.step(self.batches.at(self.step), self.step)
            self.writer.check()
        seconds = time.perf_counter() - started
        self.writer.wait()
        return seconds, copied


def measure_saving(config: RunConfig) -> Saving:
    ray.init(num_cpus=config.cluster.workers.max, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker.remote(config, rank, f"{folder}/store") for rank in range(config.cluster.workers.max)]

        def stretch(save: bool) -> tuple[float, float]:
            place = Path(folder, "checkpoints") if save else None
            seconds, copies = zip(*ray.get([worker.stretch.remote(place) for worker in workers]), strict=True)
            return max(seconds), max(copies)

        for save in (False, True):  # the first steps warm up
            stretch(save)
        plain, saving, copies = [], [], []
        for done in range(ROUNDS):
            for save in (False, True) if done % 2 else (True, False):
                seconds, copied = stretch(save)
                (saving if save else plain).append(seconds)
                if save:
                    copies.append(copied)
    ray.shutdown()
    step, copied = statistics.median(plain) / STEPS, statistics.median(copies)
    extra = statistics.median(with_save - without for with_save, without in zip(saving, plain, strict=True))
    return Saving(1e3 * step, 1e3 * copied, (extra - copied) / step)


def measure_restoring() -> Restoring:
    generator = torch.Generator().manual_seed(0)
    owners = assign_owners(dict.fromkeys(LARGE_SHAPES, 1), SAVED_ON)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        path = Folder.of(folder, "folder")
        writers = [Writer(rank, SAVED_ON, timeout_s=300) for rank in range(SAVED_ON)]
        for rank, writer in enumerate(writers):
            own = {
                name: ParameterState(*(torch.randn(shape, generator=generator) for _ in range(3)))
                for name, shape in LARGE_SHAPES.items()
                if owners[name] == rank
            }
            state = ShardedState(owners, dict(LARGE_SHAPES), own, 1)
            writer.save(path, "0" * 16, manifest(state), state)
        for writer in writers:
            writer.wait()
        content = checkpoint.read_manifest(path)
        files = [Path(folder, shard.file) for shard in content.shards]

        def restore_rank(rank: int) -> None:
            state = checkpoint.load(path, content, Group(rank, RESTORED_ON, torch.device("cpu")))
            for parameter in state.own.values():
                for part in parameter.tensors():
                    part.sum()  # what is mapped has not been read before it is used

        def restore() -> None:
            with ThreadPoolExecutor(RESTORED_ON) as ranks:
                list(ranks.map(restore_rank, range(RESTORED_ON)))

        def resume() -> None:
            checkpoint.verify(path)
            restore()

        def read() -> None:
            for file in files:
                with file.open("rb", buffering=0) as stream:
                    while stream.read(2**24):
                        pass

        rates = [(rate(read, files), rate(restore, files), rate(resume, files)) for _ in range(ROUNDS)]
    disk, restored, verified = (statistics.median(column) for column in zip(*rates, strict=True))
    return Restoring(disk, restored, verified)


def rate(action: Callable[[], None], files: Iterable[Path]) -> float:
    """GiB/s of these files, which the page cache has forgotten when `action` begins."""
    size = 0
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size += file.stat().st_size
    started = time.perf_counter()
    action()
    return size / 2**30 / (time.perf_counter() - started)


def main() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["truncation=null"])
    print(f"{cpu_model()}, {os.cpu_count()} cores")
    saving = measure_saving(config)
    print(
        f"a save of the quickstart: {saving.copy_ms:.0f} ms for the copy, then {saving.blocked_steps:.2f} steps "
        f"of {saving.step_ms:.0f} ms (at most {AT_MOST_STEPS:g}); median of {ROUNDS} rounds"
    )
    restoring = measure_restoring()
    print(
        f"a restore on {RESTORED_ON} ranks of what {SAVED_ON} have saved: {restoring.restored:.2f} GiB/s, the disk "
        f"{restoring.disk:.2f} (at least {AT_LEAST_OF_DISK:g} of it); after checksums {restoring.verified:.2f}"
    )
    RESULTS.mkdir(exist_ok=True)
    content = {"saving": asdict(saving), "restoring": asdict(restoring)}
    (RESULTS / "checkpointing.json").write_text(json.dumps(content, indent=2) + "\n")
    if saving.blocked_steps > AT_MOST_STEPS or restoring.restored < AT_LEAST_OF_DISK * restoring.disk:
        raise SystemExit("checkpointing costs more than it may")


if __name__ == "__main__":
    main()
