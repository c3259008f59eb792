"""RunConfig: everything a run is told, checked before anything starts.

Each part is owned by what uses it (models, data, truncation target and timing); this file puts them together.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

from compression.moments import Carry
from compression.planning import Rule
from compression.ranking import Target
from compression.schedule import Stable, Steps, Window
from compression.scores import Score
from models.mamba2 import Mamba2Config
from models.registry import ModelConfig
from orchestrator.data.source import absolute
from orchestrator.data.sources import DataConfig
from orchestrator.data.text import StdlibText, TextFiles

Share = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class DistillConfig(Part):
    """A baseline: learn from the answers of a larger model too."""

    teacher: Path = Field(description="Folder of the run whose model answers.")
    temperature: float = Field(2.0, gt=0, description="By which answers are softened.")
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the task's own loss; the rest is the teacher's.")

    @field_validator("teacher")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return absolute(path)


class RegularizeConfig(Part):
    """A baseline: make the layers easy to reduce by a penalty on their Hankel singular values at every step."""

    weight: float = Field(gt=0, description="Of the sum of all layers' Hankel singular values in the loss.")
    form: Literal["hankel", "nuclear"] = Field(
        "hankel", description="How the sum is computed: in closed form, or by dense Lyapunov solves as for any system."
    )


class TrainConfig(Part):
    """The optimizer and how often what happens."""

    steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    batch_size: int = Field(ge=1, description="Sequences per step, over all workers together.")
    accumulation: int = Field(1, ge=1, description="Parts in which a worker computes its share of a batch.")
    lr: float = Field(gt=0, description="Peak learning rate of AdamW.")
    ssm_lr_factor: float = Field(1.0, gt=0, description="Learning rate of state-space parameters as a multiple.")
    warmup: float = Field(0.1, ge=0, le=1, description="Share of the steps with a rising learning rate.")
    min_lr_factor: float = Field(0.1, ge=0, le=1, description="Last learning rate as a share of the peak (cosine).")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="Adam's averaging coefficients.")
    weight_decay: float = Field(0.1, ge=0, description="Of weight matrices; never of state-space parameters.")
    grad_clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 for no clipping.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of matrix products and what they give; parameters, states and optimizer stay float32."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass instead of keeping its activations."
    )
    distill: DistillConfig | None = Field(None, description="Learn from a teacher; a baseline of `rayduce compare`.")
    regularize: RegularizeConfig | None = Field(None, description="Penalise Hankel singular values; a baseline too.")
    eval_every: int = Field(100, ge=1, description="Steps between evaluations on held-out data.")
    eval_batches: int = Field(8, ge=1, description="Held-out batches of batch_size per evaluation.")
    log_every: int = Field(10, ge=1, description="Steps between reports of loss and speed.")
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints; there is one at the end too.")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine; a function of the step (from 1) alone, so it survives any rebuild."""
        warmup = round(self.warmup * self.steps)
        if step <= warmup:
            return self.lr * step / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        floor = self.min_lr_factor
        return self.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class CheckpointsConfig(Part):
    """Where checkpoints go and which of them stay; train.checkpoint_every says when there is one."""

    storage: str | None = Field(
        None, description="Folder, or URI such as s3://bucket/path; by default they stay in the run's folder."
    )
    keep_last: int = Field(2, ge=1, description="The newest ones, which stay.")
    keep_best: int = Field(1, ge=0, description="Those with the lowest held-out loss, which stay too.")
    keep_cuts: bool = Field(True, description="Those right after a truncation stay too.")
    retry_s: float = Field(120, ge=0, description="How long storage may be away before the training fails.")

    @field_validator("storage")
    @classmethod
    def _usable_anywhere(cls, storage: str | None) -> str | None:
        if storage is None:
            return None
        if "://" not in storage:
            return str(absolute(Path(storage)))
        if "@" in urlsplit(storage).netloc and storage.startswith("s3:"):
            raise ValueError(
                "holds a key, which would be written into the run's files; it must be s3://bucket/path, with the key "
                "in the environment as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return storage


class GuardConfig(Part):
    """Taking back a cut that hurts: the run returns to the state before it, and goes on without further cuts."""

    metric: Literal["val_loss", "val_accuracy"] = Field("val_loss", description="Held-out metric that is watched.")
    tolerance: float = Field(0.02, ge=0, description="Share by which it may be worse than right before the cut.")
    patience: int = Field(0, ge=0, description="Evaluations after the one right after the cut that may pass meanwhile.")


class Pace(NamedTuple):
    """Learning rate and batch size as multiples of those in the config."""

    lr: float
    batch: int


STEADY = Pace(1.0, 1)


class TruncationConfig(Part):
    """When to probe the state and how far to cut it."""

    target: Target
    window: Window | None = Field(None, description="Equidistant probes; by default four in the first tenth.")
    steps: Steps | None = Field(None, description="Explicit probe steps instead of a window.")
    stable: Stable | None = Field(None, description="Instead of a window, one cut per layer when its ranking rests.")
    score: Score | None = Field(
        None, description="What ranks the states; by default greedy with compensation, hankel without."
    )
    compensate: bool | None = Field(
        None, description="Fold what cut states contributed into the kept ones' output; by default where it can be."
    )
    moments: Carry = Field(
        "transport", description="Adam's moments go through the cut's maps; slice and reset are for comparison."
    )
    guard: GuardConfig | None = Field(None, description="Left out: cuts are never taken back.")
    lr_factor: float = Field(1.0, gt=0, description="Learning rate from the first cut on, as a multiple.")
    batch_factor: int = Field(1, ge=1, description="Sequences per step from the first cut on, as a multiple.")
    probe_batches: int = Field(2, ge=1, description="Training batches from which a probe takes its statistics.")

    @model_validator(mode="before")
    @classmethod
    def _default_timing(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and all(raw.get(timing) is None for timing in ("window", "steps", "stable")):
            return raw | {"window": {}}
        return raw

    @model_validator(mode="after")
    def _one_timing(self) -> TruncationConfig:
        if sum(timing is not None for timing in (self.window, self.steps, self.stable)) > 1:
            raise ValueError("takes one of window, steps and stable")
        if self.steps is not None and any(b <= a for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps {list(self.steps)} must increase")
        return self

    def probe_steps(self, total_steps: int) -> tuple[int, ...]:
        """Steps (from 1) after which the state is probed."""
        if self.steps is not None:
            return self.steps
        timing = self.window or self.stable
        assert timing is not None, "the default timing is a window"
        return timing.probe_steps(total_steps)


class Workers(Part):
    """A number of workers, or as many between `min` and `max` as there is room for at the time."""

    min: int = Field(ge=1, description="Fewest workers to train with.")
    max: int = Field(ge=1, description="Most workers to train with.")

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, raw: Any) -> Any:
        if isinstance(raw, int) and not isinstance(raw, bool):
            return {"min": raw, "max": raw}
        if not isinstance(raw, dict | Workers):
            raise ValueError(f"{raw!r} must be a number, or two as in {{min: 1, max: 4}}")
        return raw

    @model_validator(mode="after")
    def _in_order(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} must not be more than max {self.max}")
        return self

    @model_serializer
    def _as_it_is_written(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min} to {self.max}"


class ClusterConfig(Part):
    """What the run occupies."""

    workers: Workers = Field(Workers(min=1, max=1), description="Ray Train workers: a number, or min and max.")
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and threads, per worker.")
    use_gpu: bool = Field(False, description="One GPU per worker.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="What DeepSpeed spreads over the workers: 1 optimizer, 2 also gradients, 3 also parameters."
    )
    offload_optimizer: bool = Field(False, description="Keep masters and Adam's moments in host memory (ZeRO 1 to 3).")
    scan: Literal["auto", "torch", "cpu", "triton", "mamba_ssm"] = Field(
        "auto",
        description="What computes recurrences: torch, C++ (CPU), Triton or mamba_ssm (GPU); for Mamba-2 it is torch.",
    )
    timeout_s: int = Field(300, ge=1, le=86400, description="How long workers wait for each other, in seconds.")
    max_failures: int = Field(3, ge=0, description="Lost workers or nodes after which training goes on by itself.")

    @model_validator(mode="after")
    def _something_to_offload(self) -> ClusterConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer true needs zero_stage 1, 2 or 3; here it must be false")
        return self

    @model_validator(mode="after")
    def _kernels_fit_the_device(self) -> ClusterConfig:
        others = ("cpu",) if self.use_gpu else ("triton", "mamba_ssm")
        if self.scan in others:
            valid = "auto, torch, triton or mamba_ssm" if self.use_gpu else "auto, torch or cpu"
            raise ValueError(f"scan {self.scan} needs use_gpu {str(not self.use_gpu).lower()}; here it must be {valid}")
        return self


class TrackingConfig(Part):
    """Where metrics go besides the run's own folder."""

    mlflow: bool = Field(True, description="Log to MLflow.")
    mlflow_uri: str | None = Field(None, description="MLflow server; by default SQLite beside the runs.")
    experiment: str = Field("rayduce", min_length=1, description="MLflow experiment.")


class RunConfig(Part):
    """One training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Folder of the run below storage.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of initialisation and data order.")
    storage: Path = Field(Path("runs"), description="Folder of all runs; on a cluster, one that all nodes see.")
    data_root: Path = Field(Path("data"), description="Folder of the prepared datasets.")
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    truncation: TruncationConfig | None = Field(None, description="Left out: train at full size.")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    @field_validator("storage", "data_root")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return absolute(path)

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        train, workers = self.train, self.cluster.workers.max
        if train.batch_size < workers * train.accumulation:
            times = f" times train.accumulation {train.accumulation}" if train.accumulation > 1 else ""
            raise ValueError(
                f"train.batch_size {train.batch_size} must not be less than cluster.workers {workers}{times}"
            )
        if train.regularize is not None and self.model.kind != "lru":
            raise ValueError(f"train.regularize needs the linear layers of model.kind lru, not {self.model.kind}")
        if train.regularize is not None and self.cluster.zero_stage == 3:
            raise ValueError("cluster.zero_stage 3 must be 0, 1 or 2 with train.regularize, which needs whole layers")
        if self.cluster.scan == "mamba_ssm" and self.model.kind == "mamba" and max(self.model.state_dims) > 256:
            raise ValueError(
                f"model.d_state {max(self.model.state_dims)} must be at most 256 with cluster.scan mamba_ssm"
            )
        if self.truncation is not None:
            self._check_reduction(self.truncation)
            self._check_target(self.truncation.target)
            probes = self.probe_steps
            if probes[-1] > self.train.steps:
                raise ValueError(
                    f"truncation.steps has a probe at step {probes[-1]}, after the last step, train.steps "
                    f"{self.train.steps}"
                )
            if probes[0] < 1 or len(set(probes)) < len(probes):
                raise ValueError(
                    f"truncation has {len(probes)} probes, of which several would come after one step, or one before "
                    f"the first; take fewer, end them later, or raise train.steps {self.train.steps}"
                )
        return self

    def _check_reduction(self, truncation: TruncationConfig) -> None:
        model = self.model
        if isinstance(model, Mamba2Config) and model.n_groups > 1:
            raise ValueError(
                f"model.n_groups {model.n_groups} must be 1 with truncation, "
                "which chooses states of one group; or set truncation to null"
            )
        valid = ["hankel", "smallest", "random", *(["magnitude"] if model.kind == "lru" else [])]
        if self._combines and truncation.score not in (None, *valid):
            raise ValueError(
                f"truncation.score {truncation.score} chooses among states, which this model combines; "
                f"it must be {', '.join(valid[:-1])} or {valid[-1]}"
            )
        if truncation.compensate and model.kind != "mamba":
            raise ValueError(
                f"truncation.compensate needs the linear output projection of model.kind mamba, not {model.kind}"
            )
        metric = truncation.guard.metric if truncation.guard else "val_loss"
        if metric == "val_accuracy" and not self.has_accuracy:
            raise ValueError("truncation.guard.metric val_accuracy needs a task with labels; here it must be val_loss")

    def _check_target(self, target: Target) -> None:
        dims = self.model.state_dims
        if target.dim is not None and len(target.dims) not in (1, len(dims)):
            raise ValueError(
                f"truncation.target.dim {list(target.dims)} must be one number, or model.n_layers {len(dims)} of them"
            )
        if max(target.dims, default=1) > max(dims):
            raise ValueError(f"truncation.target.dim {target.dim} must lie between 1 and model.d_state {max(dims)}")
        least = len(dims) * (target.ladder[0] if target.ladder else 1)
        states = target.budget.states if target.budget else None
        if states is not None and not least <= states <= sum(dims):
            raise ValueError(
                f"truncation.target.budget.states {states} must lie between {least}, the least that "
                f"{len(dims)} layers can have, and {sum(dims)}, what they begin with"
            )
        cost = target.budget.cost if target.budget else None
        if cost is not None and cost < least / sum(dims):
            raise ValueError(
                f"truncation.target.budget.cost {cost:g} must be {least / sum(dims):.3g} or more, the least that "
                f"{len(dims)} layers of {least // len(dims)} states can have"
            )

    @property
    def probe_steps(self) -> tuple[int, ...]:
        return self.truncation.probe_steps(self.train.steps) if self.truncation is not None else ()

    @property
    def uncut_steps(self) -> int:
        """Steps before the first probe, which no truncation has a part in."""
        return self.probe_steps[0] - 1

    def pace(self, cut: bool) -> Pace:
        """Multiples of learning rate and batch size, before the first cut or after it."""
        if not cut:
            return STEADY
        assert self.truncation is not None
        return Pace(self.truncation.lr_factor, self.truncation.batch_factor)

    @property
    def truncation_rule(self) -> Rule | None:
        """What all probes go by; None without truncation."""
        if self.truncation is None:
            return None
        t, dims = self.truncation, tuple(self.model.state_dims)
        compensate = self.model.kind == "mamba" if t.compensate is None else t.compensate
        # Elimination takes for granted that what is left takes over.
        score = t.score or ("greedy" if compensate else "hankel")
        return Rule(t.target, score, compensate, t.stable, dims, self.seed)

    @property
    def _combines(self) -> bool:
        """Whether a cut combines states; else it chooses among them."""
        model = self.model
        return model.kind == "lru" or (isinstance(model, Mamba2Config) and model.basis == "rotated")

    @property
    def has_accuracy(self) -> bool:
        """Whether held-out accuracy is measured: for all but text, which has no right answers."""
        return not isinstance(self.data, StdlibText | TextFiles)

    @property
    def seq_len(self) -> int | None:
        """Tokens per sequence; None where the dataset's examples have a length of their own."""
        return getattr(self.data, "seq_len", None)

    def to_yaml(self) -> str:
        """The effective config; `config_reading.load_config` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
