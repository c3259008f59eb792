"""What makes a run another one than that of a saved config, and what may differ when it continues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.config_reading import parse_config
from orchestrator.errors import UserError

# A run may continue with other values of these; anything else would make it another run.
RESUMABLE = (
    "storage",
    "data_root",
    "cluster",
    "tracking",
    "checkpoints",
    "train.distill.teacher",  # a folder, which may have moved
    "train.accumulation",
    "train.activation_checkpointing",
    "train.eval_every",
    "train.log_every",
    "train.checkpoint_every",
)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested mapping as ("train.lr", 0.001) pairs."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(config: RunConfig, saved: dict[str, Any]) -> list[str]:
    """What makes `config` another run than the one that was started with `saved`: each key with both values."""
    # Through the schema, so that a setting that is newer than the checkpoint has its default there.
    before = parse_config(saved)
    changed = changes(config.model_dump(mode="json"), before.model_dump(mode="json"))
    return [words for key, words in changed if not any(key == r or key.startswith(r + ".") for r in RESUMABLE)]


def changes(now: dict[str, Any], then: dict[str, Any]) -> list[tuple[str, str]]:
    """The keys in which nested plain values differ, and each with both values in words."""
    now, then = dict(flatten(now)), dict(flatten(then))
    changed = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
    return [(key, f"{key} (was {then.get(key)!r}, is {now.get(key)!r})") for key in changed]


def refuse_other_run(config: RunConfig, saved: dict[str, Any]) -> None:
    """Check that `config` may continue a run that was started with `saved`.

    Raises:
        UserError: names every key that differs and may not.
    """
    if changed := differences(config, saved):
        raise UserError(
            f"run {config.storage / config.name} cannot continue with another value of {', '.join(changed)}; "
            "another name= starts a new run"
        )
