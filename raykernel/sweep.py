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
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from raykernel.compose import ComposedRun
from raykernel.console import Screen, counted
from raykernel.errors import InputError, RaykernelError, nearest
from raykernel.published import sweeps_dir
from raykernel.space import Plan, Point, check, make_plan, spelt
from raykernel.store.blocks import Store
from raykernel.store.tables import TABLES
from raykernel.study import Arm, Row, Study, best_on_dev
from raykernel.terms import Command, PromptStyle

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


# ---------------------------------------------------------------- running points


@dataclass(frozen=True, slots=True)
class Done:
    """A point that has been run."""

    point: Point
    rows: Sequence[Row]
    error: str = ""
    """Why it failed; empty if it did not."""


@runtime_checkable
class Engine(Protocol):
    """Runs points. Each is independent of the others and may run anywhere that sees the store."""

    def __call__(
        self, points: Sequence[Point], run: Callable[[Point], list[Row]]
    ) -> Iterator[Done]:
        """Run all points, in any order; a failing one stops no other.

        Args:
            points: what to run.
            run: runs one; the rows that it returns are stored by then.

        Yields:
            Every point once.
        """


def in_order(points: Sequence[Point], run: Callable[[Point], list[Row]]) -> Iterator[Done]:
    """The engine that runs one point after the other in this process.

    Args:
        points: what to run.
        run: runs one.

    Yields:
        Every point once.
    """
    for point in points:
        try:
            rows, error = run(point), ""
        except RaykernelError as failure:
            rows, error = [], str(failure) or type(failure).__name__
        except Exception as failure:
            traceback.print_exception(failure)
            rows, error = [], f"{type(failure).__name__}: {failure}"
        yield Done(point, rows, error)


def run_study(plan: Plan, screen: Screen, engine: Engine = in_order) -> list[Done]:
    """Run the arms of a study, one after the other.

    Args:
        plan: what to run.
        screen: where progress is shown.
        engine: what runs the points of an arm.

    Returns:
        Every point, run or failed.
    """
    total = plan.count()
    numbers = itertools.count(1)

    def run(point: Point) -> list[Row]:
        screen.say(f"\n[{next(numbers)}/{total}] {point.text}")
        return run_point(point, screen)

    found: list[Done] = []
    for arm in plan.study.arms:
        for done in engine(arm_points(plan, arm, found), run):
            if done.error:
                screen.say(f"Error: {done.error}")
            found.append(done)
    return found


def arm_points(plan: Plan, arm: Arm, found: Sequence[Done]) -> list[Point]:
    """Points of an arm; one that is `like` another has what dev selected of that, cell by cell.

    A cell of which every point of the other arm failed is left out.

    Args:
        plan: what to run.
        arm: one of its arms.
        found: points that have been run.

    Returns:
        The points.
    """
    if arm.like is None:
        return [point for cell in plan.cells() for point in plan.points(arm, cell)]
    points = []
    for cell in plan.cells():
        same = [done for done in found if (done.point.arm, done.point.cell) == (arm.like, cell)]
        rows = [{**row, "own": done.point.own} for done in same for row in done.rows]
        points += [plan.point(arm, cell, row["own"]) for row in best_on_dev(rows, by=())]
    return points


def run_point(point: Point, screen: Screen) -> list[Row]:
    """Run one point, or read what it found before.

    Args:
        point: what to run.
        screen: where progress is shown.

    Returns:
        Its rows in the result tables: of the command kernel one per kind, of spectrum one per set
        of layers; that of finetune has the rows of its curve beside.
    """
    rows = _RUN[point.command](point.compose(), screen)
    return [{**row, "arm": point.arm} for row in rows]


def _run_kernel(run: ComposedRun, screen: Screen) -> list[Row]:
    from raykernel.pipeline import kernel, result_key

    prepared = kernel(run.config, run.overrides, screen).prepared
    store = Store(run.config.store.path)
    kinds = run.config.kernel.kinds
    return [row for kind in kinds for row in store.rows("kernels", **result_key(prepared, kind))]


def _run_spectrum(run: ComposedRun, screen: Screen) -> list[Row]:
    from raykernel.spectra import result_rows, spectra

    found = spectra(run.config, run.overrides, screen)
    store, key = Store(run.config.store.path), TABLES["spectra"].key
    files = [{name: rows[0][name] for name in key} for rows in result_rows(found, run.overrides)]
    return [row for one in files for row in store.rows("spectra", **one)]


def _run_finetune(run: ComposedRun, screen: Screen) -> list[Row]:
    from raykernel.trials import run_trial

    if run.config.training.twin:
        from raykernel.twins import run_twin

        return run_twin(run.config, run.overrides, screen).rows
    found = run_trial(run.config, run.overrides, screen)
    return [{**found.row, "curve": found.curve}]


def _run_behavior(run: ComposedRun, screen: Screen) -> list[Row]:
    from raykernel.behavior import behavior, result_row

    return [result_row(behavior(run.config, run.overrides, screen), run.overrides)]


_RUN: dict[Command, Callable[[ComposedRun, Screen], list[Row]]] = {
    Command.kernel: _run_kernel,
    Command.spectrum: _run_spectrum,
    Command.finetune: _run_finetune,
    Command.behavior: _run_behavior,
}


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
    screen.out.print(
        f"{counted(plan.count(), 'run')}" + (f", all with {fixed}" if fixed else ""), markup=False
    )


def show(plan: Plan, found: Sequence[Done], screen: Screen) -> int:
    """Print the study's table, then what failed.

    Args:
        plan: what was run.
        found: every point.
        screen: where to print.

    Returns:
        The exit code.
    """
    study, total = plan.study, plan.count()
    rows = [row for done in found for row in done.rows]
    failed = [done for done in found if done.error]
    screen.out.print(f"\n{study.question}", markup=False)
    for sheet in study.table(rows, compare=plan.compare):
        screen.table(sheet.columns, sheet.rows, title=sheet.title)
        if sheet.note:
            screen.out.print(sheet.note, markup=False)
    if any(row.get("prompt") == PromptStyle.none.value for row in rows):
        screen.note("runs without a prompt start from a linear probe, not from 0-shot.")
    if rows and not plan.compare and getattr(study.table, "paper", None) is not None:
        screen.note("the setting is not the paper's, so that its numbers are not shown.")
    left_out = total - len(found)
    screen.out.print(
        f"{study.name}: {len(found) - len(failed)} of {total} runs are complete"
        + (f", {len(failed)} failed" if failed else "")
        + (f", {left_out} could not begin" if left_out else "")
        + ". The same command computes only what is missing.",
        markup=False,
    )
    for done in failed:
        screen.say(f"  {done.point.text}: {done.error.splitlines()[0]}")
    return 1 if failed else 0
