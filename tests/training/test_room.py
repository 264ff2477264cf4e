"""Fine-tuning stays inside the memory: passes of fewer examples, or none at all."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from raykernel.compute.memory import GIB, HEAP_SLACK, process_bytes
from raykernel.config import ComputeConfig, TrainingConfig
from raykernel.errors import InputError
from raykernel.problem.models import Problem
from raykernel.terms import Optimizer
from raykernel.training.room import held_bytes, pass_bytes, pass_size, twin_bytes
from raykernel.training.subspace import kept_bytes

KIB = 1 << 10


def problem() -> Problem:
    """A layer of 256 KiB whose bias does not vary, and one of 2 KiB."""
    module = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2, bias=False)).eval()
    module[0].bias.requires_grad_(False)
    return Problem(module, lambda model, batch: model(batch["x"]))


ONE = {"x": torch.ones(1, 256)}
TRAINED = 258 * KIB


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [(Optimizer.sgd, 2), (Optimizer.signgd, 2), (Optimizer.adam, 4), (Optimizer.adamw, 4)],
)
def test_a_trainer_keeps_the_start_the_best_and_the_optimisers_state(
    optimizer: Optimizer, copies: int
) -> None:
    """θ_0 and the best parameters; of Adam two averages more."""
    training = TrainingConfig(optimizer=optimizer)
    assert held_bytes(problem(), training) == copies * TRAINED


def test_in_random_directions_the_state_is_that_of_their_coordinates() -> None:
    """θ_0 of the trainer and of the directions, S, and three vectors of ten numbers."""
    training = TrainingConfig(optimizer=Optimizer.adam, intrinsic_dimension=10)
    trained = [torch.empty(TRAINED // 4)]
    expected = 2 * TRAINED + 3 * 10 * 4 + kept_bytes(trained, 10)
    assert held_bytes(problem(), training) == expected
    assert kept_bytes(trained, 10) > 10 * TRAINED


def test_passes_are_as_large_as_fits_and_what_cannot_fit_is_refused() -> None:
    own, training = problem(), TrainingConfig(optimizer=Optimizer.adam)
    compute = ComputeConfig(batch_size=8)
    work = pass_bytes(own, ONE, compute)
    assert work.fixed >= TRAINED
    assert work.example > 0
    fixed = process_bytes(compute) + TRAINED + KIB + held_bytes(own, training)
    for count in (1, 3, 8):
        limit = (fixed + HEAP_SLACK * work.of(count) + 1) / GIB
        assert pass_size(own, ONE, training, dataclasses.replace(compute, memory_gb=limit)) == count
    assert pass_size(own, ONE, training, compute) == 8
    assert twin_bytes(own) == 3 * TRAINED
    limit = (fixed + 3 * TRAINED + HEAP_SLACK * work.of(2) + 1) / GIB
    small = dataclasses.replace(compute, memory_gb=limit)
    assert pass_size(own, ONE, training, small, twin=True) == 2
    tiny = dataclasses.replace(compute, memory_gb=0.1)
    with pytest.raises(InputError, match=r"memory_gb: found 0\.1, expected at least 0\.\d\d GiB"):
        pass_size(own, ONE, training, tiny)
