"""Files that exist whole or not at all.

A file is written under a temporary name in its own folder, synced and renamed: its existence is
the commit. A crash leaves at most a temporary, whose name begins with a dot, so that no Arrow
reader takes it for data. The folder itself is not synced: a rename lost in a power cut means one
block computed again, and syncing would double the cost of every write.

In an object store a file is written straight under its name, for an object appears when all of it
is there.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from raykernel.errors import InputError, StorageFullError
from raykernel.location import RemotePath, StorePath, keep_folder

_SUFFIX = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
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
        InputError: likewise.
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
        InputError: if the folder cannot be written to.
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
        InputError: likewise.
        OSError: likewise.
    """
    if isinstance(path, RemotePath):
        return _upload_written(path, write)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_SUFFIX}")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        written = temporary.stat().st_size
        temporary.replace(path)
    except OSError as error:
        _explain(error, path, num_bytes)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something went wrong
    return written


def _upload_written(path: RemotePath, write: Callable[[Path], None]) -> int:
    with tempfile.TemporaryDirectory(prefix="raykernel-") as folder:
        copy = Path(folder) / path.name
        write(copy)
        path.upload(copy)
        return copy.stat().st_size


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
        _explain(error, path, 0)


def _explain(error: OSError, path: Path, num_bytes: int) -> NoReturn:
    """Raise what a failed write means to the user.

    Args:
        error: what the operating system said.
        path: the file or folder being written.
        num_bytes: bytes that the write needed.

    Raises:
        StorageFullError: if there is no space.
        InputError: if writing is not allowed there.
    """
    if error.errno in _FULL:
        raise StorageFullError(
            f"{path}: no space left for {num_bytes:,} bytes ({error.strerror}); nothing "
            f"half-written remains. Free space or raise the quota, then run the same command "
            f"again: what is stored is not computed twice."
        ) from error
    if error.errno in _REFUSED:
        raise InputError(
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
    for path in sorted(root.rglob(f".*{_SUFFIX}")):
        try:
            age_seconds = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # renamed meanwhile: its writer is alive
            continue
        if age_seconds > older_than_seconds:
            yield path
