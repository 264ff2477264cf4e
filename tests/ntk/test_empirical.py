"""What `empirical_kernel` refuses, and how groups are chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raykernel.errors import InputError
from raykernel.ntk.empirical import empirical_kernel, select_groups
from tests.cases import readout


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


BATCH = {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(0))}


def test_columns_default_to_the_rows():
    one, two = (
        empirical_kernel(model(), readout, BATCH),
        empirical_kernel(model(), readout, BATCH, BATCH),
    )
    assert one.keys() == {"sgd"}
    assert list(one["sgd"]) == ["0", "2"]
    for group, block in one["sgd"].items():
        assert block.shape == (4, 2, 4, 2)
        assert torch.allclose(block, two["sgd"][group])


def test_groups_are_chosen_by_name_or_expression():
    whole = empirical_kernel(model(), readout, BATCH)["sgd"]
    some = empirical_kernel(model(), readout, BATCH, groups=["2"])["sgd"]
    assert list(some) == ["2"]
    assert torch.equal(some["2"], whole["2"])
    assert select_groups(["a.0", "a.1", "cross(a.0, b)"], ["cross(a.0, b)", r"\.1$"]) == (
        "a.1",
        "cross(a.0, b)",
    )


@pytest.mark.parametrize("groups", [["encoder.layer"], ["("]])
def test_unknown_groups_are_refused(groups):
    with pytest.raises(InputError, match="groups"):
        empirical_kernel(model(), readout, BATCH, groups=groups)


def test_unknown_kind_is_refused():
    with pytest.raises(InputError, match="did you mean 'sgd'"):
        empirical_kernel(model(), readout, BATCH, kinds=("sgdd",))


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.zeros(0, 3)},
        {"x": torch.zeros(2, 3), "y": torch.zeros(3)},
        {},
        {"x": torch.tensor(1.0)},
    ],
)
def test_empty_and_uneven_batches_are_refused(batch):
    with pytest.raises(InputError, match="batch"):
        empirical_kernel(model(), readout, batch)


@pytest.mark.parametrize(
    "wrong", [lambda m, b: m(b["x"]).sum(1), lambda m, b: m(b["x"])[:0], lambda m, b: (m(b["x"]),)]
)
def test_readouts_of_another_shape_are_refused(wrong):
    with pytest.raises(InputError, match="readout"):
        empirical_kernel(model(), wrong, BATCH)


def test_nothing_selected_is_refused():
    with pytest.raises(InputError, match="requires_grad"):
        empirical_kernel(model().requires_grad_(False), readout, BATCH)


def test_batch_size_must_be_positive():
    with pytest.raises(InputError, match="batch_size"):
        empirical_kernel(model(), readout, BATCH, batch_size=0)
