"""States of the world that a user has to know about.

Every message has three parts: what was found, what was expected, what to do. `InputError` and
its subclasses end a command with exit code 2 and no traceback; `RunError` and its subclasses
with exit code 1.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the operating system says of a write for which there is no space."""


class RaykernelError(Exception):
    """Any failure that raykernel explains itself."""

    exit_code = 1


class InputError(RaykernelError, ValueError):
    """The user's input is wrong: configuration, data, template, model or store."""

    exit_code = 2


class NotWritableError(InputError):
    """A place that cannot be written to."""


class StoreMismatchError(InputError):
    """A stored kernel was computed for another problem than the one asked for."""


class BlockCorruptError(InputError):
    """A file of the store is damaged or foreign."""


class ExampleError(InputError):
    """The model's numbers for some example are wrong.

    Args:
        message: the three parts.
        row: the example, by its place among those that were captured.
        col: the same on the side of the columns.
    """

    def __init__(self, message: str, *, row: int | None = None, col: int | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.col = col


class NonFiniteError(ExampleError):
    """The model's outputs or gradients are NaN or infinite."""


class InconsistentError(ExampleError):
    """Two passes over one example give different outputs."""


class RunError(RaykernelError, RuntimeError):
    """The run failed although its input was right."""


class DivergedError(RunError):
    """Loss or gradient stopped being finite."""


class OutOfMemoryError(RunError):
    """Memory ran out, also in the smallest pieces."""


class KernelIncompleteError(RunError):
    """Blocks of a kernel are missing."""


class NotPositiveSemidefiniteError(RunError):
    """A matrix that should be a Gram matrix is none."""


class StorageFullError(RunError):
    """The store's device has no space left; nothing half-written remains."""

    exit_code = 2


class WorkerLostError(RunError):
    """A block failed on every attempt allowed."""


_OUT_OF_MEMORY = (
    "can't allocate memory",  # PyTorch's allocator on the CPU
    "could not create a primitive",  # oneDNN's, which gives no reason
    "could not create a memory",
    "bad_alloc",  # C++
    "Cannot allocate memory",  # the system
    "CUDA error: out of memory",  # beside PyTorch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host."""
    # By name: PyTorch's own class, and Ray's, without their packages.
    return (
        isinstance(error, MemoryError)
        or any(cls.__name__ == OutOfMemoryError.__name__ for cls in type(error).__mro__)
        or any(words in str(error) for words in _OUT_OF_MEMORY)
    )


_MAX_LISTED = 30
"""Choices that an error message lists; a model can have hundreds of layer groups."""


def nearest(name: str, choices: Iterable[str], *, count: int = 3) -> str:
    """The end of a sentence that names the likeliest spellings.

    Args:
        name: what the user wrote.
        choices: what would have been accepted.
        count: how many near names at the most.

    Returns:
        `did you mean 'a' or 'b'?`, or the list, at most thirty of it, where nothing is near.
    """
    known = sorted(set(choices))
    near = get_close_matches(name, known, n=count, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(choice) for choice in near) + "?"
    if not known:
        return "there is nothing to choose from."
    more = f", … ({len(known)} in all)" if len(known) > _MAX_LISTED else ""
    return "choose one of " + ", ".join(known[:_MAX_LISTED]) + more + "."


def storage_full(error: BaseException) -> StorageFullError | None:
    """What it means that some library could write no more.

    Args:
        error: what it raised.

    Returns:
        The error to raise instead; None if it is about anything else.
    """
    if isinstance(error, StorageFullError):
        return error
    if not isinstance(error, OSError) or error.errno not in FULL:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return StorageFullError(
        f"{where}no space left ({error.strerror}). Expected some, in the store or for temporary "
        f"files. Free space or raise the quota, then run the same command again: what is stored "
        f"is not computed twice."
    )
