"""Tensors and facts in one safetensors file, so that they are of the same moment: no pickle.

The facts are JSON in the file's header. Python writes a float so that it reads back the same. The
format is written here, one tensor at a time: the library's own writer goes through a temporary of
a name of its own, which a killed process leaves behind, and which only its owner can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raykernel.config import Json
from raykernel.errors import BlockCorruptError
from raykernel.jsontext import json_object
from raykernel.location import StorePath, local_copy
from raykernel.store.commit import commit_written

_FACTS = "raykernel"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
"""As the format spells what parameters and optimisers are made of."""


def write_tensors(path: StorePath, tensors: Mapping[str, Tensor], facts: Mapping[str, Json]) -> int:
    """Commit tensors and facts as one file.

    Args:
        path: the file; its folder exists.
        tensors: by name.
        facts: what else is to be kept.

    Returns:
        Bytes written.
    """
    # Wide numbers first, so that all of them are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {_FACTS: json.dumps(facts, sort_keys=True)}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        kind = _DTYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                flat = tensor.detach().cpu().contiguous().flatten()
                file.write(flat.view(torch.uint8).numpy().data)

    return commit_written(path, write, num_bytes=8 + len(text) + end)


def read_tensors(path: StorePath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, on the CPU.

    Args:
        path: the file.

    Returns:
        Tensors and facts.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _facts(file)  # noqa: SIM118


def read_facts(path: StorePath) -> dict[str, Any]:
    """The facts alone, without reading a tensor.

    Args:
        path: the file.

    Returns:
        What `write_tensors` was given.
    """
    with _opened(path) as file:
        return _facts(file)


def _facts(file: Any) -> dict[str, Any]:
    return json_object((file.metadata() or {})[_FACTS])


@contextmanager
def _opened(path: StorePath) -> Iterator[Any]:
    """The open file.

    Yields:
        What reads it.

    Raises:
        FileNotFoundError: if there is none.
        BlockCorruptError: if it is damaged or foreign.
    """
    try:
        with local_copy(path) as copy, safe_open(copy, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, LookupError) as error:
        raise BlockCorruptError(
            f"{path}: damaged or foreign ({str(error).strip()}). Expected a file that raykernel "
            "wrote. Delete it, then run its configuration again."
        ) from error
