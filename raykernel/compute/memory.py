"""Chunk sizes that keep a worker inside its memory, and the memory that it took.

Sizes follow from configuration, model and token counts alone, never from what is free at the
moment: another size is another order of summation, and a resumed run must give the same bits.

    peak ≈ process + weights + 3 · output block
                    + 1.1 · (resident · q · f + r · f + b · p + max(r, q) · g)

f bytes of factors and p bytes of a pass per example (of the longest one), g bytes of its largest
layer's factors, b examples of a pass, r and q examples of a row and a column chunk. A chunk of
several passes is joined layer by layer, so one layer exists twice for a moment.

Which chunks fit best is a question of time. Forming the gradients of both sides costs each pair
of examples c t (1/r + 1/q) products with the weights, and rows are captured anew for every column
chunk, (1 + c) t / q, a quarter slower where a pass holds one example alone.
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

HEAP_SLACK = 1.1
"""Memory that the heap keeps between used blocks, 4 % at the most where it was measured."""

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
    largest: int
    """Those of the layer that has most."""
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


def chunk_sizes(
    footprint: Footprint, compute: ComputeConfig, *, block_size: int, num_outputs: int
) -> Sizes:
    """The chunks that take least time and fit `compute.memory_gb`.

    Args:
        footprint: measured bytes.
        compute: memory and largest batch.
        block_size: examples on a side of a cell.
        num_outputs: c.

    Returns:
        The sizes; chunks are whole passes or the whole block, so that every example is always
        captured in the same company.

    Raises:
        InputError: if one row against one column does not fit.
    """
    limit = int(compute.memory_gb * GIB)
    fixed = footprint.weights + 3 * footprint.output + 3 * GRAM_BYTES
    fixed += CUDA_BYTES if compute.device.startswith("cuda") else PROCESS_BYTES

    def sized(batch: int, rows: int, cols: int, resident: int) -> Sizes:
        f, p = footprint.factors, footprint.forward
        joining = footprint.largest * max(rows if rows > batch else 0, cols if cols > batch else 0)
        work = int(HEAP_SLACK * (resident * cols * f + rows * f + batch * p + joining))
        start = footprint.audit + 2 * p
        return Sizes(batch, rows, cols, resident, fixed + max(start, work))

    smallest = sized(1, 1, 1, 1)
    if smallest.peak_bytes > limit:
        raise InputError(
            f"compute.memory_gb: found {compute.memory_gb:g}, expected at least "
            f"{smallest.peak_bytes / GIB:.2f} GiB for one example against one (weights "
            f"{footprint.weights / GIB:.2f}, factors {footprint.factors / GIB:.2f} per example, "
            f"results of a block {footprint.output / GIB:.2f}). Raise it, or lower "
            "task.max_length or kernel.block_size."
        )
    fitting = [
        sizes
        for batch in range(1, min(compute.batch_size, block_size) + 1)
        for rows in chunks(batch, block_size)
        for cols in chunks(batch, block_size)
        if (sizes := sized(batch, rows, cols, 1)).peak_bytes <= limit
    ]
    best = min(fitting, key=lambda sizes: (slowness(sizes, num_outputs), sizes.peak_bytes))
    kept = [sized(best.batch, best.rows, best.cols, count) for count in range(1, MAX_RESIDENT + 1)]
    return max((s for s in kept if s.peak_bytes <= limit), key=lambda s: s.resident)


def chunks(batch: int, block_size: int) -> list[int]:
    """Sizes of whole passes, and the whole block."""
    return [*range(batch, block_size, batch), block_size]


def slowness(sizes: Sizes, num_outputs: int) -> float:
    """Time that a pair of examples takes, in products of a token with all weights.

    Args:
        sizes: how a cell is worked off.
        num_outputs: c.

    Returns:
        c (1/r + 1/q) + (1 + c)(1 + 1/(4b)) / q, per token.
    """
    capture = (1 + num_outputs) * (1 + 0.25 / sizes.batch) / sizes.cols
    return num_outputs * (1 / sizes.rows + 1 / sizes.cols) + capture


# ------------------------------------------------------------------ the process


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


def trim_heap() -> None:
    """Give free pages, also those between used ones, back to the system."""
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
