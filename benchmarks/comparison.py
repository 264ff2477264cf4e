"""All contenders on one workload: seconds, ratios, errors, the floor, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import psutil
from torch import Tensor

from benchmarks import floor
from benchmarks.contenders import CAPTURE, GRAM, OWN, RAYKERNEL, Contender, stages
from benchmarks.peers import PEERS, checked_texts, reference
from benchmarks.regression import CHECKED, TITLE, WAYS, reference_predictions, regression
from benchmarks.tables import Table
from benchmarks.timing import NotRun, Say, Timing, measure
from benchmarks.workloads import Workload

MEMORY_SHARE = 0.6
"""Of the free memory, what a contender may take."""


def comparison(workload: Workload, rounds: int, say: Say) -> Table:
    """Time every contender on a workload, and hold it against float64."""
    contenders = (*OWN, *PEERS)
    references = _references(contenders, workload, say)
    parts = {
        floor.PASSES: floor.passes,
        floor.PRODUCT: floor.product,
        floor.OWN_PASSES: floor.own_passes,
        floor.OWN_PRODUCT: floor.own_product,
        **stages(),
    }
    timings = measure(
        {
            **{own.name: partial(_prepare, own, workload) for own in contenders},
            **{name: partial(prepare, workload) for name, prepare in parts.items()},
        },
        rounds,
        say=say,
    )
    work = floor.work(workload)
    least = floor.floor(work, timings[floor.PASSES], timings[floor.PRODUCT])
    own_least = floor.floor(work, timings[floor.OWN_PASSES], timings[floor.OWN_PRODUCT])
    table = Table(
        f"{workload.name}: {workload.title}",
        ["", "seconds", "/ raykernel", "/ floor", "error", "note"],
    )
    for name, of_products in (
        ("floor", least),
        ("floor, with raykernel's products", own_least),
    ):
        ratios = [_ratio(of_products, other) for other in (timings[RAYKERNEL.name], least)]
        table.add(name, f"{of_products.seconds:.3f}", *ratios, "", "")
    for own in contenders:
        if failure := timings[own.name].failure:
            table.add(own.name, "", "", "", "", failure)
        else:
            table.add(*_row(own, workload, timings, least, references[own.variant]))
    for note in _floor_notes(work, timings):
        table.note(note)
    return table


def _prepare(contender: Contender, workload: Workload) -> Callable[[], Tensor]:
    if not contender.installed:
        raise NotRun("not installed")
    need = contender.jacobians * workload.jacobian_bytes
    free = MEMORY_SHARE * psutil.virtual_memory().available
    if need > free:
        raise NotRun(f"not run: needs {need / 2**30:.1f} GiB, may use {free / 2**30:.1f}")
    return contender.prepare(contender.variant(workload))


def _references(
    contenders: Sequence[Contender], workload: Workload, say: Say
) -> dict[Callable[[Workload], Workload], Tensor]:
    found = {}
    for variant in dict.fromkeys(own.variant for own in contenders if own.installed):
        say(f"float64 reference, {variant.__name__}")
        found[variant] = reference(variant(workload.first(checked_texts(workload))))
    return found


def _row(
    contender: Contender,
    workload: Workload,
    timings: dict[str, Timing],
    least: Timing,
    expected: Tensor,
) -> list[str]:
    timing = timings[contender.name]
    if contender.num_rows is not None:
        timing = timing.scaled(workload.num_examples / contender.num_rows)
    return [
        contender.name,
        f"{timing.seconds:.3f}",
        _ratio(timing, timings[RAYKERNEL.name]),
        _ratio(timing, least),
        f"{relative_error(timing.result, expected):.1e}",
        f"one call. {contender.note}" if timing.single else contender.note,
    ]


def relative_error(kernel: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error, over the rows and columns that both have."""
    found = kernel[: len(expected), : expected.shape[1]].double()
    cut = expected[: len(found)]
    return float((found - cut).norm() / cut.norm())


def _ratio(timing: Timing, other: Timing) -> str:
    return f"{timing.over(other):.2f}"


def _floor_notes(work: floor.Work, timings: dict[str, Timing]) -> list[str]:
    passes, own_passes = (timings[name].seconds for name in (floor.PASSES, floor.OWN_PASSES))
    rate, own_rate = (floor.rate(timings[name]) for name in (floor.PRODUCT, floor.OWN_PRODUCT))
    capture, gram = timings[CAPTURE].seconds, timings[GRAM].seconds
    ideal = work.flops / own_rate
    return [
        f"Floor: forward + C backwards {passes:.3f} s, and {work.flops / 1e9:.2f} GFLOP at "
        f"{rate / 1e9:.0f} GFLOP/s {work.flops / rate:.3f} s ({work.num_direct} layers direct, "
        f"{work.num_factored} factored). With raykernel's products {own_passes:.3f} s, and "
        f"{own_rate / 1e9:.0f} GFLOP/s {ideal:.3f} s.",
        f"raykernel: capture {capture:.3f} s (those passes and {capture - own_passes:.3f} s), "
        f"Gram {gram:.3f} s ({ideal / gram:.0%} of that rate on the floor's operations).",
    ]


def regression_table(rounds: int, say: Say) -> Table:
    """W6: end to end, with and without the test kernel."""
    problem = regression()
    say("float64 reference")
    expected = reference_predictions(problem)
    timings = measure(
        {name: partial(partial, way, problem) for name, way in WAYS.items()}, rounds, say=say
    )
    table = Table(f"W6: {TITLE}", ["", "seconds", "ratio", "error"])
    shortest = timings[next(iter(WAYS))]
    for name, timing in timings.items():
        error = np.linalg.norm(timing.result[:CHECKED] - expected) / np.linalg.norm(expected)
        table.add(name, f"{timing.seconds:.2f}", _ratio(timing, shortest), f"{error:.1e}")
    table.note(
        f"From tokens to predictions, each time with a new tracer. Error: of the predictions of "
        f"{CHECKED} test texts, against the float64 loop's kernel."
    )
    return table
