"""Update rules of fine-tuning, and the learning rate of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from raykernel.config import TrainingConfig
from raykernel.terms import Optimizer, Schedule


class SignGD(torch.optim.Optimizer):
    """Every coordinate moves by the learning rate, against the sign of its gradient.

        θ ← θ - η sign(g + wd θ),    sign 0 = 0

    It is Adam without its averages, which Adam is close to early in training.
    Reference: Malladi et al. 2023 (arXiv:2210.05643), section 3.2.

    Args:
        parameters: what moves.
        learning_rate: η.
        weight_decay: wd.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the parameters that have a gradient."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = parameter.grad.add(parameter, alpha=group["weight_decay"]).sign()
                    parameter.add_(direction, alpha=-group["lr"])


def make_optimizer(
    parameters: Iterable[nn.Parameter], training: TrainingConfig
) -> torch.optim.Optimizer:
    """The optimiser that the configuration names.

    Weight decay is a step of its own for adamw and part of the gradient for the others; it comes
    after clipping, which measures the gradient without it.

    Args:
        parameters: what moves.
        training: rule, learning rate and constants.

    Returns:
        An optimiser without any state yet.
    """
    own = list(parameters)
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer is Optimizer.sgd:
        return torch.optim.SGD(own, lr=rate, weight_decay=decay)
    if training.optimizer is Optimizer.signgd:
        return SignGD(own, rate, decay)
    adam = torch.optim.AdamW if training.optimizer is Optimizer.adamw else torch.optim.Adam
    beta1, beta2 = training.betas
    return adam(own, lr=rate, betas=(beta1, beta2), eps=training.eps, weight_decay=decay)


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Learning rate of a step: η (1 - t/T) where it decays linearly, without warm-up.

    Args:
        training: η, the schedule and the number of steps T.
        step: t, from 0.

    Returns:
        The rate.
    """
    assert training.steps is not None, "a resolved configuration"
    if training.schedule is Schedule.constant:
        return training.learning_rate
    return training.learning_rate * (training.steps - step) / training.steps


def state_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What an optimiser remembers, by `quantity/parameter`.

    Args:
        optimizer: of these parameters.
        parameters: by name.

    Returns:
        Its tensors, not copied; nothing before the first step.
    """
    return {
        f"{quantity}/{name}": value
        for name, parameter in parameters.items()
        for quantity, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
) -> None:
    """Make an optimiser remember what `state_tensors` gave.

    Args:
        optimizer: of these parameters.
        parameters: by name.
        tensors: by `quantity/parameter`.
    """
    for key, value in tensors.items():
        quantity, _, name = key.partition("/")
        parameter = parameters[name]
        # Adam counts its steps on the CPU, whatever the device.
        place = torch.device("cpu") if quantity == "step" else parameter.device
        optimizer.state[parameter][quantity] = value.to(place, copy=True)
