"""`raykernel COMMAND --help`: the groups and keys that a command reads, each with its meaning."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from raykernel.compose import conf_dir
from raykernel.config import RunConfig, plain
from raykernel.meanings import first_sentence, meanings

_PROBLEM = ("task", "prompt", "model", "parameters")
GROUPS = {
    "plan": (*_PROBLEM, "kernel", "solver", "compute", "store"),
    "doctor": (*_PROBLEM, "kernel", "compute", "store"),
    "kernel": (*_PROBLEM, "kernel", "solver", "compute", "sweep", "store"),
    "spectrum": (*_PROBLEM, "kernel", "spectrum", "compute", "sweep", "store"),
    "select": (*_PROBLEM, "kernel", "spectrum", "select", "compute", "sweep", "store"),
    "finetune": (*_PROBLEM, "training", "regularization", "compute", "sweep", "store"),
    "behavior": (
        *(*_PROBLEM, "kernel", "solver", "training", "regularization"),
        *("behavior", "compute", "sweep", "store"),
    ),
    "show": tuple(field.name for field in dataclasses.fields(RunConfig)),
}
"""Configuration groups that a command reads; it takes the others, too."""

_WIDTH = 100
_VALUE_WIDTH = 24


def help_text(command: str, about: str, config: RunConfig) -> str:
    """What a command does and what can be set.

    Args:
        command: its name.
        about: what it does.
        config: the values to show, as composed from the command line.

    Returns:
        The text, with a line end at its end.
    """
    groups = GROUPS[command]
    others = [name for name in GROUPS["show"] if name not in groups]
    lines = [
        *textwrap.wrap(f"raykernel {command}: {about}", _WIDTH),
        "",
        f"usage: raykernel {command} [GROUP=CHOICE] [KEY=VALUE] [-m] [--cfg job]",
        "",
        "  GROUP=CHOICE  takes the settings of a file of conf/: task=mr, experiment=quickstart",
        "  KEY=VALUE     sets one of them: task.k=64",
        "  -m            runs every combination of values: task.seed=13,21,42",
        "  --cfg job     prints the composed configuration; `raykernel show` also what it names",
        "  --hydra-help  shows Hydra's own flags",
        "",
        *_wrapped("experiment", _choices("experiment")),
    ]
    for group in groups:
        value = getattr(config, group)
        doc = " ".join((type(value).__doc__ or "").split())
        lines += ["", *textwrap.wrap(f"{group}: {first_sentence(doc)}", _WIDTH)]
        lines += _wrapped("choices", _choices(group)) if len(_choices(group)) > 1 else []
        lines += _keys(value, group)
    if others:
        listed = ", ".join(others)
        lines += ["", *textwrap.wrap(f"Not read by {command}: {listed} (raykernel show --help).")]
    return "\n".join(lines) + "\n"


def _keys(value: Any, path: str) -> Iterator[str]:
    """Lines for the fields of a group, those of groups inside it as well."""
    cls: type = type(value)
    about = meanings(cls)
    for field in dataclasses.fields(value):
        key, own = f"{path}.{field.name}", getattr(value, field.name)
        if dataclasses.is_dataclass(own):
            yield from _keys(own, key)
            continue
        start = f"  {key:<31} {_spelt(own):<{_VALUE_WIDTH}} "
        indent = " " * (2 + 31 + 1 + _VALUE_WIDTH + 1)
        sentence = first_sentence(about[field.name])
        yield from textwrap.wrap(start + sentence, 120, subsequent_indent=indent)


def _spelt(value: object) -> str:
    """A value as YAML and the command line have it, cut short."""
    found = plain(value)
    if found is None or isinstance(found, bool):
        text = {None: "null", True: "true", False: "false"}[found]
    elif isinstance(found, list):
        text = f"[{','.join(map(str, found))}]"
    elif isinstance(found, dict):
        text = f"{{{','.join(found)}}}"
    else:
        text = str(found)
    return text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 1]}…"


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _wrapped(name: str, words: list[str]) -> list[str]:
    start = f"  {name}: "
    text = start + ", ".join(words)
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * len(start))
