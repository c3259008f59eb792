"""A run's config from YAML and the command line; what a user got wrong there, in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.config import Part, RunConfig
from orchestrator.data.sources import AnySource, DataConfig
from orchestrator.errors import UserError

Schema = TypeVar("Schema", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML), and check everything.

    Raises:
        UserError: one sentence naming the setting, its value and what is valid.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, or bytes that are no text
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"config {path} must hold settings as `key: value`, for example `name: quickstart`")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Check plain values against the schema.

    Raises:
        UserError: as `load_config`.
    """
    return _validate(RunConfig, raw)


class _DataOnly(Part):
    data: DataConfig


def parse_data(source: str, settings: Sequence[str]) -> AnySource:
    """The data part alone, from a source's name and `key=value` settings.

    Raises:
        UserError: as `load_config`.
    """
    raw: dict[str, Any] = {"source": source}
    for setting in settings:
        _apply(raw, setting)
    return _validate(_DataOnly, {"data": raw}).data


def _validate(schema: type[Schema], raw: dict[str, Any]) -> Schema:
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise UserError(_sentence(error)) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like key.sub=value, for example train.lr=0.001")
    *parents, last = key.split(".")
    for parent in parents:
        if raw.get(parent) is None:
            raw[parent] = {}
        raw = raw[parent]
        if not isinstance(raw, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a group of settings")
    try:
        raw[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value") from error


def _sentence(error: ValidationError) -> str:
    """The first of pydantic's findings as one sentence."""
    # An unknown key often makes another one missing: the typing error explains both.
    found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
    location = found["loc"]
    key = ".".join(str(part) for i, part in enumerate(location) if not _is_tag(location, i))
    if found["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"valid keys here: {', '.join(valid)}"
        return f"unknown key {key}; {hint}"
    if found["type"] == "missing":
        return f"{key} is required and not set"
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is {found['input']!r}: it must be a group of settings"
    if found["type"] == "path_type":
        return f"{key} is {found['input']!r}: it must be a path"
    if found["type"] == "string_pattern_mismatch":
        return f"{key} is {found['input']!r}: it begins with a letter or digit and may hold those, '.', '_' and '-'"
    if found["type"] == "union_tag_not_found":
        tag = found["ctx"]["discriminator"].strip("'")
        return f"{key}.{tag} is required and not set"
    if found["type"] == "union_tag_invalid":
        context = found["ctx"]
        tag = context["discriminator"].strip("'")
        return f"{key}.{tag} {context['tag']!r} must be one of: {context['expected_tags']}"
    if found["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} is {found['input']!r}: {message[0].lower()}{message[1:]}"


def _is_tag(location: Sequence[Any], index: int) -> bool:
    """pydantic puts the chosen variant of a union into the location, where no setting of that name is."""
    before = location[index - 1] if index > 0 else None
    return (index == 1 and before in ("model", "data")) or before in ("d_state", "dim")


def _valid_keys(location: Sequence[Any]) -> list[str]:
    """Settings of the part at a location, which names the chosen variant behind a field that has variants."""
    models: list[type[BaseModel]] = [RunConfig]
    for i, part in enumerate(location):
        if _is_tag(location, i):
            models = [m for m in models if (part,) in (get_args(f.annotation) for f in m.model_fields.values())]
        else:
            models = [m for model in models for m in models_in(model.model_fields[part].annotation)]
    return [name for model in models for name in model.model_fields]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that a field may hold, through Annotated and unions."""
    if get_origin(annotation) is Annotated:
        return models_in(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [model for option in get_args(annotation) for model in models_in(option)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
