"""A search space, loaded by name or from a file, and checked against the config before anything starts."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

import tune_spaces
from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.errors import UserError
from tune_spaces.knobs import Choice, Float, Integer, Knob

Point = dict[str, Any]
_TIMINGS = ("window", "steps", "stable")
GRID = 3  # values of a range in a grid search: its ends and its middle


@dataclass(frozen=True)
class Space:
    """Knobs, and the settings that a point of them stands for."""

    name: str
    knobs: dict[str, Knob]
    settings: Callable[..., dict[str, Any]]

    def config(self, base: RunConfig, point: Mapping[str, Any]) -> RunConfig:
        """The run at a point.

        Raises:
            UserError: it is not one; names the space and the point.
        """
        where = ", ".join(f"{name}={value!r}" for name, value in point.items())
        raw = base.model_dump(mode="json")
        for key, value in self._settings(point, where).items():
            *parents, last = key.split(".")
            part = raw
            for parent in parents:
                part[parent] = part.get(parent) or {}
                part = part[parent]
                if not isinstance(part, dict):
                    raise UserError(f"space {self.name} at {where}: {key} is no setting: {parent} has none below it")
            if parents == ["truncation"] and last in _TIMINGS:
                part.update(dict.fromkeys(_TIMINGS))  # one of them excludes the others
            part[last] = value
        try:
            config = parse_config(raw)
        except UserError as error:
            raise UserError(f"space {self.name} at {where}: {error}") from error
        if config.truncation is None:
            raise UserError(
                f"space {self.name} at {where}: truncation null must say how far to cut: a sweep is over schedules"
            )
        if config.cluster != base.cluster:
            raise UserError(f"space {self.name} at {where}: cluster must be the same for all trials, who share workers")
        if (config.name, config.storage) != (base.name, base.storage):
            raise UserError(f"space {self.name} at {where}: name and storage are the sweep's to choose")
        return config

    def _settings(self, point: Mapping[str, Any], where: str) -> dict[str, Any]:
        try:
            found = self.settings(**point)
        except Exception as error:
            raise UserError(
                f"space {self.name} at {where}: settings() fails: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise UserError(f"space {self.name} at {where}: settings() must return a dict of settings, not {found!r}")
        return found

    def random_point(self, generator: np.random.Generator) -> Point:
        return {name: _draw(knob, generator) for name, knob in self.knobs.items()}

    def grid(self) -> list[Point]:
        """Every combination of all choices, and of three values of each range."""
        return [dict(zip(self.knobs, values, strict=True)) for values in itertools.product(*self.ends().values())]

    def ends(self) -> dict[str, list[Any]]:
        """Of every knob the values that say whether all of it can be used: ends and middle, or all choices."""
        return {name: _grid_values(knob) for name, knob in self.knobs.items()}

    def check(self, base: RunConfig) -> None:
        """Check that the ends and the middle of every range, and every choice, are settings of a run.

        Raises:
            UserError: as `config`.
        """
        for point in self.edges():
            self.config(base, point)

    def edges(self) -> list[Point]:
        """Points that stand for all: each of `ends` beside the others' middles, and the first and last in all ways."""
        columns = self.ends()
        middle = {name: values[len(values) // 2] for name, values in columns.items()}
        single = [middle | {name: value} for name, values in columns.items() for value in values]
        outer = itertools.product(*((values[0], values[-1]) for values in columns.values()))
        return [*single, *(dict(zip(self.knobs, values, strict=True)) for values in outer)]

    def contents(self) -> dict[str, str]:
        """What tells another space from this one: its knobs, and what its file says but for comments and layout."""
        knobs = {name: repr(replace(knob, doc="")) for name, knob in self.knobs.items()}
        source = Path(inspect.getfile(self.settings)).read_text()
        return knobs | {"its file": hashlib.sha256(ast.dump(ast.parse(source)).encode()).hexdigest()[:12]}

    def latest_cut(self, base: RunConfig, points: Sequence[Point]) -> int:
        """The step by which each of these points and of the edges has made its last cut."""
        return max(self.config(base, point).probe_steps[-1] for point in (*points, *self.edges()))


def load_space(name: str) -> Space:
    """The space called `name` in tune_spaces, or in the file of that path.

    Raises:
        UserError: there is none, or it cannot be one: says what is wrong with it.
    """
    module = _module(name)
    knobs, settings = getattr(module, "KNOBS", None), getattr(module, "settings", None)
    if not isinstance(knobs, dict) or not knobs or not inspect.isfunction(settings):
        raise UserError(f"space {name} needs KNOBS, a dict that is not empty, and a function settings(knob, …)")
    for knob_name, knob in knobs.items():
        _check_knob(name, knob_name, knob)
    takes = list(inspect.signature(settings).parameters)
    if sorted(takes) != sorted(knobs):
        raise UserError(f"space {name}: settings() takes {', '.join(takes)}, but KNOBS has {', '.join(knobs)}")
    stem = Path(name).stem
    if not re.fullmatch(r"[A-Za-z0-9._-]+", stem):
        raise UserError(f"space {name}: its file's name, part of runs' names, may have letters, digits, . _ and - only")
    return Space(stem, knobs, settings)


def optuna_space(space: Space) -> dict[str, BaseDistribution]:
    """The knobs as Optuna wants them."""
    return {name: _distribution(knob) for name, knob in space.knobs.items()}


def _distribution(knob: Knob) -> BaseDistribution:
    match knob:
        case Choice():
            return CategoricalDistribution(knob.values)
        case Integer():
            return IntDistribution(knob.low, knob.high, log=knob.log)
        case Float():
            return FloatDistribution(knob.low, knob.high, log=knob.log)


def names() -> list[str]:
    """The spaces that come with Rayduce."""
    folder = Path(tune_spaces.__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "knobs"))


def _module(name: str) -> ModuleType:
    if name in names():
        return importlib.import_module(f"tune_spaces.{name}")
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"space {name!r} must be one of {', '.join(names())}, or the path of a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None, "it ends with .py"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"space {name} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _check_knob(space: str, name: str, knob: object) -> None:
    where = f"space {space}: knob {name}"
    match knob:
        case Choice(values=values):
            if not isinstance(values, tuple | list) or not values:
                raise UserError(f"{where} has no values to choose from: {values!r} must be a tuple of them")
            if not any(all(test(value) for value in values) for test in (_is_string, _is_boolean, _is_number)):
                raise UserError(f"{where} must choose among strings, among numbers, or among booleans, not {values!r}")
        case Float() | Integer():
            if not _is_number(knob.low) or not _is_number(knob.high):
                raise UserError(f"{where}: low {knob.low!r} and high {knob.high!r} must be numbers")
            if isinstance(knob, Integer) and not (isinstance(knob.low, int) and isinstance(knob.high, int)):
                raise UserError(f"{where}: low {knob.low!r} and high {knob.high!r} must be integers")
            if not knob.low < knob.high:
                raise UserError(f"{where} has an empty range: low {knob.low} must be less than high {knob.high}")
            if knob.log and knob.low <= 0:
                raise UserError(f"{where} is logarithmic: low {knob.low} must be more than 0")
        case _:
            raise UserError(f"{where} must be a Float, an Integer or a Choice of tune_spaces.knobs, not {knob!r}")


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Which a boolean is to Python, but no column of a table has both."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw(knob: Knob, generator: np.random.Generator) -> Any:
    if isinstance(knob, Choice):
        return knob.values[int(generator.integers(len(knob.values)))]
    low, high = (float(np.log(knob.low)), float(np.log(knob.high))) if knob.log else (knob.low, knob.high)
    if isinstance(knob, Integer) and not knob.log:
        return int(generator.integers(knob.low, knob.high + 1))
    value = float(generator.uniform(low, high))
    value = float(np.exp(value)) if knob.log else value
    return min(knob.high, max(knob.low, round(value))) if isinstance(knob, Integer) else value


def _grid_values(knob: Knob) -> list[Any]:
    if isinstance(knob, Choice):
        return list(knob.values)
    values = np.geomspace(knob.low, knob.high, GRID) if knob.log else np.linspace(knob.low, knob.high, GRID)
    if isinstance(knob, Integer):
        return sorted({round(float(value)) for value in values})
    return [knob.low, float(values[1]), knob.high]
