"""How many examples a pass of fine-tuning may have, so that the worker stays inside its memory.

    peak ≈ process + weights + θ_0 + best + optimiser's state + 1.1 · (gradients + n · pass)

all of the trained numbers but weights and pass, n examples of a pass. In random directions what
the optimiser moves, and so its state and the best of it, are k numbers; then S is kept beside them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from raykernel.compute.loading import model_bytes
from raykernel.compute.memory import GIB, HEAP_SLACK, most_examples, process_bytes
from raykernel.config import ComputeConfig, TrainingConfig
from raykernel.errors import InputError
from raykernel.ntk.batches import Batch
from raykernel.ntk.passes import selected_parameters
from raykernel.ntk.product import ProductBytes, product_bytes
from raykernel.problem.models import Problem
from raykernel.training.subspace import kept_bytes

_TEMPORARIES = 3
"""Copies of the largest parameter that a step makes: one after the other on a CPU."""


def pass_size(
    problem: Problem,
    longest: Batch,
    training: TrainingConfig,
    compute: ComputeConfig,
    *,
    twin: bool = False,
) -> int:
    """Examples of a forward and backward pass; the number follows from the configuration alone.

    Args:
        problem: at θ_0.
        longest: the example with the most tokens.
        training: update rule, and the random directions if there are any.
        compute: memory and largest batch.
        twin: for the linear twin, which keeps more.

    Returns:
        `compute.batch_size`, or what fits.

    Raises:
        InputError: if one example does not fit.
    """
    weights, held = model_bytes(problem.module), held_bytes(problem, training)
    held += twin_bytes(problem) if twin else 0
    work = pass_bytes(problem, longest, compute)
    fixed = process_bytes(compute) + weights + held
    if found := most_examples(fixed, work, compute):
        return found
    needed = fixed + HEAP_SLACK * work.of(1)
    raise InputError(
        f"compute.memory_gb: found {compute.memory_gb:g}, expected at least {needed / GIB:.2f} GiB "
        f"to fine-tune with one example in a pass (weights {weights / GIB:.2f}; θ_0, the best "
        f"parameters and the optimiser's state {held / GIB:.2f}; gradients {work.fixed / GIB:.2f}; "
        f"a pass {work.example / GIB:.2f}). Raise it, lower task.max_length, train fewer "
        "parameters (parameters=lora), or take an optimiser that remembers nothing (training=sgd)."
    )


def held_bytes(problem: Problem, training: TrainingConfig) -> int:
    """What a trainer keeps beside the model from step to step.

    Args:
        problem: at θ_0.
        training: update rule, and the random directions if there are any.

    Returns:
        Bytes of θ_0, the best parameters, the optimiser's state, and S.
    """
    trained = list(selected_parameters(problem.module).values())
    whole, copies = _num_bytes(trained), 1 + training.optimizer.num_states
    if training.intrinsic_dimension is None:
        return (1 + copies) * whole
    moved = training.intrinsic_dimension * trained[0].element_size()
    return 2 * whole + copies * moved + kept_bytes(trained, training.intrinsic_dimension)


def twin_bytes(problem: Problem) -> int:
    """What a linear twin keeps beside a trainer and the network at θ_0: its θ̄, θ̄ − θ_0, and θ_T.

    Args:
        problem: at θ_0.

    Returns:
        The bytes.
    """
    return 3 * _num_bytes(selected_parameters(problem.module).values())


def pass_bytes(problem: Problem, longest: Batch, compute: ComputeConfig) -> ProductBytes:
    """What a step takes: gradients, and a pass of every example.

    Args:
        problem: at θ_0.
        longest: the example with the most tokens.
        compute: the device.

    Returns:
        The bytes; a pass is counted as for J w, twice what a backward pass saves, which leaves
        room for what dropout saves.
    """
    trained = list(selected_parameters(problem.module).values())
    whole, largest = _num_bytes(trained), max(map(_size, trained))
    # On a GPU a step handles all parameters at once.
    temporaries = whole if compute.device.startswith("cuda") else _TEMPORARIES * largest
    example = product_bytes(problem.module, problem.readout, longest).example
    return ProductBytes(fixed=whole + temporaries, example=example)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(map(_size, tensors))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
