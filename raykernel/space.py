"""From a study and a command line to the points that are run.

    study + overrides → Plan: cells (task, k, seed …) × arms × an arm's own hyperparameters → Point

Values are spelt in Hydra's sweep grammar (`a,b`, `choice()`, `range()`), as after `raykernel
kernel -m`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from raykernel.compose import ComposedRun, check_spelling, compose_runs, explain, quote_null_prompt
from raykernel.errors import InputError
from raykernel.study import Arm, Study
from raykernel.terms import Command

_COMPARED = {"task", "task.k", "task.seed", "prompt", "model"}
"""Keys that a published number says itself what it is of, or that only choose its samples."""
_HARMLESS = {"task.data_dir", "store", "compute"}
"""Keys and groups that say where data and results are, and how to compute."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run of one arm: a command and its overrides, nothing else."""

    arm: str
    command: Command
    overrides: tuple[str, ...]
    cell: tuple[str, ...]
    """Those of them that every arm is repeated over."""
    own: tuple[str, ...]
    """Those that dev selects among."""

    @property
    def text(self) -> str:
        """What a person is shown."""
        chosen = " ".join((*self.cell, *self.own))
        return f"{self.arm}: {chosen}" if chosen else self.arm

    def compose(self) -> ComposedRun:
        """Its resolved configuration."""
        (run,) = compose_runs(self.command.value, list(self.overrides))
        return run


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
    """The setting is the paper's, as far as its numbers do not say themselves what they are of."""

    def cells(self) -> list[tuple[str, ...]]:
        """Combinations that every arm is repeated over."""
        return list(itertools.product(*self.space.values()))

    def points(self, arm: Arm, cell: tuple[str, ...]) -> list[Point]:
        """Runs of an arm in a cell, over its own hyperparameters."""
        every = itertools.product(*self.own[arm.name].values())
        return [self.point(arm, cell, own) for own in every]

    def point(self, arm: Arm, cell: tuple[str, ...], own: tuple[str, ...]) -> Point:
        """One run of an arm."""
        settings = [f"{key}={value}" for key, value in arm.settings.items()]
        overrides = (*self.fixed.values(), *settings, *cell, *own)
        return Point(arm.name, arm.command, overrides, cell, own)

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
    """
    check_spelling(list(arguments))
    chosen = dict(values_of(argument) for argument in arguments)
    compare = all(_keeps_setting(key) for key in chosen)
    if "experiment" in chosen:
        study, chosen = _as_demo(study, chosen)
    _check_keys(study, chosen)
    shared = _axes(study.space, chosen)
    own = {arm.name: _axes(arm.space, chosen) for arm in study.arms}
    used = {*shared, *(key for axes in own.values() for key in axes)}
    fixed = {key: f"{key}={value}" for key, value in study.base.items()}
    fixed |= {key: values[0] for key, values in chosen.items() if key not in used}
    return Plan(study, fixed, shared, own, compare)


def values_of(argument: str) -> tuple[str, list[str]]:
    """One override in Hydra's sweep grammar as a key and a plain override per value.

    Args:
        argument: `task=sst2,mr` or `task.k=range(1,4)`, for example.

    Returns:
        The key and its overrides.

    Raises:
        InputError: if it cannot be read, or is an interval.
    """
    argument = quote_null_prompt(argument)
    try:
        (override,) = OverridesParser.create().parse_overrides([argument])
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


def check(plan: Plan) -> None:
    """Compose every override once, so that a wrong one is said before anything runs.

    All axes advance together: as many configurations as the longest axis has values are enough.

    Args:
        plan: what to run.
    """
    seen: set[str] = set()
    for arm in plan.study.arms:
        own = plan.own[arm.like or arm.name]
        for step in range(max(map(len, (*plan.space.values(), *own.values())), default=1)):
            cell, choice = (
                tuple(values[step % len(values)] for values in axes.values())
                for axes in (plan.space, own)
            )
            point = plan.point(arm, cell, choice)
            if not seen.issuperset(point.overrides):
                seen.update(point.overrides)
                point.compose()


def spelt(axes: Mapping[str, Sequence[str]]) -> str:
    """Axes as one would type them."""
    return " ".join(
        f"{key}={','.join(text.split('=', 1)[1] for text in texts)}" for key, texts in axes.items()
    )


def _as_demo(study: Study, chosen: Mapping[str, list[str]]) -> tuple[Study, dict[str, list[str]]]:
    """The study at the size of minutes, and the command line over it."""
    if chosen["experiment"] != ["experiment=demo"]:
        raise InputError(
            f"{','.join(chosen['experiment'])}: expected experiment=demo, because a study sets "
            "task and model itself. Give those keys of the experiment that you want."
        )
    if not study.demo:
        raise InputError(
            f"experiment=demo: {study.name} has no demo, expected demo=... in its file. Add it."
        )
    kept = {key: values for key, values in chosen.items() if key != "experiment"}
    texts = [f"{key}={value}" for key, value in study.demo.items() if value is not None]
    small = replace(
        study,
        space={key: v for key, v in study.space.items() if study.demo.get(key, v) is not None},
        base={key: v for key, v in study.base.items() if study.demo.get(key, v) is not None},
        arms=[replace(arm, space=arm.demo) for arm in study.arms],
    )
    return small, dict(values_of(text) for text in texts) | kept


def _check_keys(study: Study, chosen: Mapping[str, list[str]]) -> None:
    """Refuse keys that tell the arms apart, and several values of a key that is no axis.

    Raises:
        InputError: for the first such key.
    """
    axes = {*study.space, *(key for arm in study.arms for key in arm.space)}
    for key, values in chosen.items():
        for arm in study.arms:
            if key in arm.settings:
                raise InputError(
                    f"{key}: {study.name} sets it to {arm.settings[key]} for its method "
                    f"{arm.name!r}. Drop it, or run `raykernel {arm.command.value}`."
                )
        if len(values) > 1 and key not in axes:
            raise InputError(
                f"{key}: found {len(values)} values, expected one, because {study.name} varies "
                f"only {', '.join(sorted(axes))}."
            )


def _axes(space: Mapping[str, str], chosen: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Overrides by key of a space, the command line's where it has some."""
    return {
        key: chosen.get(key) or values_of(f"{key}={values}")[1] for key, values in space.items()
    }


def _keeps_setting(key: str) -> bool:
    return key in _COMPARED or key in _HARMLESS or key.split(".")[0] in _HARMLESS
