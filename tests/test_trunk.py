"""Where trials begin: which of a trunk's checkpoints they get, and when it has to be trained for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator import checkpoint, launch
from orchestrator.config import CheckpointsConfig, RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.errors import TrainingError, UserError
from orchestrator.launch import Lent
from orchestrator.storage import checkpoints_of
from orchestrator.trunk import branch, forget, trunk_config
from tests.checkpoints import write

DIVERGES_AT = 7


@pytest.fixture
def trial(small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run whose trunk, in place of a training, is saved where it is wanted until it diverges."""

    def train(config: RunConfig, lent: Lent) -> None:
        folder = config.storage / config.name
        folder.mkdir(parents=True, exist_ok=True)
        place = checkpoints_of(folder, None)
        place.create()
        for step in sorted(lent.save_after | {lent.until or 0}):
            if step > DIVERGES_AT:
                raise TrainingError("diverged")
            write(place, step, config=config.model_dump(mode="json"))

    monkeypatch.setattr(launch, "train", train)
    return parse_config(small_run)


def begun(trial: RunConfig, name: str, before: int, **known: Any) -> int:
    trial = trial.model_copy(update={"name": name})
    return branch(trial, trunk_config(trial), before, Lent(None), **known)  # type: ignore[arg-type]


def test_a_trial_begins_right_before_its_cut_or_at_the_nearest_known_start(trial: RunConfig) -> None:
    assert begun(trial, "first", 4, saved={2}) == 4
    assert [begun(trial, f"again-{before}", before) for before in (0, 1, 2, 3, 4)] == [0, 0, 2, 2, 4]
    folder = trial.storage / "again-3"
    manifest = checkpoint.verify(checkpoint.at(checkpoints_of(folder, None), 2))
    assert manifest.config["name"] == "again-3"
    assert manifest.config["truncation"] is not None
    assert json.loads((folder / "branch.json").read_text()) == {"step": 2, "trunk": "trunk"}


def test_a_trunk_that_fails_later_on_is_still_a_beginning_for_earlier_cuts(trial: RunConfig) -> None:
    assert begun(trial, "first", 4, saved={2, 6, 10}, ahead=10) == 4
    assert begun(trial, "second", 6, saved={2, 6, 10}, ahead=10) == 6
    with pytest.raises(TrainingError, match="diverged"):
        begun(trial, "third", 10)


def test_a_trunk_of_another_config_is_nobodys_beginning(trial: RunConfig) -> None:
    """Though a space may look, at its edges, as if all trials began alike."""
    begun(trial, "first", 4)
    with pytest.raises(UserError, match=r"trunk cannot continue with another value of seed \(was 0, is 5\)"):
        begun(trial.model_copy(update={"seed": 5}), "second", 4)


def test_what_is_saved_is_not_trained_again(trial: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(trial, "first", 4)
    monkeypatch.setattr(launch, "train", lambda *_: pytest.fail("trained"))
    assert begun(trial, "second", 4) == 4
    assert begun(trial, "second", 4) == 4, "it goes on from its own"


def test_of_a_trunk_that_nobody_begins_with_any_more_stays_what_stays_of_any_run(trial: RunConfig) -> None:
    trunk = trunk_config(trial)
    forget(trunk, CheckpointsConfig(keep_last=1))
    begun(trial, "first", 4, saved={1, 2, 3})
    shared = checkpoints_of(trunk.storage / trunk.name, None)
    assert checkpoint.complete_steps(shared) == [1, 2, 3, 4]
    forget(trunk, CheckpointsConfig(keep_last=2, keep_best=0))
    assert checkpoint.complete_steps(shared) == [3, 4]
