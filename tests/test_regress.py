"""Kernel regression end to end: test by J w and through its kernel are the same predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from raykernel.analysis.asymmetric import AsymmetricSolution, solve_asymmetric
from raykernel.analysis.ridge import solve_ridge
from raykernel.analysis.targets import one_hot, plus_minus
from raykernel.compose import compose_runs
from raykernel.compute.executor import InlineExecutor, Outcome
from raykernel.compute.spec import WorkerSpec
from raykernel.compute.trouble import cause_of
from raykernel.config import GridPoint, RunConfig
from raykernel.console import Screen
from raykernel.errors import (
    InputError,
    KernelIncompleteError,
    NotPositiveSemidefiniteError,
    WorkerLostError,
)
from raykernel.pipeline import Outcome as Ended
from raykernel.pipeline import begin_kernel, complete, kernel, show_outcome
from raykernel.plan import make_plan, show_plan
from raykernel.prepared import prepare
from raykernel.spectra import spectra
from raykernel.store.arrowfile import read_header
from raykernel.store.blockfile import block_name
from raykernel.store.blocks import Store, open_store
from raykernel.store.grid import Cell
from raykernel.store.kernels import KernelHandle
from raykernel.store.listing import TABLES
from raykernel.store.predictions import PREDICTION_GLOB, read_predictions, solution_of
from raykernel.store.query import query
from raykernel.store.verify import verify
from raykernel.terms import Kind, PredictedBy
from tests import tiny


def arguments(model: Path, **changes: str) -> list[str]:
    """Overrides of a small kernel: 6 train, 6 dev and 7 test examples, cut into threes."""
    own = {"task.test_limit": "7", "kernel.block_size": "3"}
    return tiny.overrides(model, **(own | changes))


def config_of(model: Path, **changes: str) -> RunConfig:
    (run,) = compose_runs("kernel", arguments(model, **changes))
    return run.config


def run(model: Path, **changes: str) -> Ended:
    return kernel(config_of(model, **changes), (), Screen())


def rows() -> list[dict[str, object]]:
    found: list[dict[str, object]] = Store("store").results("kernels").to_pylist()
    return found


def stored_predictions(handle: KernelHandle, kind: str = "sgd") -> np.ndarray:
    paths = handle.path.glob(PREDICTION_GLOB)
    solutions = {solution_of(path, read_header(path)) for path in paths}
    (solution,) = (found for found in solutions if found.kind == kind)
    return read_predictions(handle, solution, handle.grid.test)


def labels_of(handle: KernelHandle) -> np.ndarray:
    return (np.array(handle.examples()["label"].to_pylist()) == "positive").astype(int)


def through_the_kernel(
    handle: KernelHandle, row: dict[str, object], groups: list[str]
) -> np.ndarray:
    """K(test, train) α of the ridge and the scaling that a row of results names."""
    grid = handle.grid
    labels = labels_of(handle)
    train = range(grid.num_cols)
    solution = solve_ridge(
        handle.kernel(groups or None, rows=train),
        one_hot(labels[: grid.num_cols], 2),
        ridge=[row["ridge"]],  # type: ignore[list-item]
        f0=handle.logits(range(grid.num_cols)),
        f0_scaling=[row["f0_scaling"]],  # type: ignore[list-item]
        resolution=float(np.finfo(handle.manifest.dtype).eps) * 2 * grid.num_cols,
    )
    k = handle.kernel(groups or None, rows=grid.test)
    return np.einsum("iajb,jb->ia", k, solution.alpha[0, 0])


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize("groups", [[], [r"layer\.1\."]])
def test_both_ways_give_the_same_predictions_and_scores(
    model: Path, here: Path, precision: str, tolerance: float, groups: list[str]
) -> None:
    changes = {"kernel.precision": precision, "solver.groups": f"[{','.join(groups)}]"}
    # A small divisor: the initial logits decide many a prediction.
    changes |= {"solver.ridge": "[0.01,0.1]", "solver.f0_scaling": "[0.2]"}
    short = run(model, **changes)
    (by_tangent,) = rows()
    assert (short.regression.by, short.regression.num_computed) == (PredictedBy.tangent, 7)
    # 3 cells of train with itself, 4 of dev with train, none of test.
    assert short.completion.blocks_total == by_tangent["blocks_total"] == 7
    handle = open_store("store").open()
    with pytest.raises(KernelIncompleteError, match=r"kernel\.test_block=true"):
        handle.kernel()
    long = run(model, **changes, kernel__test_block="true")
    (by_block,) = rows()
    assert (long.completion.blocks_total, long.completion.blocks_computed) == (13, 6)
    assert (by_tangent["test_by"], by_block["test_by"]) == ("tangent", "block")
    same = ("fingerprint", "kernel_regression", "zero_shot", "dev", "ridge", "f0_scaling")
    assert [by_tangent[name] for name in same] == [by_block[name] for name in same]
    expected = through_the_kernel(handle, by_block, groups)
    found = stored_predictions(handle)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    test = handle.grid.test
    h = expected + handle.logits(test) / by_block["f0_scaling"]  # type: ignore[operator]
    accuracy = (h.argmax(1) == labels_of(handle)[test.start :]).mean()
    assert by_tangent["kernel_regression"] == accuracy
    # What is stored is used: neither blocks nor predictions are computed any more.
    again = run(model, **changes)
    assert (again.completion.blocks_computed, again.regression.num_computed) == (0, 0)
    assert again.regression.by is PredictedBy.block


def test_a_second_run_computes_nothing_and_a_new_ridge_only_predictions(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(model, **{"solver.ridge": "[0.1]"})
    show_outcome(first, Screen())
    captured = capsys.readouterr()
    assert "test predicted without its kernel (J w), 7 examples in" in captured.out
    assert captured.err.count("test predictions:") <= 2  # plain lines, the last at the end
    files = {path: path.stat().st_ino for path in (here / "store").rglob("*")}
    again = run(model, **{"solver.ridge": "[0.1]"})
    show_outcome(again, Screen())
    captured = capsys.readouterr()
    assert "computing 0 blocks" in captured.err
    assert "computing 0 predictions" in captured.err
    assert "(J w), stored before" in captured.out
    assert {path: path.stat().st_ino for path in (here / "store").rglob("*")} == files
    assert again.regression.results == first.regression.results
    other = run(model, **{"solver.ridge": "[10.0]"})
    assert other.completion.blocks_computed == 0
    assert other.regression.num_computed == 7
    assert len(rows()) == 2


def test_every_table_of_a_real_run_can_be_asked(model: Path, here: Path) -> None:
    """Labels are there by name, and predictions beside them give the stored accuracy."""
    run(model)
    for name in TABLES:
        query(f"SELECT * FROM {name}", "store")
    of_split = "SELECT split, label, count(*) FROM examples GROUP BY ALL ORDER BY ALL"
    found = [tuple(row.values()) for row in query(of_split, "store").to_pylist()]
    assert [count for split, _, count in found if split in ("train", "dev")] == [3, 3, 3, 3]
    assert {label for _, label, _ in found} == {"negative", "positive"}
    joined = "SELECT fitted, label FROM predictions JOIN examples USING (fingerprint, example)"
    pairs = query(joined, "store").to_pylist()
    assert len(pairs) == 7
    assert {pair["label"] for pair in pairs} <= {"negative", "positive"}


def test_a_damaged_prediction_is_computed_again(model: Path, here: Path) -> None:
    run(model)
    path, *_ = sorted(here.glob("store/kernels/*/prediction-*"))
    path.write_bytes(path.read_bytes()[:-100])
    assert run(model).regression.num_computed == 3


def asymmetric(handle: KernelHandle, point: GridPoint) -> AsymmetricSolution:
    """The solution of one grid point from the stored kernel of train."""
    train = range(handle.grid.num_cols)
    return solve_asymmetric(
        handle.kernel(kind="asigngd", rows=train),
        plus_minus(labels_of(handle)[: len(train)], 2),
        gamma=[point.gamma],  # type: ignore[list-item]
        ridge=[point.ridge],
        f0=handle.logits(train),
        f0_scaling=[point.f0_scaling],
        c=[point.c],  # type: ignore[list-item]
    )


def test_asigngd_is_predicted_without_the_kernel_of_test_and_as_through_it(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """J w, w = Σ_j β_j sign(gradient of j), is K(test, train) β; c < 1 adds K(train, test)ᵀ α."""
    changes = {"kernel.kinds": "[asigngd]", "kernel.precision": "float64"}
    changes |= {"solver.ridge": "[0.1]", "solver.gamma": "[0.01,1.0]", "solver.f0_scaling": "[0.2]"}
    short = run(model, **changes)
    assert (short.regression.by, short.completion.blocks_total) == (PredictedBy.tangent, 7)
    handle = open_store("store").open()
    found = stored_predictions(handle, "asigngd")
    capsys.readouterr()
    mixed = run(model, **changes, **{"solver.c": "[0.25]"})
    assert "solver.c below 1 needs K(train, x)" in capsys.readouterr().err
    assert (mixed.regression.by, mixed.completion.blocks_total) == (PredictedBy.block, 13)
    long = run(model, **changes, kernel__test_block="true")
    assert (long.regression.by, long.completion.blocks_computed) == (PredictedBy.block, 0)
    results = [run.regression.results[Kind.asigngd] for run in (short, long, mixed)]
    assert results[0] == results[1]
    assert [result.point.c for result in results] == [1.0, 1.0, 0.25]
    test = handle.grid.test
    k, k_flipped = (handle.kernel(kind=kind, rows=test) for kind in ("asigngd", "asigngd_flipped"))
    expected = np.einsum("iajb,jb->ia", k, asymmetric(handle, results[0].point).beta[0, 0, 0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    for result in results:
        solution = asymmetric(handle, result.point)
        h = solution.predict(k, handle.logits(test), k_flipped)[0, 0, 0, 0]
        assert result.test_score == (h.argmax(1) == labels_of(handle)[test.start :]).mean()
    by_share = {row["c"]: row for row in rows()}
    assert set(by_share) == {1.0, 0.25}
    assert by_share[1.0]["gamma"] == results[0].point.gamma
    assert by_share[1.0]["iterations"] == 0


def test_three_kinds_are_three_rows_and_signs_on_both_sides_need_the_kernel_of_test(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"kernel.kinds": "[sgd,signgd,asigngd]", "solver": "logistic"}
    outcome = run(model, **changes)
    assert outcome.regression.by is PredictedBy.block
    assert outcome.completion.blocks_total == outcome.prepared.grid.num_cells
    assert not list(here.glob("store/kernels/*/prediction-*"))
    show_outcome(outcome, Screen())
    shown = capsys.readouterr().out
    for row in ("(sgd, logistic)", "(signgd, logistic)", "(asigngd, asymmetric)", "gamma"):
        assert row in shown
    by_kind = {row["kind"]: row for row in rows()}
    solvers = {kind: row["solved_by"] for kind, row in by_kind.items()}
    assert solvers == {"sgd": "logistic", "signgd": "logistic", "asigngd": "asymmetric"}
    assert by_kind["sgd"]["iterations"] > 0  # type: ignore[operator]
    assert by_kind["sgd"]["gamma"] is None


def test_some_uses_of_a_tied_parameter_need_the_kernel_of_test(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"solver.groups": "[word_embeddings]"}
    outcome = run(model, **groups)
    assert outcome.regression.by is PredictedBy.block
    assert outcome.completion.blocks_total == outcome.completion.blocks_computed == 13
    said = capsys.readouterr().err
    assert said.count("Note: solver.groups chooses some but not all uses of a tied") == 1
    plan = make_plan(config_of(model, **groups), Screen())
    assert (len(plan.cells), plan.missing, plan.num_predicted) == (13, [], 0)
    # Both uses are one parameter.
    both = run(model, **{"solver.groups": "[word_embeddings,decoder]", "store.path": "other"})
    assert both.regression.by is PredictedBy.tangent


def test_plan_counts_what_is_wanted(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = [make_plan(config_of(model), Screen())]
    assert (len(plans[0].cells), len(plans[0].missing), plans[0].num_predicted) == (7, 7, 7)
    assert 0 < plans[0].prediction_flops < plans[0].flops
    assert 0 < plans[0].prediction_seconds < plans[0].seconds
    show_plan(plans[0], Screen())
    assert "7 examples predicted without their kernel (J w)" in capsys.readouterr().out
    outcome = run(model)
    stored = sum(path.stat().st_size for path in here.glob("store/kernels/*/block-*"))
    assert plans[0].store_bytes < stored
    done = make_plan(config_of(model), Screen())
    assert (done.missing, done.num_predicted, done.flops, done.seconds) == ([], 0, 0.0, 0.0)
    more = make_plan(config_of(model, kernel__test_block="true"), Screen())
    assert (len(more.cells), len(more.missing), more.num_predicted) == (13, 6, 0)
    assert outcome.prepared.fingerprint == more.prepared.fingerprint


def test_a_linear_probe_is_predicted_from(model: Path, here: Path) -> None:
    changes = {"prompt": "none", "kernel.precision": "float64"}
    without = ("prompt.template", "prompt.words")
    config = _without(arguments(model, **changes), without)
    first = kernel(config, (), Screen())
    kernel_too = dataclasses.replace(config.kernel, test_block=True)
    second = kernel(dataclasses.replace(config, kernel=kernel_too), (), Screen())
    assert [o.regression.by for o in (first, second)] == [PredictedBy.tangent, PredictedBy.block]
    assert first.regression.results == second.regression.results
    (row,) = rows()
    handle = open_store("store").open()
    expected = through_the_kernel(handle, row, [])
    found = stored_predictions(handle)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


# ------------------------------------------------------------------ kernels that are none


def change(handle: KernelHandle, cell: Cell, entry: tuple[int, int, int, int], by: float) -> None:
    """Add to one entry of a stored block in every layer group, by its share of |K|, committed."""
    values = handle.read_block(cell).of_kind("sgd").copy()
    top = np.linalg.norm(handle.kernel(rows=handle.grid.train))
    values[(slice(None), *entry)] += by * top / len(values)
    handle.write_block(cell, {"sgd": dict(zip(handle.groups(), values, strict=True))})


@pytest.mark.parametrize(
    ("cell", "entry", "text"),
    [
        ((0, 0), (0, 1, 2, 0), "differs from its transpose.* between train examples 0 and 2"),
        ((0, 1), (2, 0, 1, 0), "has eigenvalue -.* Train example . has most of it"),
    ],
    ids=["asymmetric", "indefinite"],
)
def test_a_block_that_was_changed_with_its_checksum_stops_the_solver(
    cell: tuple[int, int], entry: tuple[int, int, int, int], text: str, model: Path, here: Path
) -> None:
    """Half of |K| in one entry; a millionth is rounding. `verify` sees files that are whole."""
    handle = Store("store").open(run(model).prepared.fingerprint)
    own = next(found for found in handle.grid.cells() if (found.i, found.j) == cell)
    change(handle, own, entry, 1e-6)
    run(model)
    change(handle, own, entry, 0.5)
    assert verify("store").ok
    for stage in (
        lambda: run(model),
        lambda: spectra(config_of(model), (), Screen()),
    ):
        with pytest.raises((NotPositiveSemidefiniteError, InputError), match=text) as raised:
            stage()
        assert "delete the kernel's folder" in str(raised.value)


class Killed(InlineExecutor):
    """An executor whose workers die of Ray's memory monitor while chunks are whole."""

    def __init__(self, error: str) -> None:
        self.error = error
        self.halvings: list[int] = []

    def run(self, make, jobs, *, workers=None):  # type: ignore[no-untyped-def]
        spec = getattr(make, "__self__", None)
        if not isinstance(spec, WorkerSpec) or spec.halvings:
            self.halvings += [spec.halvings] if isinstance(spec, WorkerSpec) else []
            yield from super().run(make, jobs, workers=workers)
            return
        first, *others = jobs
        yield Outcome(first, 3, error=WorkerLostError(self.error))
        yield from super().run(make, others, workers=workers)


def test_blocks_whose_workers_were_ended_for_memory_come_back_in_halved_chunks(
    model: Path, here: Path
) -> None:
    prepared = run(model, store__path="whole").prepared
    whole = Store("whole").open(prepared.fingerprint)
    ray_says = RuntimeError("The actor died: task killed as the node was running low on memory.")
    killed = Killed(f"cell was tried 3 times, each time its worker died ({cause_of(ray_says)}).")
    own = prepare(config_of(model), Screen())
    handle = begin_kernel(own, Store("store"))
    complete(own, handle, killed, Screen())
    assert killed.halvings == [1]
    first, second = (kernel.kernel(rows=kernel.grid.train_and_dev) for kernel in (whole, handle))
    np.testing.assert_allclose(second, first, rtol=0, atol=1e-5 * np.abs(first).max())
    cells = handle.grid.cells(handle.grid.train_and_dev)
    names = [block_name(cell.i, cell.j) for cell in cells]
    rows = [read_header(handle.path / name)["provenance"]["rows"] for name in names]
    assert rows == [1] + [3] * (len(cells) - 1)
    other = Killed("cell was tried 3 times, each time its worker died (ActorDiedError: killed).")
    with pytest.raises(WorkerLostError, match="ActorDiedError"):
        complete(own, begin_kernel(own, Store("other")), other, Screen())


def _without(overrides: list[str], keys: tuple[str, ...]) -> RunConfig:
    kept = [text for text in overrides if text.partition("=")[0] not in keys]
    (run,) = compose_runs("kernel", kept)
    return run.config
