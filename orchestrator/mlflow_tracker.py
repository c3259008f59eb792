"""MLflow: one run per training, written by a thread of its own."""

from __future__ import annotations

import json
import os
import queue
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.config_changes import flatten
from orchestrator.run_folder import metrics_so_far, write_whole

# Keeps the id of the MLflow run, so that a resumed training continues it.
MLFLOW_RUN = "mlflow.json"
# A server that does not answer within these limits is given up: MLflow's own are minutes long.
_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
PATIENCE_S = 60.0
# A tag by which a run is found again whose id was not heard.
_KEY = "rayduce.key"
_BATCH_S = 2.0
# Of a row of metrics.jsonl, what MLflow has places of its own for.
_NO_METRICS = ("step", "seconds")
_SQLITE = "sqlite:///"  # before a path
# How a run of a sweep has ended, as its tag says.
_TOLD = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}


@dataclass(frozen=True)
class Nesting:
    """Where a run belongs that is part of a sweep: the sweep's MLflow run, and tags that say which part.

    Without one, because MLflow could not be reached, no part is tracked there: each would wait for it anew.
    """

    parent_run_id: str | None
    tags: Mapping[str, str]
    pruned: Path | None = None
    """A file that is there if the run was pruned, and not just stopped."""
    to_its_end: bool = True
    """Or no further than where it is judged, and pruned unless it goes on later."""


class MlflowTracker:
    """A tracker that a slow or dead server never holds up.

    The first failure is reported through `warn`, and nothing is sent any more.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifacts: Path,
        run_name: str,
        params: Mapping[str, Any],
        memory: Path,
        warn: Callable[[str], None],
        nesting: Nesting | None = None,
        history: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """`memory` is a file that keeps the MLflow run's id, so that a resumed run continues the same one.

        `artifacts` is where files go when `uri` is a database. `history` is what the run has measured before, a row a
        step, of which MLflow is told what it does not know: all where a run begins with another's checkpoint, and the
        end after a kill.
        """
        self.uri = uri
        self._run_id: str | None = None
        self._connected = threading.Event()
        self._dead = False
        self._deadline: float | None = None
        self._memory = memory
        self._warn = warn
        self._tags = dict(nesting.tags) if nesting else {}
        self._pruned = nesting.pruned if nesting else None
        self._to_its_end = nesting is None or nesting.to_its_end
        if nesting and nesting.parent_run_id:
            self._tags["mlflow.parentRunId"] = nesting.parent_run_id
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._metrics: list[tuple[str, float, int, int]] = []
        self._history = history
        self._lock = threading.Lock()
        self._jobs.put(lambda: self._connect(experiment, artifacts, run_name, params))
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The run's id, once it is known; None where MLflow cannot be reached."""
        if self._connected.wait(self._patience()):
            self._deadline = None  # it has answered
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        with self._lock:
            if not self._dead:
                self._metrics.extend((key, value, now, step) for key, value in metrics.items())

    def artifact(self, path: Path, folder: str = "") -> None:
        def send() -> None:
            # Where MLflow is slow, the plan of a probe may have been taken back meanwhile.
            if path.exists():
                self._client.log_artifact(self._connected_run(), str(path), folder or None)

        self._jobs.put(send)

    def close(self, status: str) -> None:
        self._jobs.put(self._send_metrics)
        judged = status == "FINISHED" and not self._to_its_end
        status = "KILLED" if judged else status
        if self._tags:
            # One that was to be pruned may have come to its end before it heard of that.
            pruned = judged or (status != "FINISHED" and self._pruned is not None and self._pruned.exists())
            self._jobs.put(lambda: self._tag("status", "pruned" if pruned else _TOLD[status]))
        self._jobs.put(lambda: self._client.set_terminated(self._connected_run(), status=status))
        self._jobs.put(None)
        self._thread.join(self._patience())
        if self._thread.is_alive():
            self._fail(f"did not take everything within {PATIENCE_S:g} s")

    def _tag(self, key: str, value: str) -> None:
        self._client.set_tag(self._connected_run(), key, value)

    def _patience(self) -> float:
        """What is left of the time that a run waits for a server that does not answer, from the first time it waits."""
        if self._deadline is None:
            self._deadline = time.monotonic() + PATIENCE_S
        return max(0.0, self._deadline - time.monotonic())

    def _work(self) -> None:
        try:
            while True:
                try:
                    job = self._jobs.get(timeout=_BATCH_S)
                except queue.Empty:
                    job = self._send_metrics
                if job is None:
                    return
                job()
        except Exception as error:  # noqa: BLE001 -- whatever a server or database fails with, the run goes on
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._fail(f"failed ({reason[0][:200]})")
        finally:
            self._connected.set()

    def _fail(self, how: str) -> None:
        """Say it once, and drop what would pile up."""
        with self._lock:
            said, self._dead = self._dead, True
            self._metrics.clear()
        if not said:
            self._warn(f"MLflow at {self.uri} {how}: nothing more is sent there; metrics.jsonl has everything")

    def _connect(self, experiment: str, artifacts: Path, run_name: str, params: Mapping[str, Any]) -> None:
        for name, limit in _LIMITS.items():
            os.environ.setdefault(name, limit)
        import mlflow  # reads the limits when it is imported, and takes seconds
        from mlflow.entities import Param

        self._client = mlflow.MlflowClient(tracking_uri=self.uri)
        self._run_id = self._earlier_run()
        if self._run_id is None:
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                location = artifacts.as_uri() if self.uri.startswith("sqlite:") else None
                experiment_id = self._client.create_experiment(experiment, artifact_location=location)
            else:
                experiment_id = found.experiment_id
            self._run_id = self._begun(experiment_id) or self._begin(experiment_id, run_name)
            self._catch_up(self._history)
            self._send_metrics()
        else:
            self._catch_up(self._unsent(self._run_id))
        # Of a run that was killed MLflow may not know all; it refuses another value of what it knows.
        known = self._client.get_run(self._run_id).data.params
        pairs = [Param(key, str(value)) for key, value in params.items() if key not in known]
        for first in range(0, len(pairs), 100):  # MLflow's limit a call
            self._client.log_batch(self._run_id, params=pairs[first : first + 100])
        self._history = ()
        self._connected.set()

    def _unsent(self, run_id: str) -> Iterator[Mapping[str, float]]:
        """What the run has measured, but MLflow was not told before the driver was killed: the end of its history."""
        known: dict[str, set[int]] = {}

        def steps(key: str) -> set[int]:
            if key not in known:
                known[key] = {metric.step for metric in self._client.get_metric_history(run_id, key)}
            return known[key]

        last = max(steps("train_loss"), default=0)
        for row in self._history:
            step = int(row["step"])
            if step >= last:
                new = {key for key in row if key not in _NO_METRICS and step not in steps(key)}
                yield {"step": step} | {key: row[key] for key in new}

    def _catch_up(self, rows: Iterable[Mapping[str, float]]) -> None:
        now = int(time.time() * 1000)
        told = [
            (key, value, now, int(row["step"])) for row in rows for key, value in row.items() if key not in _NO_METRICS
        ]
        with self._lock:
            self._metrics[:0] = told

    def _earlier_run(self) -> str | None:
        """The run that this training began with, running again; None where this server does not have it."""
        from mlflow.exceptions import MlflowException

        known = self._known()
        if known is None or "run_id" not in known:
            return None
        try:
            self._client.update_run(known["run_id"], status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return known["run_id"]

    def _begun(self, experiment_id: str) -> str | None:
        """The run that was begun when the training was killed, before it was told the run's id."""
        known = self._known()
        if known is None or "key" not in known:
            return None
        found = self._client.search_runs([experiment_id], f"tags.`{_KEY}` = '{known['key']}'")
        if not found:
            return None
        run_id = str(found[0].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        write_whole(self._memory, json.dumps(known | {"run_id": run_id}) + "\n")
        return run_id

    def _begin(self, experiment_id: str, run_name: str) -> str:
        known = {"uri": self.uri, "key": secrets.token_hex(8)}
        write_whole(self._memory, json.dumps(known) + "\n")
        tags = self._tags | {_KEY: known["key"]}
        run_id = str(self._client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)
        write_whole(self._memory, json.dumps(known | {"run_id": run_id}) + "\n")
        return run_id

    def _known(self) -> dict[str, str] | None:
        """What is kept of the training's run on this server."""
        known: dict[str, str] = json.loads(self._memory.read_text()) if self._memory.exists() else {}
        return known if known.get("uri") == self.uri else None

    def _connected_run(self) -> str:
        assert self._run_id is not None, "connecting is the first job"
        return self._run_id

    def _send_metrics(self) -> None:
        from mlflow.entities import Metric

        with self._lock:
            metrics, self._metrics = self._metrics, []
        for first in range(0, len(metrics), 1000):  # MLflow's limit a call
            batch = [Metric(*metric) for metric in metrics[first : first + 1000]]
            self._client.log_batch(self._connected_run(), metrics=batch)


def mlflow_uri(config: RunConfig) -> str:
    """The configured server, else MLflow's own environment variable, else SQLite beside the runs.

    A database's path is absolute: a sweep's trials run in folders of Ray's.
    """
    uri = config.tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        return f"{_SQLITE}{config.storage / 'mlflow.db'}"
    return f"{_SQLITE}{Path(uri.removeprefix(_SQLITE)).absolute()}" if uri.startswith(_SQLITE) else uri


def mlflow_command(config: RunConfig) -> str:
    """What opens MLflow for a person: a command, or the server's address."""
    uri = mlflow_uri(config)
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if uri.startswith("sqlite:") else uri


def mlflow_tracker(
    config: RunConfig, folder: Path, warn: Callable[[str], None], nesting: Nesting | None = None
) -> MlflowTracker | None:
    """The MLflow run of the training in `folder`; None where the config wants none, or there is none to nest it in."""
    if not config.tracking.mlflow or (nesting is not None and nesting.parent_run_id is None):
        return None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a run needs no network
    return MlflowTracker(
        mlflow_uri(config),
        config.tracking.experiment,
        config.storage / "mlartifacts",
        folder.name,
        dict(flatten(config.model_dump(mode="json"))),
        folder / MLFLOW_RUN,
        warn,
        nesting,
        metrics_so_far(folder),
    )
