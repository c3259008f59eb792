"""Which failures of a group of workers are worth another attempt, told to Ray Train."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.train import UserCallback
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2._internal.exceptions import RayTrainError

from models.scan.backends import UnavailableError
from orchestrator.checkpoint import CheckpointError
from orchestrator.group import DisagreementError

# A process, a node, a connection or a disk: another attempt may find another. torch's collectives and gloo raise
# RuntimeError when a peer has gone.
_MACHINES = (RayError, RayTrainError, RuntimeError, OSError)
# Of these, what waits for a person: a model that is too large, a library that is not there, a folder without space.
_SAME_AGAIN = (DisagreementError, CheckpointError, UnavailableError, torch.OutOfMemoryError, NotImplementedError)
_NEEDS_A_PERSON = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class RetryPolicy(UserCallback):  # type: ignore[misc]
    """Ends the run at an error that would come again, or once too often; of any other, says what it was.

    Ray Train starts again whatever a worker raises, but not when a callback of the user raises. It would count over all
    that a crew trains, so it is the coordinator who counts, for each run.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        causes = {rank: root_cause(error) for rank, error in sorted(worker_exceptions.items())}
        for error in causes.values():
            if comes_again(error):
                raise error
        # One that died explains what the others, who waited for it, raise.
        rank, error = max(causes.items(), key=lambda item: isinstance(item[1], RayTrainError | RayError))
        if not ray.get(self._coordinator.lost.remote(f"rank {rank}: {in_a_line(error)}")):
            raise error
        # This runs in Ray Train's controller, which would wait half a minute for a worker that hangs to take its leave.
        os.environ[TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S] = "1"


def comes_again(error: BaseException) -> bool:
    """Whether another attempt would meet the same: numbers that diverged, a full disk, a setting, data, a bug."""
    if isinstance(error, _SAME_AGAIN) or (isinstance(error, OSError) and error.errno in _NEEDS_A_PERSON):
        return True
    return not isinstance(error, _MACHINES)


def root_cause(error: BaseException) -> BaseException:
    """What the code of a remote task or actor raised, without Ray's wrapping."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def in_a_line(error: BaseException) -> str:
    """The type of an error and the last line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
