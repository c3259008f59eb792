"""A whole sweep: killed halfway, continued, and every trial as if it had been trained alone."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from mlflow.entities import Run
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher

from orchestrator import checkpoint
from orchestrator.cli import main
from orchestrator.config_reading import load_config, parse_config
from orchestrator.errors import UserError
from orchestrator.pruning import Pruning
from orchestrator.search import searcher
from orchestrator.space import Space, load_space
from orchestrator.storage import checkpoints_of
from orchestrator.sweep import Request, _conclude_rest, check, room_for, tune_schedules
from orchestrator.sweep_report import FEWEST, _of_equal_columns, importance, pareto
from orchestrator.terminal import Terminal
from orchestrator.trial import Sweep, _trial_folder
from orchestrator.trial_folder import Outcome, outcomes, steps_alone, steps_trained
from tests.runs import (
    HANGS_S,
    alive_in,
    assert_same_state,
    end_crews,
    family,
    lend_crews,
    losses,
    saved,
    start,
    train,
    wait_while_running,
)
from tune_spaces.knobs import Float

TRIALS = 3


def outcome(loss: float, seconds: float, status: str = "finished") -> Outcome:
    objectives = {"val_loss": loss, "train_seconds": seconds}
    return Outcome(f"{loss}-{seconds}", {}, status, None, objectives, None, 0, 1, [])


def test_the_front_is_what_no_other_trial_beats_in_both() -> None:
    points = torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    found = [outcome(*point).row() for point in points] + [outcome(0.0, 0.0, "pruned").row()]
    front = {(row["val_loss"], row["train_seconds"]) for row in pareto(found, "train_seconds", "val_loss")}
    beaten = {(a, b) for a, b in points if any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)}
    assert front == {tuple(point) for point in points} - beaten


def test_a_knob_that_decides_is_the_important_one() -> None:
    knobs = {name: Float(0.0, 1.0, "A number.") for name in ("decides", "idles")}
    points = torch.rand(24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    found = [replace(outcome(one, 1.0), point={"decides": one, "idles": other}) for one, other in points]
    space = Space("two", knobs, dict)
    shares = importance(found, "val_loss", space)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["decides"] > 0.8
    assert importance(found[: FEWEST - 1], "val_loss", space) == {}


def test_what_the_first_trial_did_not_come_to_has_its_column_all_the_same() -> None:
    failed = Outcome("trial-0", {"at": 0.1}, "failed", "no more", {}, None, 0, 1, [])
    rows = _of_equal_columns([failed.row(), outcome(1.0, 2.0).row() | {"at": 0.2}])
    assert [list(row) for row in rows] == [list(rows[1])] * 2
    assert [row["val_loss"] for row in rows] == [None, 1.0]


def test_what_trials_share_is_counted_once() -> None:
    """Two begin with one trunk, of which it takes the longer part; one with another; one shares nothing."""
    of = replace(outcome(1.0, 2.0), last_step=100)
    one, other = replace(of, trunk="trunk-0", trunk_step=10), replace(of, trunk="trunk-0", trunk_step=30)
    third = replace(of, trunk="trunk-2", trunk_step=40)
    assert steps_trained([one, other, third, of]) == (30 + 90 + 70) + (40 + 60) + 100


def test_alone_only_what_was_pruned_would_have_gone_further() -> None:
    """A space may have given trials steps of their own, and one that diverges would have done so alone too."""
    ended = [("finished", 100), ("finished", 60), ("failed", 30), ("pruned", 20)]
    found = [replace(outcome(1.0, 2.0, status), last_step=last) for status, last in ended]
    assert steps_alone(found, 100) == 100 + 60 + 30 + 100


def trial_folder(sweep: Path, number: int, **files: str) -> Path:
    """As a trial leaves it: Ray Tune's id of it is its number, and `files` are what else there is, by stem."""
    folder = sweep / f"trial-{number:05d}"
    folder.mkdir()
    (folder / "point.json").write_text(json.dumps({"trial_id": str(number), "start": "", "point": {"at": 0.1}}))
    for stem, text in files.items():
        folder.joinpath(stem + (".jsonl" if stem == "metrics" else ".json")).write_text(text)
    return folder


def test_a_trial_that_fails_before_it_has_measured_anything_is_in_the_table(tmp_path: Path) -> None:
    trial_folder(tmp_path, 0, outcome=json.dumps({"status": "failed", "error": "out of memory"}), metrics="")
    [trial] = outcomes(tmp_path)
    assert (trial.status, trial.error, trial.last_step, trial.objectives) == ("failed", "out of memory", 0, {})


def test_what_the_trunk_has_measured_is_not_the_trials(tmp_path: Path) -> None:
    rows = [{"step": 8, "train_loss": 2.0}, {"step": 8, "val_loss": 2.0, "states": 32}, {"step": 9, "train_loss": 9.0}]
    metrics = "".join(json.dumps(row) + "\n" for row in rows)
    failed = json.dumps({"status": "failed", "error": "diverged"})
    trial_folder(tmp_path, 0, outcome=failed, metrics=metrics, branch='{"step": 8, "trunk": "trunk"}')
    [trial] = outcomes(tmp_path)
    assert (trial.trunk_step, trial.last_step, trial.objectives, trial.final_dims) == (8, 9, {}, [])


def test_a_trial_that_was_pruned_is_in_the_table_as_it_was_then(tmp_path: Path) -> None:
    """One that has come to its end before it heard of that has finished."""
    cut = {"step": 9, "val_loss": 2.5, "val_loss_before": 2.0, "states": 12, "d_state_00": 8.0, "d_state_01": 4.0}
    rows = [
        {"step": 9, "train_loss": 2.0},
        cut,
        {"step": 10, "val_loss": math.nan, "d_state_00": 8.0, "d_state_01": 4.0},
    ]
    metrics = "".join(json.dumps(row) + "\n" for row in rows)
    trial_folder(tmp_path, 0, metrics=metrics).joinpath("pruned").touch()
    [trial] = outcomes(tmp_path)
    assert (trial.status, trial.first_cut, trial.final_dims, trial.objectives) == ("pruned", 9, [8, 4], {})
    summary = {"val_loss_final": 1.5, "val_accuracy_final": None, "final_dims": [4], "train_seconds": 2.0}
    (tmp_path / "trial-00000" / "summary.json").write_text(json.dumps(summary | {"truncations": []}))
    (tmp_path / "trial-00000" / "outcome.json").write_text(json.dumps({"status": "finished", "error": None}))
    assert [trial.status for trial in outcomes(tmp_path)] == ["finished"]


def test_a_sweep_that_is_continued_begins_with_what_has_not_ended(tmp_path: Path, small_run: dict[str, Any]) -> None:
    """Then with the points that have not begun; and the search knows what came of the one that has finished."""
    points = [{"at": 0.05 + 0.05 * number} for number in range(4)]
    summary = {"val_loss_final": 1.5, "val_accuracy_final": None, "final_dims": [4], "train_seconds": 2.0}
    told = [{"outcome": json.dumps({"status": status, "error": None})} for status in ("finished", "failed")]
    told[0]["summary"] = json.dumps(summary | {"truncations": []})
    for number, files in enumerate([*told, {}]):
        folder = trial_folder(tmp_path, number, **files)
        (folder / "point.json").write_text(json.dumps({"trial_id": "", "start": "", "point": points[number]}))
    sweep = Sweep(parse_config(small_run).model_copy(update={"storage": tmp_path}), load_space("timing"), (), None)
    search = searcher(sweep, ("val_loss", "states"), points, outcomes(tmp_path), 3)
    assert [search.suggest(str(number)) for number in range(3)] == points[1:]
    [known] = search._ot_study.get_trials(states=[TrialState.COMPLETE])
    assert (known.params, known.values) == (points[0], [1.5, 4.0])
    # Each goes on in its own folder, whatever Ray Tune calls it now.
    for point, number in zip(points[1:], (1, 2, 3), strict=True):
        assert _trial_folder(sweep, f"new-{number}", point).name == f"trial-{number:05d}"
    (tmp_path / "stopping").touch()
    assert search.suggest("more") == Searcher.FINISHED


def test_a_search_that_goes_on_does_not_propose_what_it_has_proposed(small_run: dict[str, Any]) -> None:
    """TPE begins at random, from a seed."""
    sweep = Sweep(parse_config(small_run), load_space("timing"), (), None)
    first = searcher(sweep, ("val_loss",), [], [], 8)
    proposed = [first.suggest(str(number)) for number in range(3)]
    ended = [replace(outcome(1.0, 2.0), point=point) for point in proposed]
    again = searcher(sweep, ("val_loss",), [], ended, 5)
    assert not any(again.suggest(str(number)) in proposed for number in range(3))


def test_every_point_of_a_grid_is_checked_before_anything_starts(tmp_path: Path, small_run: dict[str, Any]) -> None:
    """This one is at no edge of the space."""
    path = tmp_path / "three.py"
    path.write_text(
        "from tune_spaces.knobs import Choice\n"
        "KNOBS = {name: Choice((1, 2, 3), 'A number.') for name in 'abc'}\n"
        "def settings(a, b, c):\n"
        "    return {'truncation.target': {'dim': 0 if (a, b, c) == (1, 1, 2) else 4}}\n"
    )
    with pytest.raises(UserError, match=r"space three at a=1, b=1, c=2: truncation\.target\.dim is 0"):
        check(parse_config(small_run), request(path, "val_loss"))


def test_trials_whose_process_was_ended_have_an_outcome_all_the_same(tmp_path: Path, small_run: dict[str, Any]) -> None:
    """Ray Tune ends those that it has stopped after ten seconds, and may never hear of one that is killed."""
    known = [tune.experiment.Trial("trial", stub=True, trial_id=str(number)) for number in range(3)]
    known[2].status = known[2].ERROR
    ended = trial_folder(tmp_path, 0, outcome=json.dumps({"status": "failed", "error": "diverged"}))
    before = (ended / "outcome.json").read_text()
    folders = [trial_folder(tmp_path, number) for number in (1, 2, 3)]
    (folders[0] / "pruned").touch()
    config = parse_config(small_run).model_copy(update={"storage": tmp_path})
    _conclude_rest(Sweep(config, load_space("timing"), (), None), known, Terminal(sys.stderr))
    assert all((folder / "outcome.json").exists() for folder in folders)
    assert [trial.status for trial in outcomes(tmp_path)[1:]] == ["pruned", "failed", "failed"]
    assert (ended / "outcome.json").read_text() == before


def tuned(raw: dict[str, Any], *options: str) -> Any:
    return start(raw, *options, command="tune")


OPTIONS = ["--space", "timing", "--search", "random", "--samples", str(TRIALS)]


@pytest.fixture
def timed_cut(tracked_run: dict[str, Any]) -> dict[str, Any]:
    """A config whose sweep with OPTIONS moves its only cut."""
    tracked_run["train"] |= {"steps": 24, "eval_every": 8}
    tracked_run["truncation"] = {"target": {"dim": 4}, "steps": [20]}
    tracked_run["checkpoints"] = {"keep_last": 1, "keep_best": 0}
    return tracked_run


@pytest.mark.cluster
def test_a_sweep_that_was_killed_is_continued_and_equals_runs_of_their_own(
    timed_cut: dict[str, Any],
    local_ray: None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lend_crews(monkeypatch, "orchestrator.sweep")
    folder = Path(timed_cut["storage"]) / "small-timing"
    first = tuned(timed_cut, *OPTIONS)
    # One that Ray Tune may not have saved yet, and would propose again.
    wait_while_running(
        first,
        lambda: (folder / "trial-00001" / "point.json").exists() and (folder / "trial-00000" / "summary.json").exists(),
        "the second trial begins",
    )
    first.kill()
    first.communicate()
    finished = (folder / "trial-00000" / "summary.json").stat().st_mtime_ns

    # One at a time, beside workers that wait for runs of this process.
    asked = Request("timing", TRIALS, ("val_loss",), "random", "none", True, True, concurrent=1)
    tune_schedules(parse_config(timed_cut), asked)
    output = capfd.readouterr().out
    assert re.search(rf"\d of {TRIALS} trials: .*best val_loss", output)
    assert (folder / "trial-00000" / "summary.json").stat().st_mtime_ns == finished  # not trained again
    found = outcomes(folder)
    assert [trial.status for trial in found] == ["finished"] * TRIALS
    _check_results(folder, found, output)
    _check_mlflow(timed_cut, folder)

    best = json.loads((folder / "sweep.json").read_text())["best"]
    [trial] = [trial for trial in found if trial.trial == best["trial"]]
    assert trial.trunk_step > 0
    assert train(load_config(folder / "best.yaml"))["val_loss_final"] == best["val_loss"]
    shared, whole = folder / trial.trial, folder.parent / "small-timing-best"
    assert losses(shared) == losses(whole)  # the trunk's steps among them
    assert_same_state(saved(shared, 24), saved(whole, 24))


@pytest.mark.long
@pytest.mark.cluster
def test_a_sweep_that_was_interrupted_is_continued(timed_cut: dict[str, Any], local_ray: None) -> None:
    """One whose points are not known beforehand: the trunk goes no further than a trial needs. Several at a time.

    Trials save and end though they are far from their next evaluation.
    """
    timed_cut["train"] |= {"steps": 600, "eval_every": 600, "checkpoint_every": 600}
    folder = Path(timed_cut["storage"]) / "small-timing"
    options = ["--space", "timing", "--samples", str(TRIALS), "--no-baselines"]
    first = tuned(timed_cut, *options)
    second = folder / "trial-00001"

    def is_on_its_own() -> bool:
        branch = second / "branch.json"
        return branch.exists() and max(losses(second), default=0) > json.loads(branch.read_text())["step"] + 20

    wait_while_running(first, is_on_its_own, "the second trial runs")
    first.send_signal(signal.SIGINT)
    output, errors = first.communicate(timeout=HANGS_S)
    assert first.returncode == 128 + signal.SIGINT, output + errors
    assert errors == "rayduce: sweep small-timing stopped; the same command continues it\n"
    statuses = {run.data.tags["trial"]: run.data.tags["status"] for run in family(timed_cut)[1]}
    assert set(statuses.values()) <= {"finished", "stopped"}
    assert statuses[second.name] == "stopped"
    left = checkpoint.newest(checkpoints_of(second, None))
    assert left is not None
    assert checkpoint.read_manifest(left).step > json.loads((second / "branch.json").read_text())["step"] + 20

    end_crews()
    config = parse_config(timed_cut)
    assert room_for(config) > 1
    tune_schedules(config, Request("timing", TRIALS, ("val_loss",), "tpe", "none", True, False))
    found = outcomes(folder)
    assert [trial.status for trial in found] == ["finished"] * TRIALS
    assert max(losses(folder / "trunk")) == max(trial.trunk_step for trial in found)


@pytest.mark.long
@pytest.mark.cluster
def test_a_trial_whose_process_dies_leaves_its_room_to_the_next(timed_cut: dict[str, Any]) -> None:
    """On a machine that holds one trial at a time."""
    sweep = Path(timed_cut["storage"]) / "small-timing"
    driver = tuned(timed_cut, "--space", "timing", "--search", "random", "--samples", "2", "--no-baselines")
    wait_while_running(driver, lambda: any((sweep / "ray_train").glob("reserved-by-*")), "a trial's workers are there")
    [process] = [pid for pid, title in alive_in(driver.pid) if title.startswith("ray::ResourceTrainable")]
    os.kill(process, signal.SIGKILL)
    output, errors = driver.communicate(timeout=HANGS_S)
    assert driver.returncode == 0, output + errors
    assert [trial.status for trial in outcomes(sweep)] == ["failed", "finished"]


SPACE = """
from tune_spaces.knobs import Choice

KNOBS = {{{knob!r}: Choice({values!r}, "What differs.")}}


def settings({knob}):
    return {{{key!r}: {knob}}}
"""


@pytest.fixture
def one_at_a_time(tracked_run: dict[str, Any], local_ray: None) -> dict[str, Any]:
    """A config whose `request` has one trial after the other, in the order of their points."""
    tracked_run["train"] |= {"steps": 16, "eval_every": 4}
    tracked_run["truncation"] = {"target": {"dim": 4}, "steps": [3]}
    return tracked_run


def request(path: Path, *objectives: str, pruning: Pruning = "none") -> Request:
    return Request(str(path), None, objectives, "grid", pruning, share=True, baselines=False, concurrent=1)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("pruning", "factors", "steps"),
    [
        ("asha", (1.0, 300.0, 1.5, 1e30), 16),
        # Of three trials at least, the last of which is judged while it goes on: long enough not to be over by then.
        pytest.param("median", (1.0, 0.5, 1.5, 300.0), 400, marks=pytest.mark.long),
    ],
)
def test_a_worse_trial_is_pruned_and_the_next_one_has_its_workers(
    pruning: Pruning, factors: tuple[float, ...], steps: int, one_at_a_time: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "pace.py"
    path.write_text(SPACE.format(knob="factor", values=factors, key="truncation.lr_factor"))
    one_at_a_time["checkpoints"] = {"keep_last": 1, "keep_best": 0}
    one_at_a_time["train"] |= {"steps": steps, "eval_every": steps // 4}
    config = parse_config(one_at_a_time)
    summary = tune_schedules(config, request(path, "val_loss", pruning=pruning))
    folder = Path(one_at_a_time["storage"]) / "small-pace"
    found = {trial.point["factor"]: trial for trial in outcomes(folder)}
    children = {run.data.tags["trial"]: run for run in family(one_at_a_time)[1]}
    if diverged := found.pop(1e30, None):
        assert (diverged.status, "loss" in str(diverged.error)) == ("failed", True)
        run = children[diverged.trial]
        assert (run.data.tags["status"], run.info.status) == ("failed", "FAILED")
    # One that has failed may be tried again, and begin there.
    assert (len(checkpoint.complete_steps(checkpoints_of(folder / "trunk", None))) > 1) == bool(diverged)
    bad = found.pop(300.0)
    assert (bad.status, bad.error) == ("pruned", None)
    assert steps // 4 <= bad.last_step < steps
    if pruning == "asha":  # all but one end at the first evaluation after a quarter, and it goes on
        assert sorted(trial.last_step for trial in [bad, *found.values()]) == [8, 8, 16]
    assert bad.objectives["val_loss"] > max(trial.objectives["val_loss"] for trial in found.values())
    finished = [trial for trial in found.values() if trial.status == "finished"]
    assert [trial.last_step for trial in finished] == [steps] * len(finished)
    assert summary["steps_trained"] < summary["steps_naive"]
    assert max(losses(folder / "trunk")) == max(trial.trunk_step for trial in outcomes(folder)) > 0
    assert children[bad.trial].data.tags["status"] == "pruned"
    assert children[bad.trial].info.status != "RUNNING"
    for trial in finished:
        assert children[trial.trial].data.tags["status"] == "finished"
        assert children[trial.trial].info.status == "FINISHED"
    client = mlflow.MlflowClient(one_at_a_time["tracking"]["mlflow_uri"])
    assert _artifacts(client, children[bad.trial]) >= {"plans", "figures", "report.html"}


@pytest.mark.cluster
def test_more_trials_at_a_time_than_there_is_room_for_are_refused(
    small_run: dict[str, Any], local_ray: None, tmp_path: Path
) -> None:
    path = tmp_path / "pace.py"
    path.write_text(SPACE.format(knob="factor", values=(1.0, 0.5), key="truncation.lr_factor"))
    with pytest.raises(UserError, match="--concurrent 5 must be at most 3"):
        tune_schedules(parse_config(small_run), replace(request(path, "val_loss"), concurrent=5))


@pytest.mark.long
@pytest.mark.cluster
def test_several_objectives_and_a_trial_that_fails(one_at_a_time: dict[str, Any], tmp_path: Path) -> None:
    """The third diverges: it is recorded with its error, and the others have what they need. Nothing is shared."""
    path = tmp_path / "far.py"
    path.write_text(SPACE.format(knob="factor", values=(1.0, 0.5, 1e30), key="truncation.lr_factor"))
    asked = replace(request(path, "val_loss", "states"), share=False)
    summary = tune_schedules(parse_config(one_at_a_time), asked)
    folder = Path(one_at_a_time["storage"]) / "small-far"
    found = {trial.point["factor"]: trial for trial in outcomes(folder)}
    assert [found[factor].status for factor in (1.0, 0.5, 1e30)] == ["finished", "finished", "failed"]
    assert "loss" in str(found[1e30].error)
    assert [found[factor].objectives["states"] for factor in (1.0, 0.5)] == [8, 8]
    assert summary["objectives"] == ["val_loss", "states"]
    best = min((found[1.0], found[0.5]), key=lambda trial: trial.objectives["val_loss"])
    front = [row["trial"] for row in summary["trials"] if row["front_train_seconds"]]
    assert best.trial in front
    assert found[1e30].trial not in front
    assert summary["steps_naive"] == summary["steps_trained"] == 32 + found[1e30].last_step
    assert not (folder / "trunk").exists()
    [run] = [run for run in family(one_at_a_time)[1] if run.data.tags["trial"] == found[1e30].trial]
    assert (run.data.tags["status"], run.info.status) == ("failed", "FAILED")

    # The same command tries once more what has failed, and nothing else.
    stamps = [(folder / found[factor].trial / "outcome.json").stat().st_mtime_ns for factor in (1.0, 0.5, 1e30)]
    repeated = tune_schedules(parse_config(one_at_a_time), asked)["trials"]
    assert [row["status"] for row in repeated] == ["finished", "finished", "failed"]
    assert repeated[:2] == summary["trials"][:2]
    assert repeated[2]["last_step"] == found[1e30].last_step
    again = [(folder / found[factor].trial / "outcome.json").stat().st_mtime_ns for factor in (1.0, 0.5, 1e30)]
    assert [later > earlier for later, earlier in zip(again, stamps, strict=True)] == [False, False, True]


def _check_results(folder: Path, found: Sequence[Outcome], output: str) -> None:
    summary = json.loads((folder / "sweep.json").read_text())
    best = min(found, key=lambda trial: trial.objectives["val_loss"])
    assert summary["best"]["trial"] == best.trial
    assert best.trial in output
    assert str(folder) in output
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["at"] for row in rows] == [trial.point["at"] for trial in found]
    assert all(0.05 <= row["at"] <= 0.4 for row in rows)
    front = [row["trial"] for row in rows if row["front_train_seconds"]]
    assert front == [row["trial"] for row in summary["trials"] if row["front_train_seconds"]]
    assert best.trial in front
    # One trunk, and the remainders from the steps of the first cuts on.
    starts = [(trial.first_cut or 0) - 1 for trial in found]
    assert summary["steps_trained"] == max(starts) + sum(24 - start for start in starts) < 24 * TRIALS
    assert load_config(folder / "best.yaml").probe_steps == (best.first_cut,)
    assert set(summary["baselines"]) == {"full size", "4 x 2 layers from scratch"}
    # Full size has gone on where the trunk ended, of whose many checkpoints no trial needs one any more.
    assert checkpoint.complete_steps(checkpoints_of(folder / "trunk", None)) == [24]
    # Both fronts and the one knob, which has no share in anything.
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    (folder / "report.html").unlink()
    assert CliRunner().invoke(main, ["report", str(folder)]).stdout == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text() == page


def _check_mlflow(raw: dict[str, Any], folder: Path) -> None:
    client = mlflow.MlflowClient(raw["tracking"]["mlflow_uri"])
    trunk_steps = {trial.trial: trial.trunk_step for trial in outcomes(folder)}
    parent, found = family(raw)
    assert parent.data.tags["mlflow.runName"] == folder.name
    assert _artifacts(client, parent) >= {"best.yaml", "report.html", "trials.parquet", "figures"}
    children = {run.data.tags["trial"]: run for run in found}
    best = json.loads((folder / "sweep.json").read_text())["best"]["trial"]
    assert set(children) == {"trunk", f"scratch-of-{best}", *(f"trial-{number:05d}" for number in range(TRIALS))}
    for name, run in children.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["status"] == "finished"
        if name.startswith("trial-"):
            assert int(run.data.tags["trunk_step"]) == trunk_steps[name]
            assert set(run.data.metrics) >= {"val_loss", "states", "train_seconds"}
            told = {metric.step for metric in client.get_metric_history(run.info.run_id, "train_loss")}
            assert told == losses(folder / name).keys()  # the trunk's steps among them
            assert float(run.data.params["truncation.window.end"]) > 0
            assert _artifacts(client, run) >= {"plans", "figures"}


def _artifacts(client: mlflow.MlflowClient, run: Run) -> set[str]:
    return {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), Request("timing", 16, ("val_loss",), "tpe", "none", share=True, baselines=True)),
        (("--search", "grid"), Request("timing", None, ("val_loss",), "grid", "none", share=True, baselines=True)),
        (
            (
                *("--samples", "5", "--objective", "val_accuracy", "--objective", "states", "--search", "random"),
                *("--pruning", "asha", "--no-share", "--no-baselines", "--concurrent", "3"),
            ),
            Request("timing", 5, ("val_accuracy", "states"), "random", "asha", False, False, 3),
        ),
    ],
)
def test_the_command_asks_for_what_it_was_told(
    small_run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Sequence[str],
    expected: Request,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("orchestrator.sweep.tune_schedules", lambda config, request: asked.append((config, request)))
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_run))
    told = CliRunner().invoke(main, ["tune", str(path), "name=other", "--space", "timing", *options])
    assert told.exit_code == 0, told.output
    [(config, request)] = asked
    assert config.name == "other"
    assert request == expected
