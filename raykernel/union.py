"""One kernel for several samples of a task, so that every example is captured once for all.

    runs that differ in k and seed → their examples, each once → blocks that any of them wants

The test examples are the same for every k and seed, and the 16-shot examples of a seed lie inside
the 64-shot ones (problem/tasks.py). So where the kernel of test with train is wanted, a pass over
the examples of all samples does what a pass for each would; the runs then copy their entries
(store/nested.py). Train examples of one sample with those of another are not computed, but for
what shares a block with wanted entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from raykernel.behavior import compared_cells, settled
from raykernel.compute.executor import Executor
from raykernel.config import TaskConfig, canonical_json
from raykernel.console import Screen
from raykernel.errors import RaykernelError
from raykernel.location import location
from raykernel.pipeline import begin_kernel, complete_cells
from raykernel.prepared import Prepared, identity_of, prepare
from raykernel.problem.prompts import Encoded
from raykernel.problem.tasks import Data, assemble
from raykernel.regress import wanted_rows
from raykernel.runs import Run
from raykernel.store.blocks import Store
from raykernel.store.grid import Cell, Grid
from raykernel.store.nested import apart_from_the_sample
from raykernel.terms import Command, Split


@dataclass(frozen=True, slots=True)
class Union:
    """Several runs' kernel."""

    prepared: Prepared
    cells: list[Cell]
    """Those that some run wants."""
    num_samples: int

    def complete(self, executor: Executor, screen: Screen) -> None:
        """Compute what is missing of it.

        Args:
            executor: where.
            screen: where progress is shown.
        """
        handle = begin_kernel(self.prepared, Store(self.prepared.config.store.path))
        complete_cells(self.prepared, handle, self.cells, executor=executor, screen=screen)


@dataclass(frozen=True, slots=True)
class Member:
    """One of the runs."""

    prepared: Prepared
    cells: Sequence[Cell]
    """Those of its own kernel that it wants."""


def unions(runs: Iterable[Run], quiet: Screen) -> list[Union]:
    """The kernels that runs should share.

    Args:
        runs: which are to come.
        quiet: takes what their preparation says; the runs will say it themselves.

    Returns:
        One for each group of runs that differ in nothing but their samples and want the kernel of
        test; of runs whose input is wrong nothing.
    """
    groups: dict[str, dict[str, Member]] = {}
    for run in runs:
        if not run.wants_test:
            continue
        command, config = run.point.command, run.composed.config
        try:
            config = settled(config) if command is Command.behavior else config
            prepared = prepare(config, quiet)
        except RaykernelError:  # the run will say it
            continue
        key = canonical_json(apart_from_the_sample(prepared.identity))
        member = Member(prepared, _wanted(command, prepared))
        groups.setdefault(key, {})[prepared.fingerprint] = member
    return [union(list(group.values())) for group in groups.values() if len(group) > 1]


def union(members: Sequence[Member]) -> Union:
    """The kernel of the examples of several runs.

    Args:
        members: runs whose kernels differ in nothing but the sample.

    Returns:
        Their kernel: train examples of all as columns, seed after seed.
    """
    # The larger sample of a seed first: it has the smaller ones in it.
    order = sorted(members, key=lambda member: (_task(member).seed, -_task(member).k))
    source = {
        example.id: (member.prepared, number)
        for member in order
        for number, example in enumerate(member.prepared.data.examples)
    }
    data = _examples(order, source)
    first = order[0].prepared
    encoded = _gather([source[example.id] for example in data.examples], first.encoded)
    identity = identity_of(first.config, data, first.prompt, encoded)
    task = identity["task"]
    assert isinstance(task, dict), "an identity"
    task["k"] = [member.prepared.config.task.k for member in order]
    task["seed"] = [member.prepared.config.task.seed for member in order]
    grid = Grid(
        num_cols=len(data.splits[Split.train]),
        num_rows=len(data.examples),
        block_size=first.config.kernel.block_size,
        num_dev=len(data.splits[Split.dev]),
    )
    config = first.config
    config = replace(config, store=replace(config.store, path=str(location(config.store.path))))
    whole = Prepared(config, data, first.prompt, encoded, grid, identity)
    return Union(whole, _cells(whole, members), len(members))


# ---------------------------------------------------------------- inside


def _wanted(command: Command, prepared: Prepared) -> list[Cell]:
    config, grid = prepared.config, prepared.grid
    wanted = set(grid.cells(wanted_rows(config, grid)))
    if command is Command.behavior:
        wanted |= set(compared_cells(grid, config.behavior.test_limit))
    return sorted(wanted, key=lambda cell: (cell.j, cell.i))


def _examples(members: Sequence[Member], source: dict[str, tuple[Prepared, int]]) -> Data:
    """Examples of all, each once: train of any, then dev, then test."""
    parts: dict[Split, list[str]] = {}
    seen: set[str] = set()
    for split in (Split.train, Split.dev, Split.test):
        every = (member.prepared.data for member in members)
        names = (data.examples[i].id for data in every for i in data.splits[split])
        parts[split] = [name for name in dict.fromkeys(names) if name not in seen]
        seen.update(parts[split])
    data = members[0].prepared.data
    found = {
        split: [source[name][0].data.examples[source[name][1]] for name in names]
        for split, names in parts.items()
    }
    return assemble(data.labels, found, [])


def _task(member: Member) -> TaskConfig:
    return member.prepared.config.task


def _gather(places: Sequence[tuple[Prepared, int]], like: Encoded) -> Encoded:
    """Tokens of examples of several runs."""
    rows = [(prepared.encoded, number) for prepared, number in places]
    segments = None
    if like.token_type_ids is not None:
        segments = tuple(own.token_type_ids[i] for own, i in rows if own.token_type_ids)
    return replace(
        like,
        input_ids=tuple(own.input_ids[i] for own, i in rows),
        token_type_ids=segments,
        position=tuple(own.position[i] for own, i in rows),
        notes=(),
    )


def _cells(whole: Prepared, members: Sequence[Member]) -> list[Cell]:
    """Cells that hold what some run wants."""
    grid = whole.grid
    number = {example.id: n for n, example in enumerate(whole.data.examples)}
    block = [i for i, rows in enumerate(grid.row_blocks()) for _ in rows]
    wanted = set()
    for member in members:
        own = [block[number[example.id]] for example in member.prepared.data.examples]
        for cell in member.cells:
            for i in {own[row] for row in cell.rows}:
                for j in {own[col] for col in cell.cols}:
                    wanted.add((j, i) if j < i < grid.num_col_blocks else (i, j))
    return [cell for cell in grid.cells() if (cell.i, cell.j) in wanted]
