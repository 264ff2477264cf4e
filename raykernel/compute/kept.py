"""What a worker leaves to the next one in its process: the model, which takes long to load.

A run has several kinds of jobs, one after the other: features for a linear head, blocks,
predictions. The worker of each ends before the next one starts. What it has handed on is kept in
between, one thing at the most; the next worker takes it over, or it is gone before anything else
is loaded. Two living workers never share a thing, for each may change it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_kept: dict[str, Any] = {}


def take_over(owner: object, key: str, make: Callable[[], T]) -> T:
    """The thing of this key that the last owner left in this process, or a new one.

    Args:
        owner: keeps it for as long as it lives; then it waits for the next owner.
        key: what decides the thing.
        make: makes a new one, with nothing else in memory.

    Returns:
        The thing, as the last owner left it.
    """
    found: T | None = _kept.pop(key, None)
    forget()
    thing = make() if found is None else found
    # At the end of the process nobody comes to take it.
    weakref.finalize(owner, _keep, key, thing).atexit = False
    return thing


def forget() -> None:
    """Free what waits for a next owner."""
    _kept.clear()


def _keep(key: str, thing: object) -> None:
    forget()
    _kept[key] = thing
