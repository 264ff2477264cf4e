"""Memory of this process: what its heap keeps, what goes back, and the most that it had."""

from __future__ import annotations

import ctypes
import gc
import platform
from functools import cache
from typing import Any

import psutil
import torch

from raykernel.compute.memory import GIB
from raykernel.config import ComputeConfig
from raykernel.provenance import peak_resident_bytes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of two of its settings (malloc.h)."""

_KEPT_SHARE = 0.5
"""Part of a worker's memory up to which it keeps pages that are free: blocks of 64 x 64 texts of a
small RoBERTa took 640 MB of page faults each where it gave them back, and an eighth more time."""

_kept_bytes = 0
"""The same in bytes, of this process."""


@cache
def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def keep_heap_ready(compute: ComputeConfig) -> None:
    """Let the C library reuse freed tensors instead of mapping new memory for each.

    A fresh mapping costs a page fault for every 4 KiB: a third of a worker's time in a system
    call (measured on the quick start's model), which reuse halves. What stays free in between is
    given back by `trim_heap` at every step that frees much, once the worker is so large that it
    may matter.

    Args:
        compute: the memory of this process.
    """
    global _kept_bytes
    _kept_bytes = int(_KEPT_SHARE * compute.memory_gb * GIB)
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_TRIM_THRESHOLD, min(_kept_bytes, (1 << 31) - 1))


def release(device: str) -> None:
    """Give memory that is free but kept back to the system or the GPU."""
    gc.collect()
    _give_back()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give free pages, also those between used ones, back to the system, if there is need to."""
    if psutil.Process().memory_info().rss > _kept_bytes:
        _give_back()


def _give_back() -> None:
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def peak_bytes(device: str) -> int:
    """Largest memory of this process so far: reserved on a GPU, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(device)
    return peak_resident_bytes()
