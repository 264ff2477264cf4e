"""Every contender of the benchmarks computes the kernel that the float64 loop defines."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import floor
from benchmarks.comparison import relative_error
from benchmarks.contenders import OWN, Contender
from benchmarks.guards import GUARDS, without_guards, write_between
from benchmarks.peers import PEERS, reference
from benchmarks.regression import WAYS, reference_predictions, regression
from benchmarks.selection import groups
from benchmarks.tables import Table
from benchmarks.workloads import PAD, Workload, roberta

WIDTH = 16


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return roberta("tiny", "", texts=4, tokens=8, width=WIDTH, layers=2)


@pytest.mark.parametrize("contender", [*OWN, *PEERS], ids=lambda contender: contender.name)
def test_contender_is_the_float64_loop(contender: Contender, tiny: Workload) -> None:
    if not contender.installed:
        pytest.skip(f"{contender.needs} is not installed")
    expected = reference(contender.variant(tiny))
    assert relative_error(contender.kernel(tiny), expected) < 1e-5


def test_the_forced_contractions_are_two(tiny: Workload) -> None:
    """They sum in different orders, so that their bits differ."""
    direct, factored = (own.kernel(tiny) for own in OWN if own.name.endswith("only"))
    assert not torch.equal(direct, factored)


def test_tied_weights_add_what_the_untied_model_lacks(tiny: Workload) -> None:
    dattri = next(contender for contender in PEERS if contender.needs == "dattri-llm")
    assert relative_error(reference(dattri.variant(tiny)), reference(tiny)) > 1e-5


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_regression_is_that_of_the_float64_kernel(way) -> None:
    problem = regression(6, 4, tokens=8, width=WIDTH, layers=2)
    found, expected = way(problem), reference_predictions(problem)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_floor_counts_every_layer_over_its_live_tokens(tiny: Workload) -> None:
    """All of a text's tokens below the last block; there only the mask's, but for keys, values."""
    n, c = tiny.num_examples, tiny.num_outputs
    words = int((tiny.batch["input_ids"] != PAD).sum())
    square, wide, tall = (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)
    layers = [(words, *size) for size in (square, square, square, square, wide, tall)]
    layers += [(words, *square), (words, *square)]
    layers += [(n, *size) for size in (square, square, wide, tall, square, (WIDTH, c))]
    expected = sum(
        min(
            2 * c * s * d_in * d_out + (n * c) ** 2 * d_in * d_out,
            s**2 * d_in + (c * s) ** 2 * (d_out + 2),
        )
        for s, d_in, d_out in layers
    )
    assert floor.work(tiny).flops == expected


def test_groups_of_the_search_are_of_full_rank() -> None:
    """Else their eigenvalues would be noise, which takes another way through the code."""
    drawn = groups(3, rows=6)
    kernels = drawn.kernels.reshape(3, 12, 12)
    assert np.linalg.matrix_rank(kernels).tolist() == [12, 12, 12]
    assert drawn.names == ("0", "1", "2")


def test_every_guard_is_called_where_the_benchmark_takes_it_out() -> None:
    """Else the run without them would be the run with them."""
    for module, name, _ in GUARDS.values():
        before = getattr(module, name)
        with without_guards():
            assert getattr(module, name) is not before
        assert getattr(module, name) is before
        called = inspect.getsource(module).count(f"{name}(")  # type: ignore[arg-type]
        defined = inspect.getsource(module).count(f"def {name}(")  # type: ignore[arg-type]
        assert called > defined


def test_results_are_written_between_their_marks(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    file.write_text("# Results\n\nother\n", encoding="utf-8")
    for rows in (["a", "1"], ["b", "2"]):
        table = Table("Checks", ["", "seconds"])
        table.add(*rows)
        write_between(table, "command", file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# Results\n\nother\n\n<!-- guards -->\n## Checks")
    assert text.count("<!-- guards -->") == text.count("## Checks") == 1
    assert "| b | 2 |" in text
    assert "| a | 1 |" not in text
