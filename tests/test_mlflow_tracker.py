"""Servers that are absent, hang, answer 500 or are slow, over a real socket: never the run's problem."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest

from orchestrator import mlflow_tracker
from orchestrator.config_reading import parse_config
from orchestrator.mlflow_tracker import MlflowTracker, mlflow_uri
from orchestrator.tracking import CompositeTracker, JsonlTracker
from tests.runs import runs_of
from tests.runs import track as track_in

# A step that waited for an answer would wait for MLflow's own limit, 10 s and more; importing mlflow in a thread may
# hold the interpreter for a good part of a second.
NOT_WAITING_S = 5.0


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    for method in ("GET", "POST", "PATCH"):
        setattr(Handler, f"do_{method}", lambda self: answer(self))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads, http.block_on_close = True, False
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def track(uri: str, folder: Path) -> tuple[list[str], float, float]:
    """A run of 200 steps: the warnings, the longest that a step waited, and how long the end took."""
    warnings: list[str] = []
    tracker = MlflowTracker(uri, "rayduce", folder, "run", {"seed": 0}, folder / "mlflow.json", warnings.append)
    longest = 0.0
    for step in range(200):
        before = time.perf_counter()
        tracker.log(step, {"train_loss": 1.0})
        tracker.artifact(folder / "plan.json", "plans")
        longest = max(longest, time.perf_counter() - before)
        time.sleep(0.01)
    before = time.perf_counter()
    assert tracker.run_id is None
    tracker.close("FINISHED")
    return warnings, longest, time.perf_counter() - before


def test_a_server_that_hangs_costs_a_bounded_time_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_tracker, "PATIENCE_S", 3.0)
    with server(lambda request: time.sleep(60)) as uri:
        warnings, longest, end = track(uri, tmp_path)
    assert longest < NOT_WAITING_S
    assert end < 4
    (warning,) = warnings
    assert f"MLflow at {uri} did not take everything within 3 s" in warning


def test_a_server_that_fails_costs_one_warning(tmp_path: Path) -> None:
    with server(lambda request: request.send_error(500)) as uri:
        warnings, longest, end = track(uri, tmp_path)
    assert longest < NOT_WAITING_S
    assert end < mlflow_tracker.PATIENCE_S
    (warning,) = warnings
    assert warning.startswith(f"MLflow at {uri} failed (")
    assert warning.endswith("nothing more is sent there; metrics.jsonl has everything")


def test_a_port_where_nothing_listens_costs_one_warning(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound, so that nobody else listens there, and refused
        warnings, longest, end = track(uri, tmp_path)
    assert longest < NOT_WAITING_S
    assert end < mlflow_tracker.PATIENCE_S / 2
    (warning,) = warnings
    assert warning.startswith(f"MLflow at {uri} failed (")


def test_a_slow_server_gets_everything(tmp_path: Path) -> None:
    """Each answer takes a third of a second, as many as a run's end needs; no step waits for one."""
    artifacts, asked = tmp_path / "artifacts", []
    run = {
        "info": {"run_id": "7", "run_uuid": "7", "experiment_id": "1", "artifact_uri": artifacts.as_uri()},
        "data": {},
    }

    def answer(request: BaseHTTPRequestHandler) -> None:
        content = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        asked.append((request.path.rpartition("mlflow/")[2].partition("?")[0], json.loads(content or b"{}")))
        time.sleep(0.3)
        body = json.dumps({"run": run, "run_info": run["info"], "experiment": {"experiment_id": "1"}}).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    plan, warnings = tmp_path / "plan.json", list[str]()
    plan.write_text("{}")
    with server(answer) as uri:
        tracker = MlflowTracker(uri, "rayduce", tmp_path, "run", {"seed": 0}, tmp_path / "mlflow.json", warnings.append)
        longest = 0.0
        for step in range(200):
            before = time.perf_counter()
            tracker.log(step, {"train_loss": step / 7})
            longest = max(longest, time.perf_counter() - before)
            time.sleep(0.01)
        tracker.artifact(tmp_path / "taken-back.json", "plans")
        tracker.artifact(plan, "plans")
        before = time.perf_counter()
        assert tracker.run_id == "7"
        tracker.close("FINISHED")
        end = time.perf_counter() - before
    assert warnings == []
    assert longest < NOT_WAITING_S
    assert end < mlflow_tracker.PATIENCE_S
    logged = [metric for path, content in asked if path == "runs/log-batch" for metric in content.get("metrics", [])]
    assert {metric["step"]: metric["value"] for metric in logged} == {step: step / 7 for step in range(200)}
    assert (artifacts / "plans" / "plan.json").read_text() == "{}"
    assert ("runs/update", "FINISHED") in [(path, content.get("status")) for path, content in asked]


def test_a_run_whose_id_was_never_heard_is_found_again(tmp_path: Path, empty_store: Path) -> None:
    """The driver was killed after the server had begun a run, and before it had said which."""
    raw = track_in({"storage": str(tmp_path / "runs")}, empty_store)
    uri, memory, warnings = raw["tracking"]["mlflow_uri"], tmp_path / "mlflow.json", list[str]()

    def tracked() -> str | None:
        tracker = MlflowTracker(uri, "rayduce", tmp_path, "run", {"seed": 0}, memory, warnings.append)
        tracker.log(1, {"train_loss": 1.0})
        tracker.close("FINISHED")
        return tracker.run_id

    first, known = tracked(), json.loads(memory.read_text())
    assert known["run_id"] == first is not None
    memory.write_text(json.dumps({key: known[key] for key in ("uri", "key")}))
    assert tracked() == first
    assert json.loads(memory.read_text()) == known
    assert len(runs_of(raw)) == 1
    assert warnings == []


def test_a_run_that_was_killed_before_it_had_told_everything_tells_it_when_it_goes_on(
    tmp_path: Path, empty_store: Path
) -> None:
    """Step 3 is half known, step 4 not at all; what is known is not told twice."""
    raw = track_in({"storage": str(tmp_path / "runs")}, empty_store)
    memory, uri = tmp_path / "mlflow.json", raw["tracking"]["mlflow_uri"]
    rows = [{"step": step, "seconds": 0.5, "train_loss": 1.0 / step} for step in (1, 2, 3, 4)]
    rows[2]["val_loss"] = 0.4

    def start(history: list[dict[str, float]]) -> MlflowTracker:
        return MlflowTracker(
            uri, "rayduce", tmp_path, "run", {"seed": 0} if history else {}, memory, print, None, history
        )

    first = start([])
    for row in rows[:3]:
        first.log(int(row["step"]), {"train_loss": row["train_loss"]})
    first.close("KILLED")
    start(rows).close("FINISHED")
    (run,) = runs_of(raw)
    assert run.data.params == {"seed": "0"}
    client = mlflow.MlflowClient(uri)
    for key, steps in (("train_loss", [1, 2, 3, 4]), ("val_loss", [3])):
        told = client.get_metric_history(run.info.run_id, key)
        assert [(metric.step, metric.value) for metric in told] == [(step, rows[step - 1][key]) for step in steps]


def test_the_path_of_a_database_is_this_processs(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep's trials have other working directories."""
    config = parse_config(small_run | {"tracking": {}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    assert mlflow_uri(config) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert mlflow_uri(config) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert mlflow_uri(config) == "http://localhost:5000"


def test_a_full_disk_does_not_keep_the_other_trackers_from_closing(tmp_path: Path) -> None:
    closed: list[str] = []

    class Other:
        def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

        def artifact(self, path: Path, folder: str = "") -> None: ...

        def close(self, status: str) -> None:
            closed.append(status)

    full = JsonlTracker(tmp_path / "metrics.jsonl")
    full._file = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115 -- the tracker closes it
    tracker = CompositeTracker([full, Other()])
    with pytest.raises(OSError, match="No space left on device"):
        tracker.log(1, {"train_loss": 1.0})
    tracker.close("FAILED")  # what could not be written is tried again, which must not hide how the run has ended
    assert closed == ["FAILED"]
