"""The linear twin against a naive Jacobian, closed-form dynamics and models that are linear."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykernel.analysis.bounds import linear_flow
from raykernel.config import RegularizationConfig, TrainingConfig
from raykernel.ntk.product import tangents
from raykernel.terms import (
    Loss,
    LossConvention,
    Metric,
    Optimizer,
    Regularization,
    Schedule,
    Split,
)
from raykernel.training.bounds import flow_units
from raykernel.training.finetune import Examples, Trainer, distance
from raykernel.training.linearized import Linearized, read_linearized_logits
from tests import cases

N, DEV, INPUTS = 6, 4, 3
X, LABELS = cases.normal(N + 2 * DEV, INPUTS, seed=7), np.arange(N + 2 * DEV) % 2
SPLITS = {
    Split.train: range(N),
    Split.dev: range(N, N + DEV),
    Split.test: range(N + DEV, N + 2 * DEV),
}
EXAMPLES = Examples(lambda indices: {"x": X[list(indices)]}, LABELS, SPLITS)
FLOW = TrainingConfig(
    learning_rate=0.05,
    schedule=Schedule.constant,
    batch_size=N,
    steps=40,
    eval_every=40,
    max_grad_norm=None,
    loss=Loss.squared,
    dropout=False,
)


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def pull(lam: float) -> RegularizationConfig:
    return RegularizationConfig(Regularization.coupled, lam, LossConvention.sum)


def trainer(module: nn.Module, training: TrainingConfig, lam: float = 0.0) -> Trainer:
    is_twin = isinstance(module, Linearized)
    return Trainer(
        module, read_linearized_logits if is_twin else cases.readout, EXAMPLES, training,
        regularization=pull(lam), metric=Metric.accuracy, batch_size=4,
    )  # fmt: skip


def twin_of(network: nn.Module) -> Linearized:
    return Linearized(network, cases.readout, {"x": X[:2]})


def naive_jacobian(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """∂f/∂θ by autograd, one output of one example at a time: (n, c, *shape)."""
    values = dict(network.named_parameters())
    found = {name: torch.zeros(len(x), 2, *p.shape, dtype=x.dtype) for name, p in values.items()}
    for i in range(len(x)):
        for c in range(2):
            row = torch.autograd.grad(network(x[i : i + 1])[0, c], list(values.values()))
            for name, gradient in zip(values, row, strict=True):
                found[name][i, c] = gradient
    return found


def taylor(network: nn.Module, x: Tensor, theta: dict[str, Tensor]) -> Tensor:
    """f(x; θ_0) + J_0(x) (θ − θ_0), from the naive Jacobian."""
    logits = network(x).detach()
    for name, jacobian in naive_jacobian(network, x).items():
        moved = theta[name] - dict(network.named_parameters())[name].detach()
        logits = logits + jacobian.flatten(2) @ moved.flatten()
    return logits


def moved(network: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    return {
        name: p.detach() + 0.5 * cases.normal(*p.shape, seed=seed + i)
        for i, (name, p) in enumerate(network.named_parameters())
    }


def test_the_linear_model_is_that_of_the_naive_jacobian():
    network = mlp()
    theta = moved(network)
    twin = twin_of(network)
    twin.load_state_dict(theta)
    expected = taylor(network, X, theta)
    torch.testing.assert_close(read_linearized_logits(twin, {"x": X}), expected)
    direction = {name: theta[name] - p.detach() for name, p in network.named_parameters()}
    logits, change = tangents(network, cases.readout, [{"x": X}], direction)
    torch.testing.assert_close(logits + change, expected)  # B, of parameters from elsewhere


def test_its_gradient_is_that_of_the_naive_jacobian():
    """∂L/∂θ = J_0ᵀ ∂L/∂f̄, here of cross-entropy at θ away from θ_0."""
    network = mlp()
    theta = moved(network)
    twin = twin_of(network)
    twin.load_state_dict(theta)
    labels = torch.from_numpy(LABELS)
    F.cross_entropy(twin({"x": X}), labels).backward()
    leaves = {name: value.requires_grad_(True) for name, value in theta.items()}
    F.cross_entropy(taylor(network, X, leaves), labels).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, leaves[name].grad)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama", "lora"])
def test_transformers_have_a_twin_with_the_same_parameters(name):
    """And ⟨u, J w⟩ = ⟨Jᵀ u, w⟩: value and gradient are of one linear function."""
    case = (
        cases.lora_case("roberta", zero_b=True) if name == "lora" else cases.transformer_case(name)
    )
    twin = Linearized(case.model, case.readout, cases.pieces(case.batch, 2)[0])
    names = [n for n, p in case.model.named_parameters() if p.requires_grad]
    assert [n for n, _ in twin.named_parameters()] == names
    start = read_linearized_logits(twin, case.batch)
    torch.testing.assert_close(start, case.readout(case.model, case.batch), rtol=1e-5, atol=1e-5)
    direction = cases.random_direction(twin)
    weights = cases.normal(*start.shape, seed=2).float()
    (start * weights).sum().backward()
    with torch.no_grad():
        for own, parameter in twin.named_parameters():
            parameter += direction[own]
    change = (read_linearized_logits(twin, case.batch) - start).detach()
    expected = sum(
        float((direction[n] * p.grad).sum()) for n, p in twin.named_parameters()
        if p.grad is not None
    )  # fmt: skip
    assert float((change * weights).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("optimizer", list(Optimizer))
@pytest.mark.parametrize("loss", list(Loss))
def test_a_model_linear_in_its_parameters_is_its_own_twin(optimizer, loss):
    """The last layer alone is trained, in batches, clipped, with decay and pull: A = B = 0."""
    training = dataclasses.replace(
        FLOW, optimizer=optimizer, loss=loss, batch_size=4, steps=20, eval_every=10,
        schedule=Schedule.linear, max_grad_norm=0.3, weight_decay=0.1,
    )  # fmt: skip
    network = mlp()
    network.get_submodule("0").requires_grad_(False)
    run, twin = (trainer(module, training, 0.5) for module in (network, twin_of(mlp_like(network))))
    run.advance(20)
    twin.advance(20)
    assert distance(run.values(), twin.values()) < 1e-12
    assert run.curve[-1].distance > 1e-2
    start = mlp()
    expansion = taylor_of_last(start, run.values())
    torch.testing.assert_close(network(X), expansion, rtol=1e-12, atol=1e-12)


def mlp_like(network: nn.Module) -> nn.Module:
    """A copy, of which the same parameters vary."""
    copied = mlp()
    copied.load_state_dict(network.state_dict())
    for own, other in zip(copied.parameters(), network.parameters(), strict=True):
        own.requires_grad_(other.requires_grad)
    return copied


def taylor_of_last(start: nn.Module, last: dict[str, Tensor]) -> Tensor:
    theta = {name: p.detach() for name, p in start.named_parameters()} | last
    return taylor(start, X, theta)


# ------------------------------------------------------------------ dynamics


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_small_full_batch_steps_follow_the_closed_form(lam):
    """Residual and deviation of `analysis.bounds.linear_flow`; the error halves with the step.

    λ and t go through `flow_units`, whose units every bound of a run is in.
    """
    network = mlp()
    jacobian = naive_jacobian(network, X[:N])
    flat = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2).numpy()
    kernel = np.einsum("iap,jbp->iajb", flat, flat)
    targets = np.eye(2)[LABELS[:N]]
    residual = targets - network(X[:N]).detach().numpy()
    errors = []
    for steps in (40, 80, 160):
        training = dataclasses.replace(
            FLOW, learning_rate=4.0 / steps, steps=steps, eval_every=steps
        )
        twin = twin_of(network)
        run = trainer(twin, training, lam)
        run.advance(steps)
        own_pull, time = flow_units(training, pull(lam), N)
        deviation, left = linear_flow(kernel, residual, pull=own_pull, time=time)
        found = targets - twin({"x": X[:N]}).detach().numpy()
        errors.append(
            np.array([np.abs(found - left).max(), abs(run.curve[-1].distance - deviation)])
        )
    assert (errors[-1] < 5e-3).all()
    for before, after in pairwise(errors):
        np.testing.assert_allclose(after / before, 0.5, atol=0.05)


def test_the_taylor_remainder_falls_as_the_pull_grows():
    """D_B, and the deviation with it; every λ from the same start."""
    remainders, deviations = [], []
    for lam in (0.0, 0.1, 1.0, 10.0, 50.0):
        network = mlp()
        training = dataclasses.replace(FLOW, learning_rate=0.1, steps=300, eval_every=300)
        run = trainer(network, training, lam)
        run.advance(300)
        expansion = taylor(mlp(), X[:N], run.values())
        remainders.append(float((network(X[:N]).detach() - expansion).norm()))
        deviations.append(run.curve[-1].distance)
    assert remainders == sorted(remainders, reverse=True)
    assert deviations == sorted(deviations, reverse=True)
    assert remainders[-1] < 0.02 * remainders[0]


# ------------------------------------------------------------------ going on


@pytest.mark.parametrize("intrinsic_dimension", [None, 4])
def test_a_twin_that_goes_on_from_a_state_is_the_same_to_the_bit(intrinsic_dimension):
    def make() -> Trainer:
        case = cases.transformer_case("roberta")
        training = TrainingConfig(
            optimizer=Optimizer.adam, learning_rate=0.01, batch_size=2, steps=6, eval_every=2,
            dropout=False, intrinsic_dimension=intrinsic_dimension,
        )  # fmt: skip

        def collate(indices: Any) -> dict[str, Tensor]:
            return {key: value[list(indices)] for key, value in case.batch.items()}

        examples = Examples(collate, np.arange(5) % 2, dict.fromkeys(Split, range(5)))
        twin = Linearized(case.model, case.readout, cases.pieces(case.batch, 2)[0])
        return Trainer(
            twin, read_linearized_logits, examples, training,
            regularization=pull(1.0), metric=Metric.accuracy, batch_size=8,
        )  # fmt: skip

    whole = make()
    whole.advance(6)
    for stop in (2, 4):
        first = make()
        first.advance(stop)
        tensors, facts = first.state()
        copied = {name: value.clone() for name, value in tensors.items()}
        second = make()
        second.resume(copied, facts)
        second.advance(6 - stop)
        assert second.curve == whole.curve
        for name, value in whole.values().items():
            assert torch.equal(second.values()[name], value), name
