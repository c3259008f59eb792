"""A DeepSpeed engine that can change the shape of its model: build, step, evaluate, reshape, close."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compression.gramians import Statistics
from compression.moments import ParameterState
from compression.plan import LayerPlan, TruncationPlan
from models.heads import NOT_ASKED, SequenceModel
from models.layer import TruncatableLayer
from models.registry import LanguageTask, Task, build_mixer, build_model
from models.scan import backends
from orchestrator.config import STEADY, Pace, RunConfig, TrainConfig
from orchestrator.data.batches import Batch
from orchestrator.failpoints import reach
from orchestrator.group import Group
from orchestrator.objective import Objective
from orchestrator.sharded_state import ShardedState, States, parameter_groups
from orchestrator.zero import (
    EngineState,
    forget_engines,
    gathered,
    optimizer_step,
    partition,
    prepare_collectives,
    whole_shape,
)


class Engine:
    """One model under ZeRO on this worker. Every method counts on all workers calling it."""

    def __init__(self, config: RunConfig, task: Task, state_dims: Sequence[int], group: Group) -> None:
        self._config = config
        self._task = task
        self._group = group
        self.gradient_norm = torch.zeros((), device=group.device)
        """Of the last step, over all workers and before clipping; NaN or infinite where that step was none."""
        self._objective = Objective(config.train, group)
        prepare_collectives()
        self._build(state_dims)

    def step(self, batch: Batch, step: int, pace: Pace = STEADY) -> Tensor:
        """One optimizer step (from 1) on this worker's rows.

        Returns their share in the loss, detached: the mean over the workers is the mean over the global batch.
        """
        lr = self._config.train.learning_rate(step) * pace.lr
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        train, share = self._config.train, torch.zeros((), device=self._group.device)
        for number, part in enumerate(batch.to(self._group.device).split(train.accumulation)):
            # DeepSpeed takes the mean over parts and workers, which may have a row more or less than others.
            weight = len(part.targets) * train.accumulation * self._group.size / (train.batch_size * pace.batch)
            self._model.seed_dropout((self._config.seed, step), part.first)
            logits = self._engine(part.inputs)
            loss = self._objective.loss(self._model, logits, part.inputs, part.targets) * weight
            # Once a step: DeepSpeed takes the mean over parts, and over workers.
            penalty = train.accumulation * self._objective.penalty(self._model) if number == 0 else 0.0
            self._engine.backward(loss + penalty)
            if self._engine.is_gradient_accumulation_boundary():
                self.gradient_norm = optimizer_step(self._engine)
            else:
                self._engine.step()  # counts the part
            share += loss.detach() / train.accumulation
        return share

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss in nats over what all workers' batches ask and, except for text, the share answered right."""
        totals = torch.zeros(3, dtype=torch.float64)
        self._engine.eval()
        for batch in batches:
            batch = batch.to(self._group.device)
            logits = self._engine(batch.inputs)
            n = int((batch.targets != NOT_ASKED).sum())
            if n > 0:
                loss = float(self._model.loss(logits, batch.targets)) * n
                correct = float((logits.argmax(-1) == batch.targets).sum())
                totals += torch.tensor([loss, correct, n], dtype=torch.float64)
        self._engine.train()
        loss, correct, n = self._group.sum(totals).tolist()
        metrics = {"val_loss": loss / n}
        if not isinstance(self._task, LanguageTask):
            metrics["val_accuracy"] = correct / n
        return metrics

    @torch.no_grad()
    def statistics(self, batches: Iterable[Batch]) -> list[Statistics]:
        """What every layer contributes at a probe, from this worker's rows and the present weights."""
        mixers = self._model.mixers()
        for mixer in mixers:
            mixer.start_statistics()
        self._engine.eval()  # what is dropped in training is not missing from the statistics
        if any(mixer.statistics_need_tokens for mixer in mixers):
            for batch in batches:
                for part in batch.split(self._config.train.accumulation):
                    self._engine(part.inputs.to(self._group.device))
        self._engine.train()
        found = []
        for mixer in mixers:
            with gathered(mixer.parameters()):
                found.append(mixer.finish_statistics())
        return found

    def certify(self, plan: TruncationPlan, batches: Iterable[Batch]) -> tuple[TruncationPlan, dict[str, float]]:
        """What the cut does to each layer's output on these batches, and `evaluate`'s metrics of the uncut model.

        Every layer gets the input that the uncut model gives it, so that the errors are each layer's own.
        """
        mixers = self._model.mixers()
        squares = torch.zeros(2, len(mixers), dtype=torch.float64)  # of the change, and of the output

        def compare(cut: LayerPlan) -> RemovableHandle:
            shrunk = partial(self._shrunk, cut)
            # Where layers are spread over the workers, made for every batch anew: so there is one at a time.
            smaller = shrunk if self._config.cluster.zero_stage == 3 else cache(shrunk)

            def hook(_: nn.Module, inputs: tuple[Tensor], out_BLM: Tensor) -> None:
                change_BLM = smaller()(*inputs).float() - out_BLM.float()
                for row, part in enumerate((change_BLM, out_BLM.float())):
                    squares[row, cut.layer] += float(part.square().sum(dtype=torch.float64))

            return mixers[cut.layer].register_forward_hook(hook)

        hooks = [compare(cut) for cut in plan.layers if cut.reduction is not None]
        metrics = self.evaluate(batches)
        for handle in hooks:
            handle.remove()
        change, output = self._group.sum(squares).sqrt().tolist()
        # Without an output there is nothing that a cut could change.
        errors = [part / whole if whole > 0 else 0.0 for part, whole in zip(change, output, strict=True)]
        return plan.certified(errors), metrics

    def reshape(self, plan: TruncationPlan) -> None:
        """Apply a plan to masters, moments and model; the engine is built again around the smaller model."""
        state = self._read(plan)
        reach("rebuild", plan.step)
        self.restore(plan.dims_after, state)

    def restore(self, state_dims: Sequence[int], state: ShardedState) -> None:
        """Build the engine again, with these dimensions, around a state that has them."""
        self.close()
        self._build(state_dims)
        self.load(state)

    def state(self) -> ShardedState:
        """Everything that training has changed, spread over the workers."""
        return self._read(None)

    def load(self, state: ShardedState) -> None:
        self._state.write(state, self._group)

    def checksum(self) -> str:
        """SHA-256 of all parameters as this worker computes with them; collective."""
        digest = hashlib.sha256()
        for name, parameter in self._model.named_parameters():
            digest.update(name.encode())
            with gathered([parameter]):
                digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def scans(self) -> str:
        """What computes the recurrences, in words for a person."""
        if self._config.model.kind == "mamba2":
            return "scans as matrix products, in torch"
        return backends.describe(self._group.device)

    @property
    def parameter_count(self) -> int:
        return sum(whole_shape(parameter).numel() for parameter in self._model.parameters())

    @property
    def state_dims(self) -> list[int]:
        return self._model.state_dims

    def close(self) -> None:
        """Release the engine and all that it holds."""
        self._engine.destroy()
        del self._engine, self._model, self._state
        forget_engines()
        # Engine, optimizer and parameters refer to each other in circles (DeepSpeed issue 7204).
        gc.collect()

    def _shrunk(self, cut: LayerPlan) -> TruncatableLayer:
        """One layer as the plan would leave it."""
        mixer = self._model.mixers()[cut.layer]
        with torch.device("meta"):
            smaller = build_mixer(self._config.model, cut.layer, cut.dim_after)
        with gathered(mixer.parameters()):
            states = {name: ParameterState.fresh(parameter.detach()) for name, parameter in mixer.named_parameters()}
            shrunk = {name: state.value.clone() for name, state in mixer.shrink(cut, states).items()}
        smaller.load_state_dict(shrunk, assign=True)
        return smaller

    def _build(self, state_dims: Sequence[int]) -> None:
        settings = _deepspeed_config(self._config)

        def place(mixer: TruncatableLayer) -> None:
            partition(mixer.to(self._group.device), settings)

        torch.manual_seed(self._config.seed)
        self._model: SequenceModel = build_model(self._config.model, self._task, state_dims, place)
        self._model.to(self._group.device)
        train = self._config.train
        self._model.backbone.activation_checkpointing = train.activation_checkpointing
        optimizer = torch.optim.AdamW(_optimizer_groups(self._model, train), lr=train.lr, betas=train.betas)
        self._engine, *_ = deepspeed.initialize(
            model=self._model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._state = EngineState(self._engine, {type(mixer) for mixer in self._model.mixers()})

    def _read(self, plan: TruncationPlan | None) -> ShardedState:
        layers = {f"backbone.layers.{i}.mixer.": i for i in range(len(self.state_dims))}
        mixers = self._model.mixers()

        def shrink(prefix: str, states: States) -> States:
            if plan is None or prefix not in layers or plan.layers[layers[prefix]].reduction is None:
                return states
            index = layers[prefix]
            own = {name.removeprefix(prefix): state for name, state in states.items()}
            shrunk = mixers[index].shrink(plan.layers[index], own)
            assert self._config.truncation is not None
            carry = self._config.truncation.moments
            kept = {name: own[name].replaced(carry, state) if name in own else state for name, state in shrunk.items()}
            return {prefix + name: state for name, state in kept.items()}

        groups = parameter_groups(self._model, layers)
        return self._state.read(groups, shrink, self._group)


def _optimizer_groups(model: SequenceModel, train: TrainConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases without; the state space without and at its own rate."""
    space = {
        id(parameter)
        for mixer in model.mixers()
        for name, parameter in mixer.named_parameters()
        if name in mixer.ssm_parameters
    }
    state_space = [p for p in model.parameters() if id(p) in space]
    others = [p for p in model.parameters() if id(p) not in space]
    matrices = [p for p in others if len(whole_shape(p)) >= 2]
    vectors = [p for p in others if len(whole_shape(p)) < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay, "lr_factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": state_space, "weight_decay": 0.0, "lr_factor": train.ssm_lr_factor},
    ]
    return [group for group in groups if group["params"]]


def _deepspeed_config(config: RunConfig) -> dict[str, Any]:
    train, cluster = config.train, config.cluster
    zero: dict[str, Any] = {"stage": cluster.zero_stage}
    if cluster.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cluster.use_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, but it only multiplies this
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.grad_clip,
        "zero_optimization": zero,
        # No module's gradients are rounded on their way between the workers.
        "torch_autocast": {
            "enabled": train.precision == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        # torch's AdamW everywhere, so that moments mean the same at every stage.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
