"""J(x) w is K(x, train) α: whoever computes it, in whatever batches, and never twice."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from raykernel.compute.executor import InlineExecutor
from raykernel.compute.memory import GIB, PROCESS_BYTES, chunk_sizes, product_batch
from raykernel.compute.spec import PredictionReceipt, PredictionSpec
from raykernel.config import ComputeConfig, GridPoint, ModelConfig
from raykernel.errors import InputError, RunError
from raykernel.ntk.product import ProductBytes
from raykernel.store.groups import halved_ties, select_groups
from raykernel.store.predictions import Solution, missing_predictions, read_predictions
from raykernel.terms import Kind, Precision, Solver
from tests.compute.test_memory import FOOTPRINT, MIB, ROOT
from tests.compute.tiny_problem import handle_of, make_spec, save_model

ALPHA = np.random.default_rng(0).standard_normal((6, 2))
F64 = Precision.float64
POINT = GridPoint(Solver.ridge, 0.1, math.inf)
EMBEDDINGS = "roberta.embeddings.word_embeddings"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_model(tmp_path_factory.mktemp("model"))


def spec_of(
    folder: Path,
    model: ModelConfig,
    *,
    groups: list[str] | None = None,
    kind: Kind = Kind.sgd,
    dead_zone: float = 1e-5,
    **options: object,
) -> PredictionSpec:
    """Predictions of five test examples in a kernel whose blocks are stored."""
    worker = make_spec(folder, model, **options)  # type: ignore[arg-type]
    kernel = dataclasses.replace(worker.kernel, kinds=[kind], dead_zone=dead_zone)
    worker = dataclasses.replace(worker, kernel=kernel)
    handle = handle_of(worker)
    list(InlineExecutor().run(worker.blocks, handle.missing()))
    chosen = tuple(select_groups(handle.groups(kind.value), groups=groups))
    return PredictionSpec(worker, Solution(kind.value, chosen, POINT), ALPHA)


def missing(spec: PredictionSpec) -> list[int]:
    handle = handle_of(spec.worker)
    return missing_predictions(handle, spec.solution, handle.grid.test)


def predict(spec: PredictionSpec) -> list[PredictionReceipt]:
    outcomes = InlineExecutor().run(spec.row_blocks, missing(spec))
    return [outcome.value() for outcome in outcomes]


def fitted(spec: PredictionSpec) -> np.ndarray:
    handle = handle_of(spec.worker)
    return read_predictions(handle, spec.solution, handle.grid.test)


def through_the_kernel(spec: PredictionSpec) -> np.ndarray:
    """K(test, train) α of the stored blocks."""
    handle = handle_of(spec.worker)
    of = spec.solution
    k = handle.kernel(list(of.groups), kind=of.kind, rows=handle.grid.test)
    return np.einsum("iajb,jb->ia", k, ALPHA)


LAYER = [r"layer\.1\."]
ALL_BUT_TIED = [r"layer\.", "LayerNorm", "lm_head.dense", "position"]


@pytest.mark.parametrize("kind", [Kind.sgd, Kind.asigngd])
@pytest.mark.parametrize("groups", [None, LAYER, ALL_BUT_TIED, [EMBEDDINGS, r"decoder$"]])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [(Precision.float64, 1e-9), (Precision.float32, 1e-4)]
)
def test_predictions_are_those_of_the_kernel(
    tmp_path: Path,
    model: ModelConfig,
    kind: Kind,
    groups: list[str] | None,
    precision: Precision,
    tolerance: float,
) -> None:
    spec = spec_of(tmp_path, model, groups=groups, kind=kind, precision=precision, batch_size=2)
    predict(spec)
    expected = through_the_kernel(spec)
    # Rounding: of sums over all parameters, in another order.
    np.testing.assert_allclose(fitted(spec), expected, atol=tolerance * np.abs(expected).max())


def test_the_signs_of_predictions_have_the_kernels_dead_zone(
    tmp_path: Path, model: ModelConfig
) -> None:
    """A wide one strikes out half of all signs, and the same ones on both ways."""
    narrow, wide = (
        spec_of(tmp_path / name, model, kind=Kind.asigngd, dead_zone=dead_zone, precision=F64)
        for name, dead_zone in (("narrow", 1e-5), ("wide", 0.1))
    )
    for spec in (narrow, wide):
        predict(spec)
        expected = through_the_kernel(spec)
        np.testing.assert_allclose(fitted(spec), expected, atol=1e-9 * np.abs(expected).max())
    change = np.abs(fitted(wide) - fitted(narrow)).max()
    assert change > 0.01 * np.abs(fitted(narrow)).max()


def test_some_uses_of_a_tied_parameter_are_refused(tmp_path: Path, model: ModelConfig) -> None:
    spec = spec_of(tmp_path, model, groups=[EMBEDDINGS])
    assert halved_ties(handle_of(spec.worker).groups(), spec.solution.groups)
    with pytest.raises(RunError, match="all or none of them"):
        predict(spec)


def test_batches_and_blocks_change_rounding_only(tmp_path: Path, model: ModelConfig) -> None:
    found = []
    for name, options in (("a", {}), ("b", {"batch_size": 1}), ("c", {"block_size": 3})):
        spec = spec_of(tmp_path / name, model, precision=Precision.float64, **options)
        predict(spec)
        found.append(fitted(spec))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-12 * np.abs(found[0]).max())


def test_what_is_stored_is_not_predicted_again(tmp_path: Path, model: ModelConfig) -> None:
    spec = spec_of(tmp_path, model)
    blocks = missing(spec)
    assert [receipt.already_stored for receipt in predict(spec)] == [False, False]
    before, handle = fitted(spec), handle_of(spec.worker)
    assert missing(spec) == []
    again = [outcome.value() for outcome in InlineExecutor().run(spec.row_blocks, blocks)]
    assert all(receipt.already_stored and receipt.num_bytes == 0 for receipt in again)
    # A lost or damaged file is computed again, to the bit, and only that.
    damaged = handle.path / spec.solution.file_name(blocks[0])
    damaged.write_bytes(damaged.read_bytes()[:-50])
    (handle.path / f"logits-{blocks[1]:04d}.arrow").unlink()
    logits = handle.path / f"logits-{blocks[0]:04d}.arrow"
    kept = logits.stat().st_ino
    assert missing(spec) == blocks
    assert not any(receipt.already_stored for receipt in predict(spec))
    assert fitted(spec).tobytes() == before.tobytes()
    assert logits.stat().st_ino == kept


def test_logits_are_the_models(tmp_path: Path, model: ModelConfig) -> None:
    """Predicting writes the logits of rows that no block has brought."""
    spec = spec_of(tmp_path, model, precision=Precision.float64)
    handle = handle_of(spec.worker)
    expected = handle.logits()
    for i in handle.grid.row_indices(handle.grid.test):
        (handle.path / f"logits-{i:04d}.arrow").unlink()
    predict(spec)
    np.testing.assert_allclose(handle.logits(), expected, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ memory

PRODUCT = ProductBytes(fixed=100 * MIB, example=10 * MIB)


def test_batches_of_products_fit_the_memory() -> None:
    weights = 300 * MIB
    sizes = {}
    for memory_gb in (1.1, 1.2, 4.0):
        compute = ComputeConfig(memory_gb=memory_gb, batch_size=16)
        size = sizes[memory_gb] = product_batch(weights, PRODUCT, compute)
        assert weights + PROCESS_BYTES + PRODUCT.of(size) <= memory_gb * GIB
    assert 1 <= sizes[1.1] < sizes[1.2] <= sizes[4.0] == 16
    with pytest.raises(InputError, match=r"memory_gb: found 1, expected at least 1\.\d\d GiB"):
        product_batch(weights, PRODUCT, ComputeConfig(memory_gb=1.0))


def test_a_prediction_that_cannot_fit_is_refused_before_the_blocks() -> None:
    huge = dataclasses.replace(FOOTPRINT, product=ProductBytes(4 * GIB, MIB))
    compute = ComputeConfig(memory_gb=4.0)
    assert chunk_sizes(FOOTPRINT, compute, block_size=16, num_outputs=2)
    with pytest.raises(InputError, match=r"found 4, expected at least 4\.\d\d GiB"):
        chunk_sizes(huge, compute, block_size=16, num_outputs=2)


PREDICT = """
import json, math, resource, sys
from pathlib import Path
import numpy as np
from raykernel.compute import process
from raykernel.compute.spec import PredictionSpec
from raykernel.config import GridPoint, ModelConfig
from raykernel.store.predictions import Solution, missing_predictions, read_predictions
from raykernel.terms import Architecture, Solver
from tests.compute.tiny_problem import handle_of, make_spec, texts
limits, length, memory_gb = json.loads(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
if any(limits):  # they count addresses, which a heap keeps although it gives back their memory
    process.keep_heap_ready = lambda compute: None
model = ModelConfig(name=sys.argv[2], architecture=Architecture.masked_lm)
alpha = np.random.default_rng(0).standard_normal((8, 2))
solution = Solution("sgd", tuple(json.loads(sys.argv[6])), GridPoint(Solver.ridge, 0.1, math.inf))
results = []
for limit in limits:
    folder = Path(sys.argv[1], str(limit))
    spec = make_spec(folder, model, num_train=8, num_rows=16, block_size=8, batch_size=8,
                     encoded=texts(16, shortest=length - 9, longest=length), memory_gb=memory_gb)
    work = None
    work = PredictionSpec(spec, solution, alpha).row_blocks()
    batch = work.__self__._batch
    process.release("cpu")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + limit if limit else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    handle = handle_of(spec)
    for i in missing_predictions(handle, solution, handle.grid.test):
        receipt = work(i)
    found = read_predictions(handle, solution, handle.grid.test)
    results.append({"halved": receipt.halved, "batch": batch, "peak": receipt.peak_memory_bytes,
                    "fitted": found.tolist()})
json.dump(results, sys.stdout)
"""


def measured(
    folder: Path, *limits: int, length: int, memory_gb: float = 4.0
) -> list[dict[str, object]]:
    """Predictions of eight examples in a process, with `limit` bytes to spare (0: any number)."""
    model = save_model(folder / "model", num_attention_heads=8)
    groups = ["roberta.encoder.layer.0.output.dense", "roberta.encoder.layer.1.output.dense"]
    options = [json.dumps(limits), str(length), str(memory_gb), json.dumps(groups)]
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(folder / "store"), model.name, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # One arena: another thread's would take 64 MiB of addresses whenever it begins to allocate.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size from /proc")
def test_when_memory_runs_out_batches_are_halved(tmp_path: Path) -> None:
    # First with little memory: what was free before would lie inside the limit.
    little, plenty = measured(tmp_path, 56 * MIB, 0, length=300)
    assert (plenty["halved"], plenty["batch"]) == (0, 8)
    assert little["halved"]
    expected, found = np.array(plenty["fitted"]), np.array(little["fitted"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_predicting_worker_stays_inside_its_memory(tmp_path: Path) -> None:
    """Eight examples at once would take 865 MiB."""
    (found,) = measured(tmp_path, 0, length=510, memory_gb=0.8)
    assert found["halved"] == 0
    assert 1 <= found["batch"] < 8  # type: ignore[operator]
    assert found["peak"] < 0.8 * GIB  # type: ignore[operator]


# ------------------------------------------------------------------ on Ray


@pytest.mark.ray
def test_killed_and_resumed_gives_the_same_bits(
    tmp_path: Path, model: ModelConfig, ray_run: Callable[..., Iterator[object]]
) -> None:
    whole, killed = (
        spec_of(tmp_path / name, model, num_rows=24, block_size=2) for name in ("whole", "killed")
    )
    predict(whole)
    outcomes = ray_run(killed.row_blocks, missing(killed))
    os.kill(next(outcomes).value().process, 9)
    receipts = [outcome.value() for outcome in outcomes]
    assert {receipt.process for receipt in receipts}.isdisjoint({os.getpid()})
    assert missing(killed) == []
    assert fitted(killed).tobytes() == fitted(whole).tobytes()
