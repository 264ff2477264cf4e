"""A fine-tuning run's θ_0 and θ_FT: the linear head of the start, and what was trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raykernel.compute.tensorfile import read_tensors, write_tensors
from raykernel.errors import BlockCorruptError, InputError
from raykernel.location import StorePath
from raykernel.problem.probe import Head
from raykernel.problem.readout import Probed
from raykernel.store.trials import TrialFiles


def write_head(path: StorePath, head: Head) -> None:
    """Commit the linear head that a trial starts from."""
    tensors = {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)}
    write_tensors(path, tensors, {})


def read_head(path: StorePath) -> Head:
    """The linear head that a trial starts from.

    Args:
        path: the file.

    Returns:
        The head.

    Raises:
        BlockCorruptError: if the file holds something else.
    """
    tensors, _ = read_tensors(path)
    found = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    outputs = tensors["weight"].shape[:1] if "weight" in tensors else ()
    if (
        found.keys() != {"weight", "bias"}
        or any(dtype is not torch.float32 for dtype, _ in found.values())
        or tensors["weight"].ndim != 2
        or tensors["bias"].shape != outputs
    ):
        raise BlockCorruptError(
            f"{path}: holds {found}, expected weight and bias of a linear head. Delete it, then "
            "run its configuration again."
        )
    return Head(tensors["weight"].numpy(), tensors["bias"].numpy())


def read_parameters(files: TrialFiles) -> dict[str, Tensor]:
    """θ_FT of a trial that has ended, on the CPU.

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
    """
    values = read_parameters(files)
    if isinstance(module, Probed) and files.head.exists():
        module.set_head(read_head(files.head))
    assign(module, values, source=str(files.weights))


@torch.no_grad()
def assign(
    module: nn.Module, values: Mapping[str, Tensor], *, source: str = "weights"
) -> dict[str, Tensor]:
    """Set some parameters, in their own type and on their device.

    Args:
        module: whose.
        values: by name; of the parameters' shapes.
        source: where they are from, for the message if they are wrong.

    Returns:
        What the parameters were.

    Raises:
        InputError: if the module has no parameter of a name or shape.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wrong = sorted(
        name
        for name, value in values.items()
        if name not in parameters or parameters[name].shape != value.shape
    )
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"{source}: found {', '.join(map(repr, wrong[:3]))}{more}, expected parameters of the "
            "model, of the same shape. Load the model with the trial's own `model` and "
            "`parameters`."
        )
    before = {name: parameters[name].detach().clone() for name in values}
    for name, value in values.items():
        parameters[name].copy_(value)
    return before
