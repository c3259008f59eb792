"""What `summary.json` says of a run follows from its metrics and cuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config_reading import parse_config
from orchestrator.summary import write_summary

STEPS = 12
SLOW, DURING, FAST = 10.0, 7.0, 4.0


def cut(step: int, after: list[int], rolled_back: bool = False, bounds: tuple[float | None, ...] = (0.5, None)) -> Any:
    return {"step": step, "dims_after": after, "error_bounds": list(bounds), "rolled_back": rolled_back}


@pytest.fixture
def measured(small_run: dict[str, Any], tmp_path: Path) -> tuple[Any, Path]:
    """A config of cuts at steps 3 and 7, and a folder with metrics: slow before them, fast after them."""
    config = parse_config(small_run)
    assert config.train.steps == STEPS
    rows = []
    for step in range(1, STEPS + 1):
        step_ms = 1000.0 if step == 1 else SLOW if step <= 3 else DURING if step <= 7 else FAST
        rows.append({"step": step, "step_ms": step_ms, "tokens_per_s": 1000 / step_ms})
    rows += [{"step": 3, "probe_ms": 30.0}, {"step": 7, "probe_ms": 12.0}]
    rows += [{"step": step, "val_loss": 2 - step / 10, "train_seconds": 5.0 * step} for step in (6, 12)]
    folder = tmp_path / "measured"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config, folder


def test_times_are_of_before_the_first_cut_and_after_the_last(measured: tuple[Any, Path]) -> None:
    """The first step, which warms up, counts for neither; what lies between the cuts does not, either."""
    config, folder = measured
    summary = write_summary(config, folder, [cut(3, [6, 6]), cut(7, [4, 5])], None, None)
    assert (summary["step_ms_before"], summary["step_ms_after"]) == (SLOW, FAST)
    assert (summary["tokens_per_s_before"], summary["tokens_per_s_after"]) == (1000 / SLOW, 1000 / FAST)
    assert (summary["initial_dims"], summary["final_dims"]) == (config.model.state_dims, [4, 5])
    assert summary["error_bounds"] == [1.0, None]
    assert summary["val_loss_final"] == pytest.approx(0.8)
    assert summary["train_seconds"] == 60.0
    in_steps = 1000 + 2 * SLOW + 4 * DURING + 5 * FAST
    assert summary["probe_share"] == pytest.approx(42 / in_steps)
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_a_cut_that_was_taken_back_does_not_count(measured: tuple[Any, Path]) -> None:
    config, folder = measured
    summary = write_summary(config, folder, [cut(3, [6, 6]), cut(7, [4, 5], rolled_back=True)], None, None)
    assert summary["final_dims"] == [6, 6]
    assert summary["error_bounds"] == [0.5, None]
    # The median of the steps from 4 on: four of them in between, five fast.
    assert (summary["step_ms_before"], summary["step_ms_after"]) == (SLOW, FAST)
    assert len(summary["truncations"]) == 2


def test_without_a_cut_there_is_nothing_after(measured: tuple[Any, Path]) -> None:
    config, folder = measured
    summary = write_summary(config, folder, [cut(3, [6, 6], rolled_back=True)], None, None)
    assert summary["final_dims"] == config.model.state_dims
    assert summary["step_ms_before"] == DURING
    assert summary["step_ms_after"] is None
    assert summary["tokens_per_s_after"] is None
