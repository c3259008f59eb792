"""Which trials come to their end, as far as their folders and the search say: no training."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher

from orchestrator.config import RunConfig
from orchestrator.config_reading import load_config, parse_config
from orchestrator.pruning import REDUCTION, MedianRule, at_rung, first_judged, promote, promoted, rung_of, scheduler_of
from orchestrator.search import searcher
from orchestrator.space import load_space, names
from orchestrator.sweep import _Judgement
from orchestrator.trial import Sweep, _trial_folder
from orchestrator.trial_folder import AGAIN, conclude, outcomes, status_of, statuses

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STEPS, RUNG = 200, 100


@pytest.fixture
def base(small_run: dict[str, Any], tmp_path: Path) -> RunConfig:
    small_run["train"]["steps"] = STEPS
    return parse_config(small_run).model_copy(update={"storage": tmp_path})


def sweep_of(base: RunConfig) -> Sweep:
    return Sweep(base, load_space("timing"), (), None, rung=RUNG)


def written(folder: Path, rows: list[tuple[int, float]]) -> None:
    lines = [json.dumps({"step": step, "val_loss": loss}) + "\n" for step, loss in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))


def left_folder(sweep: Path, number: int, rows: list[tuple[int, float]]) -> Path:
    folder = sweep / f"trial-{number:05d}"
    folder.mkdir()
    (folder / "point.json").write_text(
        json.dumps({"trial_id": str(number), "start": "", "point": {"at": number / 100}})
    )
    written(folder, rows)
    return folder


def test_trials_are_judged_when_all_have_been_cut(base: RunConfig) -> None:
    """For the last time: after 40 % of the steps where the time is a knob, `stable` after half; GRACE is a quarter."""
    quickstart = load_config(CONFIGS / "quickstart.yaml")
    assert quickstart.train.steps == 400
    latest = {name: load_space(name).latest_cut(quickstart, []) for name in names()}
    assert latest == dict.fromkeys(names(), 160) | {"stable": 200, "target": 40, "score": 40}
    points = [{"at": 0.3}]
    assert first_judged(load_space("timing"), base, points) == 81
    assert [rung_of(81, every) for every in (1, 20, 27, 100)] == [81, 100, 81, 100]
    median = scheduler_of("median", sweep_of(base), points, "val_loss")
    assert isinstance(median, MedianRule)
    assert median._grace_period == 81


# --- ASHA ---


class Simulated:
    """A sweep whose trials take no time: what they have at the rung is drawn at random, and some may fail."""

    def __init__(self, base: RunConfig, trials: int, seed: int, failing: float = 0.0) -> None:
        self.base, self.trials, self.failing = base, trials, failing
        self.random = torch.Generator().manual_seed(seed)
        self.points = [{"at": 0.05 + 0.35 * number / trials} for number in range(trials)]
        self.losses = dict(zip((point["at"] for point in self.points), self.draw(trials).tolist(), strict=True))

    def draw(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self.random, dtype=torch.float64)

    def run(self, at_a_time: int, at_most: int) -> None:
        """Until all have ended or `at_most` of them have, when the rest is left as by a kill."""
        sweep, folder = sweep_of(self.base), self.base.storage
        begun = outcomes(folder)
        left = self.trials - sum(trial.status not in AGAIN for trial in begun)
        search, judgement = searcher(sweep, ("val_loss",), self.points, begun, left), _Judgement(folder)
        running: dict[str, Path] = {}
        number, ended = 0, 0
        while ended < at_most:
            suggested = search.suggest(str(number)) if len(running) < at_a_time else None
            if suggested == Searcher.FINISHED:
                assert not running
                return
            if suggested is not None:
                running[str(number)] = _trial_folder(sweep, str(number), suggested)
                number += 1
                continue
            assert running, "Ray Tune would wait for ever"
            name = list(running)[int(self.draw(1).item() * len(running))]
            result = self.ended(running.pop(name))
            if result is None:
                dead = tune.experiment.Trial("trial", stub=True, trial_id=name)
                judgement.on_trial_error(0, [], dead)
                search.on_trial_complete(name, error=True)
            else:
                judgement.on_trial_result(0, [], None, result)
                search.on_trial_complete(name, result)
            ended += 1

    def ended(self, folder: Path) -> dict[str, Any] | None:
        """The result that Ray Tune has of a trial; None of one whose process has died."""
        if self.draw(1).item() < self.failing:
            return None
        loss = self.losses[json.loads((folder / "point.json").read_text())["point"]["at"]]
        told = {"folder": folder.name, "done": True}
        if (folder / "promoted").exists():
            written(folder, [(RUNG, loss), (STEPS, loss / 2)])
            summary = {"val_loss_final": loss / 2, "val_accuracy_final": None, "final_dims": [4], "train_seconds": 2.0}
            (folder / "summary.json").write_text(json.dumps(summary | {"truncations": []}))
            conclude(folder, "finished")
            return told | {"val_loss": loss / 2}
        written(folder, [(RUNG - 20, 2 * loss), (RUNG, loss)])
        conclude(folder, "stopped")
        return told | {"val_loss": loss}


@pytest.mark.parametrize("at_a_time", [1, 3, 20])
@pytest.mark.parametrize("trials", [4, 16, 19])
@pytest.mark.parametrize("killed_after", [None, 3, 9, 17])
def test_one_of_four_comes_to_its_end_and_the_best_at_the_rung_is_one(
    at_a_time: int, trials: int, killed_after: int | None, base: RunConfig
) -> None:
    """However many run at a time, and whenever the sweep is killed and continued; each trial in one folder."""
    simulated = Simulated(base, trials, seed=at_a_time + trials)
    if killed_after is not None:
        simulated.run(at_a_time, killed_after)
    simulated.run(at_a_time, at_most=1000)
    found = outcomes(base.storage)
    assert sorted(trial.point["at"] for trial in found) == [point["at"] for point in simulated.points]
    finished = [trial.point["at"] for trial in found if trial.status == "finished"]
    assert (len(finished), len(found)) == (trials // REDUCTION, trials)
    if trials % REDUCTION == 0:  # else the last may come when all that may go on do
        assert min(simulated.losses, key=simulated.losses.__getitem__) in finished


@pytest.mark.parametrize("at_a_time", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_trials_that_fail_are_among_the_four_and_give_their_place_to_another(
    at_a_time: int, seed: int, base: RunConfig
) -> None:
    """The same command tries them again, until none is left."""
    simulated = Simulated(base, 16, seed, failing=0.2)
    simulated.run(at_a_time, at_most=1000)
    statuses = Counter(trial.status for trial in outcomes(base.storage))
    assert statuses["finished"] == 16 // REDUCTION
    assert set(statuses) <= {"finished", "pruned", "failed"}
    simulated.failing = 0.0
    simulated.run(at_a_time, at_most=1000)
    found = outcomes(base.storage)
    assert {trial.status for trial in found} == {"finished", "pruned"}
    assert sorted(trial.point["at"] for trial in found) == [point["at"] for point in simulated.points]


def test_the_search_learns_what_trials_had_at_the_rung(base: RunConfig) -> None:
    """Of those that went on, too: a loss at the end is no measure for one at the rung."""
    simulated = Simulated(base, 8, seed=0)
    simulated.run(2, at_most=1000)
    again = searcher(sweep_of(base), ("val_loss",), simulated.points, outcomes(base.storage), 0)
    known = again._ot_study.get_trials(states=[TrialState.COMPLETE])
    assert {trial.params["at"]: trial.values[0] for trial in known} == simulated.losses


def test_of_the_trials_that_wait_the_best_goes_on_when_there_are_enough(tmp_path: Path) -> None:
    """One that has failed was judged, too."""
    for number, loss in enumerate([3.0, 4.0, 2.0]):
        (left_folder(tmp_path, number, [(80, 0.1), (RUNG, loss)]) / "pruned").touch()
    runs = left_folder(tmp_path, 3, [(RUNG, 1.0)])
    assert promote(tmp_path, "val_loss", RUNG, "again") is None
    conclude(runs, "failed", "diverged")
    assert at_rung(tmp_path / "trial-00002", "val_loss", RUNG) == 2.0
    assert promote(tmp_path, "val_loss", RUNG, "again") == {"at": 0.02}
    assert statuses(tmp_path) == ["pruned", "pruned", "running", "failed"]
    assert [trial.name for trial in promoted(tmp_path)] == ["trial-00002"]
    assert promote(tmp_path, "val_loss", RUNG, "once more") is None


def test_the_most_accurate_goes_on(tmp_path: Path) -> None:
    for number in range(4):
        folder = left_folder(tmp_path, number, [])
        (folder / "metrics.jsonl").write_text(json.dumps({"step": RUNG, "val_accuracy": number / 4}) + "\n")
        (folder / "pruned").touch()
    assert promote(tmp_path, "val_accuracy", RUNG, "again") == {"at": 0.03}


# --- median stopping ---


def test_a_continued_sweep_knows_what_has_been_judged(base: RunConfig) -> None:
    """The third was running when the sweep stopped; at its end nothing is left to stop."""
    folders = [
        left_folder(base.storage, number, rows)
        for number, rows in enumerate(([(40, 9.0), (100, 3.0), (200, 2.0)], [(40, 9.0)], [(100, 5.0)]))
    ]
    for folder in folders[:2]:
        (folder / "pruned").touch()
    assert [status_of(folder)[0] for folder in folders] == ["pruned", "pruned", "running"]
    median = scheduler_of("median", sweep_of(base), [], "val_loss")
    assert isinstance(median, MedianRule)
    means = {name: median._running_mean(name, 200) for name in median._trials_beyond_time(100)}
    assert means == {"trial-00000": 2.5}
    resumed = tune.experiment.Trial("trial", stub=True, trial_id="2")
    nobody = SimpleNamespace(get_live_trials=list)
    told = {"folder": "trial-00002", "step": 150, "val_loss": 1.0}
    assert median.on_trial_result(nobody, resumed, told) == median.CONTINUE
    assert [row["step"] for row in median._results[resumed]] == [100, 150]


def test_what_a_trial_had_before_its_cut_does_not_count(base: RunConfig) -> None:
    left_folder(base.storage, 0, [(100, 5.0)])
    median = scheduler_of("median", sweep_of(base), [], "val_loss")
    assert isinstance(median, MedianRule)
    trial = tune.experiment.Trial("trial", stub=True, trial_id="0")
    uncut = {"folder": "trial-00000", "step": 80, "val_loss": 0.1}
    assert median.on_trial_result(None, trial, uncut) == median.CONTINUE
    assert trial not in median._results
