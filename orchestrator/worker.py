"""Where a worker process begins, before anything that takes seconds to import."""

from __future__ import annotations

import os
import sys
from typing import Any

import ray


def run_worker(crew: dict[str, Any]) -> None:
    """What Ray Train runs on every worker: one job after the other, until no more follows.

    `crew` holds the `foreman`, an actor that knows the jobs, and `use_gpu`.
    """
    if not crew["use_gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that it sees, whose is not ours
    # DeepSpeed's autotuner imports MLflow where it finds it: two seconds of every start, for nothing.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    from orchestrator.loop import train_worker

    foreman = crew["foreman"]
    ray.get(foreman.reserved.remote(ray.util.get_current_placement_group()))
    number, job = ray.get(foreman.next_job.remote(0, 0))
    while job is not None:
        attempt = train_worker(job)
        number, job = ray.get(foreman.next_job.remote(number, attempt))
