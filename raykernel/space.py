"""From a study and a command line to the points that are run.

    study + overrides → Plan: cells (task, k, seed …) × arms × an arm's own hyperparameters → Point

Values are spelt in Hydra's sweep grammar (`a,b`, `choice()`, `range()`), as after `raykernel
kernel -m`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException

from raykernel.compose import (
    ComposedRun,
    check_spelling,
    compose_point,
    explain,
    groups,
    near_keys,
    quote_null_prompt,
    schema_keys,
)
from raykernel.config import RunConfig, SweepConfig
from raykernel.errors import InputError
from raykernel.location import StorePath, location
from raykernel.study import Arm, Study
from raykernel.terms import Command

_COMPARED = {"task", "task.k", "task.seed", "prompt", "model"}
"""Keys that a published number says itself what it is of, or that only choose its samples."""
_HARMLESS = {"task.data_dir", "store", "compute", "sweep"}
"""Keys and groups that say where data and results are, and how to compute."""


@dataclass(frozen=True, slots=True)
class Axis:
    """What one key of a space can be: values, or any number between two."""

    key: str
    values: tuple[str, ...] = ()
    """As texts of an override; none for an interval."""
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    """Drawn evenly by magnitude."""
    is_int: bool = False

    @property
    def is_interval(self) -> bool:
        """Whether it has no list of values."""
        return not self.values

    @property
    def overrides(self) -> list[str]:
        """An override per value.

        Returns:
            Texts for the command line.

        Raises:
            InputError: of an interval.
        """
        if self.is_interval:
            raise InputError(
                f"{self.key}={self.text}: found an interval, expected values, because every point "
                f"of the space is run. List some, as in {self.key}=1e-4,1e-3, or draw from it with "
                "sweep=random or sweep=tpe."
            )
        return [self.override(value) for value in self.values]

    def override(self, value: str | int | float) -> str:
        """The override of one value; of a number drawn from an interval four digits."""
        return f"{self.key}={value:.4g}" if isinstance(value, float) else f"{self.key}={value}"

    @property
    def text(self) -> str:
        """As one would type it."""
        if not self.is_interval:
            return ",".join(self.values)
        ends = f"{self.low:g},{self.high:g}"
        return f"tag(log,interval({ends}))" if self.is_log else f"interval({ends})"


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
        return compose_point(self.command.value, self.overrides)


@dataclass(frozen=True)
class Plan:
    """A study with the command line applied."""

    study: Study
    fixed: Mapping[str, str]
    """Overrides of all points, by key."""
    space: Mapping[str, Axis]
    """Shared axes by key."""
    own: Mapping[str, Mapping[str, Axis]]
    """By arm, the axes that dev selects among."""
    asked: str
    """What of the command line decides results, the same whatever its order."""
    compare: bool
    """The setting is the paper's, as far as its numbers do not say themselves what they are of."""

    def cells(self) -> list[tuple[str, ...]]:
        """Combinations that every arm is repeated over."""
        return list(itertools.product(*(axis.overrides for axis in self.space.values())))

    def points(self, arm: Arm, cell: tuple[str, ...]) -> list[Point]:
        """Runs of an arm in a cell, over its own hyperparameters."""
        every = itertools.product(*(axis.overrides for axis in self.own[arm.name].values()))
        return [self.point(arm, cell, own) for own in every]

    def point(self, arm: Arm, cell: tuple[str, ...], own: tuple[str, ...]) -> Point:
        """One run of an arm."""
        settings = [f"{key}={value}" for key, value in arm.settings.items()]
        overrides = (*self.fixed.values(), *settings, *cell, *own)
        return Point(arm.name, arm.command, overrides, cell, own)

    def settings(self) -> SweepConfig:
        """How its runs are chosen and run."""
        return self._composed.config.sweep

    def store_path(self) -> StorePath:
        """The store of all runs."""
        return location(self._composed.config.store.path)

    @cached_property
    def _composed(self) -> ComposedRun:
        return self.point(self.study.arms[0], (), ()).compose()

    def cells_to_average(self, settings: SweepConfig) -> list[list[tuple[str, ...]]]:
        """Cells that differ only in axes over which a sampler's metrics are averaged, together."""
        kept = [i for i, key in enumerate(self.space) if key not in settings.average]
        found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for cell in self.cells():
            found.setdefault(tuple(cell[i] for i in kept), []).append(cell)
        return list(found.values())

    def is_searched(self, arm: Arm, settings: SweepConfig) -> bool:
        """Whether a sampler chooses an arm's own hyperparameters."""
        return bool(self.own[arm.name]) and not arm.is_derived and not settings.is_grid

    def count(self, settings: SweepConfig) -> int:
        """Runs of all arms together, as far as they are known before."""
        return len(self.cells()) * sum(self._count(arm, settings) for arm in self.study.arms)

    def _count(self, arm: Arm, settings: SweepConfig) -> int:
        if arm.is_derived:
            return arm.num_chosen
        if self.is_searched(arm, settings):
            return settings.trials or 0
        return len(self.points(arm, ()))


def make_plan(study: Study, arguments: Sequence[str]) -> Plan:
    """Apply a command line to a study: it fixes or widens the space.

    Args:
        study: as its file has it.
        arguments: Hydra overrides; several values only of keys that the study varies.

    Returns:
        What to run.
    """
    chosen = _chosen(arguments)
    begun_with = _deciding(chosen)
    compare = all(keeps_setting(key) for key in chosen)
    if "experiment" in chosen:
        study, chosen = _as_demo(study, chosen)
    _check_keys(study, chosen)
    shared = _axes(study.space, chosen)
    own = {arm.name: _axes(arm.space, chosen) for arm in study.arms}
    used = {*shared, *(key for axes in own.values() for key in axes)}
    fixed = {key: f"{key}={value}" for key, value in study.base.items()}
    fixed |= {key: axis.overrides[0] for key, axis in chosen.items() if key not in used}
    return Plan(study, fixed, shared, own, begun_with, compare)


def asked(arguments: Sequence[str]) -> str:
    """What of a command line decides the results of a study.

    Args:
        arguments: overrides, as for `make_plan`.

    Returns:
        Those that do not only say where and how to compute, by key.
    """
    return _deciding(_chosen(arguments))


def _deciding(chosen: Mapping[str, Axis]) -> str:
    return spelt({key: chosen[key] for key in sorted(chosen) if not is_harmless(key)})


def _chosen(arguments: Sequence[str]) -> dict[str, Axis]:
    """Axes of a command line by key."""
    check_spelling(list(arguments))
    return {axis.key: axis for axis in map(axis_of, arguments)}


def axis_of(argument: str) -> Axis:
    """One override in Hydra's sweep grammar.

    Args:
        argument: `task=sst2,mr`, `task.k=range(1,4)` or `training.learning_rate=tag(log,
            interval(1e-5,1e-3))`, for example.

    Returns:
        Its key and what it can be.

    Raises:
        InputError: if it cannot be read, or is an interval that is none.
    """
    argument = quote_null_prompt(argument)
    try:
        (override,) = OverridesParser.create().parse_overrides([argument])
    except HydraException as error:
        raise InputError(explain(error, [argument])) from error
    key = str(override.get_key_element())
    if not override.is_sweep_override():
        return Axis(key, (argument.split("=", 1)[1] if "=" in argument else "",))
    if override.is_discrete_sweep():
        return Axis(key, tuple(override.sweep_string_iterator()))
    interval = override.value()
    assert isinstance(interval, IntervalSweep), "neither one value nor a list"
    low, high, tags = interval.start, interval.end, interval.tags
    assert low is not None, "the parser wants both ends"
    assert high is not None, "the parser wants both ends"
    is_log = "log" in tags
    if not low < high or (is_log and low <= 0):
        raise InputError(
            f"{argument!r}: found {low:g} to {high:g}, expected two different numbers, the smaller "
            "one first" + (", both above 0 with tag(log, ...)." if is_log else ".")
        )
    return Axis(key, (), low, high, is_log, isinstance(low, int) and isinstance(high, int))


def check(plan: Plan) -> None:
    """Compose every override once, so that a wrong one is said before anything runs.

    All axes advance together: as many configurations as the longest axis has values are enough.

    Args:
        plan: what to run.
    """
    seen: set[str] = set()
    for arm in plan.study.arms:
        shared = [axis.overrides for axis in plan.space.values()]
        own = [_ends(axis) for axis in plan.own[arm.like or arm.name].values()]
        for step in range(max(map(len, (*shared, *own)), default=1)):
            cell, choice = (
                tuple(texts[step % len(texts)] for texts in axes) for axes in (shared, own)
            )
            point = plan.point(arm, cell, choice)
            if not seen.issuperset(point.overrides):
                seen.update(point.overrides)
                point.compose()


def _ends(axis: Axis) -> list[str]:
    """Overrides of all values, of an interval of both ends."""
    if not axis.is_interval:
        return axis.overrides
    return [axis.override(end) for end in (axis.low, axis.high)]


def spelt(axes: Mapping[str, Axis]) -> str:
    """Axes as one would type them."""
    return " ".join(f"{key}={axis.text}" for key, axis in axes.items())


def _as_demo(study: Study, chosen: Mapping[str, Axis]) -> tuple[Study, dict[str, Axis]]:
    """The study at the size of minutes, and the command line over it."""
    if chosen["experiment"].values != ("demo",):
        raise InputError(
            f"experiment={chosen['experiment'].text}: expected experiment=demo, because a study "
            "sets task and model itself. Give those keys of the experiment that you want."
        )
    if not study.demo:
        raise InputError(
            f"experiment=demo: {study.name} has no demo, expected demo=... in its file. Add it."
        )
    kept = {key: axis for key, axis in chosen.items() if key != "experiment"}
    texts = [f"{key}={value}" for key, value in study.demo.items() if value is not None]
    small = replace(
        study,
        space={key: v for key, v in study.space.items() if study.demo.get(key, v) is not None},
        base={key: v for key, v in study.base.items() if study.demo.get(key, v) is not None},
        arms=[replace(arm, space=arm.demo) for arm in study.arms],
    )
    return small, {axis.key: axis for axis in map(axis_of, texts)} | kept


def _check_keys(study: Study, chosen: Mapping[str, Axis]) -> None:
    """Refuse keys that tell the arms apart, and several values of a key that is no axis.

    Raises:
        InputError: for the first such key.
    """
    axes = {*study.space, *(key for arm in study.arms for key in arm.space)}
    known = {*schema_keys(RunConfig), *groups(), *_open_keys(chosen)}
    for key, axis in chosen.items():
        for arm in study.arms:
            if key in arm.settings:
                raise InputError(
                    f"{key}: {study.name} sets it to {arm.settings[key]} for its method "
                    f"{arm.name!r}. Drop it, or run `raykernel {arm.command.value}`."
                )
        if key not in known:
            raise InputError(f"Unknown key {key!r}: {near_keys(key)}")
        if len(axis.values) != 1 and key not in axes:
            found = f"{len(axis.values)} values" if axis.values else "an interval"
            raise InputError(
                f"{key}: found {found}, expected one, because {study.name} varies "
                f"only {', '.join(sorted(axes))}."
            )


def _open_keys(chosen: Mapping[str, Axis]) -> set[str]:
    """Keys below a mapping of any content, such as `prompt.words.0`."""
    known = schema_keys(RunConfig)
    leaves = {key for key in known if not any(other.startswith(f"{key}.") for other in known)}
    return {key for key in chosen if key.rpartition(".")[0] in leaves}


def _axes(space: Mapping[str, str], chosen: Mapping[str, Axis]) -> dict[str, Axis]:
    """Axes of a space by key, the command line's where it has some."""
    return {
        key: chosen[key] if key in chosen else axis_of(f"{key}={values}")
        for key, values in space.items()
    }


def is_harmless(key: str) -> bool:
    """Whether a key says where data and results are, or how to compute; not what."""
    return key in _HARMLESS or key.split(".")[0] in _HARMLESS


def keeps_setting(key: str) -> bool:
    """Whether the setting is the paper's whatever value a key has."""
    return key in _COMPARED or is_harmless(key)
