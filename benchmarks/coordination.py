"""What a probe's coordination costs: `python -m benchmarks.coordination`.

Real workers in a gloo group, a real coordinator actor: gather statistics, solve, decide, reduce, broadcast. Then, from
the sizes of the real messages, what clusters far beyond this machine would send.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.cloudpickle
import torch
import torch.distributed as dist

from benchmarks.report import RESULTS, cpu_model
from compression.gramians import SelectiveMoments
from compression.planning import Occasion, Rule, Submission, plan_truncation, solve_layer
from compression.ranking import Target
from orchestrator.coordinator import Coordinator, Sender, coordinate
from orchestrator.group import Group

ROUNDS = 7
# layers, channels, states
SIZES = ((4, 256, 64), (16, 256, 64), (64, 256, 64), (16, 1024, 16), (16, 256, 16), (16, 256, 128))
WORKERS = (1, 2, 4)
# What large models are made of: Mamba-1 of 2.8B parameters, and a Mamba-2 of the same width.
LARGE = {"Mamba-1, D 5120, N 16": (5120, 16), "Mamba-2, D 5120, N 128": (5120, 128)}
LARGE_LAYERS = 64


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one probe's coordination, median over rounds of the slowest worker."""

    layers: int
    channels: int
    d_state: int
    workers: int
    ms: float


def moments(channels: int, d_state: int, seed: int) -> SelectiveMoments:
    """Positive sums, and Gramians of full rank."""
    generator = torch.Generator().manual_seed(seed)
    sums = SelectiveMoments.zeros(channels, d_state)
    for part in vars(sums).values():
        if isinstance(part, torch.Tensor):
            part += 0.1 + torch.rand(part.shape, dtype=torch.float64, generator=generator)
    sums.a2_DN.clamp_(max=0.99)
    sums.tokens.fill_(1)
    for gramian_NN in (sums.hh_NN, sums.cc_NN):
        half_NN = torch.randn(d_state, d_state, dtype=torch.float64, generator=generator)
        gramian_NN.copy_(half_NN @ half_NN.T)
    return sums


def rule(layers: int, d_state: int) -> Rule:
    target = Target(dim=d_state // 2)
    return Rule(target, "hankel", compensate=True, stable=None, initial_dims=(d_state,) * layers, seed=0)


@ray.remote(num_cpus=0)
class Worker:
    """One rank of the group."""

    def __init__(self, rank: int, size: int, store: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        self.group = Group(rank, size, torch.device("cpu"))

    def probe(self, actor: Any, layers: int, channels: int, d_state: int, step: int) -> float:
        statistics = [moments(channels, d_state, seed=layer) for layer in range(layers)]
        self.group.barrier()
        started = time.perf_counter()
        coordinate(actor, rule(layers, d_state), Occasion(step, 1, step, ROUNDS), statistics, self.group)
        return time.perf_counter() - started


def measure(layers: int, channels: int, d_state: int, workers: int) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        actor = ray.remote(Coordinator).options(num_cpus=0).remote(rule(layers, d_state), 60)
        ray.get(actor.begin_attempt.remote(workers))
        group = [Worker.remote(rank, workers, f"{folder}/store") for rank in range(workers)]
        rounds = []
        for step in range(1, ROUNDS + 1):
            calls = [worker.probe.remote(actor, layers, channels, d_state, step) for worker in group]
            rounds.append(max(ray.get(calls)))
        for process in (actor, *group):
            ray.kill(process)
    # The first probe loads linear algebra.
    return Timing(layers, channels, d_state, workers, 1e3 * statistics.median(rounds[1:]))


@dataclass(frozen=True)
class Messages:
    """Bytes of one probe. Everything else is the same for any number of workers."""

    statistics: int  # of one layer, reduced over the workers towards its owner
    spectra: int  # of all layers, into the actor
    reductions: int  # of all layers, into the actor, and to each worker as the plan
    actor_peak: int


def messages(channels: int, d_state: int, layers: int) -> Messages:
    rules, sums = rule(layers, d_state), moments(channels, d_state, seed=0)
    solution = solve_layer(0, sums, rules, step=1)
    occasion = Occasion(1, 1, 1, 1)
    submission = Submission.of(solution)
    spectrum = len(ray.cloudpickle.dumps((Sender(occasion, 0, rules.initial_dims), {0: submission})))
    one = Rule(rules.target, rules.score, rules.compensate, None, (d_state,), 0)
    reduction = len(ray.cloudpickle.dumps(plan_truncation([sums], one, occasion).layers[0]))
    total = layers * reduction
    return Messages(sums.to_vector().nbytes, layers * spectrum, total, layers * (spectrum + reduction))


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    timings = []
    print(f"{cpu_model()}, 2 cores; gather, solve, decide, reduce and agree on a plan, median of {ROUNDS - 1} rounds")
    print(f"{'layers':>8}{'D':>8}{'N':>8}" + "".join(f"{w:>6} worker{'s' if w > 1 else ' '}" for w in WORKERS))
    for size in SIZES:
        row = [measure(*size, workers) for workers in WORKERS]
        timings += row
        print("".join(f"{part:>8}" for part in size) + "".join(f"{timing.ms:>11.0f} ms" for timing in row), flush=True)
    ray.shutdown()

    print(f"\non paper: one probe of {LARGE_LAYERS} layers; every worker makes 2 calls to the actor and gets the plan")
    print(
        f"{'MiB':24}{'workers':>8}{'reduced, each':>16}{'calls':>8}{'into actor':>12}{'out of it':>12}{'in actor':>12}"
    )
    paper = {}
    for name, (channels, d_state) in LARGE.items():
        sent = messages(channels, d_state, LARGE_LAYERS)
        paper[name] = asdict(sent)
        for workers in (8, 64, 1024):
            # A reduction to one rank passes each sum on once, however many workers there are.
            reduced, out = LARGE_LAYERS * sent.statistics, workers * sent.reductions
            sizes = (sent.spectra + sent.reductions, out, sent.actor_peak)
            cells = "".join(f"{size / 2**20:>12.2f}" for size in sizes)
            print(f"{name:24}{workers:>8}{reduced / 2**20:>16.1f}{2 * workers:>8}{cells}")
    RESULTS.mkdir(exist_ok=True)
    content = {"timings": [asdict(timing) for timing in timings], "messages": paper}
    (RESULTS / "coordination.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
