"""Names of layers and parameters, chosen as users write them: by their ends, or by expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from raykernel.errors import InputError


def ends_in(path: str, target: str) -> bool:
    """Whether a dotted path is the target or ends in it, as PEFT reads `target_modules`."""
    return path == target or path.endswith(f".{target}")


def last_parts(paths: Iterable[str]) -> set[str]:
    """What follows the last dot of each path."""
    return {path.rsplit(".", 1)[-1] for path in paths}


def compiled(key: str, expression: str) -> re.Pattern[str]:
    """A regular expression of the user's.

    Args:
        key: what the user set, for the error message.
        expression: to what.

    Returns:
        The compiled expression.

    Raises:
        InputError: if it is no regular expression.
    """
    try:
        return re.compile(expression)
    except re.error as error:
        raise InputError(
            f"{key}: {expression!r} is no regular expression ({error}), expected a name or an "
            "expression that fits names. Escape brackets and dots, or give the name."
        ) from error
