"""Signatures are checked while the tests run: shapes, sizes that must agree, and plain types."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError

from raykernel.analysis.ridge import solve_ridge
from raykernel.compute.examples import split
from raykernel.ntk import contract
from raykernel.ntk.capture import Tracer
from raykernel.problem.probe import Head
from raykernel.problem.tail import at_position
from raykernel.terms import Kind
from tests import cases, typed


@pytest.fixture(autouse=True)
def every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a function was called before."""
    monkeypatch.setattr(typed, "EVERY", 1)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 1)])
def test_a_wrong_number_of_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    assert at_position(torch.ones(2, 3, 4), torch.zeros(2, dtype=torch.long)).shape == (2, 1, 4)
    with pytest.raises(TypeCheckError, match="hidden"):
        at_position(torch.ones(shape), torch.zeros(2, dtype=torch.long))


def test_sizes_of_one_name_must_agree() -> None:
    with pytest.raises(TypeCheckError, match="f0"):
        solve_ridge(np.ones((2, 1, 2, 1)), np.ones((2, 1)), f0=np.ones((3, 1)))


def test_fields_of_a_dataclass_are_checked() -> None:
    with pytest.raises(TypeCheckError, match="bias"):
        Head(weight=np.ones((2, 3), np.float32), bias=np.ones((2, 1), np.float32))


def test_a_shape_with_a_name_of_its_own_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gram` returns `Block`, which stands for a shape elsewhere in its module."""
    monkeypatch.setattr(contract, "grams", lambda *_, **__: {Kind.sgd: {"all": torch.ones(2, 3)}})
    case = cases.transformer_case("roberta")
    capture = Tracer(case.model, case.readout).capture(case.batch)
    with pytest.raises(TypeCheckError, match="return value"):
        contract.gram(capture, capture)


def test_a_dict_of_shapes_with_a_name_of_its_own_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With sizes of its own, not of the function that calls it."""
    wrong = {Kind.sgd: torch.ones(2, 3, 4)}
    monkeypatch.setattr(contract, "together", lambda pairs, *_, **__: [wrong for _ in pairs])
    case = cases.transformer_case("roberta")
    capture = Tracer(case.model, case.readout).capture(case.batch)
    with pytest.raises(TypeCheckError, match="return value"):
        contract.gram(capture, capture)


def test_plain_types_are_checked() -> None:
    with pytest.raises(BeartypeCallHintParamViolation):
        next(split((0, 1), 1))  # type: ignore[arg-type]
