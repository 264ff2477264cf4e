"""Power iteration against the singular values of the whole Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.operator_norm import norm_of_change, norms_on_sphere, operator_norm
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


def jacobian(case):
    """J of the stacked outputs, one backward pass per output."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True)
        for f in case.readout(case.model, case.batch).flatten()
    ]
    return torch.stack([torch.cat([own.flatten() for own in row]) for row in rows])


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_norm_of_a_change_is_that_of_the_difference_of_two_jacobians():
    case = cases.transformer_case("roberta")
    case.model.double()
    here, before = values(case.model), jacobian(case)
    there = {
        name: own + 0.05 * cases.normal(*own.shape, seed=number)
        for number, (name, own) in enumerate(here.items())
    }
    found = norm_of_change(
        case.model, case.readout, [case.batch], there, tolerance=1e-9, max_steps=200
    )
    assert all(torch.equal(own, here[name]) for name, own in values(case.model).items())
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            if name in there:
                parameter.copy_(there[name])
    expected = float(torch.linalg.matrix_norm(jacobian(case) - before, 2))
    assert found == pytest.approx(expected, rel=1e-5)


def test_points_on_a_sphere_are_so_far_away_and_the_model_stays():
    """f = θ²/2 · x has J = θ x: on a sphere of radius r around 0 its norm is r |x| in one
    dimension; around θ_0 it is |θ_0 ± r| |x|."""
    model = cases.Module(lambda self, x: x * self.theta.square() / 2, theta=None)
    model.theta = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    x = torch.ones(4, 1, dtype=torch.float64)
    found = norms_on_sphere(model, cases.readout, [{"x": x}], radius=0.5, samples=8, seed=1)
    assert {round(norm, 9) for norm in found} == {2 * 2.5, 2 * 3.5}
    assert model.theta.item() == 3.0
    assert norms_on_sphere(model, cases.readout, [{"x": x}], radius=0.5, samples=0) == []
