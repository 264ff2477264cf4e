"""Examples are taken by length, and what is found of them comes back in their own order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from raykernel.compute.examples import Examples
from raykernel.compute.spec import LinearizedSpec
from raykernel.compute.tensorfile import write_tensors
from raykernel.problem.models import load_problem
from raykernel.store.blocks import Store
from raykernel.store.linearized import linearized_changes
from raykernel.terms import Precision
from tests import oracles
from tests.compute.tiny_problem import handle_of, make_spec, save_model, texts

LENGTHS = [5, 9, 5, 12, 7, 12, 6]


def examples() -> Examples:
    encoded = texts(7, shortest=12, longest=12)
    ids = tuple(row[:n] for row, n in zip(encoded.input_ids, LENGTHS, strict=True))
    return Examples(dataclasses.replace(encoded, input_ids=ids), "cpu")


def test_the_longest_come_first_and_equal_ones_as_they_were() -> None:
    found = examples()
    assert found.by_length(range(7)) == [3, 5, 1, 4, 6, 0, 2]
    assert found.longest == [3, 5]
    assert list(found.passes(range(1, 7), 3)) == [[3, 5, 1], [4, 6, 2]]
    widths = [batch["input_ids"].shape[1] for batch in found.batches(range(7), 2)]
    assert widths == [12, 9, 6, 5]  # as they come: 9, 12, 12 and 6


def test_places_restore_the_order() -> None:
    found = examples()
    for some in (range(7), range(2, 6), range(4, 5)):
        taken = torch.tensor(found.by_length(some))
        assert taken[found.places(some)].tolist() == list(some)


def test_linearised_outputs_are_in_the_order_of_the_examples(tmp_path: Path) -> None:
    """J(x) w and f(x) at θ_FT of texts of several lengths, two in a pass, in blocks of four."""
    model = save_model(tmp_path / "model")
    spec = make_spec(tmp_path / "store", model, precision=Precision.float64, batch_size=2)
    test = handle_of(spec).grid.test
    own = Examples(spec.encoded, "cpu")
    assert own.by_length(test) != list(test)
    problem = load_problem(
        model, spec.parameters, label_ids=(7, 9), num_labels=2, precision=Precision.float64
    )
    generator = torch.Generator().manual_seed(0)
    chosen = oracles.selected(problem.module)
    start = {name: p.detach().clone() for name, p in chosen.items()}
    w = {
        name: 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in start.items()
    }
    files = Store(tmp_path / "store").begin_trial("0123456789abcdef")
    write_tensors(files.weights, {name: start[name] + w[name] for name in w}, {})
    spec = dataclasses.replace(spec, trial="0123456789abcdef")
    follow = LinearizedSpec(spec).row_blocks()
    handle = handle_of(spec)
    for i in handle.grid.row_indices(test):
        follow(i)
    batch = own.batch(list(test))
    jacobian = oracles.jacobian(problem.module, problem.readout, batch)
    expected = oracles.along(jacobian, w)
    found = linearized_changes(handle, test)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max())
    with torch.no_grad():
        for name, p in chosen.items():
            p.add_(w[name])
        logits = problem.readout(problem.module, batch)
    np.testing.assert_allclose(handle.logits(test), logits, rtol=1e-9, atol=1e-12)
