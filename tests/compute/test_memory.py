"""A worker stays inside its memory, however many examples there are."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from raykernel.compute.memory import (
    GIB,
    Footprint,
    PackedBytes,
    Sizes,
    chunk_sizes,
    halved,
    sample_size,
    sketch_sizes,
    slowness,
)
from raykernel.config import ComputeConfig
from raykernel.errors import InputError
from raykernel.ntk.stream import StreamBytes
from raykernel.provenance import peak_resident_bytes
from tests.compute.tiny_problem import save_model

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

FOOTPRINT = Footprint(
    weights=100 * MIB,
    audit=200 * MIB,
    factors=20 * MIB,
    largest=MIB,
    forward=50 * MIB,
    stream=None,
    packed=None,
    output=MIB,
)
PACKED = dataclasses.replace(FOOTPRINT, packed=PackedBytes(whole=5 * MIB, segment=MIB // 2))
STREAMED = dataclasses.replace(FOOTPRINT, stream=StreamBytes(kept=MIB, factors=2 * MIB, step=5))
BOTH = dataclasses.replace(STREAMED, packed=PACKED.packed)
FOOTPRINTS = [FOOTPRINT, STREAMED, PACKED, BOTH]


@pytest.mark.parametrize(
    ("memory_gb", "batch_size", "block_size", "footprint"),
    list(product([1.5, 2.0, 4.0, 16.0], [1, 8], [1, 7, 16], FOOTPRINTS)),
)
def test_sizes_fit_and_are_whole_passes_or_the_block(
    memory_gb: float, batch_size: int, block_size: int, footprint: Footprint
) -> None:
    compute = ComputeConfig(memory_gb=memory_gb, batch_size=batch_size)
    sizes = chunk_sizes(footprint, compute, block_size=block_size, num_outputs=2)
    assert sizes.resident or sizes.stream
    assert sizes.peak_bytes <= memory_gb * GIB
    assert 1 <= sizes.batch <= min(batch_size, block_size)
    for size in (sizes.rows, sizes.cols):
        assert size <= block_size
        assert size == block_size or size % sizes.batch == 0


@pytest.mark.parametrize("footprint", FOOTPRINTS)
def test_more_memory_never_makes_chunks_slower(footprint: Footprint) -> None:
    sizes = [
        chunk_sizes(footprint, ComputeConfig(memory_gb=gb / 4), block_size=16, num_outputs=2)
        for gb in range(5, 40)
    ]
    times = [slowness(s, 2, 16) for s in sizes]
    assert times == sorted(times, reverse=True)
    assert sizes[-1].rows == sizes[-1].cols == 16
    assert sizes[-1].resident > 1


SKETCHED = [dataclasses.replace(f, sketch=MIB // 2, making=MIB) for f in (FOOTPRINT, STREAMED)]


def sizes_of_sketches(footprint: Footprint, memory_gb: float, **options: int) -> Sizes:
    sizes = {"block_size": 16, "num_examples": 200} | options
    compute = ComputeConfig(memory_gb=memory_gb)
    return sketch_sizes(footprint, compute, **sizes, num_outputs=2, matrices=50.0)


@pytest.mark.parametrize(
    ("memory_gb", "block_size", "footprint"),
    list(product([1.25, 1.5, 2.0, 16.0], [1, 7, 16], SKETCHED)),
)
def test_sketches_of_a_cell_fit_and_no_more_than_there_are_are_kept(
    memory_gb: float, block_size: int, footprint: Footprint
) -> None:
    sizes = sizes_of_sketches(footprint, memory_gb, block_size=block_size)
    assert sizes.sketched
    assert sizes.peak_bytes <= memory_gb * GIB
    assert sizes.rows == sizes.cols <= block_size
    assert sizes.rows == block_size or sizes.rows % sizes.batch == 0
    chunks = math.ceil(block_size / sizes.rows)
    assert sizes.resident >= 2 * chunks
    assert sizes.resident <= max(2, math.ceil(200 / block_size) + 1) * chunks


def test_more_memory_projects_more_examples_by_the_same_matrices() -> None:
    large = [dataclasses.replace(SKETCHED[0], factors=n * MIB) for n in (20, 40)]
    for footprint in large:
        rows = [sizes_of_sketches(footprint, gb / 4).rows for gb in range(5, 12)]
        assert rows == sorted(rows)
        assert rows[0] < rows[-1] == 16
        assert sizes_of_sketches(footprint, 16.0).resident >= 200 / 16
    with pytest.raises(InputError, match="memory_gb: found 1, expected at least 1"):
        sizes_of_sketches(SKETCHED[0], 1.0)


def test_halved_chunks_keep_the_sketches_of_as_many_examples() -> None:
    sizes = sizes_of_sketches(SKETCHED[1], 16.0)
    smaller = halved(sizes)
    assert smaller.rows == smaller.cols == sizes.rows // 2
    assert smaller.resident == 2 * sizes.resident
    assert smaller.sketched


def test_streaming_makes_a_small_memory_faster() -> None:
    small, large = (ComputeConfig(memory_gb=gb) for gb in (1.25, 16.0))
    for compute, streams in ((small, True), (large, False)):
        whole, sizes = (
            chunk_sizes(footprint, compute, block_size=32, num_outputs=2)
            for footprint in (FOOTPRINT, STREAMED)
        )
        assert sizes.stream == streams
        assert slowness(sizes, 2, 32) <= slowness(whole, 2, 32)
    assert chunk_sizes(STREAMED, small, block_size=32, num_outputs=2).rows == 32


@pytest.mark.parametrize(("factors", "signs"), [(FOOTPRINT, PACKED), (STREAMED, BOTH)])
def test_packed_columns_leave_room_for_more(factors: Footprint, signs: Footprint) -> None:
    """A quarter of the factors' memory: three times as many columns beside the same rows."""
    for memory_gb in (3.0, 6.0):
        compute = ComputeConfig(memory_gb=memory_gb)
        sizes = [chunk_sizes(f, compute, block_size=16, num_outputs=2) for f in (factors, signs)]
        assert [own.packed for own in sizes] == [False, True]
        assert slowness(sizes[1], 2, 16) < slowness(sizes[0], 2, 16)
        counts = [own.resident * own.cols for own in sizes]
        assert counts[1] > 3 * counts[0]


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    huge = dataclasses.replace(FOOTPRINT, weights=28 * GIB)
    with pytest.raises(InputError, match=r"memory_gb: found 4, expected at least 29\.\d\d GiB"):
        chunk_sizes(huge, ComputeConfig(), block_size=16, num_outputs=2)


def test_a_sample_is_as_large_as_fits_and_never_empty() -> None:
    """Room for 100 MiB of factors beside model, block, process and a pass; 1.1 of them each."""
    fixed = (100 + 3 + 3 * 64 + 640 + 200 + 2 * 50) * MIB
    compute = ComputeConfig(memory_gb=(fixed + 100 * MIB) / GIB)
    found = [sample_size(f * MIB, FOOTPRINT, compute, most=8) for f in (1, 12, 30, 45, 100, 500)]
    assert found == [8, 7, 3, 2, 1, 1]


def test_the_peak_is_this_processes_own() -> None:
    """A process inherits `ru_maxrss` from its parent, but not what is read here."""
    code = "from raykernel.provenance import peak_resident_bytes as p; print(p())"
    ballast = bytearray(400 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 0 < int(out.stdout) < 350 * MIB < peak_resident_bytes()


MEASURE = """
import json, sys, time
from pathlib import Path
from dataclasses import replace
from raykernel.provenance import peak_resident_bytes
from raykernel.config import ModelConfig, ProjectionConfig
from raykernel.terms import Architecture, Projection
from tests.compute.tiny_problem import handle_of, make_spec, texts
model = ModelConfig(name=sys.argv[2], architecture=Architecture.masked_lm)
num_rows, memory_gb = int(sys.argv[3]), float(sys.argv[4])
spec = make_spec(Path(sys.argv[1]), model, num_train=8, num_rows=num_rows, block_size=8,
                 encoded=texts(num_rows, shortest=60, longest=64), memory_gb=memory_gb)
projection = ProjectionConfig(Projection[sys.argv[5]])
spec = replace(spec, kernel=replace(spec.kernel, projection=projection))
work = spec.blocks()
seconds, peaks, receipts = [], [], []
for cell in handle_of(spec).missing():
    start = time.process_time()
    receipts.append(work(cell).peak_memory_bytes)
    seconds.append(time.process_time() - start)
    peaks.append(peak_resident_bytes())
json.dump({"seconds": seconds, "peaks": peaks, "receipts": receipts}, sys.stdout)
"""


OUT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
from raykernel.compute import process
from raykernel.config import ModelConfig
from raykernel.terms import Architecture
from tests.compute.tiny_problem import handle_of, make_spec, texts
# The limit below counts addresses, which a heap keeps although it gives back their memory.
process.keep_heap_ready = lambda compute: None
model = ModelConfig(name=sys.argv[2], architecture=Architecture.masked_lm)
found = []
# First with little memory: what was free before would lie inside the limit.
for name, limit in (("little", int(sys.argv[3])), ("plenty", 0)):
    spec = make_spec(Path(sys.argv[1], name), model, num_train=32, num_rows=32, block_size=32,
                     encoded=texts(32, shortest=60, longest=64), memory_gb=4.0)
    work = None
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    work = spec.blocks()
    process.release("cpu")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + limit if limit else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    receipt = work(handle_of(spec).missing()[0])
    found.append({"halved": receipt.halved, "sum": handle_of(spec).kernel().tolist()})
json.dump(found, sys.stdout)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size from /proc")
def test_when_memory_runs_out_chunks_are_halved(tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 768}
    model = save_model(tmp_path / "model", num_hidden_layers=4, **sizes).name
    limit = 100 * MIB  # at once it takes more than 120 MiB
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path), model, str(limit)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # One arena: another thread's would take 64 MiB of addresses whenever it begins to allocate.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [result["halved"] > 0 for result in found] == [True, False]
    pieces, whole = (np.array(result["sum"]) for result in found)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def measure(
    folder: Path, model: str, num_rows: int, memory_gb: float, projection: str = "none"
) -> dict[str, list[float]]:
    """Time and peak memory of a process by cell."""
    arguments = [str(folder), model, str(num_rows), str(memory_gb), projection]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def test_memory_is_flat_and_time_linear_in_the_rows(tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 768}
    model = save_model(tmp_path / "model", num_hidden_layers=4, **sizes).name
    found = measure(tmp_path / "a", model, 88, 0.9)
    seconds, peaks = found["seconds"], found["peaks"]
    assert len(peaks) == 11
    assert found["receipts"] == peaks
    # The factors of all 88 examples (5 MiB each) would not fit beside the process.
    assert peaks[-1] < 0.9 * GIB
    assert peaks[-1] < peaks[1] + 64 * MIB
    # As long as in the beginning, and as much again for whatever else the process does.
    assert sum(seconds[-5:]) < 2 * sum(seconds[1:6])


@pytest.mark.slow
def test_a_projected_kernel_stays_inside_the_memory(tmp_path: Path) -> None:
    """Factors of 48 examples would be 240 MiB, those of a block 40 MiB; sketches are 12 MiB."""
    sizes = {"hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 768}
    model = save_model(tmp_path / "model", num_hidden_layers=4, **sizes).name
    found = measure(tmp_path / "a", model, 48, 0.92, "rademacher")
    assert found["receipts"][-1] == found["peaks"][-1] < 0.92 * GIB
