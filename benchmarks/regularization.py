"""What penalising Hankel singular values costs a training step: `python -m benchmarks.regularization`.

The paper's model for sequential MNIST, one LRU layer of 256 states; truncation leaves 28 at a tolerance of 2 %.
The paper has 0.06 times full size's speed for the dense nuclear norm and 2.6 times for truncation: 43 times between
them (CompreSSM, arXiv 2510.02823, section 4), and 17 times from full size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.measure import Duel, duel
from benchmarks.peers import SMNIST, LRUTask, Penalty, lru_training_step
from benchmarks.report import RESULTS, Row, report, setting
from compression.baselines.regularization import dense_nuclear_norm, hankel_sum

TRUNCATED = replace(SMNIST, d_state=28)


def beside_dense(task: LRUTask, penalty: Penalty | None, seconds: float) -> Duel:
    ours = lru_training_step(task, penalty=penalty)
    dense = lru_training_step(SMNIST, penalty=dense_nuclear_norm)
    ours()
    dense()
    return duel(ours, {"256 states with the dense nuclear norm": dense}, seconds)


ROWS = (
    Row("step of 28 states, times faster than with the dense norm", partial(beside_dense, TRUNCATED, None), 40, 60, 40),
    Row("step of 256 states, times faster than with the dense norm", partial(beside_dense, SMNIST, None), 16, 25, 40),
    Row("the same with the HSVs' sum in closed form", partial(beside_dense, SMNIST, hankel_sum), 5, 10, 40),
)


def main(arguments: Sequence[str] | None = None) -> int:
    head, output = partial(setting, "torch"), RESULTS / "regularization.json"
    return report("python -m benchmarks.regularization", "Benchmarks of penalties.", ROWS, head, output, arguments)


if __name__ == "__main__":
    sys.exit(main())
