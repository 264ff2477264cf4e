"""The first step moves the function as its kernel says, up to the square of the step size.

    SGD     f(x'; θ_1) - f(x'; θ_0) = -η Σ_b K(x', x)_b χ_b + O(η²),        χ = ∂L/∂f(x)
    SignGD  f(x'; θ_1) - f(x'; θ_0) = -η sign(χ) K_asigngd(x', x) + O(η²),  f with one output

Malladi et al. 2023, section 3 and Definition 3.4. The second holds for one output only, as the sign
of a sum over outputs is no sum of signs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raykernel.config import TrainingConfig
from raykernel.ntk.batches import Batch, Readout, num_examples
from raykernel.ntk.empirical import empirical_kernel
from raykernel.terms import Kind, Optimizer, Schedule, Split
from raykernel.training.finetune import Examples, finetune
from tests import cases

ETAS = (2e-3, 1e-3, 5e-4)


def moved(
    make: Callable[[], cases.Case], readout: Readout, optimizer: Optimizer, eta: float
) -> Tensor:
    """Change of the logits of all examples by one step on the first."""
    case = make()
    before = readout(case.model, case.batch).detach()
    count = num_examples(case.batch)
    data = Examples(
        lambda indices: {key: value[list(indices)] for key, value in case.batch.items()},
        np.zeros(count, dtype=np.int64),
        {Split.train: [0], Split.dev: [1], Split.test: [1]},
    )
    training = TrainingConfig(
        optimizer,
        learning_rate=eta,
        schedule=Schedule.constant,
        batch_size=1,
        steps=1,
        eval_every=1,
        max_grad_norm=None,
        dropout=False,
    )
    finetune(case.model, readout, data, training)
    return readout(case.model, case.batch).detach() - before


def chi(logits: Tensor) -> Tensor:
    """∂L/∂f of the cross-entropy of label 0: softmax minus one-hot."""
    found = logits.softmax(0)
    found[0] -= 1
    return found


def whole_kernel(case: cases.Case, readout: Readout, kind: Kind) -> Tensor:
    """K[x', a, b] of all examples with the first, all layers."""
    # An optimiser's signs know no dead zone but what rounding leaves of a zero.
    kernels = empirical_kernel(
        case.model, readout, case.batch, kinds=(kind.value,), dead_zone=1e-12
    )
    total: Tensor = torch.stack(list(kernels[kind.value].values())).sum(0)
    return total[:, :, 0]


def errors_fall_with_the_square(errors: list[float], size: float) -> None:
    """Half the step, a quarter of the error, relative to what the kernel foretells."""
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(4, rel=0.1)
    assert errors[-1] <= 0.05 * size


def full() -> cases.Case:
    case = cases.transformer_case("bert")
    case.model.double()
    return case


def lora() -> cases.Case:
    case = cases.lora_case("roberta", zero_b=True)
    case.model.double()
    return case


@pytest.mark.parametrize("make", [full, lora])
def test_sgd_moves_the_function_by_the_kernel(make: Callable[[], cases.Case]) -> None:
    case = make()
    kernel = whole_kernel(case, case.readout, Kind.sgd)
    own = chi(case.readout(case.model, case.batch).detach()[0])
    foretold = -torch.einsum("nab,b->na", kernel, own)
    scale = 1 / float(foretold.abs().max())  # so that a step of η moves a logit by about η
    found = [
        float(
            (moved(make, case.readout, Optimizer.sgd, eta * scale) - eta * scale * foretold).norm()
        )
        for eta in ETAS
    ]
    errors_fall_with_the_square(found, ETAS[-1] * scale * float(foretold.norm()))


def test_signgd_moves_the_function_by_the_asymmetric_kernel() -> None:
    def one_output(model: nn.Module, batch: Batch) -> Tensor:
        """Logits (f, 0): the softmax has a sign of χ, and the gradient is χ ∇f."""
        logits = case.readout(model, batch)[:, :1]
        return torch.cat([logits, torch.zeros_like(logits)], dim=1)

    case = full()
    kernel = whole_kernel(case, one_output, Kind.asigngd)[:, 0, 0]
    own = chi(one_output(case.model, case.batch).detach()[0])[0]
    foretold = -own.sign() * kernel
    scale = 1 / float(foretold.abs().max())
    found = [
        float(
            (
                moved(full, one_output, Optimizer.signgd, eta * scale)[:, 0]
                - eta * scale * foretold
            ).norm()
        )
        for eta in ETAS
    ]
    errors_fall_with_the_square(found, ETAS[-1] * scale * float(foretold.norm()))
