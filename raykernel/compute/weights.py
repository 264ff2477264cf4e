"""The weights of a fine-tuning run, put in the place of those that it began with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raykernel.errors import BlockCorruptError, InputError
from raykernel.store.blocks import Store


def trial_weights(store_path: str, trial: str) -> dict[str, Tensor]:
    """Trained parameters of a fine-tuning run, on the CPU.

    Args:
        store_path: the store.
        trial: the run.

    Returns:
        Values by name in the module that was trained.

    Raises:
        InputError: if they are not there.
        BlockCorruptError: if the file is damaged.
    """
    path = Store(store_path).trial(trial).weights
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: found no weights of trial {trial}, expected those that are best on dev. Run "
            "its configuration again with training.keep_weights=true."
        ) from error
    except SafetensorError as error:
        raise BlockCorruptError(
            f"{path}: damaged ({error}). Delete it, then run its configuration again."
        ) from error


@torch.no_grad()
def assign(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set some parameters, in their own type and on their device.

    Args:
        module: whose.
        values: by name; of the parameters' shapes.

    Returns:
        What they were.

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
        raise InputError(
            f"weights: found {len(wrong)} that the model lacks or has in another shape, such as "
            f"{wrong[0]!r}; expected those of this model. Use its own `model` and `parameters`."
        )
    before = {name: parameters[name].detach().clone() for name in values}
    for name, value in values.items():
        parameters[name].copy_(value)
    return before
