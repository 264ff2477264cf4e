"""What measuring a model's memory leaves behind: nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from raykernel.ntk.capture import Tracer
from raykernel.ntk.passes import saved_storages
from raykernel.ntk.product import product_bytes
from raykernel.ntk.stream import Streamer
from tests import cases


def by_capture(case: cases.Case) -> object:
    return Tracer(case.model, case.readout).bytes_per_example(case.batch)


def by_stream(case: cases.Case) -> object:
    return Streamer(Tracer(case.model, case.readout)).num_bytes(case.batch)


def by_product(case: cases.Case) -> object:
    return product_bytes(case.model, case.readout, case.batch)


@pytest.mark.parametrize("measure", [by_capture, by_stream, by_product])
def test_a_model_that_was_measured_can_be_let_go(measure: Callable[[cases.Case], object]) -> None:
    """A process that runs one trial after the other has the memory of one."""
    case = cases.transformer_case("roberta")
    weight = weakref.ref(next(case.model.parameters()))
    assert measure(case)
    del case
    gc.collect()
    assert weight() is None


def test_what_is_saved_is_what_a_backward_pass_reads() -> None:
    """Of tanh(tanh(x W)): x, and both tanh, but not W."""
    linear = nn.Linear(3, 5, bias=False)
    x = torch.randn(2, 3)
    with saved_storages(linear) as saved:
        first = linear(x).tanh()
        second = first.tanh()
    assert sum(saved.values()) == 4 * (x.numel() + first.numel() + second.numel())
