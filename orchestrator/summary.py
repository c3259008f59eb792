"""What a run came to: `summary.json`, and the same in a few lines."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.run_folder import read_metrics, total_bounds, write_whole
from orchestrator.terminal import count, dims


def write_summary(
    config: RunConfig,
    folder: Path,
    truncations: Sequence[dict[str, Any]],
    mlflow_run_id: str | None,
    checkpoint: str | None,
) -> dict[str, Any]:
    """Write `summary.json` from the run's metrics and cuts.

    Step times are medians in milliseconds: before the first cut, without the first step, which warms up, and
    after the last cut. Without a cut there is nothing "after", and those values are None. Cuts that were rolled back
    do not count. `error_bounds`: of each LTI layer, the sum over all cuts, which the errors of the cuts together do
    not exceed in the H-infinity norm. `train_seconds`: see `Manifest`. `probe_share`: the time of all probes,
    each up to the agreed plan, over that of all steps; None where the steps' metrics are gone with their machine.
    """
    rows = {row["step"]: row for row in read_metrics(folder)}
    cuts = [cut for cut in truncations if not cut["rolled_back"]]
    first = cuts[0]["step"] if cuts else config.train.steps
    last = cuts[-1]["step"] if cuts else config.train.steps

    def median(key: str, low: int, high: float) -> float | None:
        values = [row[key] for step, row in rows.items() if key in row and low < step <= high]
        return statistics.median(values) if values else None

    def total(key: str) -> float:
        return math.fsum(row.get(key, 0.0) for row in rows.values())

    initial = config.model.state_dims
    held_out = [row for row in rows.values() if "val_loss" in row]
    summary = {
        "name": folder.name,
        "model": config.model.kind,
        "workers": str(config.cluster.workers),
        "zero_stage": config.cluster.zero_stage,
        "steps": config.train.steps,
        "initial_dims": initial,
        "final_dims": cuts[-1]["dims_after"] if cuts else initial,
        "error_bounds": total_bounds(cuts),
        "truncations": list(truncations),
        "val_loss_final": held_out[-1]["val_loss"],
        "val_accuracy_final": held_out[-1].get("val_accuracy"),
        "step_ms_before": median("step_ms", 1, first),
        "step_ms_after": median("step_ms", last, float("inf")),
        "tokens_per_s_before": median("tokens_per_s", 1, first),
        "tokens_per_s_after": median("tokens_per_s", last, float("inf")),
        "probe_share": total("probe_ms") / total("step_ms") if total("step_ms") else None,
        "train_seconds": held_out[-1]["train_seconds"],
        "mlflow_run_id": mlflow_run_id,
        "checkpoint": checkpoint,
    }
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def describe_summary(summary: dict[str, Any]) -> list[str]:
    """The summary as a person reads it."""
    quality = f"held-out loss {summary['val_loss_final']:.4f}"
    if summary["val_accuracy_final"] is not None:
        quality += f", accuracy {summary['val_accuracy_final']:.1%}"
    lines = [
        f"  {quality} after {summary['steps']} steps",
        f"  states      {dims(summary['initial_dims'])} -> {dims(summary['final_dims'])}",
    ]
    bounds = [bound for bound in summary["error_bounds"] if bound is not None]
    if bounds:
        lines.append(
            f"  certificate the cuts changed no layer's recurrence by more than {max(bounds):.3g} (H-infinity)"
        )
    before, after = summary["step_ms_before"], summary["step_ms_after"]
    if before and after:
        lines += [
            f"  step time   {before:.0f} ms -> {after:.0f} ms ({before / after:.2f}x)",
            f"  speed       {count(summary['tokens_per_s_before'])} -> {count(summary['tokens_per_s_after'])} tokens/s",
        ]
    elif before:
        lines.append(f"  step time   {before:.0f} ms ({count(summary['tokens_per_s_before'])} tokens/s)")
    return lines
