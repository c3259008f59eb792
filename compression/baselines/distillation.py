"""Knowledge distillation: a small model learns what a large one answers.

Shapes: X what is asked, K answers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student_XK: Tensor, teacher_XK: Tensor, temperature: float) -> Tensor:
    """T^2 times the mean divergence KL(teacher || student) of answers softened by the temperature T, in nats, float32.

    The factor keeps its gradients as large as a hard loss's whatever T is (Hinton, Vinyals, Dean, arXiv 1503.02531,
    section 2).
    """
    student_XK = F.log_softmax(student_XK.float() / temperature, dim=-1)
    teacher_XK = F.log_softmax(teacher_XK.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student_XK, teacher_XK, reduction="batchmean", log_target=True)
