"""Dropout that does not depend on who computes a row.

Shapes: B batch, L time, M d_model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class RowDropout(nn.Module):
    """Drops entries in training and scales the rest up; which ones follows from `key` and the row's place.

    So workers drop of a global batch what one would, and the parts of an accumulated batch what the whole would.
    """

    share = 0.0
    """Of the entries, which training drops."""
    key: tuple[int, ...] = (0,)
    """What is drawn for; another one for every step and layer."""
    first = 0
    """Place of the first row in the global batch."""

    def forward(self, x_BLM: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x_BLM
        # A row's seed does not depend on how many are drawn after it.
        seeds = np.random.SeedSequence(self.key).generate_state(self.first + len(x_BLM))[self.first :]
        generator = torch.Generator(x_BLM.device)
        kept_BLM = torch.empty_like(x_BLM, requires_grad=False)
        for kept_LM, seed in zip(kept_BLM, seeds, strict=True):
            kept_LM.bernoulli_(1 - self.share, generator=generator.manual_seed(int(seed)))
        # Not the mask: 1 / (1 - share) would be rounded to bfloat16, and all entries scaled by the same wrong factor.
        return x_BLM * kept_BLM / (1 - self.share)
