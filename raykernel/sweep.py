"""`raykernel sweep NAME`: run the points of a study and print its table.

    sweeps/NAME.py → Study + command line → Plan → points → engine → rows → sheets

Points end in the result tables of the store, by the stages of their own command, so that a point
whose result is stored computes nothing and a study that was killed goes on. Whatever runs points
is an `Engine`.
"""

from __future__ import annotations

import ast
import itertools
import runpy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raykernel.compose import ComposedRun
from raykernel.config import SweepConfig, fingerprint
from raykernel.console import Screen, counted, duration
from raykernel.engines import Begin, Engine, Heard, PoolEngine, Searcher, by_kernel
from raykernel.errors import InputError, nearest
from raykernel.published import sweeps_dir
from raykernel.runs import Ended, Run, Runner, make_run, recalled, rows_of, stored
from raykernel.search import Search, check_settings
from raykernel.space import Plan, Point, check, is_harmless, make_plan, spelt
from raykernel.store.blocks import Store
from raykernel.study import Arm, Row, Study, best_on_dev
from raykernel.summary import best_choices
from raykernel.terms import Command, EngineName, PromptStyle, RunStatus
from raykernel.trackers import open_trackers, tells

USER_FOLDER = Path("sweeps")
"""A user's own studies, below the working folder."""

_HELP = {"-h", "--help"}


# ---------------------------------------------------------------- studies in files


def study_files() -> dict[str, Path]:
    """Files by name: the package's, and those of `./sweeps`, which replace ones of the same name.

    Returns:
        Paths of Python files, whether or not they are studies.
    """
    found: dict[str, Path] = {}
    for folder in (sweeps_dir(), USER_FOLDER):
        found |= {path.stem: path for path in folder.glob("*.py")}
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def load_study(name: str) -> Study:
    """Read a study.

    Its file is Python and is run, so only the package's own folder and `./sweeps` are looked in.

    Args:
        name: of its file, without ending; its first word is enough where no other has it.

    Returns:
        The study.

    Raises:
        InputError: if there is no such study, or its file defines none.
    """
    files = study_files()
    short = [stem for stem in files if stem.split("_")[0] == name]
    if name not in files and len(short) == 1:
        (name,) = short
    if name not in files:
        known = {*files, *(stem.split("_")[0] for stem in files)}
        raise InputError(
            f"Unknown study {name!r}: {nearest(name, known)} `raykernel sweep` lists all; your "
            f"own lie in ./{USER_FOLDER}."
        )
    path, expected = files[name], "Expected Python with `study = raykernel.study.Study(...)`."
    try:
        # Unlike an import it leaves no byte code beside the file.
        study = runpy.run_path(str(path), run_name=f"raykernel_sweep_{name}").get("study")
    except Exception as error:  # whatever a user's file raises
        raise InputError(
            f"{path}: found {type(error).__name__}: {error}. {expected} Correct the file."
        ) from error
    if not isinstance(study, Study):
        raise InputError(f"{path}: found no `study`. {expected} Add it.")
    return replace(study, name=name)


def question_of(path: Path) -> str | None:
    """The question of a study, read without running its file: `./sweeps` may hold other programs.

    Args:
        path: a Python file.

    Returns:
        The text given as `question=`; None if there is none.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "question":
            value = node.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    return None


def list_studies(screen: Screen) -> None:
    """Print every study with its question."""
    asked = [(name, question_of(path)) for name, path in study_files().items()]
    rows = [[name, question] for name, question in asked if question is not None]
    screen.table(["study", "question"], rows)
    screen.out.print(
        "Next: raykernel sweep NAME --help, or raykernel sweep NAME experiment=demo", markup=False
    )


def _natural(name: str) -> tuple[int, str]:
    """Order of names: table2 before table11."""
    digits = "".join(itertools.takewhile(str.isdigit, name.lstrip("abcdefghijklmnopqrstuvwxyz")))
    return int(digits or 0), name


# ---------------------------------------------------------------- running


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


class Tally:
    """Counts the runs of a study, says how they end, and how far it is.

    Args:
        total: runs that are known of.
        workers: that run at a time.
        screen: where to say it.
    """

    def __init__(self, total: int, workers: int, screen: Screen) -> None:
        self._total = total
        self._workers = workers
        self._screen = screen
        self._begun = self._ended = self._failed = self._stored = 0
        self._seconds = 0.0

    def begin(self, run: Run) -> None:
        """A run begins in this process."""
        self._begun = max(self._begun, self._ended) + 1
        self._screen.say(f"\n[{self._begun}/{self._total}] {run.point.text}")

    def heard(self, ended: Ended) -> None:
        """A run has ended, now or before."""
        self._ended += 1
        self._begun = max(self._begun, self._ended)
        self._total = max(self._total, self._ended)
        if ended.was_stored:
            self._stored += 1
        else:
            self._seconds += ended.seconds
        for note in ended.notes:
            self._screen.note(note)
        if ended.printed:
            self._screen.say(f"\n[{self._ended}/{self._total}] {ended.run.point.text}")
            self._screen.out.print(ended.printed, markup=False, end="")
        if ended.status is RunStatus.failed:
            self._failed += 1
            before = ", before" if ended.was_stored else ""
            cause = "" if ended.cause is None else ended.cause.value
            self._screen.say(f"Failed ({cause}{before}): {ended.run.point.text}: {ended.error}")
            if ended.trace:
                self._screen.say(ended.trace)
        if not ended.was_stored:
            self._screen.say(self.line())

    def line(self) -> str:
        """How far it is."""
        left = self._total - self._ended
        running = min(self._workers, left)
        parts = [f"{self._ended - self._failed} of {counted(self._total, 'run')} done"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if left:
            each = self._seconds / max(1, self._ended - self._stored) / self._workers
            parts += [f"{running} running"] if self._workers > 1 else []
            parts += [f"{left - running if self._workers > 1 else left} left"]
            parts.append(f"about {duration(each * left)} more")
        return ", ".join(parts)


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
    with open_engine(settings, screen, tally.begin) as engine:
        for arm in plan.study.arms:
            if plan.is_searched(arm, settings):
                ended = search_arm(plan, arm, engine, runner, heard)
            else:
                points = arm_points(plan, arm, found)
                runs = [make_run(plan.study.name, point) for point in points]
                ended = complete_runs(runs, engine, runner, heard)
            found += [Done(one, rows_of(one)) for one in ended]
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
        engine.run(by_kernel(missing), runner, keep)
    return [replace(known[run.id], run=run) for run in runs if run.id in known]


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
    if arm.like is None and arm.choose is None:
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


# ---------------------------------------------------------------- the command


def sweep(arguments: Sequence[str], screen: Screen) -> int:
    """`raykernel sweep [NAME [overrides]]`.

    Args:
        arguments: what follows the command.
        screen: where to print.

    Returns:
        0 if all points went well, 1 if some failed.
    """
    if not arguments or arguments[0] in _HELP:
        screen.out.print("usage: raykernel sweep NAME [overrides]\n", markup=False)
        list_studies(screen)
        return 0
    asked = [argument for argument in arguments[1:] if argument not in _HELP]
    plan = make_plan(load_study(arguments[0]), asked)
    if len(asked) < len(arguments) - 1:
        describe(plan, screen)
        return 0
    check(plan)
    check_settings(plan)
    return show(plan, run_study(plan, screen), screen)


def describe(plan: Plan, screen: Screen) -> None:
    """Print what a study would run; nothing is computed.

    Args:
        plan: the study with the command line applied.
        screen: where to print.
    """
    rows = [["every method", "", spelt(plan.space)]]
    for arm in plan.study.arms:
        settings = " ".join(f"{key}={value}" for key, value in arm.settings.items())
        own = f"as selected for {arm.like}" if arm.like else spelt(plan.own[arm.name])
        rows.append([arm.name, arm.command.value, f"{settings} {own}".strip()])
    screen.table(["method", "command", "with"], rows, title=plan.study.question)
    fixed = " ".join(plan.fixed.values())
    number = counted(plan.count(plan.settings()), "run")
    screen.out.print(number + (f", all with {fixed}" if fixed else ""), markup=False)


def show(plan: Plan, found: Sequence[Done], screen: Screen) -> int:
    """Print the study's table, then what failed.

    Args:
        plan: what was run.
        found: every point.
        screen: where to print.

    Returns:
        The exit code.
    """
    study = plan.study
    total = plan.count(plan.settings())
    if any(plan.is_searched(arm, plan.settings()) for arm in study.arms):
        total = len(found)  # choices can coincide
    rows = [row for done in found for row in done.rows]
    failed = [done.ended for done in found if done.ended.status is RunStatus.failed]
    stopped = sum(done.ended.status is RunStatus.stopped for done in found)
    screen.out.print(f"\n{study.question}", markup=False)
    for sheet in study.table(rows, compare=plan.compare):
        screen.table(sheet.columns, sheet.rows, title=sheet.title)
        if sheet.note:
            screen.out.print(sheet.note, markup=False)
    for arm in study.arms:
        ran = [(done.point, done.rows) for done in found if done.point.arm == arm.name]
        best = best_choices(plan, arm, [one for one in ran if one[1]])
        if best is not None:
            screen.table(best.columns, best.rows, title=best.title)
    if any(row.get("prompt") == PromptStyle.none.value for row in rows):
        screen.note("runs without a prompt start from a linear probe, not from 0-shot.")
    if rows and not plan.compare and getattr(study.table, "paper", None) is not None:
        screen.note("the setting is not the paper's, so that its numbers are not shown.")
    left_out = total - len(found)
    screen.out.print(
        f"{study.name}: {len(found) - len(failed) - stopped} of {total} runs are complete"
        + (f", {len(failed)} failed" if failed else "")
        + (f", {stopped} stopped early" if stopped else "")
        + (f", {left_out} could not begin" if left_out else "")
        + ". The same command computes only what is missing.",
        markup=False,
    )
    for ended in failed:
        screen.say(f"  {ended.run.point.text}: {ended.text}")
    if any(ended.was_stored for ended in failed):
        screen.say("Those that failed before by themselves run again with sweep.retry_failed=true.")
    return 1 if failed else 0
