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
from raykernel.store.arrowfile import damage
from raykernel.store.commit import commit_written
from raykernel.store.sealed import check_tensors, write_sealed

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
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        kind = _DTYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [start, end]}
    texts = {_FACTS: json.dumps(facts, sort_keys=True), "format": "pt"}  # which PEFT asks for

    def write(temporary: Path) -> None:
        write_sealed(temporary, header, texts, (_content(tensor) for _, tensor in ordered))

    return commit_written(path, write, num_bytes=len(json.dumps([header, texts])) + end)


def read_tensors(path: StorePath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, on the CPU.

    Args:
        path: the file.

    Returns:
        Tensors and facts.
    """
    check_tensors(path)
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _facts(file)  # noqa: SIM118


def read_facts(path: StorePath) -> dict[str, Any]:
    """The facts of a file that is whole; no tensor is kept in memory.

    Args:
        path: the file.

    Returns:
        What `write_tensors` was given.
    """
    check_tensors(path)
    with _opened(path) as file:
        return _facts(file)


def _content(tensor: Tensor) -> Any:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


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
        raise BlockCorruptError(damage(path, str(error).strip())) from error
