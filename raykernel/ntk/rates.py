"""How fast a device is: two constants, measured once, that decide between equal ways.

The direct and the factored contraction differ in what bounds them, matrix products or elementwise
traffic, and devices differ in the ratio of the two. The measurement takes a tenth of a second and
is kept in the user's cache, so that later runs on this machine choose alike.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from raykernel.cache import cache_folder

_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """Speed of one device at one number of threads."""

    flops: float
    """Floating-point operations of a float32 matrix product, per second."""
    bandwidth: float
    """Bytes of elementwise work read and written, per second."""

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Predicted time of so much work."""
        return flops / self.flops + num_bytes / self.bandwidth


def rates_of(device: torch.device | str) -> Rates:
    """Rates of a device at the present number of threads, from the cache if they are there.

    Args:
        device: where matrix products run.

    Returns:
        The rates.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _known(str(device), torch.cuda.get_device_name(device), 0)
    return _known(device.type, platform.processor() or platform.machine(), torch.get_num_threads())


@cache
def _known(device: str, name: str, threads: int) -> Rates:
    words = [name, platform.node(), device.partition(":")[0], str(threads), torch.__version__]
    file_name = "-".join("".join(c if c.isalnum() else "_" for c in word) for word in words)
    path = cache_folder() / "rates" / f"{file_name}.json"
    try:
        return Rates(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not measured yet, or another version's file
        found = measure(torch.device(device))
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
        _write(path, json.dumps(asdict(found)))
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text)
    temporary.replace(path)


def measure(device: torch.device) -> Rates:
    """Measure a device now.

    Args:
        device: where.

    Returns:
        Rates of a product of two square matrices, and of multiplying and summing a table.
    """
    on_gpu = device.type == "cuda"
    size, table_size = (4096, 1 << 26) if on_gpu else (512, 1 << 17)
    a, b = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    table, other = torch.ones(table_size, device=device), torch.ones(table_size, device=device)
    product = _best(lambda: torch.mm(a, b), device)
    elementwise = _best(lambda: table.mul_(other).view(-1, 32).sum(1), device)
    # The table is read twice and written once.
    return Rates(2.0 * size**3 / product, 3.0 * 4 * table_size / elementwise)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Shortest of several runs, in seconds: whatever else runs only makes it longer."""
    best = float("inf")
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
