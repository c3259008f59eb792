"""A folder on any filesystem that pyarrow knows: this machine's, S3, Google's, Azure's; one code path for all.

What fails is tried again for as long as the folder's `retry_s` says, because storage may be away for a minute. A full
disk is not tried again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from orchestrator.errors import UserError
from orchestrator.failpoints import reach

logger = logging.getLogger(__name__)
T = TypeVar("T")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_CHUNK = 2**24


@dataclass(frozen=True)
class Folder:
    """A folder, which need not exist. Methods raise OSError for what is still wrong after `retry_s`."""

    filesystem: Any
    path: str
    retry_s: float = 0

    @classmethod
    def of(cls, uri: str | Path, setting: str, retry_s: float = 0) -> Folder:
        """The folder at a path, or at a URI such as file:///path or s3://bucket/path.

        Raises:
            UserError: `uri`, the value of `setting`, cannot be understood.
        """
        if "://" not in str(uri):
            return cls(LocalFileSystem(), str(Path(uri).absolute()), retry_s)
        try:
            filesystem, path = FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{setting} {uri} cannot be opened ({reason(error)}): it must be a folder or a URI such as "
                "file:///path, s3://bucket/path or gs://bucket/path"
            ) from error
        return cls(filesystem, path.rstrip("/"), retry_s)

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}", self.retry_s)

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}://{self.path}"

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        return Folder(self.filesystem, self.path.rpartition("/")[0], self.retry_s)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def create(self) -> None:
        self._insist(lambda: self.filesystem.create_dir(self.path, recursive=True))

    def expect(self) -> None:
        """Wait for a folder that is known to exist: where a disk is away, its paths are just not found.

        Of this machine's filesystems alone. A store has no folders, and says so when it is away.
        """
        if self.is_local:
            self._insist(lambda: os.scandir(self.path).close())

    def names(self) -> list[str]:
        """What lies directly in it, sorted; nothing where there is no such folder."""
        selector = FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self._insist(lambda: self.filesystem.get_file_info(selector)))

    def has(self, name: str) -> bool:
        info = self._insist(lambda: self.filesystem.get_file_info(f"{self.path}/{name}"))
        return bool(info.type == FileType.File)

    def is_link(self, name: str) -> bool:
        """Whether a name leads to a file elsewhere, which only this machine's filesystems know."""
        return self.is_local and Path(self.path, name).is_symlink()

    def read(self, name: str) -> bytes | None:
        """The content of a file; None where there is none."""

        def read() -> bytes | None:
            try:
                with self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

        return self._insist(read)

    def sha256(self, name: str) -> str | None:
        """The digest of a file; None where there is none."""
        return self._insist(lambda: self._each_chunk(name, lambda chunk: None))

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file in place of whatever had this name; nobody ever sees a part of it under this name."""
        final = f"{self.path}/{name}"
        # An object in a store appears when its upload ends, and could only be moved by copying it.
        target = f"{final}.partial" if self.is_local else final

        def write() -> None:
            # Not the folders above: where a disk is away, they would be made on another one, below its mount point.
            self.filesystem.create_dir(self.path, recursive=not self.is_local)
            try:
                with self.filesystem.open_output_stream(target, compression=None) as stream:
                    stream.write(content)
                    reach("write", self.name)
                if self.is_local:
                    _flush_to_disk(target)
                    self.filesystem.move(target, final)
            except OSError:
                if self.is_local:
                    # A full disk should not be kept full by what did not fit. Where this fails too, the first says why.
                    with contextlib.suppress(OSError):
                        os.unlink(target)
                raise

        self._insist(write)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

        def delete() -> None:
            try:
                self.filesystem.delete_file(f"{self.path}/{name}")
            except FileNotFoundError:
                return

        self._insist(delete)

    def delete_all(self) -> None:
        """Delete the folder with all that is in it, if it is there."""

        def delete() -> None:
            try:
                self.filesystem.delete_dir(self.path)
            except FileNotFoundError:
                return

        self._insist(delete)

    @contextlib.contextmanager
    def on_disk(self, name: str, sha256: str) -> Iterator[Path]:
        """A file of this machine with the content of `name`: itself, or else a copy for as long as the context lasts.

        Raises:
            UserError: what was copied has another digest.
        """
        if self.is_local:
            yield Path(self.path, name)
            return
        with NamedTemporaryFile(prefix="rayduce-") as copy:

            def fetch() -> str | None:
                copy.seek(0)
                copy.truncate()
                return self._each_chunk(name, copy.write)

            digest = self._insist(fetch)
            copy.flush()
            if digest != sha256:
                raise UserError(f"{self / name} is {'missing' if digest is None else 'damaged'}")
            yield Path(copy.name)

    def _each_chunk(self, name: str, use: Callable[[bytes], object]) -> str | None:
        digest = hashlib.sha256()
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None) as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    use(chunk)
        except FileNotFoundError:
            return None
        return digest.hexdigest()

    def _insist(self, action: Callable[[], T]) -> T:
        deadline, pause = time.monotonic() + self.retry_s, _FIRST_PAUSE_S
        while True:
            try:
                return action()
            except OSError as error:
                if error.errno in _NO_SPACE or time.monotonic() + pause > deadline:
                    raise
                logger.warning("%s: %s; trying again in %.1f s", self, reason(error), pause)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def inside(uri: str, place: str | Path) -> str:
    """The path or URI of `place` below `uri`, whose query stays what it is: a store's region or address."""
    if "://" not in uri:
        return str(Path(uri) / place)
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{place}"))


def reason(error: Exception) -> str:
    """What went wrong in a few words; pyarrow's own may go on for pages."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error).strip().partition("\n")[0]


def _flush_to_disk(path: str) -> None:
    """Without this, a name may outlive a power failure that its content does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
