"""Spaces: what ships fits the shipped configs, and what cannot be searched is refused before anything starts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import BaseDistribution

from orchestrator.config import RunConfig
from orchestrator.config_reading import load_config, parse_config
from orchestrator.errors import UserError
from orchestrator.space import Space, load_space, names, optuna_space
from orchestrator.sweep import Request, check
from orchestrator.trunk import saved_after, shared_trunks, trunk_config
from tune_spaces.knobs import Choice, Float, Integer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def base(small_run: dict[str, Any]) -> RunConfig:
    small_run["train"]["steps"] = 200
    return parse_config(small_run)


def request_of(space: str, **changes: Any) -> Request:
    asked = {"samples": 3, "objectives": ("val_loss",), "search": "random", "pruning": "none"}
    return Request(space, share=True, baselines=False, **(asked | changes))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("config", ["quickstart", "digits_lru", "recall"])
def test_shipped_spaces_fit_the_shipped_configs(name: str, config: str) -> None:
    space = load_space(name)
    base = load_config(CONFIGS / f"{config}.yaml")
    if (name, config) == ("score", "digits_lru"):
        with pytest.raises(UserError, match=r"truncation\.score averaged chooses among states"):
            space.check(base)
        return
    space.check(base)
    assert all(knob.doc for knob in space.knobs.values())
    assert len(shared_trunks(space, base, [])) == 1


@pytest.mark.parametrize("name", names())
def test_points_lie_in_their_ranges_and_follow_the_seed(name: str) -> None:
    space = load_space(name)
    distributions: dict[str, BaseDistribution] = optuna_space(space)
    draws = [[space.random_point(np.random.default_rng(seed)) for _ in range(20)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for point in [*draws[0], *space.grid()]:
        for knob, value in point.items():
            assert distributions[knob]._contains(distributions[knob].to_internal_repr(value)), (knob, value)


def test_a_logarithmic_range_draws_every_ratio_as_often() -> None:
    space = Space("one", {"x": Float(0.01, 100.0, "Anything.", log=True)}, lambda x: {})
    generator = np.random.default_rng(0)
    logs = np.log10([space.random_point(generator)["x"] for _ in range(2000)])
    assert abs(logs.mean()) < 0.1
    assert abs((np.abs(logs) < 1).mean() - 0.5) < 0.05


def test_a_point_becomes_the_run_that_it_stands_for(base: RunConfig) -> None:
    config = load_space("schedule").config(base, {"start": 0.1, "length": 0.05, "events": 2, "dim": 3})
    assert config.probe_steps == (25, 30)  # the config's own steps give way to the window
    assert config.truncation is not None
    assert config.truncation.target.dim == 3
    trunk = trunk_config(config)
    assert trunk.truncation is None
    own = {"name", "truncation", "checkpoints", "train"}
    assert trunk.model_dump(exclude=own) == config.model_dump(exclude=own)
    assert trunk.train.model_dump(exclude={"checkpoint_every"}) == config.train.model_dump(exclude={"checkpoint_every"})


def test_trials_may_begin_right_before_their_first_cuts_or_where_these_are_not_known_near_any(base: RunConfig) -> None:
    space = load_space("timing")
    points = [{"at": at} for at in (0.1, 0.2, 0.2)]
    firsts = {space.config(base, point).probe_steps[0] for point in points}
    [trunk] = shared_trunks(space, base, points, further=[{"at": 0.3}])
    assert trunk.saved == {first - 1 for first in firsts}
    assert trunk.ahead == space.config(base, {"at": 0.3}).uncut_steps > max(trunk.saved)
    for unknown in (frozenset[int](), frozenset(range(1000))):
        anywhere = sorted({0, *saved_after(unknown, 1000)})
        assert max(b - a for a, b in itertools.pairwise([*anywhere, 1000])) == 10
    [unknown_yet] = shared_trunks(space, base, [])
    assert (unknown_yet.run, unknown_yet.ahead) == (trunk.run, 0)
    assert unknown_yet.saved == saved_after(frozenset(), base.train.steps)


SPACE = "from tune_spaces.knobs import Choice, Float, Integer\nKNOBS = {knobs}\ndef settings({takes}): return {gives}\n"
BROKEN = [
    ("{'a': Float(0.1, 0.4, 'x')}", "a", "{'truncation.windw': {'end': a}}", "did you mean window"),
    ("{'a': Float(0.1, 0.1, 'x')}", "a", "{}", "empty range: low 0.1 must be less than high 0.1"),
    ("{'a': Float(0, 1, 'x', log=True)}", "a", "{}", "low 0 must be more than 0"),
    ("{'a': Choice((), 'x')}", "a", "{}", "no values to choose from"),
    ("{'a': Choice(4, 'x')}", "a", "{}", "no values to choose from: 4 must be a tuple"),
    ("{'a': Choice((False, 2), 'x')}", "a", "{}", "among strings, among numbers"),
    ("{'a': Float('0.1', None, 'x')}", "a", "{}", "low '0.1' and high None must be numbers"),
    ("{'a': Integer(1.5, 3, 'x')}", "a", "{}", "low 1.5 and high 3 must be integers"),
    ("{'a': 3}", "a", "{}", "must be a Float, an Integer or a Choice"),
    ("{}", "", "{}", "KNOBS, a dict that is not empty"),
    ("{'a': Choice((1,), 'x')}", "b", "{}", r"settings\(\) takes b, but KNOBS has a"),
    ("{'a': Choice((1, 99), 'x')}", "a", "{'truncation.target': {'dim': a}}", "mine at a=99: .*model.d_state 16"),
    ("{'a': Choice((1, 2), 'x')}", "a", "{'cluster.workers': a}", "cluster must be the same"),
    ("{'a': Choice(('b', 'c'), 'x')}", "a", "{'name': a}", "name and storage are the sweep's"),
    ("{'a': Choice(((1,), (1, 2)), 'x')}", "a", "{'truncation.steps': a}", "among strings, among numbers"),
    ("{'states': Choice((1,), 'x')}", "states", "{}", "knob states must be called otherwise"),
    ("{'a': Choice((1,), 'x')}", "a", "None", r"settings\(\) must return a dict"),
    ("{'a': Choice((1,), 'x')}", "a", "{'x': 1 / (a - 1)}", "fails: ZeroDivisionError"),
    ("{'a': Choice((1,), 'x')}", "a", "{'train.lr.x': a}", "train.lr.x is no setting: lr has none below it"),
    ("nothing_of_this_name", "a", "{}", "cannot be loaded: NameError"),
]


@pytest.mark.parametrize(("knobs", "takes", "gives", "sentence"), BROKEN)
def test_a_broken_space_is_refused_in_one_sentence(
    knobs: str, takes: str, gives: str, sentence: str, base: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(SPACE.format(knobs=knobs, takes=takes, gives=gives))
    with pytest.raises(UserError, match=sentence) as refused:
        check(base, request_of(str(tmp_path / "mine.py")))
    assert "\n" not in str(refused.value)


def test_trials_that_are_evaluated_at_different_steps_cannot_be_judged(base: RunConfig, tmp_path: Path) -> None:
    space = SPACE.format(knobs="{'a': Choice((10, 20), 'x')}", takes="a", gives="{'train.eval_every': a}")
    (tmp_path / "mine.py").write_text(space)
    for pruning in ("asha", "median"):
        with pytest.raises(UserError, match=r"space mine must not set train\.steps or eval_every"):
            check(base, request_of(str(tmp_path / "mine.py"), samples=4, pruning=pruning))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"space": "tming"}, "space 'tming' must be one of after, .*timing, .*or the path"),
        ({"samples": 0}, "--samples 0 must be 1 or more"),
        ({"concurrent": 0}, "--concurrent 0 must be 1 or more"),
        ({"search": "grid"}, "--samples is for random and tpe"),
        ({"objectives": ("loss",)}, "--objective loss must be one of val_loss"),
        ({"objectives": ("val_accuracy",)}, "val_accuracy is never logged for text"),
        ({"objectives": ("val_loss", "states", "states")}, "states is named twice"),
        ({"objectives": ("val_loss", "states"), "pruning": "asha"}, "asha goes by one objective, not 2"),
        ({"objectives": ("states",), "pruning": "median"}, "median needs val_loss or val_accuracy, not states"),
        ({"pruning": "asha"}, "one of 4 trials come to its end: 3 trials must be 4 or more"),
        ({"pruning": "asha", "samples": 4}, "train.eval_every 200 there is none before the last step 200"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(
    changes: dict[str, Any], sentence: str, base: RunConfig
) -> None:
    seldom = base.model_copy(update={"train": base.train.model_copy(update={"eval_every": 200})})
    with pytest.raises(UserError, match=sentence):
        check(seldom, request_of(**({"space": "timing"} | changes)))


def test_a_value_in_the_middle_of_a_choice_counts(base: RunConfig) -> None:
    ends = Space(
        "end",
        {"end": Choice((0.1, 0.4, 0.2), "Anything.")},
        lambda end: {"truncation.window": {"events": 1, "end": end}},
    )
    assert ends.latest_cut(base, []) == 80
    rates = Space("rate", {"lr": Choice((0.01, 0.02, 0.01), "Anything.")}, lambda lr: {"train.lr": lr})
    assert not shared_trunks(rates, base.model_copy(update={"train": base.train.model_copy(update={"lr": 0.01})}), [])


def test_a_sweep_needs_something_to_cut(base: RunConfig) -> None:
    uncut = base.model_copy(update={"truncation": None})
    space = Space("rate", {"lr": Float(0.001, 0.1, "Learning rate.")}, lambda lr: {"train.lr": lr})
    with pytest.raises(UserError, match="truncation null must say how far to cut"):
        space.check(uncut)


def test_trials_that_differ_from_the_start_share_nothing(base: RunConfig) -> None:
    rate = Space("rate", {"lr": Float(0.001, 0.1, "Learning rate.")}, lambda lr: {"train.lr": lr})
    assert not shared_trunks(rate, base, [])
    assert not shared_trunks(rate, base, [{"lr": 0.01}, {"lr": 0.02}])
    dim = Space("dim", {"dim": Integer(1, 8, "States.")}, lambda dim: {"truncation.target": {"dim": dim}})
    assert shared_trunks(dim, base, [])
    assert shared_trunks(Space("one", {"x": Choice((1,), "Nothing.")}, lambda x: {}), base, [])


def test_trials_share_with_those_that_begin_alike(base: RunConfig) -> None:
    knobs = {"lr": Choice((0.01, 0.02, 0.03), "Learning rate."), "at": Float(0.1, 0.4, "When.")}
    both = Space("both", knobs, lambda lr, at: {"train.lr": lr, "truncation.window": {"events": 1, "end": at}})
    points = [{"lr": lr, "at": at} for lr, at in ((0.01, 0.1), (0.02, 0.4), (0.03, 0.2), (0.01, 0.3), (0.03, 0.2))]
    trials = [both.config(base, point) for point in points]
    first, second = shared_trunks(both, base, points)
    assert [trunk.run.name for trunk in (first, second)] == ["trunk-0", "trunk-2"]
    assert [first.begins(trial) for trial in trials] == [True, False, False, True, False]
    assert [second.begins(trial) for trial in trials] == [False, False, True, False, True]
    assert first.saved == {trials[0].uncut_steps, trials[3].uncut_steps}
    assert (first.ahead, second.ahead) == (trials[3].uncut_steps, trials[2].uncut_steps)
    assert not shared_trunks(both, base, [])
