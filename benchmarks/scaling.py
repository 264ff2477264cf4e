"""How raykernel's cost and memory grow, one size at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from benchmarks.contenders import RAYKERNEL
from benchmarks.peers import LOOP
from benchmarks.tables import Table
from benchmarks.timing import Say, Timing, measure, settle
from benchmarks.workloads import roberta
from raykernel.provenance import peak_resident_bytes

SIZES: dict[str, tuple[str, Sequence[int]]] = {
    "texts": ("N", (16, 32, 64, 128)),
    "outputs": ("C", (1, 2, 4, 8)),
    "tokens": ("T", (16, 32, 64, 128)),
    "width": ("d", (64, 128, 256, 512)),
}
"""What is varied around N=32, C=2, T=32, d=128 with 4 layers."""

CONTENDERS = {"raykernel": RAYKERNEL, "loop of backward passes": LOOP}
"""Those whose memory is measured."""


def time_table(rounds: int, say: Say) -> Table:
    """Seconds against each size, and the slope of their logarithms."""
    columns = ["", *(f"size {k}" for k in range(1, 5)), "slope"]
    table = Table("Scaling: seconds of raykernel around RoBERTa d=128, N=32, T=32, C=2", columns)
    for name, (letter, values) in SIZES.items():
        prepare = {
            f"{letter}={value}": partial(RAYKERNEL.prepare, roberta("", "", **{name: value}))
            for value in values
        }
        timings = measure(prepare, rounds, say=say)
        cells = [f"{label}: {timing.seconds:.3f}" for label, timing in timings.items()]
        table.add(letter, *cells, f"{slope(values, timings):.2f}")
    table.note("Slope: of log seconds against log size, least squares.")
    return table


def slope(values: Sequence[int], timings: Mapping[str, Timing]) -> float:
    """Exponent of the power law that fits best."""
    seconds = [timing.seconds for timing in timings.values()]
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def memory_table(_: int, say: Say) -> Table:
    """Peak resident memory against N, each figure from a process of its own."""
    values = SIZES["texts"][1]
    table = Table("Scaling: peak memory in MiB", ["", *(f"N={value}" for value in values)])
    for name in CONTENDERS:
        cells = []
        for value in values:
            say(f"memory of {name}, N={value}")
            before, peak = _peak(name, value)
            cells.append(f"{before} + {peak - before}")
        table.add(name, *cells)
    table.note("RoBERTa d=128, 4 layers, T=32, C=2: process with the model + what the kernel adds.")
    return table


def _peak(name: str, texts: int) -> tuple[int, int]:
    program = f"from benchmarks.scaling import print_peak; print_peak({name!r}, {texts})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = done.stdout.split()[-2:]
    return int(before), int(peak)


def print_peak(name: str, texts: int) -> None:
    """In a fresh process: its peak before and after one kernel, in MiB."""
    settle()
    run = CONTENDERS[name].prepare(roberta("", "", texts=texts))
    CONTENDERS[name].kernel(roberta("", "", texts=2))  # what a first call of anything loads
    before = peak_resident_bytes() >> 20
    run()
    print(before, peak_resident_bytes() >> 20)
