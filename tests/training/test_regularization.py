"""The pull to the start against kernel ridge regression, naive loops and known ends."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykernel.config import RegularizationConfig, TrainingConfig
from raykernel.errors import InputError
from raykernel.terms import Loss, LossConvention, Metric, Optimizer, Regularization, Schedule
from raykernel.training.finetune import Trainer, finetune
from raykernel.training.regularization import Pull
from tests import cases
from tests.training.test_finetune import (
    LABELS,
    PLAIN,
    assert_goes_on_to_the_bit,
    examples,
    inputs,
    linear,
    text_examples,
)
from tests.training.test_subspace import dense

NONE = RegularizationConfig()
METHODS = [Regularization.coupled, Regularization.decoupled, Regularization.selective]
NUM_TRAIN = 7


def pull(
    method: Regularization, lam: float, convention: LossConvention = LossConvention.mean
) -> RegularizationConfig:
    return RegularizationConfig(method, lam, convention)


def trained(
    own: RegularizationConfig, training: TrainingConfig, model: nn.Module | None = None
) -> nn.Module:
    """A model at its last step, not at its best one."""
    model = linear() if model is None else model
    trainer = Trainer(
        model, cases.readout, examples(inputs()), training,
        metric=Metric.accuracy, batch_size=20, regularization=own,
    )  # fmt: skip
    assert training.steps is not None
    trainer.advance(training.steps)
    return model


def long(steps: int, **changes: Any) -> TrainingConfig:
    """Full-batch gradient descent on the squared loss at a constant rate."""
    return dataclasses.replace(PLAIN, steps=steps, eval_every=steps, **changes)


def targets() -> Tensor:
    return F.one_hot(torch.from_numpy(LABELS[:NUM_TRAIN])).double()


# ------------------------------------------------------------------ where it ends


@pytest.mark.parametrize("method", [Regularization.coupled, Regularization.decoupled])
@pytest.mark.parametrize(
    ("convention", "lam", "sigma"),
    [
        (LossConvention.sum, 0.7, 0.7),
        (LossConvention.sum, 5.0, 5.0),
        (LossConvention.mean, 0.1, 0.7),
        (LossConvention.mean, 2.0, 14.0),
    ],
)
def test_a_linear_model_ends_as_kernel_ridge_regression(method, convention, lam, sigma):
    """f = f_0 + K(x, X) (K + σ I)⁻¹ (Y - f_0(X)), at train and anywhere else."""
    own, training, x = pull(method, lam, convention), long(300), inputs()
    start = x @ linear().weight.detach().T
    kernel = x @ x[:NUM_TRAIN].T  # of each output; that of all is its Kronecker product with I
    ridge = kernel[:NUM_TRAIN] + sigma * torch.eye(NUM_TRAIN, dtype=torch.float64)
    expected = start + kernel @ torch.linalg.solve(ridge, targets() - start[:NUM_TRAIN])
    found = x @ trained(own, training).weight.detach().T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert own.sigma(training, NUM_TRAIN) == pytest.approx(sigma, rel=1e-12)


def test_adam_ends_there_too_where_the_penalty_is_part_of_its_gradient():
    own = pull(Regularization.coupled, 0.7, LossConvention.sum)
    training = long(1500, optimizer=Optimizer.adam, learning_rate=0.01)
    expected = trained(own, long(600)).weight
    torch.testing.assert_close(trained(own, training).weight, expected, rtol=0, atol=1e-5)
    assert own.sigma(training, NUM_TRAIN) == pytest.approx(0.7)


def test_in_random_directions_it_is_that_of_their_kernel():
    """K = J Π Πᵀ Jᵀ: the norm that is pulled is that of z."""
    own, x = pull(Regularization.coupled, 2.0, LossConvention.sum), inputs()
    training = long(700, intrinsic_dimension=5, intrinsic_seed=3)
    model = linear()
    start, identity = x @ model.weight.detach().T, torch.eye(2, dtype=torch.float64)
    # The weight is (2, 3) row by row, so that ∂f_a/∂w = e_a ⊗ x.
    jacobian = torch.einsum("ab,nd->nabd", identity, x).reshape(40, 6) @ dense(linear())
    kernel = jacobian @ jacobian[: 2 * NUM_TRAIN].T
    ridge = kernel[: 2 * NUM_TRAIN] + 2.0 * torch.eye(2 * NUM_TRAIN, dtype=torch.float64)
    residual = (targets() - start[:NUM_TRAIN]).flatten()
    expected = start + (kernel @ torch.linalg.solve(ridge, residual)).view(20, 2)
    found = x @ trained(own, training, model).weight.detach().T
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


class One(nn.Module):
    """f = (θ, 0) of every input, at θ_0 = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.theta, torch.zeros_like(self.theta)], 1).expand(len(x), 2)


def one(own: RegularizationConfig, steps: int) -> float:
    """θ after some steps towards y = 1."""
    data = examples(inputs(), np.zeros(20, dtype=np.int64))
    training = long(steps, learning_rate=0.1)
    trainer = Trainer(
        One(), cases.readout, data, training,
        metric=Metric.accuracy, batch_size=20, regularization=own,
    )  # fmt: skip
    trainer.advance(steps)
    return float(trainer.finish().parameters["theta"])


def test_the_selective_pull_does_not_minimise_the_sum():
    """(f - y)² and λ = 10, halved: selective goes to 1, the sum has its minimum at 1/6."""
    assert one(pull(Regularization.coupled, 5.0), 300) == pytest.approx(1 / 6, rel=1e-12)
    assert one(pull(Regularization.selective, 5.0), 300) == pytest.approx(1.0, rel=1e-12)
    for steps in (1, 2, 7):
        assert one(pull(Regularization.selective, 5.0), steps) == one(NONE, steps)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_the_distance_falls_as_lam_rises(steps):
    start, training = linear().weight.detach(), long(steps)
    grid = [0.0, 0.1, 0.5, 1.0, 2.0, 3.0]
    ends = [trained(pull(Regularization.coupled, lam), training).weight.detach() for lam in grid]
    distances = [float((end - start).norm()) for end in ends]
    if steps == 1:
        assert distances == pytest.approx(distances[:1] * len(grid), rel=1e-12)
    else:
        assert all(far > near for far, near in pairwise(distances))


# ------------------------------------------------------------------ the steps


def naive(
    own: RegularizationConfig, training: TrainingConfig, batches: list[list[int]]
) -> tuple[nn.Module, list[bool]]:
    """The same steps in one loop, and at which of them the selective pull was on."""
    model, x, selected = linear(), inputs(), []
    weight, start, lam = model.weight, linear().weight.detach(), own.lam
    rules: dict[Optimizer, Any] = {
        Optimizer.sgd: torch.optim.SGD,
        Optimizer.signgd: torch.optim.SGD,
        Optimizer.adam: torch.optim.Adam,
        Optimizer.adamw: lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
    }
    rule = rules[training.optimizer](model.parameters(), lr=training.learning_rate)
    for step, batch in enumerate(batches):
        rate = training.learning_rate * (1 - step / len(batches))
        deviation = weight.detach() - start
        penalty = lam / 2 * (weight - start).square().sum()
        loss = F.cross_entropy(model(x[batch]), torch.from_numpy(LABELS[batch]))
        rule.zero_grad()
        (loss + penalty if own.method is Regularization.coupled else loss).backward()
        gradient = weight.grad
        assert gradient is not None
        selected.append(float((gradient * deviation).sum()) >= 0)
        gradient *= min(1.0, 0.1 / (float(gradient.norm()) + 1e-6))
        if training.optimizer is Optimizer.signgd:
            weight.grad = gradient.sign()
        rule.param_groups[0]["lr"] = rate
        rule.step()
        if own.method is Regularization.decoupled or (
            own.method is Regularization.selective and selected[-1]
        ):
            weight.data -= rate * lam * deviation
    return model, selected


@pytest.mark.parametrize("optimizer", list(Optimizer))
@pytest.mark.parametrize("method", METHODS)
def test_the_steps_are_the_naive_ones(method, optimizer):
    """Small batches, linear decay, clipping, every update rule."""
    training = TrainingConfig(
        optimizer=optimizer, learning_rate=0.9, batch_size=2, steps=24, eval_every=24,
        max_grad_norm=0.1,
    )  # fmt: skip
    own, model, batches = pull(method, 0.4), linear(), list[list[int]]()
    trainer = Trainer(
        model, cases.readout, examples(inputs()), training,
        metric=Metric.accuracy, batch_size=20, regularization=own,
    )  # fmt: skip
    for step in range(24):
        batches.append(list(trainer._batch_of(step)))
    trainer.advance(24)
    expected, selected = naive(own, training, batches)
    assert len(set(selected[1:])) == 2, "the case must tell selective from decoupled"
    torch.testing.assert_close(model.weight, expected.weight, rtol=1e-11, atol=1e-13)


def test_decoupled_is_coupled_for_plain_sgd_and_for_no_other():
    base = TrainingConfig(
        learning_rate=0.3, batch_size=2, steps=11, eval_every=11, max_grad_norm=None
    )
    both = [pull(method, 0.8) for method in METHODS[:2]]

    def distance(**changes: Any) -> float:
        training = dataclasses.replace(base, **changes)
        one, two = (trained(own, training).weight.detach() for own in both)
        return float((one - two).norm() / two.norm())

    assert distance() < 1e-14
    assert distance(max_grad_norm=0.1) > 1e-3
    assert distance(optimizer=Optimizer.adam) > 1e-3
    assert distance(optimizer=Optimizer.signgd) > 1e-3


def test_the_summed_loss_has_the_same_steps_with_a_rate_divided_by_n():
    """θ ← θ - η/n (∇ Σ_i L_i + λ (θ - θ_0)), full batches."""
    own, x, steps, lam = pull(Regularization.coupled, 3.0, LossConvention.sum), inputs(), 9, 3.0
    weight, start = linear().weight.detach(), linear().weight.detach()
    for _ in range(steps):
        gradient = (x[:NUM_TRAIN] @ weight.T - targets()).T @ x[:NUM_TRAIN]
        weight = weight - 0.2 / NUM_TRAIN * (gradient + lam * (weight - start))
    torch.testing.assert_close(
        trained(own, long(steps)).weight.detach(), weight, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("own", [pull(method, 0.0) for method in METHODS])
def test_lam_of_zero_is_no_pull_to_the_bit(own):
    training = TrainingConfig(learning_rate=0.3, batch_size=2, steps=5, eval_every=5)
    assert torch.equal(trained(own, training).weight, trained(NONE, training).weight)
    assert own.applied is Regularization.none


def test_parameters_that_a_batch_does_not_touch_are_pulled_all_the_same():
    theta = nn.Parameter(torch.tensor([3.0, 1.0]))
    start = {"theta": torch.tensor([1.0, 1.0])}
    Pull({"theta": theta}, start, weight=0.5, method=Regularization.coupled).add_gradient()
    assert theta.grad is not None
    assert theta.grad.tolist() == [1.0, 0.0]
    theta.grad = None
    Pull({"theta": theta}, start, weight=0.5, method=Regularization.decoupled).step(0.5)
    assert theta.tolist() == [2.5, 1.0]


# ------------------------------------------------------------------ real models


@pytest.mark.parametrize("method", METHODS[:2])
def test_a_lora_is_pulled_to_its_random_a_and_to_b_of_zero(method):
    """A share ηλ = 1 - 1e-4 of the way back in a step: one step of the loss is all that is left."""
    case = cases.lora_case("roberta", zero_b=True)
    start = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    rate = 0.5
    training = TrainingConfig(
        learning_rate=rate, schedule=Schedule.constant, batch_size=5, steps=8, eval_every=8,
        max_grad_norm=None, dropout=False,
    )  # fmt: skip
    own = pull(method, (1 - 1e-4) / rate)
    finetune(case.model, case.readout, text_examples(case), training, regularization=own)
    left = {name: p.detach() - start[name] for name, p in case.model.named_parameters()}
    ends = {part: [n for n in left if part in n] for part in ("lora_A", "lora_B")}
    assert all(ends.values())
    case.model.zero_grad()
    data = text_examples(case)
    logits = case.readout(case.model, data.collate(range(5)))
    F.cross_entropy(logits, torch.from_numpy(data.labels)).backward()
    for name in (*ends["lora_A"], *ends["lora_B"]):
        gradient = case.model.get_parameter(name).grad
        assert gradient is not None
        # At the fixed point the step of the loss and the way back cancel: λ(θ - θ_0) = -∇L.
        torch.testing.assert_close(own.lam * left[name], -gradient, rtol=1e-2, atol=1e-5)
    for name in ends["lora_A"]:
        assert float(left[name].norm()) < 0.1 * float(start[name].norm())
    for name in left.keys() - {*ends["lora_A"], *ends["lora_B"]}:
        assert not left[name].any(), name


@pytest.mark.parametrize(
    ("method", "intrinsic_dimension"),
    [*((method, None) for method in METHODS), (Regularization.selective, 4)],
)
def test_a_pulled_trainer_that_goes_on_is_the_same_to_the_bit(method, intrinsic_dimension):
    assert_goes_on_to_the_bit(
        (2, 6),
        pull=pull(method, 3.0),
        optimizer=Optimizer.adam,
        intrinsic_dimension=intrinsic_dimension,
    )


# ------------------------------------------------------------------ the configuration


@pytest.mark.parametrize(
    ("method", "optimizer", "divided"),
    [
        (Regularization.coupled, Optimizer.sgd, True),
        (Regularization.coupled, Optimizer.adam, True),
        (Regularization.coupled, Optimizer.signgd, True),
        (Regularization.decoupled, Optimizer.sgd, True),
        (Regularization.decoupled, Optimizer.adamw, False),
        (Regularization.selective, Optimizer.sgd, True),
        (Regularization.selective, Optimizer.signgd, False),
    ],
)
def test_lam_of_the_sum_is_divided_where_the_scale_of_the_loss_counts(method, optimizer, divided):
    training = TrainingConfig(optimizer=optimizer)
    summed, mean = (pull(method, 6.0, own) for own in (LossConvention.sum, LossConvention.mean))
    assert summed.weight(training, 24) == (0.25 if divided else 6.0)
    assert mean.weight(training, 24) == 6.0


@pytest.mark.parametrize(
    ("own", "changes"),
    [
        (pull(Regularization.coupled, 1.0), {"loss": Loss.cross_entropy}),
        (pull(Regularization.coupled, 1.0), {"weight_decay": 0.1}),
        (pull(Regularization.selective, 1.0), {}),
        (pull(Regularization.decoupled, 1.0), {"optimizer": Optimizer.adamw}),
        (pull(Regularization.decoupled, 1.0), {"max_grad_norm": 1.0}),
        (NONE, {"optimizer": Optimizer.adam}),
    ],
)
def test_there_is_no_sigma_where_the_end_is_no_kernel_ridge_regression(own, changes):
    assert own.sigma(dataclasses.replace(PLAIN, **changes), NUM_TRAIN) is None
    assert NONE.sigma(PLAIN, NUM_TRAIN) == 0.0


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"method": Regularization.coupled, "lam": -1.0}, "regularization.lam: found -1.0"),
        ({"method": Regularization.coupled, "lam": float("inf")}, "a number ≥ 0"),
        ({"method": Regularization.coupled, "lam": float("nan")}, "a number ≥ 0"),
        ({"lam": 2.0}, "Set regularization=coupled"),
        ({"convention": LossConvention.mean}, "regularization.convention: found 'mean'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, key):
    with pytest.raises(InputError, match=key):
        RegularizationConfig(**settings)
