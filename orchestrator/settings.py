"""Every setting of a config in a line, from the schema that checks it."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.config import RunConfig
from orchestrator.config_reading import models_in
from orchestrator.errors import UserError


def describe(section: str | None) -> str:
    """What every setting means, may be and is by default, as YAML nests them.

    `section` is a key of the top level that has settings below it; None for all settings.

    Raises:
        UserError: there is no such section.
    """
    fields = RunConfig.model_fields
    sections = [name for name, field in fields.items() if models_in(field.annotation)]
    if section is None:
        return "\n".join(_group(RunConfig, ""))
    if section not in sections:
        raise UserError(f"section {section!r} must be one of: {', '.join(sections)}")
    return "\n".join(_field(section, fields[section], ""))


def _group(model: type[BaseModel], indent: str, tag: str = "") -> Iterator[str]:
    """The settings of a part, but for the one that names its variant; single ones first."""
    fields = [(name, field) for name, field in model.model_fields.items() if name != tag]
    for name, field in sorted(fields, key=lambda item: bool(models_in(item[1].annotation))):
        yield from _field(name, field, indent)


def _field(name: str, field: FieldInfo, indent: str) -> Iterator[str]:
    models, tag = models_in(field.annotation), str(field.discriminator or "")
    if not models:
        yield f"{indent}{name}: {field.description} ({_values(field)})"
    for model in models:
        yield f"{indent}{name}:"
        inner = f"{indent}  "
        if tag:
            [variant] = get_args(model.model_fields[tag].annotation)
            yield f"{inner}{tag}: {variant}"
        yield from (
            f"{inner}# {line}".rstrip() for line in cleandoc(field.description or model.__doc__ or "").splitlines()
        )
        yield from _group(model, inner, tag)


def _values(field: FieldInfo) -> str:
    """What is valid, where that is a list, and the default."""
    default = "required" if field.is_required() else f"default {_as_yaml(field.default)}"
    choices = ", ".join(_as_yaml(choice) for choice in _choices(field.annotation))
    return f"{choices}; {default}" if choices else default


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for option in get_args(annotation) for choice in _choices(option)]


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(list(value)) if isinstance(value, tuple) else str(value)
