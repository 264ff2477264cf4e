"""Full and read-only places, as whatever user the tests run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_VERSION_3, _DAC_OVERRIDE = 0x20080522, 1


@contextlib.contextmanager
def size_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process may become larger: the system says EFBIG, as it says ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def filled(disk: Path, num_bytes: int) -> Iterator[None]:
    """A small file system with so much space left."""
    filler = disk.parent / "disk" / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(b"\0" * (free - num_bytes))
    try:
        yield
    finally:
        filler.unlink()


def mount(folder: Path, *options: str) -> None:
    """Mount something at a folder, or skip."""
    folder.mkdir(exist_ok=True)
    command = ["mount", *options, str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs a privileged user")


@contextlib.contextmanager
def obeying_permissions() -> Iterator[None]:
    """Root without its right to write to what nobody may write to."""

    def change(effective: int) -> None:
        data[0] = effective
        assert libc.capset(header, data) == 0

    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    before = data[0]
    change(before & ~(1 << _DAC_OVERRIDE))
    try:
        yield
    finally:
        change(before)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder whose permissions allow nobody to write."""
    inside = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in inside:
        path.chmod(0o555)
    try:
        with obeying_permissions():
            yield
    finally:
        for path in inside:
            path.chmod(0o755)
