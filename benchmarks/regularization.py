"""What penalising Hankel singular values costs a training step: `python -m benchmarks.regularization`.

The paper's model for sequential MNIST, one LRU layer; truncation leaves a step as it is, and makes later ones faster.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.measure import Duel, duel
from benchmarks.peers import SMNIST, Penalty, lru_training_step
from benchmarks.report import RESULTS, Row, report, setting
from compression.baselines.regularization import dense_nuclear_norm, hankel_sum


def beside_dense(penalty: Penalty | None, seconds: float) -> Duel:
    ours = lru_training_step(SMNIST, penalty=penalty)
    dense = lru_training_step(SMNIST, penalty=dense_nuclear_norm)
    ours()
    dense()
    return duel(ours, {"dense nuclear norm": dense}, seconds)


ROWS = (
    Row(
        "LRU step N=256 H=8 L=784 B=50, times faster than with the dense norm", partial(beside_dense, None), 40, 60, 40
    ),
    Row("the same with the HSVs' sum in closed form", partial(beside_dense, hankel_sum), 5, 10, 40),
)


def main(arguments: Sequence[str] | None = None) -> int:
    head, output = partial(setting, "torch"), RESULTS / "regularization.json"
    return report("python -m benchmarks.regularization", "Benchmarks of penalties.", ROWS, head, output, arguments)


if __name__ == "__main__":
    sys.exit(main())
