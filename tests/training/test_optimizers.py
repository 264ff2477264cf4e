"""Update rules against their definition, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from raykernel.config import TrainingConfig
from raykernel.errors import InputError
from raykernel.terms import Optimizer, Schedule
from raykernel.training.optimizers import learning_rate, make_optimizer

GRADIENTS = [[0.3, -2.0, 0.0], [-0.1, 1.0, 0.0], [0.2, 0.5, 0.0]]
START = [1.0, -2.0, 3.0]


def trained(training: TrainingConfig) -> list[float]:
    """Parameters after a step per gradient, with the configured rate."""
    parameter = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = make_optimizer([parameter], training)
    for gradient in GRADIENTS:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return parameter.tolist()


def sgd(g: float, value: float, state: dict[str, float], t: int, decay: float) -> float:
    return value - 0.1 * (g + decay * value)


def signgd(g: float, value: float, state: dict[str, float], t: int, decay: float) -> float:
    g += decay * value
    return value - 0.1 * ((g > 0) - (g < 0))


def adam(g: float, value: float, state: dict[str, float], t: int, decay: float) -> float:
    g += decay * value
    return _adam(g, value, state, t)


def adamw(g: float, value: float, state: dict[str, float], t: int, decay: float) -> float:
    return _adam(g, value * (1 - 0.1 * decay), state, t)


def _adam(g: float, value: float, state: dict[str, float], t: int) -> float:
    m = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g**2
    return value - 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("rule", [sgd, signgd, adam, adamw])
def test_three_steps_are_those_of_the_definition(rule, decay):
    values = list(START)
    states: list[dict[str, float]] = [{} for _ in START]
    for t, gradients in enumerate(GRADIENTS, start=1):
        values = [
            rule(g, value, state, t, decay)
            for g, value, state in zip(gradients, values, states, strict=True)
        ]
    training = TrainingConfig(
        optimizer=Optimizer[rule.__name__], learning_rate=0.1, weight_decay=decay
    )
    assert trained(training) == pytest.approx(values, rel=1e-12)


def test_a_gradient_of_zero_has_sign_zero():
    assert trained(TrainingConfig(optimizer=Optimizer.signgd))[2] == START[2]


def test_the_rate_falls_linearly_to_zero_after_the_last_step():
    training = TrainingConfig(learning_rate=0.4, steps=4)
    rates = [learning_rate(training, step) for step in range(5)]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    constant = TrainingConfig(learning_rate=0.4, steps=4, schedule=Schedule.constant)
    assert learning_rate(constant, 3) == 0.4


def test_steps_follow_from_the_task_unless_they_are_given():
    """32 k C and 4 k C (Malladi et al. 2023, appendix A)."""
    found = TrainingConfig().resolved(k=16, num_labels=2)
    assert (found.steps, found.eval_every) == (1024, 128)
    found = TrainingConfig(steps=10).resolved(k=16, num_labels=2)
    assert (found.steps, found.eval_every) == (10, 10)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "steps"),
        ({"eval_every": 0}, "eval_every"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"optimizer": Optimizer.adam, "betas": [0.9]}, "betas"),
        ({"betas": [0.8, 0.999]}, "training.optimizer=adam"),
        ({"optimizer": Optimizer.signgd, "eps": 1e-6}, "training.optimizer=adam"),
    ],
)
def test_settings_without_meaning_are_refused(changes, key):
    with pytest.raises(InputError, match=key):
        TrainingConfig(**changes)
