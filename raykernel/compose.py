"""From the command line to a RunConfig: the only place that knows Hydra, with cli.py.

Hydra composes YAML and overrides; the result is checked against the dataclasses of config.py and
handed on as a frozen RunConfig. Whatever is wrong with an override ends as an InputError with
the nearest right names.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from raykernel.config import RunConfig
from raykernel.errors import InputError, nearest

_SWITCHES = {"-m", "--multirun", "-r", "--run", "-h", "--help", "--hydra-help", "--version"}
_SWITCHES |= {"--resolve", "-sc", "--shell-completion"}
"""Flags of Hydra that take no value."""


@dataclass(frozen=True, slots=True)
class ComposedRun:
    """One resolved configuration and the overrides that made it."""

    config: RunConfig
    overrides: tuple[str, ...]


def conf_dir() -> Path:
    """Folder of the shipped configuration: inside the wheel, or at the top of a checkout."""
    packaged = Path(str(files("raykernel"))) / "conf"
    inside = (packaged / "config.yaml").is_file()
    return packaged if inside else Path(__file__).resolve().parent.parent / "conf"


def compose_runs(command: str, arguments: list[str]) -> list[ComposedRun]:
    """The runs that a command line asks for: one, or with `-m` every combination.

    `--cfg job`, `--hydra-help` and the like print and end the program, as Hydra users expect.

    Args:
        command: name of the command, for messages.
        arguments: what follows it on the command line.

    Returns:
        The resolved configurations in sweep order.

    Raises:
        InputError: if an override or a file is wrong.
        BrokenPipeError: if nobody reads the help.
    """
    check_spelling(arguments)
    arguments = flags_first([quote_null_prompt(argument) for argument in arguments])
    if grid := _grid(arguments):
        return [compose_point(command, point) for point in grid]
    register_schema()
    collected: list[tuple[DictConfig, tuple[str, ...]]] = []

    def collect(config: DictConfig) -> None:
        collected.append((config, tuple(HydraConfig.get().overrides.task)))

    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    with tempfile.TemporaryDirectory() as scratch, hydra_errors_propagate(command, arguments):
        sys.argv += [
            f"hydra.sweep.dir={scratch}",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
        try:
            entry(collect)()
        except BrokenPipeError:  # `--help | head`
            raise
        except Exception as error:  # only Hydra runs here, and it raises many types
            raise InputError(explain(error, arguments)) from error
        finally:
            GlobalHydra.instance().clear()
    return [ComposedRun(typed(config), overrides) for config, overrides in collected]


def _grid(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of a `-m` that says nothing else to Hydra; of another command line none.

    Hydra's sweeper composes each from its files, which takes a quarter of a second.

    Args:
        arguments: a command line, flags first.

    Returns:
        Overrides of one value each.

    Raises:
        InputError: for an interval.
    """
    flag, *texts = arguments or [""]
    if flag not in ("-m", "--multirun") or any(text.startswith("-") for text in texts):
        return []
    lists: dict[str, list[str]] = {}  # a key given twice has the last of its values
    try:
        for text in texts:
            override = _parsed(text)
            key = str(override.get_key_element())
            lists[key] = [text]
            if override.is_discrete_sweep():
                lists[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            elif override.is_sweep_override():
                raise InputError(
                    f"{text}: found an interval, expected values, because -m runs every "
                    f"combination. List some, as in {key}=1e-4,1e-3; a study (`raykernel sweep`) "
                    "can draw from an interval."
                )
    except HydraException:  # Hydra says what is wrong
        return []
    of_hydra = any(key.lstrip("+~").startswith("hydra") for key in lists)
    return [] if of_hydra else list(itertools.product(*lists.values()))


def compose_point(command: str, arguments: Sequence[str]) -> ComposedRun:
    """One run, as `compose_runs`, at a thousandth of its cost after others like it.

    Hydra composes choices of groups once per process. A group's object is made once of its values,
    and is that of every run that has the same: a grid of runs has far fewer of them than runs.

    Args:
        command: name of the command, for messages.
        arguments: overrides of one run, of one value each.

    Returns:
        The resolved configuration.

    Raises:
        InputError: if an override is wrong.
    """
    check_spelling(list(arguments))
    quoted = tuple(quote_null_prompt(argument) for argument in arguments)
    chosen = {*groups(), "experiment"}
    choices: list[str] = []
    values: dict[str, list[str]] = {}
    try:
        for text in quoted:
            key = str(_parsed(text).get_key_element())
            (choices if key in chosen else values.setdefault(key.split(".")[0], [])).append(text)
        names = [item.name for item in fields(RunConfig)]
        if values.keys() <= set(names):
            made = {
                name: _group(tuple(choices), name, tuple(values.get(name, ()))) for name in names
            }
            return ComposedRun(RunConfig(**made), quoted)
    except InputError:
        raise
    except Exception:  # only Hydra runs here, and it raises many types
        pass
    (run,) = compose_runs(command, list(arguments))  # which says what is wrong
    return run


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Override:
    """One override; those of a study repeat in all of its runs."""
    (override,) = OverridesParser.create().parse_overrides([text])
    return override


def _group(choices: tuple[str, ...], name: str, values: tuple[str, ...]) -> Any:
    """The object of one group.

    Args:
        choices: of groups.
        name: of the group.
        values: overrides of keys in it, in the order in which Hydra sets them.

    Returns:
        An object of the type that the group has in `RunConfig`.
    """
    if _depends_on_environment(choices, name):
        return _resolved(choices, name, values)
    return _known_group(choices, name, values)


@lru_cache(maxsize=4096)
def _known_group(choices: tuple[str, ...], name: str, values: tuple[str, ...]) -> Any:
    return _resolved(choices, name, values)


def _resolved(choices: tuple[str, ...], name: str, values: tuple[str, ...]) -> Any:
    group = copy.deepcopy(_composed(*choices)[name])
    for override in map(_parsed, values):
        key = str(override.get_key_element())
        OmegaConf.update(group, key.removeprefix(f"{name}."), override.value(), merge=True)
    return _objects(group)


@lru_cache(maxsize=4096)
def _depends_on_environment(choices: tuple[str, ...], name: str) -> bool:
    """Whether a value of a group is looked up anew by each run."""
    return "${" in OmegaConf.to_yaml(_composed(*choices)[name])


@lru_cache(maxsize=256)
def _composed(*choices: str) -> DictConfig:
    """What Hydra composes of choices of groups, not to be changed."""
    register_schema()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(choices))


@contextlib.contextmanager
def hydra_errors_propagate(command: str, arguments: list[str]) -> Iterator[None]:
    """Give Hydra its arguments, and its exceptions to us instead of a printed traceback.

    Hydra reads `sys.argv` and, without HYDRA_FULL_ERROR, prints an error and exits with 1; a
    user's mistake must exit with 2.
    """
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"raykernel {command}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def register_schema() -> None:
    """Make the typed tree of config.py the first entry of the defaults list."""
    schema = OmegaConf.structured(RunConfig)
    make_writable(schema)
    ConfigStore.instance().store(name="schema", node=schema)


def make_writable(node: DictConfig) -> None:
    """Clear the read-only flags of frozen dataclasses, and let plain mappings take any key."""
    OmegaConf.set_readonly(node, False)
    if not is_dataclass(OmegaConf.get_type(node)):
        OmegaConf.set_struct(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            make_writable(child)


def typed(config: DictConfig) -> RunConfig:
    """The frozen objects of a composed configuration, cross-field checks done.

    Args:
        config: what Hydra composed.

    Returns:
        The same content, typed.

    Raises:
        InputError: if a value has the wrong type, is missing, or contradicts another.
    """
    run = _objects(config)
    assert isinstance(run, RunConfig), "the schema is the first default"
    return run


def _objects(config: DictConfig) -> Any:
    """What a typed node stands for."""
    try:
        return OmegaConf.to_object(config)
    except (OmegaConfBaseException, FrozenInstanceError) as error:
        raise InputError(explain(error, [])) from error


def check_spelling(arguments: list[str]) -> None:
    """Catch what Hydra's own message would not explain.

    Raises:
        InputError: for `lambda=`.
    """
    for argument in arguments:
        key = argument.split("=", 1)[0].lstrip("+~")
        if key.split(".")[-1] == "lambda" and "=" in argument:
            raise InputError(
                f"{argument!r}: the papers' λ is spelt `lam` in every key, because `lambda` is a "
                "Python keyword: `regularization=coupled regularization.lam=...` pulls fine-tuning "
                "to its start. The ridge of kernel regression is `solver.ridge`."
            )


def flags_first(arguments: list[str]) -> list[str]:
    """The same arguments, flags and their values before overrides.

    Hydra's parser reads overrides in one piece, and ours follow the user's.

    Args:
        arguments: flags such as `-m` or `--cfg job` anywhere among overrides.

    Returns:
        Flags, then overrides, each in their order.
    """
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for argument in arguments:
        flag = argument.startswith("-")
        (flags if flag or takes_value else overrides).append(argument)
        takes_value = flag and argument not in _SWITCHES and "=" not in argument
    return flags + overrides


def quote_null_prompt(argument: str) -> str:
    """`prompt=null` names the null prompt, where Hydra would read YAML's nothing."""
    if not argument.startswith("prompt="):
        return argument
    return re.sub(r"(?<=[=,(])null(?=[,)]|$)", "'null'", argument)


def explain(error: Exception, arguments: list[str]) -> str:
    """What was wrong with a command line, in our words.

    Args:
        error: what Hydra or OmegaConf raised.
        arguments: the command line.

    Returns:
        What was found, what was expected and what to do.
    """
    if isinstance(error, MissingConfigException):
        return explain_missing(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read: {first_line(error)}. Values with spaces, braces "
            "or commas need inner quotes, and the shell needs outer ones: "
            "'prompt.template=\"{review} It was {label}.\"'"
        )
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) else error
    several = re.search(r"Ambiguous value for argument '([^=']+)=([^']*)'", str(error))
    if several:
        key, values = several.groups()
        return (
            f"{key}={values}: found several values, expected one. Add -m for a run of each, or "
            f"write {key}=[{values}] for a list."
        )
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown:
        key = unknown.group(1).split("@")[0]
        if key in schema_keys(RunConfig) and cause is not None:
            return f"{key}: {first_line(cause)}."
        return f"Unknown key {key!r}: {near_keys(key)}"
    if isinstance(error, FrozenInstanceError):
        key = re.sub(r".*'([^']+)'.*", r"\1", str(error))
        return f"Unknown key {key!r} after '+': {near_keys(key)}"
    key = getattr(cause, "full_key", None)
    if isinstance(cause, MissingMandatoryValue):
        return f"{key}: found nothing, expected a value: {key}=..."
    text = first_line(cause or error) if key else str(error).strip()
    return f"{key}: {text}." if key else f"{text} (in: {' '.join(arguments)})"


def near_keys(key: str) -> str:
    """The likeliest keys for a wrong one: those with the same last word first."""
    known = [*schema_keys(RunConfig), *groups()]
    leaf = key.split(".")[-1]
    same_leaf = [name for name in known if name.split(".")[-1] == leaf]
    near = same_leaf or get_close_matches(key, known, n=3, cutoff=0.6)
    if near:
        return nearest(key, near) if not same_leaf else f"did you mean {' or '.join(same_leaf)}?"
    return "`raykernel kernel --cfg job` prints every key there is."


def explain_missing(error: MissingConfigException) -> str:
    """An unknown choice of a group, with the choices."""
    wanted = str(error.missing_cfg_file or "")
    group, _, choice = wanted.rpartition("/")
    options = list(error.options or [])
    if not group:
        return f"Unknown configuration {wanted!r}: {nearest(wanted, options)}"
    listed = ", ".join(sorted(options))
    if get_close_matches(choice, options, cutoff=0.5):
        expected = f"{nearest(choice, options)} All of conf/{group}: {listed}."
    else:
        expected = f"choose one of conf/{group}: {listed}."
    return f"Unknown {group} {choice!r}: {expected}"


def first_line(error: BaseException) -> str:
    """The first line of an error message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def schema_keys(schema: type, prefix: str = "") -> list[str]:
    """Dotted paths of every key of the schema."""
    hints = get_type_hints(schema)
    keys = []
    for item in fields(schema):
        keys.append(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys += schema_keys(hints[item.name], f"{prefix}{item.name}.")
    return keys


@lru_cache(maxsize=1)
def groups() -> list[str]:
    """Configuration groups, that is, folders of conf/."""
    return [path.name for path in conf_dir().iterdir() if path.is_dir()]
