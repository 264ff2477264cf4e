"""Random directions against the dense matrix, and against the kernel of the same method."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.project import WHOLE, intrinsic_dimension
from raykernel.ntk.random_matrix import Entries, RandomMatrices
from raykernel.training import subspace
from raykernel.training.finetune import finetune
from raykernel.training.subspace import Subspace
from tests import cases
from tests.training.test_finetune import LABELS, PLAIN, examples, inputs, linear, text_examples

MATRICES = RandomMatrices(5, seed=3, entries=Entries.gaussian)


def dense(model: torch.nn.Module) -> Tensor:
    """Π (p x k) of all parameters, one below the other."""
    pieces = [MATRICES.columns(name, 0, p.numel()) for name, p in model.named_parameters()]
    return torch.cat(pieces) / MATRICES.dimension**0.5


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_its_kernel_is_that_of_the_projection_with_the_same_seed(name):
    """⟨∂f_a(x_i)/∂z, ∂f_b(x_j)/∂z⟩ by autograd and Πᵀ, and from captured factors."""
    case = cases.transformer_case(name)
    model = case.model.double()
    capture = Tracer(model, case.readout).capture(case.batch)
    expected = gram(*[intrinsic_dimension(capture, MATRICES)] * 2)[WHOLE]
    own = Subspace(dict(model.named_parameters()), MATRICES)
    gradients = []
    for i in range(5):
        for a in range(2):
            model.zero_grad()
            one = {key: value[i : i + 1] for key, value in case.batch.items()}
            case.readout(model, one)[0, a].backward()
            own.pull_back()
            assert own.z.grad is not None
            gradients.append(own.z.grad)
    stacked = torch.stack(gradients)
    found = (stacked @ stacked.T).view(5, 2, 5, 2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_training_is_gradient_descent_on_the_coordinates(kept, monkeypatch):
    monkeypatch.setattr(subspace, "KEPT_BYTES", kept)
    monkeypatch.setattr(subspace, "_TILE_BYTES", 4 * subspace._BYTES_PER_ENTRY * 5)
    training = dataclasses.replace(PLAIN, intrinsic_dimension=5, intrinsic_seed=3)
    model, x = linear(), inputs()
    found = finetune(model, cases.readout, examples(x), training)
    twin = linear()
    projection, start, z = dense(twin), flat(twin), torch.zeros(5, dtype=torch.float64)
    y = torch.nn.functional.one_hot(torch.from_numpy(LABELS[:7])).double()
    for _ in range(found.best.step):
        weight = (start + projection @ z).view(2, 3)
        gradient = (x[:7] @ weight.T - y).T @ x[:7] / 7
        z -= 0.2 * projection.T @ gradient.flatten()
    expected = (start + projection @ z).view(2, 3)
    torch.testing.assert_close(found.parameters["weight"], expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-11, atol=1e-13)
    assert found.best.distance == pytest.approx(float((expected - linear().weight).norm().detach()))


def test_every_parameter_moves_and_only_in_the_span():
    case = cases.transformer_case("roberta")
    start = flat(case.model).double()
    training = dataclasses.replace(
        PLAIN, steps=3, intrinsic_dimension=5, intrinsic_seed=3, dropout=False
    )
    finetune(case.model, case.readout, text_examples(case), training)
    moved = flat(case.model).double() - start
    assert (moved != 0).float().mean() > 0.99
    basis = dense(case.model)
    solution = torch.linalg.lstsq(basis, moved.unsqueeze(1)).solution
    assert float((basis @ solution - moved.unsqueeze(1)).norm() / moved.norm()) < 1e-4
