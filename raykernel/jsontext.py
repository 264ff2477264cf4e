"""JSON that somebody else may have written: read whole, or refused as one kind of error."""

from __future__ import annotations

import json
from typing import Any


def json_value(text: str | bytes) -> Any:
    """The value that a text spells.

    Args:
        text: JSON; bytes in UTF-8.

    Returns:
        The value.

    Raises:
        ValueError: if it is none, or nested so deeply that Python's reader gives up.
    """
    try:
        return json.loads(text)
    except RecursionError as error:  # no ValueError, and a file of brackets is enough for it
        raise ValueError("nested too deeply") from error


def json_object(text: str | bytes) -> dict[str, Any]:
    """The object that a text spells.

    Args:
        text: JSON; bytes in UTF-8.

    Returns:
        Value by name.

    Raises:
        ValueError: if it is no JSON, or JSON of something else.
    """
    found = json_value(text)
    if not isinstance(found, dict):
        raise ValueError(f"found a {type(found).__name__}, expected an object")
    return found
