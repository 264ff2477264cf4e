"""A study's plan, run: arm by arm, what is missing by an engine, the rest from the store.

    Plan → arms → points or a search → runs → engine → Done: how it ended, and its rows

A run that has ended is read, not run again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raykernel.compose import ComposedRun
from raykernel.config import SweepConfig, fingerprint
from raykernel.console import Screen, counted
from raykernel.engines import (
    Begin,
    Engine,
    Heard,
    PoolEngine,
    Searcher,
    by_kernel,
    clear_scratch,
    waves,
)
from raykernel.errors import InputError
from raykernel.planned import keep_plan
from raykernel.runs import (
    Ended,
    Recorder,
    Run,
    Runner,
    make_run,
    recalled,
    rows_of,
    store_of,
    stored,
)
from raykernel.search import Search
from raykernel.space import Plan, Point, is_harmless, spelt
from raykernel.store.blocks import Store
from raykernel.store.compaction import compact
from raykernel.study import Arm, Row, best_on_dev
from raykernel.tally import Tally
from raykernel.terms import Command, EngineName, RunStatus
from raykernel.trackers import open_trackers, tells


@dataclass(frozen=True, slots=True)
class Done:
    """A run that has ended, and its rows in the result tables."""

    ended: Ended
    rows: Sequence[Row]
    """None of a failure."""

    @property
    def point(self) -> Point:
        """What was run."""
        return self.ended.run.point


def open_engine(settings: SweepConfig, screen: Screen, begin: Begin) -> Engine:
    """The engine that a configuration names.

    Args:
        settings: which, and its workers.
        screen: where they are reported.
        begin: told of runs in this process.

    Returns:
        A context.
    """
    if settings.engine is EngineName.tune:
        from raykernel.tune_engine import TuneEngine  # Ray takes seconds to import

        return TuneEngine(settings, screen, begin)
    return PoolEngine(settings, screen, begin)


def run_study(plan: Plan, screen: Screen) -> list[Done]:
    """Run the arms of a study, one after the other.

    Args:
        plan: what to run.
        screen: where progress is shown.

    Returns:
        Every run that has ended, now or before.
    """
    settings = plan.settings()
    Store(plan.store_path()).create()  # before a journal is there, which is no store
    tally = Tally(plan.count(settings), settings.workers, screen)
    trackers = open_trackers(settings.trackers, plan.store_path())
    runner = make_runner(settings, screen)

    def heard(ended: Ended) -> None:
        tally.heard(ended)
        for tracker in trackers if tells(ended) else ():
            try:
                tracker.heard(ended, rows_of(ended))
            except Exception as error:  # whatever another program raises: the store has the run
                screen.note(f"{type(tracker).__name__}: {type(error).__name__}: {error}")

    found: list[Done] = []
    planned = {
        arm.name: arm_runs(plan, arm, [])
        for arm in plan.study.arms
        if not (arm.is_derived or plan.is_searched(arm, settings))
    }
    with open_engine(settings, screen, tally.begin) as engine:
        for arm in plan.study.arms:
            if plan.is_searched(arm, settings):
                ended = search_arm(plan, arm, engine, runner, heard)
            else:
                runs = planned.get(arm.name) or arm_runs(plan, arm, found)
                ended = complete_runs(runs, engine, runner, heard)
            found += [Done(one, rows_of(one)) for one in ended]
    clear_scratch(plan.store_path())  # a driver may have died with nothing left to run
    if any(not done.ended.was_stored for done in found):
        compact(plan.store_path())  # queries read one file a table
    return found


def make_runner(settings: SweepConfig, screen: Screen, *, shows: bool = False) -> Runner:
    """What the workers of a study are.

    Args:
        settings: its limits.
        screen: whose width their output has.
        shows: print what commands print.

    Returns:
        The worker, for a process that nobody looks at.
    """
    limit = settings.minutes
    return Runner(
        shows=shows,
        width=screen.out.width,
        deadline=None if limit is None else time.time() + 60 * limit,
        retry_failed=settings.retry_failed,
    )


def complete_runs(runs: Sequence[Run], engine: Engine, runner: Runner, heard: Heard) -> list[Ended]:
    """Do those runs that have not ended before.

    Args:
        runs: which.
        engine: what does them.
        runner: what its workers are.
        heard: told of every run.

    Returns:
        How they ended, in their order; none of those after the deadline.
    """
    known: dict[str, Ended] = {}

    def keep(ended: Ended) -> None:
        known[ended.run.id] = ended
        heard(ended)

    missing = []
    for run in {run.id: run for run in runs}.values():
        before = stored(run, retry_failed=runner.retry_failed)
        if before is not None and not (runner.shows and before.status is RunStatus.ok):
            keep(before)
        else:
            missing.append(run)
    if missing:
        store_of(missing[0]).require_writable()
        _complete_unions(missing, engine)
    for wave in waves(missing):
        engine.run(by_kernel(wave), runner, keep)
    return [replace(known[run.id], run=run) for run in runs if run.id in known]


def _complete_unions(runs: Sequence[Run], engine: Engine) -> None:
    """Compute kernels for several runs at once where that saves passes."""
    samples = {(run.composed.config.task.k, run.composed.config.task.seed) for run in runs}
    if len(samples) < 2 or not any(run.wants_test for run in runs):
        return
    from raykernel.union import unions  # it takes PyTorch

    for union in unions(runs, Recorder(100)):
        engine.complete(union)


def search_arm(plan: Plan, arm: Arm, engine: Engine, runner: Runner, heard: Heard) -> list[Ended]:
    """Search the hyperparameters of an arm, in each of its cells.

    Args:
        plan: what to run.
        arm: one of its arms.
        engine: what does the runs.
        runner: what its workers are.
        heard: told of every run.

    Returns:
        How all runs of the search ended, those of earlier calls too.
    """
    settings, found = plan.settings(), []
    for cells in plan.cells_to_average(settings):
        searcher = make_searcher(plan, arm, cells, runner)
        slots = searcher.search.resume(retry_failed=settings.retry_failed)
        before = _ended(searcher)
        for ended in before:
            heard(ended)
        if slots:
            engine.search(searcher, slots, heard)
        found += _ended(searcher) if slots else before
    return found


def make_searcher(
    plan: Plan, arm: Arm, cells: Sequence[tuple[str, ...]], runner: Runner
) -> Searcher:
    """The search of an arm over cells that are averaged.

    Args:
        plan: what to run.
        arm: one of its arms.
        cells: repetitions of every choice.
        runner: what its workers are.

    Returns:
        What a worker of the search is.
    """
    settings = plan.settings()
    before = plan.point(arm, (), ()).overrides
    asked = [text for text in before if not is_harmless(text.split("=", 1)[0])]
    axes, name = plan.own[arm.name], plan.study.name
    question = [arm.command.value, asked, cells, spelt(axes), settings.metrics]
    directions = [direction.value for direction in settings.directions]
    search = Search(
        journal=plan.store_path() / "sweeps" / f"{name}.journal",
        name=f"{name}, {arm.name}, {fingerprint([*question, directions])}",
        axes=axes,
        sampler=settings.sampler,
        seed=settings.seed,
        metrics=settings.metrics,
        directions=settings.directions,
        trials=settings.trials or 0,
    )
    return Searcher(search, runner, name, arm.name, arm.command, before, tuple(cells))


def _ended(searcher: Searcher) -> list[Ended]:
    """Runs of all choices that were tried; each once."""
    tried = [run for choice in searcher.search.choices() for run in searcher.runs(choice)]
    found = map(recalled, {run.id: run for run in tried}.values())
    return [ended for ended in found if ended is not None]


def arm_runs(plan: Plan, arm: Arm, found: Sequence[Done]) -> list[Run]:
    """Runs of an arm, which the store then knows as planned.

    Args:
        plan: what to run.
        arm: one of its arms.
        found: runs that have ended.

    Returns:
        The runs, those that have ended among them.
    """
    runs = [make_run(plan.study.name, point) for point in arm_points(plan, arm, found)]
    keep_plan(plan, arm, runs)
    return runs


def arm_points(plan: Plan, arm: Arm, found: Sequence[Done]) -> list[Point]:
    """Points of an arm.

    One that is `like` another has what dev selected of that, cell by cell; one that has `choose`
    has what this finds. A cell of which every point of the other arm failed is left out.

    Args:
        plan: what to run.
        arm: one of its arms.
        found: runs that have ended.

    Returns:
        The points.
    """
    if not arm.is_derived:
        return [point for cell in plan.cells() for point in plan.points(arm, cell)]
    points = []
    for cell in plan.cells():
        same = [done for done in found if done.point.cell == cell]
        rows = [{**row, "own": done.point.own} for done in same for row in done.rows]
        if arm.choose is not None:
            points += [plan.point(arm, cell, own) for own in arm.choose(rows)] if rows else []
            continue
        rows = [row for row in rows if row["arm"] == arm.like]
        points += [plan.point(arm, cell, row["own"]) for row in best_on_dev(rows, by=())]
    return points


# ---------------------------------------------------------------- -m


def run_many(command: Command, composed: Sequence[ComposedRun], screen: Screen) -> int:
    """The combinations that -m makes, by the engine of studies.

    Args:
        command: what to run.
        composed: the combinations.
        screen: where results and progress are shown.

    Returns:
        0 if all went well, 1 if some failed.

    Raises:
        InputError: if a sampler is asked for.
    """
    settings = composed[0].config.sweep
    if not settings.is_grid:
        raise InputError(
            f"sweep.sampler: found {settings.sampler}, expected grid with -m, which runs every "
            "combination. A study (`raykernel sweep`) has a space to draw from."
        )
    points = [Point(command.value, command, run.overrides, run.overrides, ()) for run in composed]
    runs = [make_run(command.value, *pair) for pair in zip(points, composed, strict=True)]
    tally = Tally(len(runs), settings.workers, screen)
    runner = make_runner(settings, screen, shows=True)
    with open_engine(settings, screen, tally.begin) as engine:
        ended = complete_runs(runs, engine, runner, tally.heard)
    failed = [one for one in ended if one.status is RunStatus.failed]
    if failed:
        screen.say(f"\n{len(failed)} of {counted(len(runs), 'run')} failed:")
        for one in failed:
            screen.say(f"  {' '.join(one.run.point.cell)}: {one.text}")
    return 1 if failed else 0
