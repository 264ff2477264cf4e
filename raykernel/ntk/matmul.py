"""Products of matrices by the faster of the two libraries that torch has for them on a CPU.

On x86 torch multiplies float32 matrices with MKL. On processors that are not Intel's this uses
half of the vector unit: on an AMD EPYC with AVX-512 a core reaches 100 GFLOP/s with it, and 60 to
90 in batches of small products, with oneDNN 215 and 150 to 215. Either rounds as a sum in float32
does; oneDNN adds a row's products one after the other where MKL adds sums of parts, so that layers
of some hundred inputs round two to four times as much. Which one a process uses is measured once
per machine and kept (`rates.Rates.onednn`), so that no restart changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch

from raykernel.ntk import onednn
from raykernel.ntk.rates import rates_of


@contextmanager
def fast_products() -> Iterator[None]:
    """Context in which products of float32 matrices on the CPU run by the faster library.

    Also a decorator of functions. Contexts may be nested, and those of several threads overlap.

    Yields:
        Nothing.
    """
    with onednn.products() if is_onednn_faster() else nullcontext():
        yield


def is_onednn_faster() -> bool:
    """Whether `fast_products` are oneDNN's.

    Returns:
        The same answer in every process of a machine, number of threads and limits of memory.
    """
    return onednn.available() and _measured(torch.get_num_threads()) and onednn.is_safe()


@cache
def _measured(num_threads: int) -> bool:
    return rates_of("cpu").onednn
