"""How fast the scans are beside other code: `python -m benchmarks.scans [--only SUBSTRING]`.

Every row is one comparison, timed in turns in this process. To add a row: a function from a time box in seconds to
a `Duel`, and an entry in ROWS.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from benchmarks import peers
from benchmarks.measure import BlockPass, Build, Duel, Shape, duel, duel_for_memory
from benchmarks.report import AT_MOST, RESULTS, Row, report, setting
from models.selective import SelectiveLayer

BLOCK = Shape(batch=8, length=256, width=peers.D_MODEL)
LONG_BLOCK = Shape(batch=8, length=1024, width=peers.D_MODEL)


def block_beside(build_ours: Build, shape: Shape, d_state: int, builds: Sequence[Build], seconds: float) -> Duel:
    """Our block beside others with its weights; the first, untimed call proves that the work is equal."""
    ours = BlockPass(build_ours(d_state), shape)
    ours()
    others = {}
    for build in builds:
        other = build(d_state)
        other.load_state_dict(ours.block.state_dict())
        others[build.__name__] = BlockPass(other, shape)
        others[build.__name__]()
        ours.assert_same_work(others[build.__name__])
    return duel(ours, others, seconds)


def block_beside_products(build: Build, shape: Shape, d_state: int, seconds: float) -> Duel:
    ours, products = BlockPass(build(d_state), shape), peers.matrix_products(build(d_state), shape)
    ours()
    products()
    return duel(ours, {"its matrix products": products}, seconds)


def block_after_cut(before: int, after: int, seconds: float) -> Duel:
    large, small = BlockPass(peers.ours(before), BLOCK), BlockPass(peers.ours(after), BLOCK)
    large()
    small()
    return duel(small, {f"N={before}": large}, seconds)


def block_with_statistics(build: Build, shape: Shape, d_state: int, seconds: float) -> Duel:
    without, gathering = BlockPass(build(d_state), shape), BlockPass(build(d_state), shape)
    assert isinstance(gathering.block, SelectiveLayer)
    without()
    gathering.block.start_statistics()
    gathering()
    gathering.assert_same_work(without)
    if int(gathering.block.finish_statistics().tokens) != shape.batch * shape.length:
        raise RuntimeError("the block did not gather the statistics of every token")
    gathering.block.start_statistics()
    return duel(gathering, {"without statistics": without}, seconds)


def lru_step(task: peers.LRUTask, seconds: float) -> Duel:
    ours, floor = (peers.lru_training_step(task, stateless) for stateless in (False, True))
    ours()
    floor()
    return duel(ours, {"without the recurrence": floor}, seconds)


LIBRARIES = (peers.mambapy, peers.transformers)
SMNIST_STEP = partial(lru_step, peers.SMNIST)
SCIFAR = peers.LRUTask(d_state=384, d_model=512, n_features=3, batch=4, length=1024)
MEMORY = partial(duel_for_memory, peers.ours, peers.mambapy, 128, BLOCK)
BESIDE = partial(block_beside, peers.ours, BLOCK)
BESIDE2 = partial(block_beside, peers.our_mamba2, LONG_BLOCK, 128, [peers.transformers_mamba2])
PRODUCTS = partial(block_beside_products, peers.ours, BLOCK)
STATISTICS = partial(block_with_statistics, peers.ours, BLOCK)
STATISTICS2 = partial(block_with_statistics, peers.our_mamba2, BLOCK)
ROWS = (
    Row("Mamba-1 block N=16, times faster than torch libraries", partial(BESIDE, 16, LIBRARIES), 12, 20, 40),
    Row("Mamba-1 block N=128, times faster than torch libraries", partial(BESIDE, 128, LIBRARIES), 65, 90, 100),
    Row("Mamba-1 block N=16, times faster than a loop", partial(BESIDE, 16, [peers.naive]), 10, 16, 30),
    Row("Mamba-1 block N=128, times faster than a loop", partial(BESIDE, 128, [peers.naive]), 38, 50, 50),
    Row("Mamba-1 block N=12, times its matrix products", partial(PRODUCTS, 12), 2.2, 1.6, 15, AT_MOST),
    Row("Mamba-1 block N=128, times its matrix products", partial(PRODUCTS, 128), 3.5, 2.7, 15, AT_MOST),
    Row("Mamba-1 block cut from N=128 to 12, times faster", partial(block_after_cut, 128, 12), 1.9, 2.5, 15),
    Row("Mamba-1 block N=128, times mambapy's peak memory", MEMORY, 1 / 6, 1 / 8, 75, AT_MOST),
    Row("Mamba-1 block N=64 with statistics, times without", partial(STATISTICS, 64), 1.15, 1.05, 15, AT_MOST),
    Row("Mamba-2 block N=128 with statistics, times without", partial(STATISTICS2, 128), 1.15, 1.05, 15, AT_MOST),
    Row("Mamba-2 block N=128 headdim 64 L=1024, times faster than transformers", BESIDE2, 6, 12, 40),
    Row("LRU step N=256 H=8 L=784 B=50, times without recurrence", SMNIST_STEP, 2.1, 1.7, 20, AT_MOST),
    Row("LRU step N=384 H=512 L=1024 B=4, times without recurrence", partial(lru_step, SCIFAR), 1.8, 1.4, 20, AT_MOST),
)


def head() -> str:
    blocks = f"blocks: B {BLOCK.batch}, d_model {BLOCK.width}, L {BLOCK.length} unless said"
    return setting("torch", "mambapy", "transformers", said=f"float32, forward and backward; {blocks}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    output = RESULTS / "latest.json"
    return report("python -m benchmarks.scans", "Benchmarks of the scans.", ROWS, head, output, arguments)


if __name__ == "__main__":
    sys.exit(main())
