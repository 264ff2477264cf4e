"""Cells become stored blocks: the same numbers whoever computes them, and never twice."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from raykernel.compute.executor import InlineExecutor
from raykernel.compute.spec import WorkerSpec
from raykernel.compute.worker import Worker
from raykernel.config import ModelConfig
from raykernel.errors import InputError, RunError
from raykernel.ntk.capture import Capture
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.packed import SignedCapture
from raykernel.problem.batches import collate
from raykernel.problem.models import load_problem
from raykernel.store.grid import Cell
from raykernel.terms import Architecture, Kind, Precision
from tests.compute.tiny_problem import handle_of, make_spec, save_model, texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_model(tmp_path_factory.mktemp("model"))


def complete(spec: WorkerSpec) -> list[Cell]:
    """Compute what is missing, in this process."""
    outcomes = InlineExecutor().run(spec.blocks, handle_of(spec).missing())
    return [outcome.job for outcome in outcomes if not outcome.value().already_stored]


def files(spec: WorkerSpec) -> dict[str, tuple[bytes, ...]]:
    """Numbers of every stored file, as bytes."""
    handle = handle_of(spec)
    found = {
        f"{cell.i}-{cell.j}": (np.ascontiguousarray(handle.read_block(cell).values).tobytes(),)
        for cell in handle.grid.cells()
    }
    return found | {"logits": (handle.logits().tobytes(),)}


def test_blocks_hold_the_empirical_kernel(tmp_path: Path, model: ModelConfig) -> None:
    spec = make_spec(tmp_path, model, precision=Precision.float64, batch_size=3)
    complete(spec)
    problem = load_problem(
        model, spec.parameters, label_ids=(7, 9), num_labels=2, precision=Precision.float64
    )
    rows, cols = collate(spec.encoded, range(11)), collate(spec.encoded, range(6))
    expected = empirical_kernel(problem.module, problem.readout, rows, cols)["sgd"]
    handle = handle_of(spec)
    assert handle.groups() == list(expected)
    for group, found in handle.group_kernels():
        block = expected[group]
        # float64: what batches and padding change is rounding.
        np.testing.assert_allclose(found, block.numpy(), rtol=1e-9, atol=1e-9 * block.abs().max())
    logits = problem.readout(problem.module, rows).detach().numpy()
    np.testing.assert_allclose(handle.logits(), logits, rtol=1e-9, atol=1e-12)


def test_kernels_of_signs_come_back_from_mirrored_blocks(
    tmp_path: Path, model: ModelConfig
) -> None:
    """Only one of K[i, j] and K[j, i] is stored: for asigngd, with the other side's kernel."""
    spec = make_spec(tmp_path, model, precision=Precision.float64, batch_size=3)
    kinds = [Kind.sgd, Kind.signgd, Kind.asigngd]
    kernel = dataclasses.replace(spec.kernel, kinds=kinds, dead_zone=1e-9)
    spec = dataclasses.replace(spec, kernel=kernel)
    complete(spec)
    handle = handle_of(spec)
    assert handle.kinds() == ["sgd", "signgd", "asigngd", "asigngd_flipped"]
    assert len(handle.grid.cells()) < len(handle.grid.row_blocks()) * 2, "some block is mirrored"
    problem = load_problem(
        model, spec.parameters, label_ids=(7, 9), num_labels=2, precision=Precision.float64
    )
    rows, cols = collate(spec.encoded, range(11)), collate(spec.encoded, range(6))
    expected = empirical_kernel(
        problem.module, problem.readout, rows, cols, kinds=kinds, dead_zone=1e-9
    )
    for kind in kinds:
        whole = sum(block.numpy() for block in expected[kind.value].values())
        found = handle.kernel(kind=kind.value)
        np.testing.assert_allclose(found, whole, rtol=1e-9, atol=1e-9 * np.abs(whole).max())


def test_a_reduced_precision_says_its_error(tmp_path: Path, model: ModelConfig) -> None:
    spec = make_spec(tmp_path / "a", model, precision=Precision.bfloat16)
    exact = make_spec(tmp_path / "b", model)
    for each in (spec, exact):
        complete(each)
    assert not handle_of(exact).has_pinned("precision")
    said = handle_of(spec).read_pinned("precision")
    assert said["examples"] == 2
    lengths = [len(ids) for ids in spec.encoded.input_ids]
    longest = sorted(range(11), key=lambda i: (-lengths[i], i))[:2]
    problems = [
        load_problem(model, spec.parameters, label_ids=(7, 9), num_labels=2, precision=precision)
        for precision in (Precision.bfloat16, Precision.float32)
    ]
    batch = collate(spec.encoded, longest)
    found, expected = (
        sum(empirical_kernel(p.module, p.readout, batch)["sgd"].values()) for p in problems
    )
    error = float((found - expected).norm() / expected.norm())
    assert said["relative_error"] == pytest.approx(error, rel=1e-3)
    assert 1e-5 < error < 0.5


def test_the_model_that_a_reduced_precision_is_compared_with_is_counted(
    tmp_path: Path, model: ModelConfig
) -> None:
    """Beside the reduced one the worker has the model in float32, and checks that, too."""
    exact, reduced = (
        Worker(make_spec(tmp_path / p.value, model, precision=p)).plan().footprint
        for p in (Precision.float32, Precision.bfloat16)
    )
    # A little more, as tables of integers do not become smaller with the precision.
    assert 0 <= reduced.audit / (exact.audit + exact.weights) - 1 <= 0.1


def test_a_second_run_computes_nothing(tmp_path: Path, model: ModelConfig) -> None:
    spec = make_spec(tmp_path, model)
    cells = handle_of(spec).grid.cells()
    assert complete(spec) == cells
    assert complete(spec) == []
    receipts = [outcome.value() for outcome in InlineExecutor().run(spec.blocks, cells)]
    assert all(receipt.already_stored and receipt.num_bytes == 0 for receipt in receipts)


def test_a_damaged_block_is_computed_again(tmp_path: Path, model: ModelConfig) -> None:
    spec = make_spec(tmp_path, model)
    complete(spec)
    before, path = files(spec), next(handle_of(spec).path.glob("block-*"))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    outcomes = InlineExecutor().run(spec.blocks, handle_of(spec).grid.cells())
    assert sum(not outcome.value().already_stored for outcome in outcomes) == 1
    assert files(spec) == before


def test_resumed_in_any_order_is_the_same_to_the_bit(tmp_path: Path, model: ModelConfig) -> None:
    whole, resumed = (make_spec(tmp_path / name, model) for name in ("whole", "resumed"))
    complete(whole)
    cells = handle_of(resumed).missing()
    for some in (cells[5:2:-1], cells[::-1]):
        list(InlineExecutor().run(resumed.blocks, some))
    assert files(resumed) == files(whole)


@pytest.mark.parametrize(
    "change", [{"block_size": 3}, {"block_size": 16}, {"batch_size": 1}, {"batch_size": 2}]
)
def test_block_and_batch_size_change_rounding_only(
    tmp_path: Path, model: ModelConfig, change: dict[str, int]
) -> None:
    kernels = []
    for name, options in (("a", {}), ("b", change)):
        spec = make_spec(tmp_path / name, model, precision=Precision.float64, **options)
        complete(spec)
        kernels.append(handle_of(spec).kernel())
    scale = np.abs(kernels[0]).max()
    np.testing.assert_allclose(kernels[1], kernels[0], rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize(("resident", "stream"), [(1, False), (1, True), (0, True)])
def test_chunks_that_do_not_fill_a_block_change_rounding_only(
    tmp_path: Path,
    model: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    resident: int,
    stream: bool,
) -> None:
    """Little memory: chunks of one pass, captured block by block, columns in turn or again."""
    specs = [
        make_spec(tmp_path / name, model, precision=Precision.float64, block_size=6, batch_size=2)
        for name in ("a", "b")
    ]
    complete(specs[0])
    worker = Worker(specs[1])
    sizes = worker._sizes
    small = type(sizes)(2, 2, 4, resident, stream, False, sizes.peak_bytes)
    monkeypatch.setattr(worker._fitting, "size", small)
    worker.prepare()
    assert len(worker._captures.streamer.segments) > 1
    for cell in handle_of(specs[1]).missing():
        worker.compute(cell)
    kernels = [handle_of(spec).kernel() for spec in specs]
    scale = np.abs(kernels[0]).max()
    np.testing.assert_allclose(kernels[1], kernels[0], rtol=0, atol=1e-12 * scale)
    logits = [handle_of(spec).logits() for spec in specs]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-12)


def signgd(folder: Path, model: ModelConfig, **options: int) -> WorkerSpec:
    spec = make_spec(folder, model, block_size=4, **options)
    return dataclasses.replace(spec, kernel=dataclasses.replace(spec.kernel, kinds=[Kind.signgd]))


@pytest.mark.parametrize(("resident", "stream"), [(1, False), (2, False), (1, True), (2, True)])
def test_columns_that_wait_as_packed_signs_change_no_bit(
    tmp_path: Path,
    model: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
    resident: int,
    stream: bool,
) -> None:
    """Whole or block by block, kept for other cells or not, in any order of cells."""
    specs = [signgd(tmp_path / name, model, batch_size=2) for name in ("a", "b", "c")]
    for spec, packed in zip(specs, (False, True, True), strict=True):
        worker = Worker(spec)
        sizes = worker._sizes
        assert sizes.packed
        own = type(sizes)(2, 2, 2, resident, stream, packed, sizes.peak_bytes)
        monkeypatch.setattr(worker._fitting, "size", own)
        worker.prepare()
        cells = handle_of(spec).missing()
        for cell in cells[::-1] if spec is specs[2] else cells:
            worker.compute(cell)
        held = [side for segments in worker._columns.values() for side in segments]
        assert len(worker._columns) == resident
        assert all(isinstance(side, SignedCapture if packed else Capture) for side in held)
    assert files(specs[1]) == files(specs[0])
    assert files(specs[2]) == files(specs[0])
    assert handle_of(specs[0]).kernel(kind="signgd").any()


def test_only_kernels_of_signs_alone_pack_their_columns(tmp_path: Path, model: ModelConfig) -> None:
    spec = signgd(tmp_path / "a", model)
    plan = Worker(spec).plan()
    assert plan.sizes.packed
    assert "packed" in plan.methods.values()
    packed = plan.footprint.packed
    assert packed is not None
    assert 0 < packed.segment < packed.whole < plan.footprint.factors
    for kinds in ([Kind.sgd, Kind.signgd], [Kind.asigngd], [Kind.sgd]):
        other = make_spec(tmp_path / kinds[-1].value, model)
        kernel = dataclasses.replace(other.kernel, kinds=kinds)
        plan = Worker(dataclasses.replace(other, kernel=kernel)).plan()
        assert not plan.sizes.packed
        assert plan.footprint.packed is None


def test_too_little_memory_is_refused_with_what_is_needed(
    tmp_path: Path, model: ModelConfig
) -> None:
    spec = make_spec(tmp_path, model, memory_gb=0.1)
    with pytest.raises(InputError, match=r"memory_gb: found 0.1, expected at least 0\.\d+ GiB"):
        complete(spec)


def test_plan_says_how_without_computing(tmp_path: Path, model: ModelConfig) -> None:
    spec = make_spec(tmp_path, model)
    plan = Worker(spec).plan()
    assert len(handle_of(spec).missing()) == len(handle_of(spec).grid.cells())
    assert (plan.sizes.batch, plan.sizes.rows, plan.sizes.cols) == (4, 4, 4)
    assert plan.footprint.forward >= plan.footprint.factors > 0
    assert plan.capture_flops > 0
    assert plan.contraction(4, 4, diagonal=False).flops > 0
    query = next(name for name in plan.methods if name.endswith("attention.self.query"))
    assert set(plan.methods[query].split("+")) <= {"direct", "factored", "rows"}
    assert "lookup" in "+".join(plan.methods.values())
    assert plan.num_parameters > 1000


def test_a_linear_head_is_read_from_the_store(tmp_path: Path, model: ModelConfig) -> None:
    encoder = dataclasses.replace(model, architecture=Architecture.encoder)
    encoded = dataclasses.replace(texts(11), label_ids=())
    spec = make_spec(tmp_path, encoder, encoded=encoded, batch_size=2)
    with pytest.raises(RunError, match="has no linear head"):
        complete(spec)
    jobs = [range(4), range(4, 6)]
    rows = [outcome.value() for outcome in InlineExecutor().run(spec.features, jobs)]
    assert np.concatenate(rows).shape == (6, 16)
    planned = Worker(spec).plan()
    head = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    handle_of(spec).write_head(head, np.zeros(2, np.float32))
    complete(spec)
    # The logits are the head's, of the features that were read.
    expected = np.concatenate(rows) @ head.T
    np.testing.assert_allclose(handle_of(spec).logits()[:6], expected, rtol=1e-4, atol=1e-5)
    assert Worker(spec).plan().footprint == planned.footprint


# ------------------------------------------------------------------ on Ray


@pytest.mark.ray
def test_inline_and_ray_give_the_same_bits(
    tmp_path: Path, model: ModelConfig, ray_run: Callable[..., Iterator[object]]
) -> None:
    inline, ray = (make_spec(tmp_path / name, model) for name in ("inline", "ray"))
    complete(inline)
    receipts = [outcome.value() for outcome in ray_run(ray.blocks, handle_of(ray).missing())]
    assert {receipt.process for receipt in receipts}.isdisjoint({os.getpid()})
    assert all(receipt.peak_memory_bytes > 2**28 for receipt in receipts)
    assert files(ray) == files(inline)


@pytest.mark.ray
def test_killed_and_resumed_gives_the_same_bits(
    tmp_path: Path, model: ModelConfig, ray_run: Callable[..., Iterator[object]]
) -> None:
    whole, killed = (
        make_spec(tmp_path / name, model, num_train=8, num_rows=24, block_size=2)
        for name in ("whole", "killed")
    )
    complete(whole)
    outcomes = ray_run(killed.blocks, handle_of(killed).missing())
    os.kill(next(outcomes).value().process, 9)
    list(outcomes)
    assert handle_of(killed).missing() == []
    assert files(killed) == files(whole)


def test_longest_texts_decide_the_sizes(tmp_path: Path, model: ModelConfig) -> None:
    short = Worker(make_spec(tmp_path / "a", model, encoded=texts(11, longest=12)))
    long = Worker(make_spec(tmp_path / "b", model, encoded=texts(11, shortest=90, longest=99)))
    assert long.plan().footprint.forward > 5 * short.plan().footprint.forward
