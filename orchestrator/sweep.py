"""A sweep: Ray Tune searches a space of compression schedules, and every trial is a training run of its own.

A sweep's folder holds its trials' folders, the trunk that they share, and what came out; the same command continues it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ray import tune
from ray.exceptions import RayError
from ray.tune.search import ConcurrencyLimiter

from orchestrator import launch
from orchestrator.collection import below, parent_run, refuse_another_request, remember_request
from orchestrator.config import RunConfig
from orchestrator.config_reading import load_config, parse_config
from orchestrator.crew import Crew, in_a_thread, release_dead
from orchestrator.data.sources import prepare
from orchestrator.errors import Interrupted, TrainingError, UserError
from orchestrator.failures import in_a_line
from orchestrator.launch import Lent
from orchestrator.mlflow_tracker import Nesting, mlflow_command, mlflow_tracker
from orchestrator.pruning import REDUCTION, Pruning, first_judged, promoted, rung_of, scheduler_of
from orchestrator.ray_cluster import HERE, cluster_address, ray_cluster, workers_that_fit
from orchestrator.report import write_report
from orchestrator.run_folder import metrics_so_far, ray_log, write_whole
from orchestrator.search import searcher
from orchestrator.signals import stop_request
from orchestrator.space import Point, Space, load_space
from orchestrator.storage import hold_folder
from orchestrator.sweep_report import COLUMNS, write_sweep_report
from orchestrator.terminal import Terminal, chatter_to, dims, duration
from orchestrator.tracking import hand_over
from orchestrator.trial import FOLDER, POLL_S, STOPPING, Sweep, Trial, workers_of
from orchestrator.trial_folder import (
    AGAIN,
    OBJECTIVES,
    OUTCOME,
    PRUNED,
    Outcome,
    best_of,
    best_so_far,
    conclude,
    left_open,
    outcomes,
    status_of,
    statuses,
)
from orchestrator.trunk import forget, shared_trunks, untruncated

Search = Literal["tpe", "random", "grid"]
SAMPLES = 16  # of a random or TPE search that does not say how many
SHOW_EVERY_S = 2.0


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line, besides the config."""

    space: str
    samples: int | None
    objectives: tuple[str, ...]
    search: Search
    pruning: Pruning
    share: bool
    baselines: bool
    concurrent: int | None = None
    """Trials at a time; as many as the cluster has room for where it is None."""


def tune_schedules(config: RunConfig, request: Request) -> dict[str, Any]:
    """Run a sweep to its end, or the rest of one that was interrupted; what `sweep.json` holds then.

    Raises:
        UserError: the space, an objective or a setting is not usable, or the sweep of this name is another one;
            nothing has been started.
        TrainingError: no trial came to its end.
        Interrupted: a signal ended the sweep.
    """
    started = time.perf_counter()
    space, points = check(config, request)
    folder = config.storage / f"{config.name}-{space.name}"
    with hold_folder(folder), ExitStack() as stack:
        base = below(config, folder)
        # Baselines may be asked for later, the cluster may be another; a space is what its file says, not its path.
        asked = asdict(request) | {"baselines": None, "concurrent": None, "knobs": space.contents()}
        del asked["space"]
        if request.pruning != "none":  # which would be at other steps
            asked["train.eval_every"] = base.train.eval_every
        refuse_another_request(folder, base, asked)
        prepare(config.data, config.data_root)
        terminal = stack.enter_context(chatter_to(ray_log(folder)))
        stack.enter_context(ray_cluster(config))
        room = room_for(config)
        if request.concurrent is not None and request.concurrent > room and cluster_address() == HERE:
            raise UserError(f"--concurrent {request.concurrent} must be at most {room}: this machine has no more room")
        at_a_time = request.concurrent or room
        remember_request(folder, base, asked)
        tracker = stack.enter_context(parent_run(config, folder, terminal.line))
        # A trunk of all goes on to its end, as a baseline; others no further than is known to be needed.
        further = space.edges() if request.baselines else []
        trunks = shared_trunks(space, base, points, further) if request.share else ()
        if request.share and not trunks:
            terminal.line(f"nothing to share: space {space.name} changes the training before the first cut too")
        parent = tracker.run_id if tracker is not None else None
        asha = request.pruning == "asha"
        rung = rung_of(first_judged(space, base, points), base.train.eval_every) if asha else None
        sweep = Sweep(base, space, trunks, parent, rung)
        total = _total(request, points)
        terminal.line(f"sweep {folder.name}: {total} trials, {at_a_time} at a time; {', '.join(request.objectives)}")
        _conclude_rest(sweep, _run(sweep, request, points, total, at_a_time, terminal), terminal)
        found = outcomes(folder)
        if not any(outcome.status == "finished" for outcome in found):
            raise TrainingError(f"no trial of {folder} came to its end; each one's error is in its {OUTCOME}")
        best = best_of(found, request.objectives[0])
        write_whole(folder / "best.yaml", _best_config(config, folder, best).to_yaml())
        baselines = _baselines(sweep, best, terminal) if request.baselines else {}
        summary = write_sweep_report(folder, request.objectives, space, config.train.steps, baselines)
        if tracker is not None:
            for name in ("sweep.json", "trials.parquet", "best.yaml", "report.html"):
                tracker.artifact(folder / name)
            for figure in sorted((folder / "figures").glob("*.png")):
                tracker.artifact(figure, "figures")
        if not any(outcome.status in AGAIN for outcome in found):
            for trunk in trunks:
                forget(trunk.run, base.checkpoints)
    print(f"done in {duration(time.perf_counter() - started)}")
    print("\n".join(_describe(summary, folder)))
    if config.tracking.mlflow:
        print(f"  MLflow   {mlflow_command(config)}")
    return summary


def check(config: RunConfig, request: Request) -> tuple[Space, list[Point]]:
    """Everything that can be known before anything starts; the space, and the points to try if they are known by then.

    Raises:
        UserError: in one sentence, what cannot be searched.
    """
    space = load_space(request.space)
    if taken := space.knobs.keys() & {*COLUMNS, *OBJECTIVES}:
        raise UserError(f"space {space.name}: knob {min(taken)} must be called otherwise: results have such a column")
    for objective in request.objectives:
        if objective not in OBJECTIVES:
            raise UserError(f"--objective {objective} must be one of {', '.join(OBJECTIVES)}")
        if objective == "val_accuracy" and not config.has_accuracy:
            raise UserError("--objective val_accuracy is never logged for text; val_loss is")
    if len(set(request.objectives)) < len(request.objectives):
        [(twice, _)] = Counter(request.objectives).most_common(1)
        raise UserError(f"--objective {twice} is named twice")
    if request.pruning != "none" and len(request.objectives) > 1:
        raise UserError(f"--pruning {request.pruning} goes by one objective, not {len(request.objectives)}")
    if request.pruning != "none" and request.objectives[0] in ("states", "train_seconds"):
        raise UserError(f"--pruning {request.pruning} needs val_loss or val_accuracy, not {request.objectives[0]}")
    if request.search == "grid" and request.samples is not None:
        raise UserError("--samples is for random and tpe: a grid has as many trials as it has points")
    assert request.search == "grid" or request.samples is not None, "the command fills them in"
    if request.samples is not None and request.samples < 1:
        raise UserError(f"--samples {request.samples} must be 1 or more")
    if request.concurrent is not None and request.concurrent < 1:
        raise UserError(f"--concurrent {request.concurrent} must be 1 or more")
    space.check(config)
    points = space.grid() if request.search == "grid" else []
    if request.search == "random":
        generator = np.random.default_rng(config.seed)
        points = [space.random_point(generator) for _ in range(request.samples or 0)]
    for point in points:
        space.config(config, point)
    if request.pruning == "asha" and (total := _total(request, points)) < REDUCTION:
        raise UserError(
            f"--pruning asha has one of {REDUCTION} trials come to its end: {total} trials must be {REDUCTION} or more"
        )
    if request.pruning != "none":
        trains = [space.config(config, point).train for point in (*points, *space.edges())]
        if {(own.steps, own.eval_every) for own in trains} != {(config.train.steps, config.train.eval_every)}:
            raise UserError(
                f"--pruning {request.pruning} compares trials at the same steps: space {space.name} must not set "
                "train.steps or eval_every"
            )
        grace, every = first_judged(space, config, points), config.train.eval_every
        if rung_of(grace, every) >= config.train.steps:
            raise UserError(
                f"--pruning {request.pruning} judges trials by an evaluation after step {grace - 1}, when all have "
                f"been cut: with train.eval_every {every} there is none before the last step {config.train.steps}"
            )
    return space, points


def _total(request: Request, points: Sequence[Point]) -> int:
    """How many trials a sweep has."""
    return len(points) or request.samples or 0


def room_for(config: RunConfig) -> int:
    """How many trials the cluster has room for at a time, at least 1; Ray Tune does not count their workers."""
    # An elastic trial takes as many workers as it may have, and keeps them for the next one.
    return max(1, workers_that_fit(config.cluster) // config.cluster.workers.max)


def _run(
    sweep: Sweep, request: Request, points: Sequence[Point], total: int, at_a_time: int, terminal: Terminal
) -> list[tune.experiment.Trial]:
    """All trials that have not ended yet, under Ray Tune; those that have failed, again.

    Raises:
        Interrupted: SIGINT or SIGTERM; trials that were running go on from their last checkpoints.
    """
    folder = sweep.base.storage
    # A trial's workers reserve what they need. It takes no core itself, but Ray Tune will not have it take nothing.
    resources = tune.PlacementGroupFactory([{"CPU": 0, "memory": 1}])
    trainable = tune.with_resources(tune.with_parameters(Trial, sweep=sweep), resources)
    begun = outcomes(folder)
    left = total - sum(outcome.status not in AGAIN for outcome in begun)
    may_go_on = total if sweep.rung is not None else 0  # each once
    if left == 0 and (may_go_on == 0 or len(promoted(folder)) >= total // REDUCTION):
        return []
    if begun:
        terminal.line("continuing the sweep: trials that have finished or were pruned are not repeated")
    stopping = folder / STOPPING
    stopping.unlink(missing_ok=True)
    search = ConcurrencyLimiter(searcher(sweep, request.objectives, points, begun, left), at_a_time)
    scheduler = scheduler_of(request.pruning, sweep, points, request.objectives[0])
    tune_config = tune.TuneConfig(
        search_alg=search, scheduler=scheduler, num_samples=left + may_go_on, reuse_actors=True
    )
    # What is to be remembered is in the trials' folders, a run's own checkpoints among it.
    experiment = folder / "tune"
    for left_over in (experiment, workers_of(folder)):
        shutil.rmtree(left_over, ignore_errors=True)
    none = tune.CheckpointConfig(checkpoint_at_end=False)
    run_config = tune.RunConfig(
        name=experiment.name, storage_path=str(folder), checkpoint_config=none, callbacks=[_Judgement(folder)]
    )
    tuner = tune.Tuner(trainable, tune_config=tune_config, run_config=run_config)
    with stop_request() as stop, _shown(sweep, total, request.objectives[0], terminal):
        # In the main thread Ray Tune would take SIGINT for itself, and give trials ten seconds.
        fit = in_a_thread(tuner.fit, "tune")
        while not wait([fit], timeout=POLL_S).done:
            if stop.signal is not None and not stopping.exists():
                terminal.line("stopping: checkpoints follow (a second signal ends at once, without)")
                stopping.touch()
    release_dead(workers_of(folder), all_are=True)  # Ray Tune gives them ten seconds, and then ends them
    if stop.signal is not None:
        raise Interrupted(f"sweep {folder.name} stopped; the same command continues it", stop.signal)
    try:
        return list(fit.result()._experiment_analysis.trials)
    except (tune.TuneError, RayError) as error:
        raise TrainingError(
            f"sweep {folder.name} has failed: {in_a_line(error)}; the same command continues it"
        ) from error


class _Judgement(tune.Callback):  # type: ignore[misc]
    """Leaves in a trial's folder that the sweep's pruning ends it, before its process hears of it.

    And that its process has died, and gives back what its workers occupied, for the next one to begin.
    """

    def __init__(self, sweep: Path) -> None:
        self._sweep = sweep

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: object
    ) -> None:
        if result.get("done") and status_of(folder := self._sweep / result[FOLDER])[0] == "running":
            (folder / PRUNED).touch()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: object) -> None:
        release_dead(workers_of(self._sweep))
        for folder, trial_id in left_open(self._sweep):
            if trial_id == trial.trial_id and not (folder / OUTCOME).exists():
                conclude(folder, "failed", _last_words(trial))


def _conclude_rest(sweep: Sweep, trials: Sequence[tune.experiment.Trial], terminal: Terminal) -> None:
    """Leave in the folders of trials whose process had no time to do so how they have ended.

    Ray Tune gives one that it stops ten seconds, and one may die with its node. Trials that did not come to their end
    get their pages and figures here, and MLflow is told.
    """
    known = {trial.trial_id: trial for trial in trials}
    for folder, trial_id in left_open(sweep.base.storage):
        pruned = status_of(folder)[0] == "pruned"
        if not (folder / OUTCOME).exists():
            status, reason = ("stopped", None) if pruned else ("failed", _last_words(known.get(trial_id)))
            conclude(folder, status, reason)
        if metrics_so_far(folder):
            write_report(folder)
        # One may have failed before it had a config of its own.
        own = folder / "config.yaml"
        config = load_config(own) if own.exists() else sweep.base
        nesting = Nesting(sweep.parent_run_id, {"trial": folder.name}, folder / PRUNED)
        tracker = mlflow_tracker(config, folder, terminal.line, nesting)
        if tracker is not None:
            hand_over(folder, tracker)
            tracker.close("KILLED" if pruned else "FAILED")


def _last_words(trial: tune.experiment.Trial | None) -> str:
    """Why a trial has failed, as far as Ray Tune knows."""
    name = trial.run_metadata.error_filename if trial is not None else None
    if trial is None or name is None:
        return "its process was killed"
    return Path(trial.local_path, name).read_text().strip().splitlines()[-1]


@contextmanager
def _shown(sweep: Sweep, total: int, objective: str, terminal: Terminal) -> Iterator[None]:
    """For the duration of the block, keep a line that says how far the trials are."""
    ended, started, folder = threading.Event(), time.monotonic(), sweep.base.storage
    to_do = total + (total // REDUCTION if sweep.rung is not None else 0)  # one that goes on is trained twice

    def count() -> tuple[Counter[str], int, int]:
        """Trials by status, those that have ended, and trainings that have."""
        found = Counter(statuses(folder))
        over = sum(number for status, number in found.items() if status not in AGAIN)
        return found, over, over + len(promoted(folder))

    _, _, before = count()

    def show() -> None:
        while not ended.wait(SHOW_EVERY_S):
            found, over, done = count()
            parts = [
                f"{found[status]} {status}" for status in ("finished", "pruned", "failed", "running") if found[status]
            ]
            best = best_so_far(folder, objective)
            parts += [f"best {objective} {best[1]:.4g} ({best[0]})"] if best else []
            if done > before:
                each = (time.monotonic() - started) / (done - before)
                parts.append(f"ETA {duration(each * max(0, to_do - done))}")
            terminal.progress(f"{over} of {total} trials: " + ", ".join(parts))

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        terminal.finish()


def _best_config(config: RunConfig, folder: Path, best: Outcome) -> RunConfig:
    """The best trial's config as a run of its own, beside the sweep."""
    found = load_config(folder / best.trial / "config.yaml")
    own = {"storage": config.storage, "tracking": config.tracking, "checkpoints": config.checkpoints}
    return found.model_copy(update={"name": f"{folder.name}-best"} | own)


def _baselines(sweep: Sweep, best: Outcome, terminal: Terminal) -> dict[str, dict[str, Any]]:
    """Summaries of what a schedule is compared with: full size to the end, and the best trial's size from scratch.

    One that fails is left out, with a line that says why.

    Raises:
        Interrupted: a signal ended one of them; the sweep's same command continues it.
    """
    base = sweep.base
    found = sweep.space.config(base, best.point)
    # Goes on where a trunk has ended, and keeps its checkpoints: a trial that is tried again may need one. That one may
    # become the best, so what trials do not share must not be this one's.
    trunk = sweep.trunk_of(found)
    full = trunk.run if trunk is not None else untruncated(base, "full-size")
    small = untruncated(found, f"scratch-of-{best.trial}")
    raw = small.model_dump(mode="json")
    scratch = parse_config(raw | {"model": raw["model"] | {"d_state": best.final_dims}})
    summaries = {}
    with stop_request() as stop, Crew(base.cluster, workers_of(base.storage)) as crew:
        for config, what in ((full, "full size"), (scratch, f"{dims(best.final_dims)} from scratch")):
            terminal.line(f"baseline: {what}")
            nesting = Nesting(sweep.parent_run_id, {"trial": config.name})
            try:
                summaries[what] = launch.train(config, Lent(crew, stop, nesting, terminal=terminal))
            except TrainingError as error:
                terminal.line(f"baseline {what} is left out: {error}")
    return summaries


def _describe(summary: dict[str, Any], folder: Path) -> list[str]:
    best = summary["best"]
    point = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in best["point"].items()
    )
    goals = ", ".join(f"{name} {best[name]:.4g}" for name in summary["objectives"])
    lines = [f"  best     {best['trial']}: {point}; {goals}; states {dims(best['final_dims'])}"]
    lines += [
        f"  {what:<8} val_loss {found['val_loss']:.4g}, {found['train_seconds']:.0f} s"
        for what, found in summary["baselines"].items()
    ]
    lines += [f"  failed   {row['trial']}: {row['error']}" for row in summary["trials"] if row["status"] == "failed"]
    trained, naive = summary["steps_trained"], summary["steps_naive"]
    what = "if every trial were trained alone and to its end"
    lines.append(f"  steps    {trained} trained, {naive} {what} ({summary['share']:.2f})")
    lines.append(f"  files    {folder} (report.html, best.yaml, trials.parquet, sweep.json, figures)")
    return lines
