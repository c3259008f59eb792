"""Which checkpoints stay: the last ones, the best ones, those right after a truncation, and what a guard may need."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from orchestrator import checkpoint
from orchestrator.checkpoint import CheckpointError, Manifest
from orchestrator.config import CheckpointsConfig
from orchestrator.errors import UserError
from orchestrator.filesystem import Folder, reason

logger = logging.getLogger(__name__)


def kept(manifests: Sequence[Manifest], policy: CheckpointsConfig) -> set[int]:
    """The steps that stay, of these complete checkpoints.

    Of several with the same loss the earliest is the best: the later ones have not been measured since.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.step)
    measured = [m for m in ordered if m.val_loss is not None and not math.isnan(m.val_loss)]
    best = sorted(measured, key=lambda manifest: (manifest.val_loss, manifest.step))[: policy.keep_best]
    cuts = [manifest for manifest in ordered if manifest.after_cut and policy.keep_cuts]
    return {manifest.step for manifest in [*ordered[-policy.keep_last :], *best, *cuts]}


def _complete(folder: Folder, path: Folder) -> bool:
    if path.has(checkpoint.MANIFEST):
        return True
    folder.expect()  # else it is the storage that is away
    return path.has(checkpoint.MANIFEST)


def prune(folder: Folder, now: int, policy: CheckpointsConfig) -> None:
    """Delete all that need not stay beside the checkpoint of step `now`, which has just become complete.

    Later checkpoints have been taken back, and incomplete ones are what a killed run has left. The state before a cut
    stays as long as that checkpoint is still watching the cut.

    Raises:
        CheckpointError: the storage is away.
    """
    try:
        _prune(folder, now, policy)
    except OSError as error:
        raise CheckpointError(f"checkpoints in {folder} cannot be looked through: {reason(error)}") from error


def _prune(folder: Folder, now: int, policy: CheckpointsConfig) -> None:
    manifests = []
    for step in checkpoint.steps(folder):
        path = checkpoint.at(folder, step)
        if step > now or not _complete(folder, path):
            checkpoint.delete(path)
            continue
        try:
            manifests.append(checkpoint.read_manifest(path))
        except UserError as error:
            logger.warning("%s; it is left as it is", error)
    stay = kept(manifests, policy)
    for manifest in manifests:
        if manifest.step not in stay:
            checkpoint.delete(checkpoint.at(folder, manifest.step))
    watches = [manifest.watch for manifest in manifests if manifest.step == now]
    watched = [str(checkpoint.uncut_at(folder, watch.step)) for watch in watches if watch is not None]
    for path in checkpoint.uncuts(folder):
        if str(path) not in watched:
            checkpoint.delete(path)
