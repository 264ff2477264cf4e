"""Power iteration against the singular values of the whole Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.operator_norm import operator_norm
from tests import cases


def test_it_is_the_largest_singular_value_of_the_jacobian():
    x = cases.normal(7, 4, seed=1)
    model = nn.Linear(4, 3).double()
    batches = cases.pieces({"x": x}, 3, 4)
    # Of a linear layer J = [x 1] ⊗ I: the singular values are those of [x 1].
    expected = float(torch.linalg.matrix_norm(torch.cat([x, torch.ones(7, 1)], dim=1), 2))
    found = operator_norm(model, cases.readout, batches, tolerance=1e-12, max_steps=200)
    assert found == pytest.approx(expected, rel=1e-9)
    assert operator_norm(model, cases.readout, batches) == pytest.approx(expected, rel=5e-3)
    assert operator_norm(model, cases.readout, batches) <= expected * (1 + 1e-12)


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_it_is_the_root_of_the_kernels_top_eigenvalue(name):
    case = cases.transformer_case(name)
    blocks = empirical_kernel(case.model, case.readout, case.batch)["sgd"]
    kernel = sum(blocks.values()).double().reshape(10, 10)
    expected = float(torch.linalg.eigvalsh(kernel)[-1]) ** 0.5
    assert operator_norm(case.model, case.readout, [case.batch]) == pytest.approx(
        expected, rel=2e-3
    )


def test_outputs_that_do_not_move_have_norm_zero():
    model = cases.Module(lambda self, x: x @ torch.ones(2, 2).to(x) + 0 * self.layer(x), layer=None)
    model.layer = nn.Linear(2, 2).double()
    assert operator_norm(model, cases.readout, [{"x": cases.normal(3, 2)}]) == 0.0
