"""The model of a run, read back for use; neither Ray nor DeepSpeed takes part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from models.heads import SequenceModel
from models.registry import (
    ClassificationTask,
    LanguageTask,
    PairClassificationTask,
    RecallTask,
    Task,
    TokenClassificationTask,
    build_model,
)
from orchestrator import checkpoint
from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.data.listops import ListOps
from orchestrator.data.lra import Aan, Imdb
from orchestrator.data.recall import Recall
from orchestrator.data.text import StdlibText, TextFiles
from orchestrator.errors import UserError
from orchestrator.filesystem import Folder
from orchestrator.storage import checkpoints_of, earlier_storage


def load_model(run: Path | str, step: int | None = None) -> SequenceModel:
    """The model alone, as `load_run` gives it."""
    return load_run(run, step)[0]


def load_run(run: Path | str, step: int | None = None) -> tuple[SequenceModel, RunConfig]:
    """The config of a run, and the model of a checkpoint, in float32 on the CPU, set to evaluation.

    `run` is the run's folder, or the URI of the folder with its checkpoints, such as s3://bucket/checkpoints/NAME.
    `step` says which complete checkpoint, without it the newest. The run may be training, finished or killed; its
    dataset is not needed.

    Raises:
        UserError: `run` is neither, has no such checkpoint, or it is damaged.
    """
    folder = _checkpoints(run)
    path = checkpoint.newest(folder) if step is None else checkpoint.at(folder, step)
    if path is None:
        raise UserError(f"run {run} has no complete checkpoint yet; train.checkpoint_every says when it writes one")
    if step is not None and not path.has(checkpoint.MANIFEST):
        others = ", ".join(map(str, checkpoint.complete_steps(folder)))
        raise UserError(f"run {run} has no complete checkpoint of step {step}; it has {others or 'none'}")
    manifest = checkpoint.verify(path)
    config = parse_config(manifest.config)
    model = build_model(config.model, _task(config, manifest.shapes), manifest.state_dims)
    values = checkpoint.load_values(path, manifest)
    assert values.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(values, strict=False)  # tied weights are one parameter with two names
    return model.eval(), config


def _checkpoints(run: Path | str) -> Folder:
    if "://" in str(run):
        return Folder.of(run, "run")
    run = Path(run)
    storage = earlier_storage(run)
    if storage is None and not (run / "checkpoints").is_dir():
        raise UserError(f"{run} has no folder checkpoints: expected the folder of a training run")
    return checkpoints_of(run.absolute(), storage)


def _task(config: RunConfig, shapes: Mapping[str, tuple[int, ...]]) -> Task:
    embedding = shapes["backbone.embedding.weight"]
    match config.data:
        case StdlibText() | TextFiles():
            return LanguageTask(vocab_size=embedding[0])
        case Recall():
            return RecallTask(config.data.vocab_size)
        case ListOps() | Imdb():
            return TokenClassificationTask(embedding[0], n_classes=shapes["head.weight"][0])
        case Aan():
            return PairClassificationTask(embedding[0], n_classes=shapes["head.4.weight"][0])
        case _:
            return ClassificationTask(n_features=embedding[1], n_classes=shapes["head.weight"][0])
