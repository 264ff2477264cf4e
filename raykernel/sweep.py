"""`raykernel sweep NAME`: run the points of a study one after the other and print its table.

    sweeps/NAME.py → Study + command line → Plan → points → engine → rows → sheets

A point is a command and its overrides, nothing else. Points end in the result tables of the store,
by the stages of their own command, so that a point whose result is stored computes nothing and a
study that was killed goes on. Whatever runs points is an `Engine`.
"""

from __future__ import annotations

import importlib.util
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from raykernel.compose import ComposedRun, check_spelling, compose_runs, explain, quote_null_prompt
from raykernel.console import Screen, counted
from raykernel.errors import InputError, RaykernelError, nearest
from raykernel.published import sweeps_dir
from raykernel.store.blocks import Store
from raykernel.study import Arm, Row, Study, best_on_dev
from raykernel.terms import Command

USER_FOLDER = Path("sweeps")
"""A user's own studies, below the working folder."""

_NOT_THE_SETTING = ("store", "compute")
"""Groups that change no result."""
_SOURCES = {"task.data_dir"}
"""Keys that change where the same data comes from."""


# ---------------------------------------------------------------- studies in files


def study_files() -> dict[str, Path]:
    """Files of studies by name: the package's, then those of `./sweeps`, which come first."""
    found = {}
    for folder in (sweeps_dir(), USER_FOLDER):
        found |= {path.stem: path for path in sorted(folder.glob("*.py"))}
    return found


def load_study(name: str) -> Study:
    """Read a study.

    Its file is Python and is run, so only the package's own folder and `./sweeps` are looked in.

    Args:
        name: of its file, without ending; its first word is enough.

    Returns:
        The study.

    Raises:
        InputError: if there is no such study, or its file defines none.
    """
    studies = study_files()
    # The first word is enough where only one study has it: table2.
    short = [stem for stem in studies if stem.split("_")[0] == name]
    if name not in studies and len(short) == 1:
        (name,) = short
    if name not in studies:
        raise InputError(
            f"Unknown study {name!r}: {nearest(name, studies)} `raykernel sweep` lists all; your "
            f"own lie in ./{USER_FOLDER}."
        )
    path = studies[name]
    spec = importlib.util.spec_from_file_location(f"raykernel_sweep_{name}", path)
    assert spec is not None, "the file ends in .py"
    assert spec.loader is not None, "it is a file"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise InputError(
            f"{path}: found {type(error).__name__}: {error}. Expected Python that defines "
            "`study = raykernel.study.Study(...)`."
        ) from error
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise InputError(
            f"{path}: found no `study`, expected `study = raykernel.study.Study(...)` in it."
        )
    return replace(study, name=name)


def list_studies(screen: Screen) -> None:
    """Print every study with its question."""
    rows = [[name, load_study(name).question] for name in study_files()]
    screen.table(["study", "question"], rows)
    screen.out.print("Next: raykernel sweep NAME experiment=demo", markup=False)


# ---------------------------------------------------------------- what is to be run


@dataclass(frozen=True, slots=True)
class Point:
    """One run of one arm."""

    arm: str
    command: Command
    overrides: tuple[str, ...]
    own: tuple[str, ...]
    """Those of them that dev selects among."""
    cell: tuple[str, ...]
    """Those that every arm is repeated over."""

    @property
    def text(self) -> str:
        """What a person is shown."""
        return f"{self.arm}: {' '.join((*self.cell, *self.own))}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A study with the command line applied."""

    study: Study
    fixed: Mapping[str, str]
    """Overrides of all points, by key."""
    space: Mapping[str, Sequence[str]]
    """Overrides of every shared axis."""
    own: Mapping[str, Mapping[str, Sequence[str]]]
    """By arm, those of the axes that dev selects among."""
    compare: bool
    """The setting is the study's own, so that the paper's numbers are of the same."""

    def cells(self) -> list[tuple[str, ...]]:
        """Combinations that every arm is repeated over."""
        return list(itertools.product(*self.space.values()))

    def points(self, arm: Arm, cell: tuple[str, ...]) -> list[Point]:
        """Runs of an arm in a cell, over its own hyperparameters."""
        every = itertools.product(*self.own[arm.name].values())
        return [self.point(arm, cell, own) for own in every]

    def point(self, arm: Arm, cell: tuple[str, ...], own: tuple[str, ...]) -> Point:
        """One run."""
        settings = [f"{key}={value}" for key, value in arm.settings.items()]
        overrides = (*self.fixed.values(), *settings, *cell, *own)
        return Point(arm.name, arm.command, overrides, own, cell)

    def count(self) -> int:
        """Runs of all arms together."""
        arms = self.study.arms
        return len(self.cells()) * sum(1 if a.like else len(self.points(a, ())) for a in arms)


def make_plan(study: Study, arguments: Sequence[str]) -> Plan:
    """Apply a command line to a study: it fixes or widens the space.

    Args:
        study: as its file has it.
        arguments: Hydra overrides; several values only of keys that the study varies.

    Returns:
        What to run.

    Raises:
        InputError: if an override cannot be read, or is of what the study holds fixed.
    """
    check_spelling(list(arguments))
    given = [values_of(quote_null_prompt(argument)) for argument in arguments]
    chosen = dict(given)
    space, base, arms = dict(study.space), dict(study.base), list(study.arms)
    compare = all(_keeps_setting(key, study) for key in chosen)
    if chosen.get("experiment") == ["experiment=demo"]:
        del chosen["experiment"]
        dropped = {key for key, value in study.demo.items() if value is None}
        base = {key: value for key, value in base.items() if key not in dropped}
        space = {key: value for key, value in space.items() if key not in dropped}
        arms = [replace(arm, space=arm.demo) for arm in arms]
        texts = [f"{key}={value}" for key, value in study.demo.items() if value is not None]
        chosen = dict(values_of(quote_null_prompt(text)) for text in texts) | chosen
    axes = {*space, *(key for arm in arms for key in arm.space)}
    for key, values in chosen.items():
        for arm in arms:
            if key in arm.settings:
                raise InputError(
                    f"{key}: the study {study.name} sets it to {arm.settings[key]} for its method "
                    f"{arm.name!r}. Drop it, or run `raykernel {arm.command.value}`."
                )
        if len(values) > 1 and key not in axes:
            raise InputError(
                f"{key}: found {len(values)} values, expected one, because the study "
                f"{study.name} varies only {', '.join(sorted(axes))}."
            )
    shared = _axes(space, chosen)
    own = {arm.name: _axes(arm.space, chosen) for arm in arms}
    used = {*shared, *(key for axis in own.values() for key in axis)}
    fixed = {key: f"{key}={value}" for key, value in base.items()}
    fixed |= {key: values[0] for key, values in chosen.items() if key not in used}
    return Plan(replace(study, arms=arms), fixed, shared, own, compare)


def values_of(argument: str) -> tuple[str, list[str]]:
    """One override in Hydra's sweep grammar as a key and a plain override per value.

    Args:
        argument: `task=sst2,mr` or `task.k=range(1,4)`, for example.

    Returns:
        The key and its overrides.

    Raises:
        InputError: if it cannot be read, or is an interval.
    """
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise InputError(explain(error, [argument])) from error
    key = str(override.get_key_element())
    if not override.is_sweep_override():
        return key, [argument]
    if not override.is_discrete_sweep():
        raise InputError(
            f"{argument!r}: found an interval, expected values: every point of the space is run. "
            f"List some, as in {key}=1e-4,1e-3."
        )
    return key, [f"{key}={value}" for value in override.sweep_string_iterator()]


def _axes(space: Mapping[str, str], chosen: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Overrides by key of a space, the command line's where it has some."""
    return {
        key: chosen.get(key) or values_of(quote_null_prompt(f"{key}={values}"))[1]
        for key, values in space.items()
    }


def _keeps_setting(key: str, study: Study) -> bool:
    return key in study.space or key in _SOURCES or key.split(".")[0] in _NOT_THE_SETTING


def check(plan: Plan) -> None:
    """Compose every override once, so that a wrong one is said before anything runs.

    Args:
        plan: what to run.
    """
    seen: set[str] = set()
    for arm in plan.study.arms:
        model = plan.study.arm(arm.like) if arm.like else arm
        for cell in plan.cells():
            for own in itertools.product(*plan.own[model.name].values()):
                point = plan.point(arm, cell, own)
                new = {f"{arm.name} {text}" for text in point.overrides}
                if not new <= seen:
                    seen |= new
                    compose_point(point)


def compose_point(point: Point) -> ComposedRun:
    """The resolved configuration of a point."""
    (run,) = compose_runs(point.command.value, list(point.overrides))
    return run


# ---------------------------------------------------------------- running it


@dataclass(frozen=True, slots=True)
class Done:
    """A point that has been run."""

    point: Point
    rows: list[Row]
    error: str = ""
    """Why it failed; empty if it did not."""


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
    """The engine that runs one point after the other in this process."""
    for point in points:
        try:
            yield Done(point, run(point))
        except RaykernelError as error:
            yield Done(point, [], str(error))
        except Exception as error:
            traceback.print_exception(error)
            yield Done(point, [], f"{type(error).__name__}: {error}")


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
        Its rows in the result tables; of the command kernel one per kind.
    """
    rows = _RUN[point.command](compose_point(point), screen)
    return [{**row, "arm": point.arm} for row in rows]


def _run_kernel(run: ComposedRun, screen: Screen) -> list[Row]:
    from raykernel.pipeline import kernel, result_key

    prepared = kernel(run.config, run.overrides, screen).prepared
    store = Store(run.config.store.path)
    kinds = run.config.kernel.kinds
    return [row for kind in kinds for row in store.rows("kernels", **result_key(prepared, kind))]


def _run_finetune(run: ComposedRun, screen: Screen) -> list[Row]:
    from raykernel.trials import run_trial

    return [run_trial(run.config, run.overrides, screen).row]


def _run_behavior(run: ComposedRun, screen: Screen) -> list[Row]:
    from raykernel.behavior import behavior, result_row

    return [result_row(behavior(run.config, run.overrides, screen), run.overrides)]


_RUN: dict[Command, Callable[[ComposedRun, Screen], list[Row]]] = {
    Command.kernel: _run_kernel,
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
    if not arguments or arguments[0] in {"-h", "--help"}:
        screen.out.print("usage: raykernel sweep NAME [overrides]\n", markup=False)
        list_studies(screen)
        return 0
    study = load_study(arguments[0])
    asked = [argument for argument in arguments[1:] if argument not in {"-h", "--help"}]
    plan = make_plan(study, asked)
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
    study = plan.study
    every = [["every method", "", _spelt(plan.space)]]
    own = [
        [arm.name, arm.command.value, f"as selected for {arm.like}" if arm.like else ""]
        if arm.like or not plan.own[arm.name]
        else [arm.name, arm.command.value, _spelt(plan.own[arm.name])]
        for arm in study.arms
    ]
    screen.table(["method", "command", "space"], [*every, *own], title=study.question)
    fixed = " ".join(plan.fixed.values())
    screen.out.print(
        f"{counted(plan.count(), 'run')}; all with {fixed or 'the defaults'}", markup=False
    )


def _spelt(space: Mapping[str, Sequence[str]]) -> str:
    """Axes as one would type them."""
    return " ".join(
        f"{key}={','.join(text.split('=', 1)[1] for text in texts)}" for key, texts in space.items()
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
    study = plan.study
    rows = [row for done in found for row in done.rows]
    failed = [done for done in found if done.error]
    screen.out.print(f"\n{study.question}", markup=False)
    for sheet in study.table(rows, compare=plan.compare):
        screen.table(sheet.columns, sheet.rows, title=sheet.title)
    if rows and not plan.compare:
        screen.say("The setting is not the paper's, so that its numbers are not shown.")
    left_out = plan.count() - len(found)
    screen.out.print(
        f"{study.name}: {len(found) - len(failed)} of {plan.count()} runs are complete"
        + (f", {len(failed)} failed" if failed else "")
        + (f", {left_out} could not begin" if left_out else "")
        + ". The same command completes what is missing and computes nothing twice."
    )
    for done in failed:
        screen.say(f"  {done.point.text}: {done.error.splitlines()[0]}")
    return 1 if failed else 0
