"""Errors about an example, with its id: the engine knows its place in a pass only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from raykernel.compute.spec import WorkerSpec
from raykernel.errors import ExampleError
from raykernel.store.blocks import Store


@contextmanager
def named(
    spec: WorkerSpec, rows: Sequence[int], cols: Sequence[int] | None = None
) -> Iterator[None]:
    """Context whose errors about an example end with its id in the table `examples`.

    Args:
        spec: which kernel.
        rows: examples of the pass, or of a block's rows, in the order in which they are taken.
        cols: of a block's columns.

    Yields:
        Nothing.

    Raises:
        ExampleError: of the class that was raised.
    """
    try:
        yield
    except ExampleError as error:
        places = [(rows, error.row), (cols, error.col)]
        found = [own[place] for own, place in places if own is not None and place is not None]
        if not found:
            raise
        ids = Store(spec.store_path).open(spec.fingerprint).examples()["id"].to_pylist()
        names = " and ".join(dict.fromkeys(ids[index] for index in found))
        raise type(error)(f"{error} (in the table `examples`: {names})") from error
