"""How fast a device is: two constants, measured once, that decide between equal ways.

On a CPU the first is that of the faster of two libraries for products, see `matmul`.

What they cannot say is how long a pass of a given model takes: attention, normalisations and
hooks are no matrix products. That is measured on the model (`pass_rate`), for predictions alone.

The direct and the factored contraction differ in what bounds them, matrix products or elementwise
traffic, and devices differ in the ratio of the two. The measurement takes a tenth of a second and
is kept in the user's cache, so that later runs on this machine choose alike.
"""

from __future__ import annotations

import json
import math
import platform
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from raykernel.cache import cache_folder
from raykernel.errors import is_out_of_memory
from raykernel.ntk import onednn

_REPEATS = 5

_MUCH_FASTER = 0.8
"""Share of the time of torch's own product that oneDNN's may take to be used, beyond chance."""

_SAMPLE_SECONDS = 0.3
"""That timing the passes of a model may take beyond a pass over two examples."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Speed of one device at one number of threads."""

    flops: float
    """Floating-point operations of a float32 matrix product, per second."""
    bandwidth: float
    """Bytes of elementwise work read and written, per second."""
    onednn: bool = False
    """Whether that product is oneDNN's, which was much the faster."""

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Predicted time of so much work."""
        return flops / self.flops + num_bytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class PassRate:
    """Time of a model's passes over tokens, those of padding among them."""

    fixed: float
    """Seconds of a pass, whatever its tokens."""
    token: float
    """Seconds of a token."""

    def seconds(self, tokens_of_passes: Iterable[int]) -> float:
        """Predicted time of several passes.

        Args:
            tokens_of_passes: by pass.

        Returns:
            The sum.
        """
        return sum(self.fixed + self.token * tokens for tokens in tokens_of_passes)


def pass_rate(
    run: Callable[[int], object], num_tokens: int, device: torch.device | str, *, most: int
) -> PassRate:
    """Time passes over one example and over several, and draw the line through both.

    Args:
        run: makes a pass over so many examples; what happens only once has happened.
        num_tokens: of each of them.
        device: where.
        most: examples of a pass at the most.

    Returns:
        The rate. It varies from call to call, so that nothing but a prediction may depend on it.
    """
    device = torch.device(device)
    # One thread's own time does not grow while others have the core.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    one = _best(lambda: run(1), device, repeats=2, clock=clock)
    affordable = int(_SAMPLE_SECONDS / max(one, 1e-9))
    count = min(most, max(2, affordable))
    if count < 2:
        return PassRate(0.0, one / num_tokens)
    repeats = max(1, min(_REPEATS, affordable // count))
    try:
        several = _best(lambda: run(count), device, repeats=repeats, clock=clock)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return PassRate(0.0, one / num_tokens)  # real passes are made smaller when they come to it
    token = max(several - one, 0.0) / ((count - 1) * num_tokens)
    return PassRate(max(one - token * num_tokens, 0.0), token)


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
    known = _read(path)
    if known is not None:
        return known
    found = measure(torch.device(device))
    try:
        return _kept(path, found)
    except OSError:  # a cache that cannot be written is no reason to stop
        return found


def _read(path: Path) -> Rates | None:
    """Rates that were kept, or None where there are none or those of another version."""
    try:
        known = json.loads(path.read_text())
        return Rates(**known) if known.keys() == asdict(Rates(0.0, 0.0)).keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _kept(path: Path, found: Rates) -> Rates:
    """Keep rates, or give those that another process has kept in the meantime."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and _read(path) is None:
        path.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(asdict(found)))
    try:
        path.hardlink_to(temporary)  # unlike a rename, it never replaces
    except FileExistsError:
        return _read(path) or found
    except OSError:  # a file system without hard links: the last to measure decides
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return found


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
    by_onednn = math.inf
    if device.type == "cpu" and onednn.available():
        with onednn.products():
            by_onednn = _best(lambda: torch.mm(a, b), device)
    faster = by_onednn < _MUCH_FASTER * product
    best = by_onednn if faster else product
    elementwise = _best(lambda: table.mul_(other).view(-1, 32).sum(1), device)
    # The table is read twice and written once.
    return Rates(2.0 * size**3 / best, 3.0 * 4 * table_size / elementwise, faster)


def _best(
    work: Callable[[], object],
    device: torch.device,
    *,
    repeats: int = _REPEATS + 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Shortest of several runs, in seconds: whatever else runs only makes it longer."""
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - start)
    return best
