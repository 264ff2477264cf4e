"""Chunk sizes that keep a worker inside its memory, and the memory that it took.

Sizes follow from configuration, model and token counts alone, never from what is free at the
moment: another size is another order of summation, and a resumed run must give the same bits.

    peak ≈ process + weights + 3 · output block + resident · q · f
                                                + max(r · f + b · p, 2 · r · f, q · f)

f bytes of factors and p bytes of a pass per example (of the longest one), b examples of a pass,
r and q examples of a row and a column chunk. A chunk of several passes is joined at the end, so
it exists twice for a moment.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from raykernel.config import ComputeConfig
from raykernel.errors import InputError

GIB = 1 << 30

PROCESS_BYTES = 640 << 20
"""Interpreter, PyTorch, transformers, pyarrow (504 MiB measured), and room for Ray or the CLI."""

CUDA_BYTES = 512 << 20
"""Context and library workspaces on a GPU, which PyTorch's allocator does not count."""

GRAM_BYTES = 64 << 20
"""Bound on the temporaries of a contraction; on a CPU its tiles are far smaller."""

MAX_RESIDENT = 64
"""Column chunks kept at the most; cells come column by column, so that few are used again."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers of two of its settings (malloc.h)."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What was measured on the longest example, in bytes."""

    weights: int
    """Parameters and buffers of the model."""
    audit: int
    """Extra memory of the engine's check against autograd, when no capture is resident."""
    factors: int
    """Captured factors of one example."""
    forward: int
    """Peak of a pass per example, factors included."""
    output: int
    """All layer groups' values of one full cell."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a cell is worked off."""

    batch: int
    """Examples of one forward pass."""
    rows: int
    """Examples of a row chunk."""
    cols: int
    """Examples of a column chunk."""
    resident: int
    """Column chunks kept between cells."""
    peak_bytes: int
    """Estimate of the worker's peak."""


def chunk_sizes(footprint: Footprint, compute: ComputeConfig, *, block_size: int) -> Sizes:
    """The largest chunks that fit `compute.memory_gb`.

    Passes come first, then columns, which are captured once for many cells, then rows, then
    further column chunks.

    Args:
        footprint: measured bytes.
        compute: memory and largest batch.
        block_size: examples on a side of a cell.

    Returns:
        The sizes; chunks are whole passes or the whole block, so that every example is always
        captured in the same company.

    Raises:
        InputError: if one row against one column does not fit.
    """
    limit = int(compute.memory_gb * GIB)
    # A block exists as tensors, as the stack of all groups, and as the file's buffer.
    fixed = footprint.weights + 3 * footprint.output + GRAM_BYTES
    fixed += CUDA_BYTES if compute.device.startswith("cuda") else PROCESS_BYTES

    def sized(batch: int, rows: int, cols: int, resident: int) -> Sizes:
        f, p = footprint.factors, footprint.forward
        joining = max(2 * rows if rows > batch else 0, cols if cols > batch else 0)
        moving = max(rows * f + batch * p, joining * f)
        start = footprint.audit + 2 * p
        return Sizes(batch, rows, cols, resident, fixed + max(start, resident * cols * f + moving))

    best = sized(1, 1, 1, 1)
    if best.peak_bytes > limit:
        raise InputError(
            f"compute.memory_gb: found {compute.memory_gb:g}, expected at least "
            f"{best.peak_bytes / GIB:.2f} GiB for one example against one (weights "
            f"{footprint.weights / GIB:.2f}, factors {footprint.factors / GIB:.2f} per example, "
            f"results of a block {footprint.output / GIB:.2f}). Raise it, or lower "
            "task.max_length or kernel.block_size."
        )
    for batch in range(2, min(compute.batch_size, block_size) + 1):
        best = _larger(best, sized(batch, batch, batch, 1), limit)
    chunks = [
        min(size, block_size) for size in range(best.batch, block_size + best.batch, best.batch)
    ]
    for cols in chunks:
        best = _larger(best, sized(best.batch, best.rows, cols, 1), limit)
    for rows in chunks:
        best = _larger(best, sized(best.batch, rows, best.cols, 1), limit)
    for resident in range(2, MAX_RESIDENT + 1):
        best = _larger(best, sized(best.batch, best.rows, best.cols, resident), limit)
    return best


def _larger(best: Sizes, candidate: Sizes, limit: int) -> Sizes:
    """The candidate if it fits."""
    return candidate if candidate.peak_bytes <= limit else best


# ------------------------------------------------------------------ the process


@cache
def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    if platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def keep_heap_small() -> None:
    """Give freed tensors back to the system at once.

    glibc raises its threshold for separate mappings up to 32 MiB as large blocks are freed, and
    keeps what lies below on its heap; captures of some MiB then stay resident after their cell.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 16 << 20)


def trim_heap() -> None:
    """Give free pages between small blocks back to the system."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


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
