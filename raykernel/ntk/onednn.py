"""torch's products of float32 matrices on a CPU, computed by oneDNN instead of by BLAS.

torch hands them to oneDNN where its user allows inputs to be rounded to bfloat16. oneDNN makes use
of that on processors with units for such products (AMX) only; on all others it multiplies in
float32 as before. So the allowance is given where nothing comes of it, which `available` finds out
by the processor and by a product that would show it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_EDGES = ((64, 64, 64), (31, 257, 48), (256, 24, 128))
"""Rows, terms and columns of the products that show whether float32 is rounded."""


class _Switch:
    """torch's setting, which is the process's, shared by contexts of several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = "none"

    def on(self) -> None:
        with self._lock:
            if not self._users:
                self._before = _settings().fp32_precision
                _settings().fp32_precision = "bf16"
            self._users += 1

    def off(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                _settings().fp32_precision = self._before


_switch = _Switch()


@contextmanager
def products() -> Iterator[None]:
    """Context in which oneDNN multiplies; ask `available` and `is_safe` before.

    Yields:
        Nothing.
    """
    _switch.on()
    try:
        yield
    finally:
        _switch.off()


@cache
def available() -> bool:
    """Whether torch can be told to, and float32 stays float32."""
    built: Any = torch.backends.mkldnn.is_available
    if not built() or not hasattr(_settings(), "fp32_precision"):
        return False
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()
    plain = known.get("architecture") == "x86_64" and not known.get("amx_tile", True)
    return plain and _keeps_float32()


def is_safe() -> bool:
    """Whether memory that runs out ends a process rather than fails an allocation.

    oneDNN does not look whether it was given memory. Where torch would raise an error that halves
    a chunk, under a limit on the address space or without overcommitting, it would crash.

    Returns:
        Whether there is no such limit.
    """
    if resource is None:
        return False
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    unlimited = all(resource.getrlimit(kind)[0] == resource.RLIM_INFINITY for kind in kinds)
    return unlimited and _overcommits()


@cache
def _overcommits() -> bool:
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2"
    except OSError:  # not Linux
        return True


def _settings() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)


def _keeps_float32() -> bool:
    """Whether products are right to the last bits of float32, of which bfloat16 has the first."""
    with products():
        return all(_is_right(*edges, batch) for edges in _EDGES for batch in (1, 3))


def _is_right(rows: int, terms: int, cols: int, batch: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(batch, rows, terms, generator=generator)
    right = torch.randn(batch, terms, cols, generator=generator)
    found = left @ right if batch > 1 else (left[0] @ right[0]).unsqueeze(0)
    exact = left.double() @ right.double()
    return bool((found - exact).norm() <= 1e-5 * exact.norm())
