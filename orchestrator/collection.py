"""A folder with many runs that were asked for together: a sweep's, or a comparison's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.config import RunConfig
from orchestrator.config_changes import changes, differences
from orchestrator.errors import UserError
from orchestrator.filesystem import inside
from orchestrator.mlflow_tracker import MlflowTracker, mlflow_tracker, mlflow_uri
from orchestrator.run_folder import read_json, write_whole
from orchestrator.tracking import closing

REQUEST = "request.json"
ASKED = ("config", "request")


def below(config: RunConfig, folder: Path) -> RunConfig:
    """The config with everything that its runs write below `folder`, but with the same MLflow."""
    tracking = config.tracking.model_copy(update={"mlflow_uri": mlflow_uri(config)})
    storage = config.checkpoints.storage
    place = folder.relative_to(config.storage)
    checkpoints = config.checkpoints.model_copy(update={"storage": storage and inside(storage, place)})
    return config.model_copy(update={"storage": folder, "tracking": tracking, "checkpoints": checkpoints})


def otherwise(config: RunConfig, request: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What is asked for otherwise than in `before`, a REQUEST: each key with both values.

    What runs too may continue with is no difference, nor what only one of both requests says.
    """
    asked, then = json.loads(json.dumps(request)), before["request"]
    both = {key: then[key] for key in asked.keys() & then.keys()}
    changed = [words for _, words in changes({key: asked[key] for key in both}, both)]
    return differences(config, before["config"]) + changed


def refuse_another_request(folder: Path, config: RunConfig, request: Mapping[str, Any]) -> None:
    """Check that this is what was begun with in `folder`, if anything.

    Raises:
        UserError: something else was asked for before; names what differs. Or what was asked for cannot be read.
    """
    path = folder / REQUEST
    if path.exists() and (changed := otherwise(config, request, read_json(path, *ASKED))):
        raise UserError(
            f"{folder} cannot continue with another value of {', '.join(changed)}; another name= starts a new one"
        )


def remember_request(folder: Path, config: RunConfig, request: Mapping[str, Any]) -> None:
    """Keep what was asked for; not before all that a person can have got wrong has been found, and can be corrected."""
    path = folder / REQUEST
    earlier = read_json(path, *ASKED)["request"] if path.exists() else {}
    asked = {"config": config.model_dump(mode="json"), "request": earlier | dict(request)}
    write_whole(path, json.dumps(asked, indent=1) + "\n")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table in Parquet, complete or not at all."""
    content = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), content)
    write_whole(path, content.getvalue().to_pybytes())


@contextmanager
def parent_run(config: RunConfig, folder: Path, warn: Callable[[str], None]) -> Iterator[MlflowTracker | None]:
    """The MLflow run above all others, for the duration of the block, whose end is its status; None without MLflow."""
    tracker = mlflow_tracker(config, folder, warn)
    with closing(tracker) if tracker is not None else nullcontext():
        yield tracker
