"""A comparison: full size, truncation in mid-training, and what it claims to beat, each trained the same way.

Methods of one seed share data order, steps and optimizer, and all that are made smaller end with the dimensions that
truncation has reached at that seed; those that are cut at their end, with as many states in all (`_own`). What runs
have in common, as most have with full size up to the first probe, is trained once, and its time is each one's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from models.registry import Task, build_model
from orchestrator import launch
from orchestrator.collection import below, parent_run, refuse_another_request, remember_request
from orchestrator.comparison_report import (
    COMPARISON,
    METHODS,
    PAGE,
    Row,
    described,
    read_comparison,
    together,
    write_comparison,
)
from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.crew import Crew
from orchestrator.data.arrow import describe
from orchestrator.data.sources import prepare
from orchestrator.errors import TrainingError, UserError
from orchestrator.launch import Lent
from orchestrator.mlflow_tracker import MlflowTracker, Nesting, mlflow_command
from orchestrator.ray_cluster import ray_cluster
from orchestrator.run_folder import ray_log
from orchestrator.signals import StopRequest, stop_request
from orchestrator.storage import hold_folder
from orchestrator.terminal import Terminal, chatter_to, duration
from orchestrator.trunk import TRUNK, branch, untruncated

# The learning rate after pruning begins at this share of its peak, or higher where the schedule still is.
FINE_TUNED_AT = 0.1
FULL = "full"  # the run that others begin with, or learn from
FROM_SCRATCH = ("scratch", "distill")
PENALTIES = {"hsv_regularized": "hankel", "nuclear_regularized": "nuclear"}


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line, besides the config."""

    methods: tuple[str, ...]
    seeds: int
    tolerances: tuple[float, ...]
    """Of hankel; the config's own target where there are none."""
    fine_tune: float
    """Steps after magnitude pruning, as a share of the training."""
    penalty: float
    """Weight of the regularised methods' penalty."""

    @property
    def lasting(self) -> dict[str, float]:
        """What cannot be another once runs have been trained with it."""
        pruning = {"fine_tune": self.fine_tune} if "magnitude" in self.methods else {}
        return pruning | ({} if PENALTIES.keys().isdisjoint(self.methods) else {"penalty": self.penalty})


@dataclass(frozen=True)
class Place:
    """Where a run of the comparison belongs."""

    method: str
    size: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.size}" if self.size else self.method


def compare(config: RunConfig, request: Request) -> list[Row]:
    """Train every method with every seed, or what is missing of that; one row a run.

    Raises:
        UserError: a method, a number or the config is not usable; nothing has been started.
        TrainingError: some runs have failed; the table has all others, and says why.
        Interrupted: a signal ended the comparison; the same command continues it.
    """
    started = time.perf_counter()
    check(config, request)
    folder = config.storage / f"{config.name}-compare"
    with hold_folder(folder), ExitStack() as stack:
        # What is trained is not trained again, whatever else is asked for.
        base, asked = below(config, folder), request.lasting
        refuse_another_request(folder, base, asked)
        earlier = read_comparison(folder)
        task = describe(prepare(config.data, config.data_root)).task
        terminal = stack.enter_context(chatter_to(ray_log(folder)))
        stop = stack.enter_context(stop_request())
        stack.enter_context(ray_cluster(config))
        remember_request(folder, base, asked)
        tracker = stack.enter_context(parent_run(config, folder, terminal.line))
        crew = stack.enter_context(Crew(config.cluster, folder / "ray_train"))
        team = _Team(crew, stop, tracker, task, terminal)
        sizes = len(request.tolerances) or 1
        total = request.seeds * (1 + sizes * (1 + len(_opponents(request))))
        rows: list[Row] = []
        for number in range(request.seeds):
            seed = config.seed + number
            own = below(config, folder / f"seed-{seed}").model_copy(update={"seed": seed})
            for row in _train_all(own, request, team):
                rows.append(row)
                terminal.line(f"{len(rows)} of {total}: seed {seed}, {row.told()}")
                # After each: what there is can be looked at, however long the rest takes.
                text = write_comparison(folder, together(earlier, rows), described(config))
            if tracker is not None:
                for name in (COMPARISON, PAGE, "figures/comparison.png"):
                    tracker.artifact(folder / name)
    print(f"done in {duration(time.perf_counter() - started)}\n\n{text}")
    print(f"  files    {folder} (comparison.md, comparison.parquet, figures, and all runs)")
    if config.tracking.mlflow:
        print(f"  MLflow   {mlflow_command(config)}")
    if failed := [row for row in rows if row.error is not None]:
        raise TrainingError(f"{len(failed)} of {total} runs have failed; the same command tries them again")
    return rows


def check(config: RunConfig, request: Request) -> None:
    """Everything that can be known before anything starts.

    Raises:
        UserError: in one sentence, what cannot be compared.
    """
    if config.truncation is None:
        raise UserError("truncation null must say how and when to truncate: that is what is compared with the rest")
    for method in request.methods:
        if method not in METHODS:
            raise UserError(f"--methods {method} must be one of {', '.join(METHODS)}")
    if request.seeds < 1:
        raise UserError(f"--seeds {request.seeds} must be 1 or more")
    for tolerance in request.tolerances:
        if not 0 < tolerance < 1:
            raise UserError(f"--tolerance {tolerance:g} must lie between 0 and 1")
    labels = [f"{tolerance:g}" for tolerance in request.tolerances]
    if len(set(labels)) < len(labels):
        raise UserError(f"--tolerance {' '.join(labels)} must differ from each other")
    if not 0 < request.fine_tune <= 1:
        raise UserError(f"--fine-tune {request.fine_tune:g} must be a share of the steps, more than 0 and at most 1")
    if request.penalty <= 0:
        raise UserError(f"--penalty {request.penalty:g} must be more than 0")
    if config.truncation.stable is not None or config.truncation.guard is not None:
        raise UserError("truncation.stable and guard must be left out: methods are compared at the same cuts")
    if (config.truncation.lr_factor, config.truncation.batch_factor) != (1, 1):
        raise UserError("truncation.lr_factor and batch_factor must be 1: all methods train with the same steps")
    if config.truncation.score in ("random", "smallest", "magnitude"):
        raise UserError(f"truncation.score {config.truncation.score} must be left out: it is a method of its own")
    if config.train.distill is not None or config.train.regularize is not None:
        raise UserError("train.distill and regularize must be left out: they are methods of their own")
    for size, cut in _sizes(config, request):
        for method in _opponents(request):
            place = Place(method, size, config.seed)
            try:
                _opponent(place, cut, config.model.state_dims, request)
            except UserError as error:
                raise UserError(f"--methods must leave out {method}: {error}") from error


@dataclass(frozen=True)
class _Team:
    """What all runs of a comparison are trained with."""

    crew: Crew
    stop: StopRequest
    tracker: MlflowTracker | None
    task: Task
    terminal: Terminal

    def lent(self, place: Place) -> Lent:
        tags = {"method": place.method, "size": place.size, "seed": str(place.seed)}
        nesting = Nesting(self.tracker.run_id if self.tracker else None, tags)
        return Lent(self.crew, self.stop, nesting, terminal=self.terminal)


def _train_all(base: RunConfig, request: Request, team: _Team) -> Iterator[Row]:
    """The rows of one seed, whose runs lie in `base.storage`."""
    whole = _tried(Place("full", "", base.seed), untruncated(base, FULL), base, team)
    yield whole
    for size, truncated in _sizes(base, request):
        if whole.error is not None:
            for method in ("hankel", *_opponents(request)):
                yield Row.failed(method, size, base.seed, "full size, which it is compared with, has failed")
            continue
        cut = truncated.model_copy(update={"name": Place("hankel", size, base.seed).name})
        reached = _tried(Place("hankel", size, base.seed), cut, base, team)
        yield reached
        for method in _opponents(request):
            opponent = Place(method, size, base.seed)
            if reached.error is not None:
                yield Row.failed(method, size, base.seed, "truncation, whose dimensions it is to have, has failed")
                continue
            row = _tried(opponent, _opponent(opponent, cut, reached.final_dims, request), base, team)
            teaching = whole.train_seconds if method == "distill" else 0.0
            yield replace(row, train_seconds=row.train_seconds + teaching)


def _sizes(base: RunConfig, request: Request) -> Iterator[tuple[str, RunConfig]]:
    """Label and config of every size that truncation is to reach."""
    if not request.tolerances:
        yield "", base
    for tolerance in request.tolerances:
        raw = base.model_dump(mode="json")
        raw["truncation"]["target"] |= {"tolerance": tolerance, "dim": None, "fraction": None, "budget": None}
        yield f"{tolerance:g}", parse_config(raw)


def _opponents(request: Request) -> list[str]:
    return [method for method in METHODS if method in request.methods and method not in ("full", "hankel")]


def _opponent(place: Place, cut: RunConfig, reached: Sequence[int], request: Request) -> RunConfig:
    """The run of one method, which ends at the size that truncation has reached.

    Raises:
        UserError: the model cannot be trained by this method.
    """
    raw = cut.model_dump(mode="json") | {"name": place.name}
    train, steps, target = raw["train"], cut.train.steps, {"dim": list(reached)}
    small = {"model": raw["model"] | {"d_state": list(reached)}, "truncation": None}
    match place.method:
        case "scratch":
            return parse_config(raw | small)
        case "distill":
            lesson = {"distill": {"teacher": str(cut.storage / FULL)}}
            return parse_config(raw | small | {"train": train | lesson})
        case "random" | "smallest":
            drawn = {"target": target, "score": place.method}
            return parse_config(raw | {"truncation": raw["truncation"] | drawn})
        case "magnitude":
            # Full size to its end, one step more, the cut, and fine-tuning at the end of a schedule of that length. Its
            # rate may have come down to nothing by then.
            longer = cut.train.model_copy(update={"steps": steps + 1 + max(1, round(request.fine_tune * steps))})
            faster = max(1.0, FINE_TUNED_AT * longer.lr / longer.learning_rate(steps + 1))
            pruning = {"score": "magnitude", "compensate": False, "lr_factor": faster}
            pruning |= {"target": _own(cut, reached, "global"), "steps": [steps + 1], "window": None}
            longer_raw = {"train": longer.model_dump(mode="json"), "truncation": raw["truncation"] | pruning}
            return parse_config(raw | longer_raw)
        case _:
            penalty = {"regularize": {"weight": request.penalty, "form": PENALTIES[place.method]}}
            # As published: the same share of every layer's spectrum.
            last = {"target": _own(cut, reached, "layer"), "steps": [steps], "window": None}
            return parse_config(raw | {"train": train | penalty, "truncation": raw["truncation"] | last})


def _own(cut: RunConfig, reached: Sequence[int], allocation: Literal["layer", "global"]) -> dict[str, Any]:
    """As many states as truncation has reached, given to the layers by a model's own spectra.

    Truncation's were those of another model. What settings have said of each layer, and rungs of a ladder, stay.
    """
    assert cut.truncation is not None
    target = cut.truncation.target
    of_each = target.allocation == "layer" and target.tolerance is None and target.budget is None
    if of_each or target.ladder is not None or target.uniform:
        return {"dim": list(reached)}
    return {"budget": {"states": sum(reached)}, "allocation": allocation}


def _tried(place: Place, config: RunConfig, base: RunConfig, team: _Team) -> Row:
    """As `_train`, or what went wrong."""
    try:
        return _train(place, config, base, team)
    except TrainingError as error:
        return Row.failed(place.method, place.size, place.seed, str(error))


def _train(place: Place, config: RunConfig, base: RunConfig, team: _Team) -> Row:
    """Train a run, with what it has in common with others of `base` up to its first probe trained once."""
    if place.method == "magnitude":
        shared = untruncated(base, FULL)
    elif place.method in PENALTIES:
        shared = untruncated(config, f"{place.method}-{FULL}")
    else:
        shared = untruncated(base, TRUNK)
    if place.method not in FROM_SCRATCH:
        before = (config if config.truncation is not None else base).uncut_steps
        branch(config, shared, before, team.lent(Place(shared.name, "", place.seed)))
    summary = launch.train(config, team.lent(place))
    with torch.device("meta"):
        model = build_model(config.model, team.task, summary["final_dims"])
    return Row(
        method=place.method,
        size=place.size,
        seed=place.seed,
        error=None,
        val_loss=summary["val_loss_final"],
        val_accuracy=summary["val_accuracy_final"],
        final_dims=summary["final_dims"],
        train_seconds=summary["train_seconds"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens_per_s=summary["tokens_per_s_after"] or summary["tokens_per_s_before"],
    )
