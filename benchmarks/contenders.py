"""raykernel's own ways to the kernel of a workload, and what a contender is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Workload, as_loaded, read
from raykernel.ntk import contract
from raykernel.ntk.capture import Tracer
from raykernel.ntk.empirical import empirical_kernel

Kernel = Tensor
"""(n·c, n·c), examples first; of the rows of its first examples only where a contender says so."""
Run = Callable[[], Kernel]
Prepare = Callable[[Workload], Run]
"""Sets up once; what it returns is timed."""


def as_it_is(workload: Workload) -> Workload:
    """The workload as it is."""
    return workload


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to the kernel of a workload."""

    name: str
    prepare: Prepare
    note: str = ""
    """What a reader of its figures has to know."""
    needs: str | None = None
    """Distribution that must be installed."""
    variant: Callable[[Workload], Workload] = as_it_is
    """The workload that it can do; its error is measured against that one's kernel."""
    jacobians: float = 0.0
    """Peak memory in units of all gradients, `Workload.jacobian_bytes`."""
    num_rows: int | None = None
    """Examples whose rows it computes, its time scaled to all; None: all."""

    @property
    def installed(self) -> bool:
        """Whether its distribution is there."""
        return self.needs is None or distribution_version(self.needs) is not None

    def kernel(self, workload: Workload) -> Kernel:
        """The kernel of its variant of a workload."""
        return self.prepare(self.variant(workload))()


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _warm(workload: Workload) -> Run:
    tracer = Tracer(as_loaded(workload.model), read)

    def run() -> Kernel:
        capture = tracer.capture(workload.batch)
        return _total(contract.gram(capture, capture))

    return run


def _cold(workload: Workload) -> Run:
    model, size = as_loaded(workload.model), workload.num_examples

    def run() -> Kernel:
        return _total(empirical_kernel(model, read, workload.batch, batch_size=size)["sgd"])

    return run


def _total(blocks: dict[str, Tensor]) -> Kernel:
    return torch.stack(list(blocks.values())).sum(0).flatten(2).flatten(0, 1)


@contextmanager
def only(name: str) -> Iterator[None]:
    """Context in which every product is contracted in one way: `direct` or `factored`."""
    choose = contract.method

    def chosen(*sizes: Any, **more: Any) -> contract.Method:
        return replace(choose(*sizes, **more), name=name)

    contract.method = chosen
    try:
        yield
    finally:
        contract.method = choose


def _forced(name: str, workload: Workload) -> Run:
    run = _warm(workload)

    def forced() -> Kernel:
        with only(name):
            return run()

    return forced


RAYKERNEL = Contender("raykernel", _warm, "all layers apart; tracer that knows the model")

OWN = (
    RAYKERNEL,
    Contender("raykernel, first call", _cold, "checks itself against autograd every time"),
    Contender("raykernel, direct only", lambda workload: _forced("direct", workload)),
    Contender("raykernel, factored only", lambda workload: _forced("factored", workload)),
)
"""The engine as it is used, and with one of its two contractions only."""


CAPTURE, GRAM = "capture", "Gram"


def stages() -> dict[str, Callable[[Workload], Callable[[], object]]]:
    """The two halves of raykernel's work, each to be timed alone."""
    return {CAPTURE: _capture_only, GRAM: _gram_only}


def _capture_only(workload: Workload) -> Callable[[], object]:
    tracer = Tracer(as_loaded(workload.model), read)
    return lambda: tracer.capture(workload.batch)


def _gram_only(workload: Workload) -> Callable[[], object]:
    capture = Tracer(as_loaded(workload.model), read).capture(workload.batch)
    return lambda: contract.gram(capture, capture)
