"""What a lost worker means, in the user's words: Ray's reports are long and name no remedy."""

from __future__ import annotations

import os
import re
from pathlib import Path

from raykernel.config import ComputeConfig
from raykernel.errors import InputError, RunError


def cause_of(error: Exception) -> str:
    """The one clause of Ray's report that says how a worker's process ended.

    Args:
        error: of Ray, about an actor or an object that is gone.

    Returns:
        A clause without full stop.
    """
    text = " ".join(str(error).split())
    name = type(error).__name__
    if name == "OutOfMemoryError" or "running low on memory" in text:
        return "Ray ended it because its machine ran out of memory"
    detail = re.search(r"Worker exit detail: (.+?\.)( |$)", text)
    reason = re.search(r"is (?:dead|unavailable)\w* because (.+?\.)( |$)", text)
    found = detail or reason
    return f"{name}: {found.group(1).rstrip('.') if found else text[:200]}"


def advice(compute: ComputeConfig) -> str:
    """What to do about dying workers, and where their last words are.

    Args:
        compute: the resources that they had.

    Returns:
        Sentences for the end of a message.
    """
    root = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    return (
        f"Expected workers of {compute.memory_gb:g} GiB to live. If memory ran out, lower "
        "compute.memory_gb, kernel.block_size or the number of workers per machine; see "
        f"{root / 'session_latest' / 'logs'}/worker-*.err."
    )


def missing_module(error: Exception) -> InputError | None:
    """The user's mistake behind an actor that cannot unpack its own code.

    Args:
        error: what calling the actor raised.

    Returns:
        The message about packages, None if the reason is another.
    """
    found = re.search(r"No module named '([\w.]+)'", str(error))
    if found is None:
        return None
    return InputError(
        f"a node of the cluster has no Python module {found.group(1)!r}: expected the same "
        "packages on every node. Install raykernel there."
    )


def transport_error(error: Exception) -> InputError | RunError:
    """What it means that an actor lives but can take no call, or not return its result.

    Args:
        error: what calling the actor raised, although the actor's code turns exceptions into data.

    Returns:
        An error with the last line of the remote traceback.
    """
    last = (str(error).rstrip().splitlines() or [type(error).__name__])[-1]
    return missing_module(error) or RunError(
        f"A worker could not take a job or return its result: {last}"
    )
