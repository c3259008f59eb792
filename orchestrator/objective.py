"""What a step minimises: the task's loss, and what the baselines add to it or mix with it."""

from __future__ import annotations

from torch import Tensor, autocast, bfloat16, no_grad

from compression.baselines.distillation import distillation_loss
from compression.baselines.regularization import dense_nuclear_norm, hankel_sum
from models.heads import NOT_ASKED, SequenceModel
from models.lru import LRU
from orchestrator.config import TrainConfig
from orchestrator.group import Group
from orchestrator.inference import load_model

PENALTIES = {"hankel": hankel_sum, "nuclear": dense_nuclear_norm}


class Objective:
    """The loss of a batch's rows, and a penalty that does not depend on rows. Every worker has the whole teacher."""

    def __init__(self, train: TrainConfig, group: Group) -> None:
        """Loads the teacher, if there is one.

        Raises:
            UserError: the teacher's folder has no model.
        """
        self._distil, self._regularize, self._rounds = train.distill, train.regularize, train.precision == "bfloat16"
        self._rank, self._workers = group.rank, group.size
        self._teacher: SequenceModel | None = None
        if self._distil is not None:
            self._teacher = load_model(self._distil.teacher).to(group.device).requires_grad_(False)

    def loss(self, model: SequenceModel, logits: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """What is minimised of these rows, a mean, float32; with a teacher, alpha parts of the task's loss.

        Shapes as in `SequenceModel.loss`; `inputs` as the model takes them.
        """
        loss = model.loss(logits, targets)
        if self._teacher is None:
            return loss
        assert self._distil is not None
        with no_grad(), autocast(inputs.device.type, bfloat16, enabled=self._rounds):
            answers = self._teacher(inputs)
        asked = targets.flatten() != NOT_ASKED
        student_XK, teacher_XK = (part.flatten(0, -2)[asked] for part in (logits, answers))
        alpha = self._distil.alpha
        return alpha * loss + (1 - alpha) * distillation_loss(student_XK, teacher_XK, self._distil.temperature)

    def penalty(self, model: SequenceModel) -> Tensor | float:
        """The weighted sum of all layers' Hankel singular values; 0 where nothing is regularised.

        Each worker looks at its share of the layers: only the mean over the workers is this sum.
        """
        if self._regularize is None:
            return 0.0
        total: Tensor | float = 0.0
        for mixer in model.mixers()[self._rank :: self._workers]:
            assert isinstance(mixer, LRU), "the config refuses other models"
            total = total + PENALTIES[self._regularize.form](mixer.system())
        return self._workers * self._regularize.weight * total
