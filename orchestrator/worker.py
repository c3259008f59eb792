"""Where a worker process begins, before anything that takes seconds to import."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.events import Job


def run_worker(job: Job) -> None:
    """What Ray Train runs on every worker."""
    if not job.config.cluster.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that it sees, whose is not ours
    # DeepSpeed's autotuner imports MLflow where it finds it: two seconds of every start, for nothing.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    from orchestrator.loop import train_worker

    train_worker(job)
