"""Tensors and facts in one safetensors file, so that they are of the same moment: no pickle.

The facts are JSON in the file's header. Python writes a float so that it reads back the same. The
format is written here, one tensor at a time: the library's own writer goes through a temporary of
a name of its own, which a killed process leaves behind, and which only its owner can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from raykernel.config import Json
from raykernel.errors import BlockCorruptError, InputError
from raykernel.problem.probe import Head
from raykernel.problem.readout import Probed
from raykernel.store.commit import commit_written
from raykernel.store.trials import TrialFiles

_FACTS = "raykernel"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
"""As the format spells what parameters and optimisers are made of."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Json]) -> int:
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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, on the CPU.

    Args:
        path: the file.

    Returns:
        Tensors and facts.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _facts(file)  # noqa: SIM118


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone, without reading a tensor.

    Args:
        path: the file.

    Returns:
        What `write_tensors` was given.
    """
    with _opened(path) as file:
        return _facts(file)


def _facts(file: Any) -> dict[str, Any]:
    return dict(json.loads((file.metadata() or {})[_FACTS]))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file.

    Yields:
        What reads it.

    Raises:
        FileNotFoundError: if there is none.
        BlockCorruptError: if it is damaged or foreign.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, LookupError) as error:
        raise BlockCorruptError(
            f"{path}: damaged or foreign ({str(error).strip()}). Expected a file that raykernel "
            "wrote. Delete it, then run its configuration again."
        ) from error


# ------------------------------------------------------------------ θ_0 and θ_FT of a trial


def write_head(path: Path, head: Head) -> None:
    """Commit the linear head that a trial starts from."""
    tensors = {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)}
    write_tensors(path, tensors, {})


def read_head(path: Path) -> Head:
    """The linear head that a trial starts from.

    Args:
        path: the file.

    Returns:
        The head.
    """
    tensors, _ = read_tensors(path)
    return Head(tensors["weight"].numpy(), tensors["bias"].numpy())


def read_parameters(files: TrialFiles) -> dict[str, Tensor]:
    """θ_FT of a trial that has ended.

    Args:
        files: of the trial.

    Returns:
        Values of the trained parameters, by name in the module that was trained.

    Raises:
        InputError: if its weights are not there.
    """
    try:
        return read_tensors(files.weights)[0]
    except FileNotFoundError as error:
        raise InputError(
            f"{files.weights}: found no weights, expected those of a trial that ended. Run its "
            "configuration again with training.keep_weights=true."
        ) from error


def load_parameters(files: TrialFiles, module: nn.Module) -> None:
    """Set a module to θ_FT of a trial that has ended.

    Args:
        files: of the trial.
        module: that of the same model, prompt and `parameters`, such as `load_problem` gives; with
            a linear head, the trial's head is set, too.

    Raises:
        InputError: if there are no weights, or they are of another module.
    """
    values = read_parameters(files)
    if isinstance(module, Probed) and files.head.exists():
        module.set_head(read_head(files.head))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wrong = [
        name
        for name, value in values.items()
        if name not in parameters or parameters[name].shape != value.shape
    ]
    if wrong:
        raise InputError(
            f"{files.weights}: found {_listed(wrong)}, expected parameters of the module, of the "
            "same shape. Load the model with the trial's own `model` and `parameters`."
        )
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _listed(names: Iterable[str]) -> str:
    known = sorted(names)
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return ", ".join(map(repr, known[:3])) + more
