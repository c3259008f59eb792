"""What a probe's coordination costs: `python -m benchmarks.coordination`.

Real workers in a gloo group, a real coordinator actor: gather statistics, solve, decide, reduce, broadcast. Then, from
the sizes of the real messages, what clusters far beyond this machine would send.

Shapes: D channels or width, N state, X any number.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
import ray.cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.hankel import lru_system
from benchmarks.report import RESULTS, cpu_model
from compression.gramians import SelectiveMoments, Statistics
from compression.planning import Occasion, Rule, Submission, plan_truncation, solve_layer
from compression.ranking import Target
from compression.scores import Score
from orchestrator.coordinator import Coordinator, Sender, coordinate
from orchestrator.group import Group

ROUNDS = 7
WORKERS = (1, 2, 4)
MOST = 1024
CALLS = 2  # of each worker to the actor: it submits spectra, and then reductions


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, and how they are cut."""

    name: str
    layers: int
    width: int  # channels D of a selective layer, H of an LRU
    d_state: int
    score: Score = "hankel"
    compensate: bool = False
    rotates: bool = False
    lti: bool = False

    @property
    def rule(self) -> Rule:
        """To a half of the states."""
        target, dims = Target(dim=self.rank), (self.d_state,) * self.layers
        return Rule(target, self.score, self.compensate, stable=None, initial_dims=dims, seed=0)

    @property
    def rank(self) -> int:
        return self.d_state // 2

    def statistics(self, layer: int) -> Statistics:
        """Random, and of full rank."""
        if self.lti:
            return lru_system(self.d_state, self.width, seed=layer)
        generator = torch.Generator().manual_seed(layer)
        sums = SelectiveMoments.zeros(self.width, self.d_state)
        sums.rotates = self.rotates
        for part in vars(sums).values():
            if isinstance(part, Tensor):
                part += 0.1 + torch.rand(part.shape, dtype=torch.float64, generator=generator)
        sums.a2_DN.clamp_(max=0.99)
        sums.tokens.fill_(1)
        for gramian_NN in (sums.hh_NN, sums.cc_NN):
            half_NN = torch.randn(self.d_state, self.d_state, dtype=torch.float64, generator=generator)
            gramian_NN.copy_(half_NN @ half_NN.T)
        return sums


def mamba(layers: int, width: int, d_state: int, score: Score = "greedy") -> Stack:
    return Stack(f"Mamba-1, {score}", layers, width, d_state, score, compensate=True)


def axis(layers: int, width: int, d_state: int) -> Stack:
    return Stack("Mamba-2, axis", layers, width, d_state)


def rotated(layers: int, width: int, d_state: int) -> Stack:
    return Stack("Mamba-2, rotated", layers, width, d_state, rotates=True)


def lru(layers: int, width: int, d_state: int) -> Stack:
    return Stack("LRU", layers, width, d_state, lti=True)


STACKS = (
    mamba(4, 256, 64),
    mamba(16, 256, 64),
    mamba(64, 256, 64),
    mamba(16, 256, 64, "hankel"),
    mamba(16, 1024, 16),
    mamba(16, 256, 16),
    axis(16, 256, 128),
    rotated(16, 256, 128),
    lru(16, 512, 256),
)
# What large models are made of: Mamba-1 of 2.8B parameters, and a Mamba-2 of the same width; the LRU of the papers.
LARGE = (mamba(64, 5120, 16), axis(64, 5120, 128), rotated(64, 5120, 128), lru(64, 512, 256))


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one probe, medians over rounds of the slowest worker."""

    stack: Stack
    workers: int
    ms: float  # from the statistics to the plan that all agree on
    solving_ms: float  # of the processor, for a worker's own layers: what does not wait for anyone


@ray.remote(num_cpus=0)
class Worker:
    """One rank of the group."""

    def __init__(self, rank: int, size: int, store: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        self.group = Group(rank, size, torch.device("cpu"))

    def probe(self, actor: Any, stack: Stack, step: int) -> tuple[float, float]:
        """Seconds for all of it, and the processor's for solving and reducing this worker's own layers once more."""
        statistics = [stack.statistics(layer) for layer in range(stack.layers)]
        dist.barrier()
        started = time.perf_counter()
        coordinate(actor, stack.rule, Occasion(step, 1, step, ROUNDS), statistics, self.group)
        seconds = time.perf_counter() - started
        started = time.thread_time()
        for layer in range(self.group.rank, stack.layers, self.group.size):
            solve_layer(layer, statistics[layer], stack.rule, step).reduce(stack.rank)
        return seconds, time.thread_time() - started


def measure(stack: Stack, workers: int) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        actor = ray.remote(Coordinator).options(num_cpus=0).remote(stack.rule, 60)
        ray.get(actor.begin_attempt.remote(1, workers))
        group = [Worker.remote(rank, workers, f"{folder}/store") for rank in range(workers)]
        rounds = []
        for step in range(1, ROUNDS + 1):
            seconds = ray.get([worker.probe.remote(actor, stack, step) for worker in group])
            rounds.append([max(column) for column in zip(*seconds, strict=True)])
        for process in (actor, *group):
            ray.kill(process)
    # The first probe loads linear algebra.
    ms, solving_ms = (1e3 * statistics.median(column) for column in zip(*rounds[1:], strict=True))
    return Timing(stack, workers, ms, solving_ms)


@dataclass(frozen=True)
class Messages:
    """Of one probe; bytes, but for the collectives. None of it depends on the number of workers."""

    statistics: int  # of all layers, reduced over the workers towards their owners: each worker passes them on once
    collectives: int  # reductions of statistics, the plan's broadcast in two, and the comparison of its digests
    spectra: int  # of all layers, into the actor
    reductions: int  # of all layers, into the actor, to rank 0 as the plan, and from it to each worker once
    actor_peak: int  # the plan that it makes, and the last one


def messages(stack: Stack) -> Messages:
    rules, part, occasion = stack.rule, stack.statistics(0), Occasion(1, 1, 1, 1)
    solution = solve_layer(0, part, rules, step=1)
    spectrum = len(ray.cloudpickle.dumps((Sender(occasion, 0, rules.initial_dims), {0: Submission.of(solution)})))
    alone = replace(stack, layers=1).rule
    reduction = len(ray.cloudpickle.dumps(plan_truncation([part], alone, occasion).layers[0]))
    # Every worker has an LRU's matrices: nothing is reduced.
    reduced = part.to_vector().nbytes if isinstance(part, SelectiveMoments) else 0
    return Messages(
        statistics=stack.layers * reduced,
        collectives=(stack.layers if reduced else 0) + 3,
        spectra=stack.layers * spectrum,
        reductions=stack.layers * reduction,
        actor_peak=stack.layers * (spectrum + 2 * reduction),
    )


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    timings = []
    print(f"{cpu_model()}, 2 cores; gather, solve, decide, reduce and agree on a plan, median of {ROUNDS - 1} rounds;")
    print("in brackets the processor's time for solving and reducing the layers that one worker owns")
    heads = "".join(f"{f'{count} worker' + 's' * (count > 1):>22}" for count in WORKERS)
    print(f"{'':18}{'layers':>8}{'width':>8}{'N':>6}{heads}")
    for stack in STACKS:
        row = [measure(stack, workers) for workers in WORKERS]
        timings += row
        cells = "".join(f"{timing.ms:>10.0f} ms ({timing.solving_ms:>4.0f} ms)" for timing in row)
        print(f"{stack.name:18}{stack.layers:>8}{stack.width:>8}{stack.d_state:>6}{cells}", flush=True)
    ray.shutdown()

    print(f"\non paper, a probe of {MOST} workers, MiB: what each reduces and gets, what the actor gets, gives, holds")
    columns = ("calls", "collectives", "reduced", "given", "into", "out of", "in it")
    heads = "".join(f"{head:>12}" for head in columns)
    paper = []
    print(f"{'':18}{'layers':>8}{'width':>8}{'N':>6}{heads}")
    for stack in LARGE:
        sent = messages(stack)
        paper.append({"stack": asdict(stack)} | asdict(sent))
        sizes = (sent.statistics, sent.reductions, sent.spectra + sent.reductions, sent.reductions, sent.actor_peak)
        cells = "".join(f"{size / 2**20:>12.2f}" for size in sizes)
        counts = f"{MOST * CALLS:>12}{sent.collectives:>12}"
        print(f"{stack.name:18}{stack.layers:>8}{stack.width:>8}{stack.d_state:>6}{counts}{cells}")
    RESULTS.mkdir(exist_ok=True)
    content = {"timings": [asdict(timing) for timing in timings], "messages": paper}
    (RESULTS / "coordination.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
