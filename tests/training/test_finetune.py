"""The loop against closed forms and a second implementation in a few lines."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykernel.config import TrainingConfig
from raykernel.errors import InputError, OutOfMemoryError, RunError
from raykernel.ntk import matmul, onednn
from raykernel.terms import Loss, Metric, Optimizer, Precision, Schedule, Split
from raykernel.training.finetune import Examples, FineTuned, Trainer, finetune, objective
from tests import cases

SPLITS = {Split.train: range(7), Split.dev: range(7, 13), Split.test: range(13, 20)}
PLAIN = TrainingConfig(
    learning_rate=0.2,
    schedule=Schedule.constant,
    batch_size=7,
    steps=12,
    eval_every=1,
    max_grad_norm=None,
    loss=Loss.squared,
)


def linear(num_inputs: int = 3, *, seed: int = 0) -> nn.Module:
    model = nn.Linear(num_inputs, 2, bias=False, dtype=torch.float64)
    model.weight.data = cases.normal(2, num_inputs, seed=seed)
    return model


def inputs(num_inputs: int = 3) -> Tensor:
    return cases.normal(20, num_inputs, seed=7)


LABELS = np.arange(20) % 2


def examples(x: Tensor, labels: np.ndarray = LABELS) -> Examples:
    return Examples(lambda indices: {"x": x[list(indices)]}, labels, SPLITS)


def run(model: nn.Module, x: Tensor, training: TrainingConfig, **options: Any) -> FineTuned:
    return finetune(model, cases.readout, examples(x), training, **options)


# ------------------------------------------------------------------ numbers


def test_squared_loss_on_a_linear_model_follows_its_closed_form():
    """F_t - Y = (I - η X Xᵀ / n)^t (F_0 - Y) on train, by full-batch gradient descent."""
    model, x = linear(), inputs()
    own, y = x[:7], F.one_hot(torch.from_numpy(LABELS[:7])).double()
    start = own @ model.weight.detach().T - y
    shrink = torch.eye(7, dtype=torch.float64) - 0.2 * own @ own.T / 7
    trainer = Trainer(
        model, cases.readout, examples(x), PLAIN, metric=Metric.accuracy, batch_size=3
    )
    for step in range(1, 13):
        trainer.advance()
        expected = torch.linalg.matrix_power(shrink, step) @ start
        found = own @ model.weight.detach().T - y
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_one_parameter_follows_its_geometric_series():
    """θ_t = θ* + (1 - η h)^t (θ_0 - θ*), with h and θ* of the one-dimensional parabola."""
    torch.manual_seed(0)
    model = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[0.5], [0.0]], dtype=torch.float64)
    model.weight.requires_grad_(True)
    x = torch.ones(20, 1, dtype=torch.float64) * 2
    found = run(model, x, dataclasses.replace(PLAIN, learning_rate=0.05))
    # ½ (2 θ - y)² with the mean y = 3/7 of the second output's targets: h = 4, θ* = y / 2.
    share = LABELS[:7].mean() / 2
    expected = share + (1 - 0.05 * 4) ** found.best.step * (0.0 - share)
    assert float(found.parameters["weight"][1, 0]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
def test_examples_of_a_pass_do_not_change_the_step(batch_size):
    expected = run(linear(), inputs(), PLAIN, batch_size=7).parameters["weight"]
    found = run(linear(), inputs(), PLAIN, batch_size=batch_size).parameters["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def without_room_for(most: int, error: Exception) -> nn.Module:
    """The model on a device where a pass of more examples fails."""

    def fail(module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > most:
            raise error

    model = linear()
    model.register_forward_pre_hook(fail)
    return model


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_where_memory_runs_out_passes_are_halved_and_the_steps_stay(error):
    """Of 7 examples first, then 3, then 1; gradients of a step are summed over its passes."""
    expected = run(linear(), inputs(), PLAIN, batch_size=7)
    model, options = without_room_for(2, error), {"metric": Metric.accuracy, "batch_size": 7}
    trainer = Trainer(model, cases.readout, examples(inputs()), PLAIN, **options)
    trainer.advance(12)
    found = trainer.finish()
    assert trainer.halved == 2
    torch.testing.assert_close(
        found.parameters["weight"], expected.parameters["weight"], rtol=1e-12, atol=1e-14
    )
    assert found.curve[-1].dev_loss == pytest.approx(expected.curve[-1].dev_loss, rel=1e-12)


@pytest.mark.skipif(not onednn.available(), reason="torch cannot be told to use oneDNN here")
def test_every_pass_multiplies_by_the_faster_library(monkeypatch):
    monkeypatch.setattr(matmul, "_measured", lambda threads: True)
    model, settings = linear(), []
    setting = torch.backends.mkldnn.matmul
    model.register_forward_pre_hook(lambda *_: settings.append(setting.fp32_precision))
    before = setting.fp32_precision
    trainer = Trainer(
        model, cases.readout, examples(inputs()), PLAIN, metric=Metric.accuracy, batch_size=7
    )
    trainer.advance(2)
    trained = len(settings)
    trainer.finish()
    assert 0 < trained < len(settings)
    assert set(settings) == {"bf16"}
    assert setting.fp32_precision == before


def test_where_one_example_has_no_room_the_run_ends_with_the_settings_to_change():
    with pytest.raises(OutOfMemoryError, match=r"with one example in a pass.*task\.max_length"):
        run(without_room_for(0, MemoryError()), inputs(), PLAIN, batch_size=7)
    other = without_room_for(0, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(other, inputs(), PLAIN, batch_size=7)


@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_the_loop_is_the_naive_one(optimizer):
    """Every epoch a permutation of train, its last batch smaller; linear decay; clipping."""
    training = TrainingConfig(
        optimizer=optimizer, learning_rate=0.3, batch_size=3, steps=7, eval_every=7,
        max_grad_norm=0.1,
    )  # fmt: skip
    x, model = inputs(), linear()
    batches: list[list[int]] = []

    def collate(indices: Any) -> dict[str, Tensor]:
        if len(indices) <= 3 and max(indices) < 7:
            batches.append(list(indices))
        return {"x": x[list(indices)]}

    found = finetune(
        model, cases.readout, Examples(collate, LABELS, SPLITS), training, batch_size=20
    )
    del batches[0]  # the shape of the logits, tried on one example
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1, 3]
    for epoch in (batches[:3], batches[3:6]):
        assert sorted(index for batch in epoch for index in batch) == list(range(7))
    assert batches[:3] != batches[3:6]

    twin = linear()
    rules: dict[Optimizer, Any] = {
        Optimizer.sgd: torch.optim.SGD,
        Optimizer.signgd: torch.optim.SGD,
        Optimizer.adam: torch.optim.Adam,
        Optimizer.adamw: lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
    }
    rule = rules[optimizer](twin.parameters(), lr=0.3)
    for step, batch in enumerate(batches):
        rule.zero_grad()
        F.cross_entropy(twin(x[batch]), torch.from_numpy(LABELS[batch])).backward()
        gradient = twin.weight.grad
        assert gradient is not None
        gradient *= min(1.0, 0.1 / (float(gradient.norm()) + 1e-6))
        if optimizer is Optimizer.signgd:
            twin.weight.grad = gradient.sign()
        rule.param_groups[0]["lr"] = 0.3 * (1 - step / 7)
        rule.step()
    torch.testing.assert_close(found.parameters["weight"], twin.weight.detach(), rtol=1e-12, atol=0)


def test_the_gradient_norm_is_that_before_clipping():
    x, model = inputs(), linear()
    F.cross_entropy(model(x[:7]), torch.from_numpy(LABELS[:7])).backward()
    norm = float(model.weight.grad.norm())
    training = dataclasses.replace(PLAIN, loss=Loss.cross_entropy, max_grad_norm=norm / 10, steps=1)
    found = run(linear(), x, training)
    assert found.curve[1].gradient_norm == pytest.approx(norm, rel=1e-12)
    moved = (found.parameters["weight"] - linear().weight.detach()).norm()
    assert float(moved) == pytest.approx(0.2 * norm / 10, rel=1e-5)
    assert found.curve[1].distance == pytest.approx(float(moved), rel=1e-12)


def test_losses_are_their_definitions():
    logits, labels = cases.normal(5, 3, seed=2), torch.tensor([0, 2, 1, 1, 0])
    expected = -torch.stack(
        [row.softmax(0)[y].log() for row, y in zip(logits, labels, strict=True)]
    )
    found = objective(logits, labels, Loss.cross_entropy, reduction="sum")
    torch.testing.assert_close(found, expected.sum())
    squares = sum(
        (float(logits[i, a]) - float(a == labels[i])) ** 2 for i in range(5) for a in range(3)
    )
    found = objective(logits, labels, Loss.squared, reduction="mean")
    assert float(found) == pytest.approx(squares / 2 / 5)


# ------------------------------------------------------------------ what is kept


def test_the_first_of_the_best_evaluations_on_dev_is_kept_and_judged():
    x = inputs()
    model = linear()
    found = run(model, x, dataclasses.replace(PLAIN, steps=9, learning_rate=0.8))
    after = [point for point in found.curve if point.step]
    scores = [point.dev_score for point in after]
    assert len(set(scores)) > 1, "the case must tell evaluations apart"
    assert found.best == after[int(np.argmax(scores))]
    torch.testing.assert_close(found.parameters["weight"], model.weight.detach(), rtol=0, atol=0)
    predicted = model(x[13:]).argmax(1).numpy()
    assert found.test == pytest.approx((predicted == LABELS[13:]).mean())
    predicted = linear()(x[13:]).argmax(1).numpy()
    assert found.zero_shot == pytest.approx((predicted == LABELS[13:]).mean())


def test_the_start_is_evaluated_but_is_no_result():
    """θ_0 fits dev perfectly; training on false labels makes it worse, and that is the result."""
    x, model = inputs(), linear()
    labels = model(x).argmax(1).numpy().copy()
    labels[:7] = 1 - labels[:7]
    found = finetune(model, cases.readout, examples(x, labels), PLAIN)
    assert found.curve[0].step == 0
    assert found.curve[0].dev_score == 1.0
    assert found.best.step > 0
    assert found.curve[0].distance == 0.0
    assert found.curve[0].train_loss is None


def test_train_loss_is_the_mean_since_the_last_evaluation():
    fine = run(linear(), inputs(), PLAIN).curve
    coarse = run(linear(), inputs(), dataclasses.replace(PLAIN, eval_every=5)).curve
    assert [point.step for point in coarse] == [0, 5, 10, 12]
    for start, point in zip([0, 5, 10], coarse[1:], strict=True):
        own = [p.train_loss for p in fine if start < p.step <= point.step]
        assert point.train_loss == pytest.approx(np.mean(own), rel=1e-12)


# ------------------------------------------------------------------ real models


def text_examples(case: cases.Case) -> Examples:
    def collate(indices: Any) -> dict[str, Tensor]:
        return {key: value[list(indices)] for key, value in case.batch.items()}

    five = range(5)
    return Examples(collate, np.arange(5) % 2, dict.fromkeys(Split, five))


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_small_full_batch_steps_decrease_the_loss_on_train(name):
    case = cases.transformer_case(name)
    training = TrainingConfig(
        learning_rate=0.02, batch_size=5, steps=6, eval_every=1, dropout=False
    )
    curve = finetune(case.model, case.readout, text_examples(case), training).curve
    losses = [point.dev_loss for point in curve]  # dev is train here
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_lora_leaves_the_base_as_it_is():
    case = cases.lora_case("roberta", zero_b=True)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    training = TrainingConfig(learning_rate=0.5, batch_size=2, steps=3, eval_every=3)
    found = finetune(case.model, case.readout, text_examples(case), training)
    trained = {name for name in before if "lora_" in name}
    assert set(found.parameters) == trained
    for name, parameter in case.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_dropout_is_on_in_training_only_and_drawn_anew_at_every_step():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()
            self.seen: list[tuple[bool, Tensor]] = []

        def forward(self, x: Tensor) -> Tensor:
            kept = F.dropout(torch.ones(4096), 0.5, self.training)
            self.seen.append((self.training, kept))
            return self.inner(x)

    for dropout in (True, False):
        model, state = Dropped(), torch.random.get_rng_state()
        training = dataclasses.replace(PLAIN, dropout=dropout, steps=3, eval_every=3)
        run(model, inputs(), training, batch_size=20)
        masks = [kept for on, kept in model.seen if on]
        assert len(masks) == (3 if dropout else 0)
        assert all(not torch.equal(masks[0], other) for other in masks[1:])
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not model.training


def test_autocast_keeps_parameters_in_float32_and_computes_in_less():
    losses = {}
    for precision in (Precision.float32, Precision.bfloat16):
        case = cases.transformer_case("roberta")
        training = TrainingConfig(
            learning_rate=0.02, steps=4, eval_every=4, dropout=False, precision=precision
        )
        found = finetune(case.model, case.readout, text_examples(case), training)
        assert {value.dtype for value in found.parameters.values()} == {torch.float32}
        losses[precision] = found.best.dev_loss
    exact, rounded = losses.values()
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


# ------------------------------------------------------------------ going on


def assert_goes_on_to_the_bit(stops: tuple[int, ...], *, pull: Any = None, **method: Any) -> None:
    """Nine steps in one go, and by a second trainer after some of them, are the same nine."""
    options = {} if pull is None else {"regularization": pull}

    def make() -> Trainer:
        case = cases.transformer_case("roberta")
        training = TrainingConfig(learning_rate=0.05, batch_size=2, steps=9, eval_every=2, **method)
        return Trainer(
            case.model, case.readout, text_examples(case), training,
            metric=Metric.accuracy, batch_size=8, **options,
        )  # fmt: skip

    whole = make()
    whole.advance(9)
    for stop in stops:
        first = make()
        first.advance(stop)
        tensors, facts = first.state()
        copied = {name: value.clone() for name, value in tensors.items()}
        first.advance(1)
        second = make()
        second.resume(copied, facts)
        second.advance(9 - stop)
        found, expected = second.finish(), whole.finish()
        assert found.curve == expected.curve
        assert found.test == expected.test
        for name, value in expected.parameters.items():
            assert torch.equal(found.parameters[name], value), name


@pytest.mark.parametrize("intrinsic_dimension", [None, 4])
@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_a_trainer_that_goes_on_from_a_state_is_the_same_to_the_bit(optimizer, intrinsic_dimension):
    assert_goes_on_to_the_bit(
        (2, 6, 8), optimizer=optimizer, intrinsic_dimension=intrinsic_dimension
    )


# ------------------------------------------------------------------ what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_rate():
    training = dataclasses.replace(PLAIN, learning_rate=1e200, steps=5)
    with pytest.raises(RunError, match=r"step \d+ of 5, learning rate 1e\+200.*learning_rate"):
        run(linear(), inputs(), training)


def test_nothing_to_train_and_wrong_logits_are_said_before_a_step():
    model = linear().requires_grad_(False)
    with pytest.raises(InputError, match="requires_grad"):
        run(model, inputs(), PLAIN)
    with pytest.raises(InputError, match=r"expected a tensor \(1, c\)"):
        finetune(linear(), lambda m, b: m(b["x"])[:, 0], examples(inputs()), PLAIN)
