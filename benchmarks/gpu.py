"""How fast training is on a GPU, beside the mamba_ssm package: `python -m benchmarks.gpu [--only SUBSTRING]`.

Blocks first prove in float32 that they compute the same, and are timed in bfloat16, as models are trained there.
The peer brings CUDA kernels of its own, for which pip needs nvcc and minutes: `pip install mamba-ssm`, and
`causal-conv1d`, with which its blocks are fused further. Mamba-2's take it a minute to tune at first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

from benchmarks import peers
from benchmarks.measure import BlockPass, Build, Duel, Shape, duel
from benchmarks.peers import SMNIST, LRUTask, lru_training_step
from benchmarks.report import RESULTS, Row, report, setting

# A layer of a model with 130 million parameters.
BLOCK = Shape(batch=8, length=2048, width=768)
SCIFAR = LRUTask(d_state=384, d_model=512, n_features=3, batch=50, length=1024)
# mamba_ssm's kernels round what they multiply to TF32, which has 10 bits of float32's 23.
TF32 = 30.0
FUSED = find_spec("causal_conv1d") is not None
OURS, OUR_MAMBA2 = (partial(build, d_model=BLOCK.width) for build in (peers.ours, peers.our_mamba2))


def mamba_ssm(d_state: int) -> nn.Module:
    from mamba_ssm.modules.mamba_simple import Mamba as Block  # type: ignore[import-not-found]

    block: nn.Module = Block(BLOCK.width, d_state=d_state)
    return block


def mamba_ssm_mamba2(d_state: int) -> nn.Module:
    from mamba_ssm.modules.mamba2 import Mamba2 as Block  # type: ignore[import-not-found]

    block: nn.Module = Block(BLOCK.width, d_state=d_state, headdim=64, use_mem_eff_path=FUSED)
    return block


def beside(build_ours: Build, build_other: Build, d_state: int, seconds: float) -> Duel:
    mine, other = (BlockPass(build(d_state), BLOCK, "cuda") for build in (build_ours, build_other))
    other.block.load_state_dict(mine.block.state_dict())
    mine()
    other()
    mine.assert_same_work(other, TF32)
    return timed_in_bfloat16(mine, {"mamba_ssm": other}, seconds)


def after_cut(build: Build, before: int, after: int, seconds: float) -> Duel:
    large, small = (BlockPass(build(d_state), BLOCK, "cuda") for d_state in (before, after))
    return timed_in_bfloat16(small, {f"N={before}": large}, seconds)


def timed_in_bfloat16(mine: BlockPass, others: dict[str, BlockPass], seconds: float) -> Duel:
    for step in (mine, *others.values()):
        step.rounds = True
        step()
    return duel(mine, others, seconds)


def lru_after_cut(task: LRUTask, after: int, seconds: float) -> Duel:
    large, small = (lru_training_step(replace(task, d_state=N), device="cuda") for N in (task.d_state, after))
    large()
    small()
    return duel(small, {f"N={task.d_state}": large}, seconds)


BESIDE, BESIDE2 = partial(beside, OURS, mamba_ssm), partial(beside, OUR_MAMBA2, mamba_ssm_mamba2)
CUT, CUT2 = partial(after_cut, OURS), partial(after_cut, OUR_MAMBA2)
ROWS = (
    Row("Mamba-1 block N=16, times faster than mamba_ssm", partial(BESIDE, 16), 0.9, 1.1, 5),
    Row("Mamba-1 block N=64, times faster than mamba_ssm", partial(BESIDE, 64), 0.9, 1.1, 5),
    Row("Mamba-1 block N=128, times faster than mamba_ssm", partial(BESIDE, 128), 0.9, 1.1, 5),
    Row("Mamba-2 block N=128, times faster than mamba_ssm", partial(BESIDE2, 128), 0.5, 1.0, 5),
    Row("Mamba-2 block N=32, times faster than mamba_ssm", partial(BESIDE2, 32), 0.5, 1.0, 5),
    Row("Mamba-1 block cut from N=64 to 16, times faster", partial(CUT, 64, 16), 1.5, 2, 5),
    Row("Mamba-1 block cut from N=128 to 16, times faster", partial(CUT, 128, 16), 2, 3, 5),
    Row("Mamba-2 block cut from N=128 to 32, times faster", partial(CUT2, 128, 32), 1.2, 1.5, 5),
    Row("LRU step H=8 L=784 B=50 cut from N=256 to 28, times faster", partial(lru_after_cut, SMNIST, 28), 1, 2.6, 5),
    Row(
        "LRU step H=512 L=1024 B=50 cut from N=384 to 57, times faster", partial(lru_after_cut, SCIFAR, 57), 1.2, 1.5, 5
    ),
)


def head() -> str:
    blocks = f"{torch.cuda.get_device_name()}; blocks: B {BLOCK.batch}, d_model {BLOCK.width}, L {BLOCK.length}"
    return setting(
        "torch",
        "triton",
        "mamba_ssm",
        *(["causal_conv1d"] if FUSED else []),
        said=f"{blocks}, bfloat16, forward and backward; LRU in float32\n",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    if not torch.cuda.is_available():
        print("python -m benchmarks.gpu needs a GPU and torch's CUDA build; there is none here", file=sys.stderr)
        return 2
    output = RESULTS / "gpu.json"
    return report("python -m benchmarks.gpu", "Benchmarks on a GPU.", ROWS, head, output, arguments)


if __name__ == "__main__":
    sys.exit(main())
