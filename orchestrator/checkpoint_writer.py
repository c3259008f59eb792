"""Writing checkpoints while training goes on: each rank its shard, then rank 0 the manifest that completes it.

The threads that write make no collective calls, for those are the training's. Ranks meet in the storage instead: beside
its shard each leaves a file with the digest, and rank 0 waits for them all.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from orchestrator import checkpoint
from orchestrator.checkpoint import MANIFEST, CheckpointError, Manifest, Shard
from orchestrator.failpoints import reach
from orchestrator.filesystem import Folder, reason
from orchestrator.sharded_state import ShardedState

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


class MissingShardError(RuntimeError):
    """Another rank has not written its part in time."""


def _nothing() -> None: ...


class Writer:
    """One rank's part in writing, in a thread of its own, one checkpoint at a time."""

    def __init__(self, rank: int, workers: int, timeout_s: float) -> None:
        self._rank = rank
        self._workers = workers
        self._timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        path: Folder,
        token: str,
        manifest: Manifest,
        state: ShardedState,
        before: Callable[[], None] = _nothing,
        after: Callable[[], None] = _nothing,
    ) -> None:
        """Begin to write a checkpoint, as every rank must, once the one before has been written.

        `state` must not change any more. `token` is drawn for this save, the same on all ranks. Rank 0 calls
        `before` and `after` in its thread: right before the checkpoint becomes complete, and right after.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, path, token, manifest, state, before, after)

    def check(self) -> None:
        """Go on without waiting.

        Raises:
            CheckpointError: the write has failed.
            MissingShardError: another rank's part is not there. What `before` and `after` raise is raised here too.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until this rank's part is written: its shard, and on rank 0 the whole checkpoint.

        Raises:
            CheckpointError: as `check`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(
        self,
        path: Folder,
        token: str,
        manifest: Manifest,
        state: ShardedState,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        files = [checkpoint.shard_file(rank, self._workers, token) for rank in range(self._workers)]
        try:
            content = checkpoint.serialized(state.own)
            digest = hashlib.sha256(content).hexdigest()
            path.write(files[self._rank], content)
            if self._rank > 0:
                path.write(_digest_file(files[self._rank]), digest.encode())
                return
            digests = [digest] + [self._digest_of(path, file) for file in files[1:]]
            shards = [Shard(file=file, sha256=digest) for file, digest in zip(files, digests, strict=True)]
            before()
            reach("manifest", manifest.step)
            path.write(MANIFEST, manifest.completed(shards).model_dump_json(indent=1).encode())
            for name in set(path.names()) - {MANIFEST, *files}:
                path.delete(name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} cannot be written: {reason(error)}") from error
        after()

    def _digest_of(self, path: Folder, file: str) -> str:
        """What another rank leaves beside its shard, when that is whole."""
        patience_s = self._timeout_s + path.retry_s
        deadline, pause = time.monotonic() + patience_s, _FIRST_PAUSE_S
        while (content := path.read(_digest_file(file))) is None:
            if time.monotonic() > deadline:
                raise MissingShardError(f"checkpoint {path} still lacks {file} after {patience_s:g} s")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)
        return content.decode()


def _digest_file(shard_file: str) -> str:
    return f"{shard_file}.sha256"
