"""`raykernel list`: what can be chosen, with a sentence each.

Hydra and what runs studies take a second to import, and only some lists need them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from raykernel.errors import InputError, nearest
from raykernel.meanings import meanings
from raykernel.terms import Criterion


def choices(group: str) -> dict[str, str]:
    """Choices of a configuration group.

    Args:
        group: a folder of conf/.

    Returns:
        The comment at the head of its file, by name.
    """
    from raykernel.compose import conf_dir

    files = sorted((conf_dir() / group).glob("*.yaml"))
    return {file.stem: _heading(file) for file in files}


def studies() -> dict[str, str]:
    """Questions of the studies, by name."""
    from raykernel.sweep import question_of, study_files

    asked = {name: question_of(path) for name, path in study_files().items()}
    return {name: question for name, question in asked.items() if question is not None}


def criteria() -> dict[str, str]:
    """What the criteria of `raykernel select` are, by name."""
    about = meanings(Criterion)
    return {criterion.value: about[criterion.name] for criterion in Criterion}


LISTS: dict[str, tuple[Callable[[], dict[str, str]], str]] = {
    "tasks": (lambda: choices("task"), "raykernel show task=NAME"),
    "models": (lambda: choices("model"), "raykernel show model=NAME"),
    "sweeps": (studies, "raykernel sweep NAME --help"),
    "experiments": (lambda: choices("experiment"), "raykernel show experiment=NAME"),
    "criteria": (criteria, "raykernel select experiment=demo select.criterion=NAME"),
}
"""What can be listed: its entries, and the command that takes one."""


def listed(kind: str) -> tuple[dict[str, str], str]:
    """Entries of a list.

    Args:
        kind: a key of `LISTS`; without its s will do.

    Returns:
        What each is by name, and the command that takes one.

    Raises:
        InputError: if there is no such list.
    """
    name = next((name for name in LISTS if kind in (name, name.removesuffix("s"))), kind)
    if name not in LISTS:
        raise InputError(f"Unknown list {kind!r}: {nearest(kind, LISTS)}")
    entries, command = LISTS[name]
    return entries(), command


def _heading(file: Path) -> str:
    """The comment lines that a YAML file begins with, up to the end of a sentence."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
        if re.search(r"[.?]$", line):
            break
    return " ".join(lines)
