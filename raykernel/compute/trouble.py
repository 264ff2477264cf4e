"""Trouble with workers in the user's words: Ray's own reports are long and name no remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from raykernel.config import ComputeConfig
from raykernel.errors import InputError, RunError

_OF_MEMORY = "Ray ended it because its machine ran out of memory"


def of_memory(error: Exception) -> bool:
    """Whether a worker was lost because Ray's monitor saw its machine run out of memory."""
    return _OF_MEMORY in str(error)


def while_loading(error: Exception) -> bool:
    """Whether workers were lost before they had a job, of which smaller pieces would help."""
    return "before they had loaded the model" in str(error)


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
        return _OF_MEMORY
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


# ------------------------------------------------------------------ before they work


def check_device(compute: ComputeConfig) -> None:
    """Refuse devices that Ray would hide from the worker.

    Args:
        compute: device and resources.

    Raises:
        InputError: if a GPU is named that Ray chooses, or none is asked for.
    """
    if not compute.device.startswith("cuda"):
        return
    if compute.device != "cuda":
        raise InputError(
            f"compute.device: found {compute.device}, expected cuda: Ray chooses a worker's GPU "
            "and shows it no other. Set compute.device=cuda."
        )
    if compute.num_gpus == 0:
        raise InputError(
            "compute.device=cuda with compute.num_gpus=0: Ray shows such a worker no GPU. Set "
            "compute.num_gpus=1, or a fraction to share a GPU between workers."
        )


def unplaceable(compute: ComputeConfig, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why no node, were it empty, could hold one worker.

    Args:
        compute: what a worker asks for.
        nodes: resources of every living node.

    Returns:
        The reason without full stop, None if a node could.
    """
    wanted = {"CPU": compute.num_cpus, "GPU": compute.num_gpus}
    if any(all(node.get(name, 0) >= count for name, count in wanted.items()) for node in nodes):
        return None
    most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
    return (
        f"a worker asks for {asked(compute)}, and no node of the cluster has them: the most are "
        f"{most['CPU']:g} CPU and {most['GPU']:g} GPU. Lower compute.num_cpus and compute.num_gpus"
    )


def asked(compute: ComputeConfig) -> str:
    """A worker's resources, in words."""
    return f"{compute.num_cpus:g} CPU and {compute.num_gpus:g} GPU"


def version_note(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """What to say of a node that runs other versions than the driver.

    Args:
        here: versions by package.
        there: the same of the node, and its name as `node`.

    Returns:
        A sentence, None if all are the same.

    Raises:
        InputError: if raykernel itself differs: blocks of one kernel come from one program.
    """
    rows = [(name, there.get(name), own) for name, own in here.items() if there.get(name) != own]
    if not rows:
        return None
    text = ", ".join(f"{name} {other} (here {own})" for name, other, own in rows)
    if any(name == "raykernel" for name, _, _ in rows):
        raise InputError(
            f"node {there['node']} runs {text}. Install the same raykernel on every node."
        )
    return f"Note: node {there['node']} runs {text}; its blocks may differ in rounding."
