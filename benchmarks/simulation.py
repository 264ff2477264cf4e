"""A cluster of a thousand workers, simulated: `python -m benchmarks.simulation [--write]`.

The scheduler is raykernel's own, to the line; Ray, the nodes and the blocks are a heap of events.
What a call of Ray costs the driver is measured here first, with one actor, and so are the
scheduler, the listing of a store of a million blocks, and the driver's memory.

    driver   hire, give, wait for some answers, take all that are there, again
    worker   start, load, then one block after the other in the order of submission
    node     8 workers; dies at random with all of them; another one comes minutes later
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.tables import RESULTS, Table, write_section
from raykernel.compute.scheduler import Member, Scheduler, gathered
from raykernel.compute.shell import Shell
from raykernel.config import ComputeConfig
from raykernel.store.blockfile import block_name, logits_name
from raykernel.store.grid import Cell, Grid
from raykernel.store.kernelfiles import KernelFiles
from raykernel.store.manifest import Manifest
from raykernel.terms import ExecutorName

COMMAND = "python -m benchmarks.simulation --write"
POLL_SECONDS = 1.0
"""How often the driver looks for workers that hang."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that things take, measured but for the last four."""

    submit: float = 3e-4
    """Driver: a call of an actor."""
    get: float = 2e-4
    """Driver: to take one answer."""
    wait: float = 1e-4
    """Driver: the two calls of `ray.wait` of a round, whatever they look at."""
    wait_each: float = 2e-6
    """The same for every reference."""
    own: float = 2e-5
    """Driver: the scheduler's own code for a job."""
    latency: float = 1e-3
    """From the driver to a worker, or back."""
    start: float = 10.0
    """A worker's process with PyTorch."""
    load: float = 20.0
    """A model."""
    node: float = 180.0
    """Until a lost node is replaced."""
    notice: float = 30.0
    """Until Ray notices that a node is lost."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is simulated."""

    blocks: int = 10**6
    workers: int = 1000
    seconds: float = 1.0
    """Mean time of a block; log-normal, a third of it is its standard deviation."""
    in_flight: int = 2
    loss_per_hour: float = 0.01
    """Part of the nodes that die in an hour."""
    workers_per_node: int = 8
    slow_nodes: int = 0
    """Nodes that take ten times as long for everything."""
    max_attempts: int = 4


@dataclass(slots=True)
class Report:
    """How it went."""

    seconds: float = 0.0
    """From the first hire to the last outcome."""
    began: float = math.inf
    """When the first block was given out."""
    useful: float = 0.0
    """Workers' time on blocks whose answer counted."""
    recomputed: float = 0.0
    """Workers' time on blocks that were lost or done twice."""
    driver: float = 0.0
    """The driver's time at work."""
    lost_workers: int = 0
    outcomes: bytearray = field(default_factory=bytearray)
    """Outcomes of every block."""
    given_up: int = 0

    def utilisation(self, workers: int, *, started: bool = False) -> float:
        """Part of the workers' time that was useful, with or without their start."""
        return self.useful / workers / (self.seconds - (self.began if started else 0.0))


@dataclass(slots=True, eq=False)
class _Node:
    speed: float
    workers: list[_Worker] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Worker:
    node: _Node | None = None
    member: Any = None
    free: float = 0.0
    """When it will have done all that it was given."""
    dead: float = math.inf


class Simulation:
    """A run of a case.

    Args:
        case: what.
        costs: what things take.
        seed: of all that is drawn.
    """

    def __init__(self, case: Case, costs: Costs, seed: int = 0) -> None:
        self._case, self._costs = case, costs
        self._draw = random.Random(seed)
        compute = ComputeConfig(
            executor=ExecutorName.ray,
            workers=case.workers,
            in_flight=case.in_flight,
            max_attempts=case.max_attempts,
            heartbeat_seconds=None,  # a node that dies is noticed by Ray
        )
        self._scheduler: Scheduler[_Worker, int] = Scheduler(range(case.blocks), compute)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._num_owed = 0
        self._now = 0.0
        self._waiting: deque[_Worker] = deque()  # for a place on a node
        self._places: deque[_Node] = deque()
        self._report = Report(outcomes=bytearray(case.blocks))
        for number in range(-(-case.workers // case.workers_per_node)):
            self._add_node(10.0 if number < case.slow_nodes else 1.0)

    def run(self) -> Report:
        """Until every block has an outcome.

        Returns:
            How it went.
        """
        watched, report = 0.0, self._report
        while self._scheduler.num_open:
            for _ in range(self._scheduler.num_wanted):
                self._hire()
            for member, task in self._scheduler.give(self._now):
                self._submit(member, task)
            self._work(self._costs.wait + self._costs.wait_each * self._num_owed)
            coming = heapq.nsmallest(gathered(self._num_owed), self._events)
            last = coming[-1][0] if coming else math.inf
            self._now = max(self._now, min(last, self._now + POLL_SECONDS))
            self._happen()
            if self._now - watched >= POLL_SECONDS:
                watched = self._now
                for member, _ in self._scheduler.overdue(self._now):
                    self._lose(member)
        report.seconds = self._now
        return report

    # ------------------------------------------------------------ the driver

    def _work(self, seconds: float) -> None:
        self._now += seconds
        self._report.driver += seconds

    def _hire(self) -> None:
        worker = _Worker()
        worker.member = self._scheduler.hire(worker)
        self._work(self._costs.submit)
        self._num_owed += 1
        self._waiting.append(worker)
        self._place()

    def _submit(self, member: Member[_Worker, int], task: Any) -> None:
        self._work(self._costs.submit + self._costs.own)
        self._num_owed += 1
        self._report.began = min(self._report.began, self._now)
        worker, costs = member.handle, self._costs
        assert worker.node is not None
        spread = math.sqrt(math.log(1 + 1 / 9))
        seconds = self._case.seconds * self._draw.lognormvariate(-(spread**2) / 2, spread)
        begin = max(worker.free, self._now + costs.latency)
        worker.free = end = begin + seconds * worker.node.speed

        def answer() -> None:
            if end > worker.dead or not member.ready:  # it, or its answer, never came
                self._report.recomputed += max(0.0, min(end, worker.dead) - begin)
                return
            self._work(costs.get)
            self._num_owed -= 1
            if self._scheduler.answered(member, task, self._now):
                self._report.outcomes[task.job] += 1
                self._report.useful += end - begin
            else:
                self._report.recomputed += end - begin

        self._at(end + costs.latency, answer)

    def _lose(self, member: Member[_Worker, int]) -> None:
        """As Ray reports a dead actor."""
        if member not in self._scheduler.members:
            return
        self._num_owed -= len(member.tasks) or (not member.ready)
        self._work(self._costs.get * (1 + len(member.tasks)))
        self._report.lost_workers += 1
        charge = self._scheduler.lost(member)
        if charge is not None and charge.given_up:
            self._report.outcomes[charge.task.job] += 1
            self._report.given_up += 1
        worker = member.handle
        if worker.dead == math.inf and worker.node is not None:  # it hung, and is ended
            worker.dead = self._now
            self._places.append(worker.node)

    # ------------------------------------------------------------ the nodes

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), what))

    def _happen(self) -> None:
        """All that has happened until now, as the driver hears of it."""
        until = self._now
        while self._events and self._events[0][0] <= until:
            heapq.heappop(self._events)[2]()

    def _add_node(self, speed: float) -> None:
        node = _Node(speed)
        self._places.extend([node] * self._case.workers_per_node)
        if self._case.loss_per_hour:
            lives = self._draw.expovariate(self._case.loss_per_hour / 3600)
            self._at(self._now + lives, lambda: self._drop_node(node))
        self._place()

    def _drop_node(self, node: _Node) -> None:
        self._places = deque(place for place in self._places if place is not node)
        for worker in node.workers:
            worker.dead = min(worker.dead, self._now)
            self._at(self._now + self._costs.notice, lambda w=worker: self._lose(w.member))
        self._at(self._now + self._costs.node, lambda: self._add_node(1.0))

    def _place(self) -> None:
        """Give workers that wait for it a place: they start and load."""
        while self._waiting and self._places:
            worker, node = self._waiting.popleft(), self._places.popleft()
            worker.node = node
            node.workers.append(worker)
            ready = self._now + (self._costs.start + self._costs.load) * node.speed
            worker.free = ready

            def greet(worker: _Worker = worker) -> None:
                if worker.dead == math.inf:
                    self._work(2 * self._costs.get + self._costs.submit)
                    self._num_owed -= 1
                    self._scheduler.ready(worker.member)

            self._at(ready, greet)


# ------------------------------------------------------------------ what things take here


def measured_calls(calls: int = 1000) -> Costs:
    """Costs of Ray's calls and of the scheduler, on this machine.

    Medians of single calls, so that it matters little who else is at work here.

    Args:
        calls: how many of each.

    Returns:
        The costs; those of nodes and models are assumed.
    """
    from raykernel.compute.ray_executor import cluster

    with cluster(ComputeConfig(executor=ExecutorName.ray)):
        import ray

        remote: Any = ray.remote(Shell)
        shell = remote.options(num_cpus=1).remote()
        ray.get(shell.load.remote(ray.put(_Echo)))
        cell, answers = Cell(3, 4, range(64), range(64)), []
        trips = _times(lambda: ray.get(shell.do.remote(cell)), calls // 5)
        submits = _times(lambda: answers.append(shell.do.remote(cell)), calls)
        ray.wait(answers, num_returns=calls)
        left = iter(answers)
        gets = _times(lambda: ray.get(next(left)), calls)
        shell.do.remote(10.0)
        owed = [shell.do.remote(cell) for _ in range(calls)]

        def waits(count: int) -> list[float]:
            looked = [*owed[:count], answers[0]]

            def round_of_waits() -> None:
                ray.wait(looked, num_returns=1, timeout=1.0)
                ray.wait(looked, num_returns=count + 1, timeout=0)

            return _times(round_of_waits, 25)

        few, many = statistics.median(waits(10)), statistics.median(waits(calls))
        submit, get = statistics.median(submits), statistics.median(gets)
    return Costs(
        submit=submit,
        get=get,
        wait=few,
        wait_each=max(0.0, many - few) / (calls - 10),
        own=scheduler_seconds(),
        latency=max(0.0, min(trips) - submit - get) / 2,
    )


def _times(call: Callable[[], object], count: int) -> list[float]:
    """Seconds that each of some calls takes."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


class _Echo:
    """A worker that sleeps where it is told to."""

    def __call__(self, job: Any) -> int:
        if isinstance(job, float):
            time.sleep(job)
            return 0
        return int(job.i)


def scheduler_seconds(jobs: int = 10**5, workers: int = 1000) -> float:
    """The scheduler's own time for a job: given out and answered."""
    compute = ComputeConfig(executor=ExecutorName.ray, workers=workers)
    scheduler: Scheduler[int, int] = Scheduler(range(jobs), compute)
    for number in range(workers):
        scheduler.ready(scheduler.hire(number))
    start, now = time.process_time(), 0.0
    given = deque(scheduler.give(now))
    while given:
        member, task = given.popleft()
        now += 1e-3
        scheduler.answered(member, task, now)
        given.extend(scheduler.give(now))
    return (time.process_time() - start) / jobs


def listing(side: int = 1000) -> list[tuple[str, float]]:
    """What a driver does before the first of side² blocks: a grid, a listing, a scheduler.

    A tenth of the blocks are there, as empty files.
    """
    grid = Grid(side, side + side // 2 + 1, 1, side // 2 + 1)
    process, rows = psutil.Process(), []

    def note(name: str, since: float) -> None:
        rows.append((f"{name} (s of CPU)", time.process_time() - since))

    with tempfile.TemporaryDirectory() as folder:
        handle = KernelFiles(Path(folder), Manifest({}, grid, 2, "float32"))
        cells = grid.cells()
        for cell in cells[: len(cells) // 10]:
            (handle.path / block_name(cell.i, cell.j)).touch()
        for i in range(grid.num_row_blocks):
            (handle.path / logits_name(i)).touch()
        del cells
        before = process.memory_info().rss
        for name, call in (
            ("cells of the grid", grid.cells),
            ("names of the files (a tenth of them there)", handle.present),
            ("both, and which are missing", handle.missing),
        ):
            start = time.process_time()
            call()
            note(name, start)
        start = time.process_time()
        wanted, absent = grid.cells(), set(handle.missing())
        jobs = [cell for cell in wanted if cell in absent]
        note("as `raykernel kernel` asks", start)
        start = time.process_time()
        scheduler: Scheduler[int, Cell] = Scheduler(jobs, ComputeConfig())
        note("a scheduler", start)
        assert scheduler.num_open == len(jobs)
        rows.append(("memory of all that (MiB)", (process.memory_info().rss - before) / 2**20))
    return rows


# ------------------------------------------------------------------ tables


CASES = [
    Case(seconds=1.0),
    Case(blocks=3 * 10**5, seconds=10.0),
    Case(blocks=10**5, seconds=0.1),
    Case(blocks=5 * 10**4, seconds=0.1, in_flight=1),
    Case(blocks=5 * 10**4, seconds=0.1, in_flight=8),
    Case(blocks=5 * 10**4, seconds=1.0, in_flight=1),
    Case(blocks=5 * 10**4, seconds=1.0, in_flight=8),
    Case(blocks=10**5, seconds=10.0, loss_per_hour=0.5),
    Case(blocks=10**5, seconds=10.0, slow_nodes=6),
]


def table_of_runs(costs: Costs) -> Table:
    """Every case, simulated."""
    table = Table(
        "Simulation: the scheduler with 1,000 workers on 125 nodes",
        (
            "blocks", "seconds each", "in_flight", "nodes lost per hour", "slow nodes", "hours",
            "useful", "without start", "recomputed", "workers lost", "driver at work",
        ),
    )  # fmt: skip
    for case in CASES:
        report = Simulation(case, costs).run()
        assert report.outcomes == b"\x01" * case.blocks
        table.add(
            f"{case.blocks:,}",
            f"{case.seconds:g}",
            str(case.in_flight),
            f"{case.loss_per_hour:.0%}",
            str(case.slow_nodes),
            f"{report.seconds / 3600:.2f}",
            f"{report.utilisation(case.workers):.1%}",
            f"{report.utilisation(case.workers, started=True):.1%}",
            f"{report.recomputed / report.useful:.2%}",
            str(report.lost_workers),
            f"{report.driver / (report.seconds - report.began):.0%}",
        )
    per_block = costs.submit + costs.get + costs.own
    table.note("Every block had exactly one outcome in every run.")
    calls = f"a call {costs.submit * 1e6:.0f} µs, an answer {costs.get * 1e6:.0f} µs"
    waits = f"{costs.wait * 1e6:.0f} µs and {costs.wait_each * 1e6:.2f} µs per reference"
    table.note(
        f"Measured here: {calls}, a round's two `ray.wait` {waits}, latency "
        f"{costs.latency * 1e3:.1f} ms, the scheduler {costs.own * 1e6:.0f} µs per block; "
        "medians of single calls in the driver's main thread. Ray's own threads work beside it: "
        "on a driver with fewer cores than they want, a call takes longer (312 µs with 18 "
        "others at each core)."
    )
    table.note(
        f"Assumed: a process starts in {costs.start:.0f} s, a model loads in {costs.load:.0f} s, "
        f"a lost node is noticed after {costs.notice:.0f} s and replaced after {costs.node:.0f} s; "
        "block times are log-normal with a standard deviation of a third of the mean."
    )
    limit = 1 / per_block
    table.note(
        f"One driver carries at most about {limit:,.0f} blocks a second: for 90% of 1,000 "
        f"workers a block takes at least {1000 * 0.9 / limit:.1f} s. Where they are shorter, "
        "a larger kernel.block_size (twice the side, four times the seconds) is what is needed."
    )
    table.note(
        "Useful: workers' time on blocks that counted, of all their time from the first hire to "
        "the last outcome; without start: from the first block on. Recomputed: time on blocks "
        "that were lost with a node or done twice at the end. Slow nodes take ten times as long."
    )
    return table


def table_of_listing() -> Table:
    """What a million blocks cost the driver before the first is computed."""
    table = Table("Simulation: a store of a million blocks", ("what", "here"))
    for name, value in listing():
        table.add(name, f"{value:.1f}")
    return table


def main() -> int:
    """Measure, simulate, print, and write if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"its section of {RESULTS.name}")
    options = parser.parse_args()
    tables = [table_of_runs(measured_calls()), table_of_listing()]
    for table in tables:
        table.show(Console())
    if options.write:
        write_section("simulation", tables, COMMAND)
    return 0


if __name__ == "__main__":
    sys.exit(main())
