"""Memory of this process: what its heap keeps, what goes back, and the most that it had."""

from __future__ import annotations

import ctypes
import gc
import platform
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of two of its settings (malloc.h)."""


@cache
def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def keep_heap_ready() -> None:
    """Let the C library reuse freed tensors instead of mapping new memory for each.

    A fresh mapping costs a page fault for every 4 KiB: a third of a worker's time in a system
    call (measured on the quick start's model), which reuse halves. What stays free in between is
    given back by `trim_heap` at every step that frees much.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_TRIM_THRESHOLD, 1 << 26)


def release(device: str) -> None:
    """Give memory that is free but kept back to the system or the GPU."""
    gc.collect()
    trim_heap()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give free pages, also those between used ones, back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def peak_bytes(device: str) -> int:
    """Largest memory of this process so far: reserved on a GPU, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Largest resident memory that this process had, in bytes.

    NOTE: not `getrusage`, whose maximum a process inherits from the one that started it.

    Returns:
        The maximum; on systems that do not keep one, the present value.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
