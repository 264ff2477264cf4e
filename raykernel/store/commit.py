"""Files that exist whole or not at all.

A file is written under a temporary name in its own folder, synced and renamed: its existence is
the commit. A crash leaves at most a temporary, whose name begins with a dot, so that no Arrow
reader takes it for data. The folder itself is not synced: a rename lost in a power cut means one
block computed again, and syncing would double the cost of every write.

In an object store a file is written straight under its name, for an object appears when all of it
is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from raykernel.errors import FULL, NotWritableError, StorageFullError
from raykernel.location import RemotePath, StorePath, keep_folder

_SUFFIX = ".tmp"
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}

STALE_SECONDS = 3600.0
"""Age from which a temporary counts as left behind: no write takes nearly as long."""


def commit_first(path: StorePath, payload: bytes | memoryview) -> int:
    """Write a file at once unless there is one: of several writers, one wins for all.

    Args:
        path: the file; its folder exists.
        payload: the whole content.

    Returns:
        Bytes written; 0 if there was a file.

    Raises:
        StorageFullError: as `commit` does.
        NotWritableError: likewise.
        OSError: likewise.
    """
    if isinstance(path, RemotePath):
        try:
            path.write(payload, replaces=False)
        except FileExistsError:
            return 0
        return len(payload)
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.first{_SUFFIX}")
    num_bytes = commit(staged, payload)
    try:
        os.link(staged, path)  # unlike a rename, it never replaces
    except FileExistsError:
        return 0
    except OSError:  # a file system without hard links: the last writer wins
        return commit(path, payload)
    finally:
        staged.unlink(missing_ok=True)
    return num_bytes


def commit(path: StorePath, payload: bytes | memoryview) -> int:
    """Write a file at once; an older file of this name is replaced.

    Args:
        path: the file; its folder exists.
        payload: the whole content.

    Returns:
        Bytes written.

    Raises:
        StorageFullError: if the device or a quota is full; nothing half-written remains.
        NotWritableError: if the folder cannot be written to.
        OSError: for any other failure of the device.
    """
    if isinstance(path, RemotePath):
        path.write(payload)
        return len(payload)

    def write(temporary: Path) -> None:
        temporary.write_bytes(payload)

    return commit_written(path, write, num_bytes=len(payload))


def commit_written(path: StorePath, write: Callable[[Path], None], *, num_bytes: int) -> int:
    """The same for content that a function writes.

    Args:
        path: the file; its folder exists.
        write: writes the whole content to the path that it is given.
        num_bytes: what that takes, for messages.

    Returns:
        Bytes written.

    Raises:
        StorageFullError: as `commit` does.
        NotWritableError: likewise.
        OSError: likewise.
    """
    if isinstance(path, RemotePath):
        return _upload_written(path, write)
    for is_last in (False, True):
        temporary = _temporary(path)
        try:
            write(temporary)
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            written = temporary.stat().st_size
            temporary.replace(path)
            break
        except OSError as error:
            # Somebody whose clock was set took it for one that was left behind.
            if is_last or not isinstance(error, FileNotFoundError) or not path.parent.is_dir():
                explain(error, path, num_bytes)
        finally:
            temporary.unlink(missing_ok=True)  # there only if something went wrong
    return written


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{_SUFFIX}")


def require_writable(folder: StorePath) -> None:
    """Refuse a folder that cannot be written to, before anything is computed for it.

    Args:
        folder: one that exists; of an object store the first write tells.
    """
    if isinstance(folder, RemotePath):
        return
    probe = _temporary(folder / "probe")
    try:
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        explain(error, folder, 0)


def _upload_written(path: RemotePath, write: Callable[[Path], None]) -> int:
    with tempfile.TemporaryDirectory(prefix="raykernel-") as folder:
        copy = Path(folder) / path.name
        write(copy)
        path.upload(copy)
        return copy.stat().st_size


def discard(path: StorePath) -> None:
    """Delete a file that nobody needs, if it is there and the device lets us.

    Args:
        path: the file.
    """
    # A device that is mounted read-only refuses also where there is nothing to delete.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def sync_folder(path: StorePath) -> None:
    """Have the device keep the names in a folder, as `commit` alone does not.

    Args:
        path: the folder; an object store keeps them by itself.
    """
    if isinstance(path, RemotePath):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: StorePath, *, lasts: bool = False) -> None:
    """Create a folder and its parents unless they exist.

    Args:
        path: the folder; in an object store there is one as soon as something lies in it.
        lasts: it is to be there also while nothing else lies in it.

    Raises:
        OSError: for failures that have no better name.
    """
    if isinstance(path, RemotePath):
        if lasts:
            keep_folder(path)
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        explain(error, path, 0)


def explain(error: OSError, path: Path, num_bytes: int) -> NoReturn:
    """Raise what a failed write means to the user.

    Args:
        error: what the operating system said.
        path: the file or folder being written.
        num_bytes: bytes that the write needed.

    Raises:
        StorageFullError: if there is no space.
        NotWritableError: if writing is not allowed there.
        OSError: itself, if it is anything else.
    """
    if error.errno in FULL:
        raise StorageFullError(
            f"{path}: no space left for {num_bytes:,} bytes ({error.strerror}); nothing "
            f"half-written remains. Free space or raise the quota, then run the same command "
            f"again: what is stored is not computed twice."
        ) from error
    if error.errno in _REFUSED:
        raise NotWritableError(
            f"{path}: cannot be written ({error.strerror}). Expected a folder that this user may "
            f"write to. Choose another with store.path=FOLDER, or change its permissions."
        ) from error
    raise error


def stale_temporaries(
    root: StorePath, *, older_than_seconds: float = STALE_SECONDS
) -> Iterator[StorePath]:
    """Temporaries that no running process can still be writing.

    Args:
        root: folder searched with all below it; an object store has none.
        older_than_seconds: age from which one counts as left behind.

    Yields:
        Their paths.
    """
    if isinstance(root, RemotePath):
        return
    found = sorted(root.rglob(f".*{_SUFFIX}"))
    now = _clock_of(root) if found else 0.0
    for path in found:
        try:
            age_seconds = now - path.stat().st_mtime
        except FileNotFoundError:  # renamed meanwhile: its writer is alive
            continue
        # What is written now has a time close by: also one far ahead was left behind, by a clock
        # that has been set back since.
        if abs(age_seconds) > older_than_seconds:
            yield path


def _clock_of(folder: Path) -> float:
    """The time that a folder's device gives to files now; a file server has a clock of its own."""
    probe = _temporary(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # nothing can be written, and so nothing is being written
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
