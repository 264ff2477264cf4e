"""Predicted time: that of the model's passes as it was timed, and of every chunk's contraction."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raykernel.compute.plan import WorkerPlan
from raykernel.compute.worker import Worker
from raykernel.config import ModelConfig
from raykernel.ntk.rates import PassRate, pass_rate
from tests.compute.tiny_problem import handle_of, make_spec, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> WorkerPlan:
    return Worker(make_spec(tmp_path_factory.mktemp("plan"), model)).plan()


def test_a_rate_is_the_line_through_one_example_and_several() -> None:
    """10 ms a pass and 2 ms a token of 5, spent on purpose."""

    def run(count: int) -> None:
        end = time.thread_time() + 0.01 + 0.002 * 5 * count
        while time.thread_time() < end:
            pass

    rate = pass_rate(run, 5, "cpu", most=4)
    assert rate.fixed == pytest.approx(0.01, rel=0.1)
    assert rate.token == pytest.approx(0.002, rel=0.1)
    assert pass_rate(run, 5, "cpu", most=1).seconds([5]) == pytest.approx(0.02, rel=0.1)


def test_several_examples_that_do_not_fit_are_predicted_from_one() -> None:
    def run(count: int) -> None:
        if count > 1:
            raise MemoryError
        time.sleep(0.001)

    rate = pass_rate(run, 5, "cpu", most=4)
    assert rate.fixed == 0
    assert rate.token > 0
    assert rate.seconds([10, 20]) == pytest.approx(2 * rate.fixed + 30 * rate.token)


def test_a_cell_is_predicted_from_the_timed_passes(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes of two padded examples each, of 1000 s and 1 s a token: no clock says that."""
    spec = make_spec(tmp_path, model, batch_size=2)
    worker = Worker(spec)
    worker.prepare()
    monkeypatch.setitem(worker.__dict__, "_passes", PassRate(1000.0, 1.0))
    cell = next(cell for cell in handle_of(spec).missing() if cell.rows == cell.cols)
    lengths = [len(spec.encoded.input_ids[i]) for i in cell.rows]
    tokens = 2 * max(lengths[:2]) + 2 * max(lengths[2:])
    found = worker.compute(cell).predicted_seconds
    assert 2000 + tokens < found < 2001 + tokens


def test_capturing_and_predicting_take_what_passes_take(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(make_spec(tmp_path, model))
    plans = []
    for token in (1.0, 2.0):
        monkeypatch.setitem(worker.__dict__, "_passes", PassRate(0.0, token))
        plans.append(worker.plan())
    one, two = plans
    assert one.capture_seconds == 12  # tokens of the longest
    assert two.capture_seconds == 2 * one.capture_seconds
    assert two.product_seconds == pytest.approx(2 * one.product_seconds)
    # The same number of products with the weights: J w, and a capture of two outputs.
    assert one.product_seconds == pytest.approx(one.capture_seconds)
    assert one.start_seconds > 0


def test_chunks_add_up_and_parts_of_chunks_cost_less(plan: WorkerPlan) -> None:
    """Chunks of four: ten rows are 4 + 4 + 2, not three fours."""

    def flops(rows: int, cols: int, diagonal: bool = False) -> float:
        return plan.contraction(rows, cols, diagonal=diagonal).flops

    assert (plan.sizes.rows, plan.sizes.cols) == (4, 4)
    assert flops(10, 4) == pytest.approx(2 * flops(4, 4) + flops(2, 4))
    assert flops(8, 8, diagonal=True) == pytest.approx(
        2 * flops(4, 4, diagonal=True) + 2 * flops(4, 4)
    )
    assert flops(4, 4, diagonal=True) < flops(4, 4)
    for sizes in ((1, 1), (3, 4), (4, 4), (5, 9)):
        for more in ((sizes[0] + 1, sizes[1]), (sizes[0], sizes[1] + 1)):
            assert flops(*more) > flops(*sizes)
            few, many = (plan.contraction(*s, diagonal=False).seconds for s in (sizes, more))
            assert many > few
