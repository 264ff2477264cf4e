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
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from raykernel.conduct import Done, arm_points, run_study
from raykernel.console import Screen, counted
from raykernel.errors import InputError, nearest
from raykernel.published import sweeps_dir
from raykernel.search import check_settings
from raykernel.space import Plan, check, make_plan, spelt
from raykernel.study import Study
from raykernel.summary import best_choices
from raykernel.terms import PromptStyle, RunStatus

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
    name = full_name(name, files, f"`raykernel sweep` lists all; your own lie in ./{USER_FOLDER}.")
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


def full_name(name: str, known: Collection[str], where: str) -> str:
    """The name of a study, of which the first word is enough where no other has it.

    Args:
        name: what the user wrote.
        known: studies that there are.
        where: they are, for the message.

    Returns:
        One of them.

    Raises:
        InputError: if none is meant.
    """
    if name in known:
        return name
    short = [study for study in known if study.split("_")[0] == name]
    if len(short) != 1:
        either = {*known, *(study.split("_")[0] for study in known)}
        raise InputError(f"Unknown study {name!r}: {nearest(name, either)} {where}")
    return short[0]


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


# ---------------------------------------------------------------- the command


def sweep(
    arguments: Sequence[str], screen: Screen, report: Callable[[str, str], Path] | None = None
) -> int:
    """`raykernel sweep [NAME [overrides]]`.

    Args:
        arguments: what follows the command.
        screen: where to print.
        report: writes the page of a store and a study, where `sweep.report` asks for it.

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
    code = show(plan, run_study(plan, screen), screen)
    if report is not None and plan.settings().report:
        page = report(str(plan.store_path()), plan.study.name)
        screen.out.print(f"The page: {page}", markup=False)
    return code


def _count(plan: Plan, found: Sequence[Done]) -> int:
    """Runs that the study has, now that the arms which others wait for have ended."""
    settings, total = plan.settings(), 0
    for arm in plan.study.arms:
        if plan.is_searched(arm, settings):  # choices can coincide
            total += sum(done.point.arm == arm.name for done in found)
        elif arm.choose is None:
            total += len(plan.cells()) * (1 if arm.like else len(plan.points(arm, ())))
        else:
            own = arm_points(plan, arm, found)
            empty = len(plan.cells()) - len({point.cell for point in own})
            total += len(own) + empty * arm.num_chosen
    return total


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
    total = _count(plan, found)
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
