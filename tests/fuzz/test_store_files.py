"""Any content in any file of a store: read as what was written, or refused in our words."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from hypothesis import strategies as st

from raykernel.compute.tensorfile import read_facts, read_tensors, write_tensors
from raykernel.compute.weights import read_head
from raykernel.errors import RaykernelError
from raykernel.journal import open_journal
from raykernel.location import location
from raykernel.store import arrowfile, manifest
from raykernel.store.blocks import Store
from raykernel.store.grid import Grid
from raykernel.store.listing import TABLES
from raykernel.store.predictions import read_prediction
from raykernel.store.results import KEY, VERSION, read_file, read_key, read_results
from raykernel.store.tables import TABLES as RESULT_TABLES
from raykernel.store.verify import verify
from tests.fuzz.readers import EFFORT, JSON, damaged, fuzz, json_like, tree
from tests.store import stores


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a kernel, predictions, a head, pinned facts and result rows."""
    path = tmp_path_factory.mktemp("store")
    handle = stores.complete(path)
    for i in range(handle.grid.num_row_blocks):
        stores.predict(handle, i)
    handle.write_head(np.ones((2, 3)), np.zeros(2))
    handle.pin("features", {"count": 5})
    store = Store(path)
    row = {"fingerprint": handle.fingerprint, "kind": "sgd", "solver": "{}", "task": "sst2"}
    store.write_result("kernels", row)
    store.write_result("runs", {"study": "s", "run": "r", "status": "ok", "results": "[]"})
    return path


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def readers(store: Path) -> dict[str, Callable[[], object]]:
    """How each file of a kernel is read, afresh."""

    def opened():
        return Store(store).open()

    return {
        "block-0000-0001.arrow": lambda: (
            opened().read_block(Grid(5, 8, 2).cell(0, 1)).values.copy()
        ),
        "logits-0000.arrow": lambda: opened().read_logits(0).copy(),
        "examples.arrow": lambda: opened().examples().to_pylist(),
        "head.arrow": lambda: opened().read_head(),
        stores.SOLUTION.file_name(0): lambda: read_prediction(opened(), stores.SOLUTION, 0).copy(),
    }


@EFFORT
@pytest.mark.parametrize("number", range(5))
def test_arrow_files_give_what_was_written_or_an_error(store: Path, number: int, effort: int):
    name, read = list(readers(store).items())[number]
    path = Store(store).open().path / name
    content, right = path.read_bytes(), read()

    def check(found: bytes) -> None:
        path.write_bytes(found)
        np.testing.assert_equal(read(), right)

    fuzz(damaged(content) | st.binary(max_size=200), check, effort=effort)


HEADERS = st.dictionaries(
    st.sampled_from(["fingerprint", "i", "row0", "row1", "j", "col0", "col1", "kind", "groups",
                     "point", "format"]), JSON, max_size=6)  # fmt: skip
COLUMNS = st.dictionaries(
    st.sampled_from(["kind", "group", "block", "logits", "fitted", "example", "weight", "bias"]),
    st.lists(st.text(max_size=3), min_size=2, max_size=2)
    | st.lists(st.integers(-9, 9), min_size=2, max_size=2)
    | st.lists(st.none() | st.floats(), min_size=2, max_size=2)
    | st.lists(st.lists(st.floats(), max_size=2), min_size=2, max_size=2),
    max_size=4,
)


@EFFORT
@pytest.mark.parametrize("number", range(5))
def test_files_of_right_checksum_and_wrong_content_are_refused(store, number: int, effort: int):
    """As another program, or somebody else, could write them."""
    name, read = list(readers(store).items())[number]
    path = Store(store).open().path / name
    file = arrowfile.read(path, check=True)
    header, table = dict(file.header), file.table  # whose map outlives the file

    def check(found: tuple[dict[str, Any], dict[str, Any] | None]) -> None:
        facts, columns = found
        facts.pop("format", None)
        arrowfile.write(path, table if columns is None else pa.table(columns), header | facts)
        read()

    fuzz(st.tuples(HEADERS, st.none() | COLUMNS), check, effort=effort)


@EFFORT
def test_identities_are_read_or_refused(store: Path, effort: int):
    path = Store(store).open().path / manifest.NAME

    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = manifest.read(path.parent)
        for size in (found.grid.num_rows, found.grid.num_cols, found.grid.block_size):
            assert type(size) is int
        assert type(found.num_outputs) is int
        assert found.fingerprint
        Store(store).describe(path.parent.name)

    fuzz(json_like(json.loads(path.read_bytes())), check, effort=effort, examples=100)


@EFFORT
def test_markers_and_pinned_facts_are_read_or_refused(store: Path, effort: int):
    marker, handle = store / "raykernel.json", Store(store).open()
    pinned = handle.path / "features.json"

    def check(content: bytes) -> None:
        pinned.write_bytes(content)
        handle.read_pinned("features")

    def check_marker(content: bytes) -> None:
        marker.write_bytes(content)
        Store(store)

    fuzz(json_like({"count": 5}), check, effort=effort)
    fuzz(json_like({"format": 1}), check_marker, effort=effort)


@EFFORT
def test_answers_of_right_checksum_are_rows_or_refused(store: Path, effort: int):
    (path,) = (store / "results" / "kernels").glob("*.arrow")
    spec, content = RESULT_TABLES["kernels"], path.read_bytes()
    start = path.stem.rpartition("-")[0]
    path.unlink()

    def check(found: bytes) -> None:
        named = path.with_name(f"{start}-{xxhash.xxh3_64_hexdigest(found)}.arrow")
        named.write_bytes(found)
        try:
            assert read_file(named, spec).schema.names[-2:] == [KEY, VERSION]
            read_results(store, "kernels")
        finally:
            named.unlink()

    fuzz(damaged(content), check, effort=effort)


CELLS = st.sampled_from(
    [pa.array(["a", None]), pa.array([1, 2]), pa.array([1.5, float("nan")]), pa.nulls(2),
     pa.array([["a"], []]), pa.array([b"\xff", b"b"]), pa.array([True, False]),
     pa.array([{"x": 1}, None]), pa.array(["b", "b"]).dictionary_encode(),
     pa.array(["nan", "2020-01-01"]), pa.array([2**62, -1])]
)  # fmt: skip
COLUMNS_OF_KERNELS = RESULT_TABLES["kernels"].schema.names
NAMES = st.sampled_from([*COLUMNS_OF_KERNELS[:12], "created", KEY, VERSION, "path"])


@EFFORT
@pytest.mark.parametrize("kind", ["answer", "compacted"])
def test_rows_of_any_type_are_cast_or_refused(store: Path, kind: str, effort: int):
    (path,) = (store / "results" / "kernels").glob("*.arrow")
    start = path.stem.rpartition("-")[0]
    row = {"fingerprint": Store(store).open().fingerprint, "kind": "sgd", "solver": "{}"}
    path.unlink()

    def check(columns: dict[str, pa.Array]) -> None:
        table, sink = pa.table(columns), pa.BufferOutputStream()
        if kind == "answer":
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        else:
            pq.write_table(table, sink)
        content = sink.getvalue().to_pybytes()
        name = f"{start}-{xxhash.xxh3_64_hexdigest(content)}.arrow"
        if kind == "compacted":
            name = f"{name[17:41]}{name[-23:-6]}.parquet"
        named = path.parent / ("compacted" if kind == "compacted" else "") / name
        named.parent.mkdir(exist_ok=True)
        named.write_bytes(content)
        try:
            with contextlib.suppress(RaykernelError):
                read_results(store, "kernels")
            read_key(store, "kernels", row)
        finally:
            named.unlink()

    fuzz(st.dictionaries(NAMES, CELLS, min_size=1, max_size=5), check, effort=effort)


@EFFORT
def test_weights_are_tensors_or_refused(tmp_path: Path, effort: int):
    path = tmp_path / "best.safetensors"
    write_tensors(path, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, {"step": 3})
    content = path.read_bytes()

    def check(found: bytes) -> None:
        path.write_bytes(found)
        tensors, facts = read_tensors(path)
        assert isinstance(facts, dict)
        assert read_facts(path) == facts or facts != facts
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        read_head(path)

    start = {"__metadata__": {"raykernel": "{}"},
             "weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
             "bias": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}  # fmt: skip

    def spelt(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + bytes(8)

    of_header = json_like(start).map(spelt)
    of_facts = json_like({"step": 3}).map(
        lambda text: spelt(
            json.dumps(start | {"__metadata__": {"raykernel": text.decode("latin1")}}).encode()
        )
    )
    fuzz(damaged(content) | of_header | of_facts, check, effort=effort)


@EFFORT
@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_journals_are_read_or_refused(tmp_path: Path, kind: str, effort: int):
    logs = [{"op_code": 0, "worker_id": "w", "study_name": "s", "directions": [1]}]
    remote = location(f"memory://fuzz-{effort}/s.journal")

    def check(content: bytes) -> None:
        if kind == "folder":
            place = tmp_path / "s.journal"
            place.write_bytes(content)
        else:
            place = remote
            (place / "00000000.json").write(content)
        found = list(open_journal(place).read_logs(0))
        assert all(isinstance(log, dict) for log in found)

    entry = {"id": "a", "logs": logs} if kind == "object store" else logs[0]
    fuzz(json_like(entry), check, effort=effort)


@EFFORT
def test_verify_and_queries_survive_any_damage(store: Path, effort: int):
    """`verify` ends with a report and removes nothing unasked; tables name what is unreadable."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    contents = [path.read_bytes() for path in files]

    def check(found: tuple[int, bytes]) -> None:
        number, content = found
        files[number].write_bytes(content)
        before = tree(store)
        try:
            verify(store)
            assert tree(store) == before
            for listing in TABLES.values():
                with contextlib.suppress(RaykernelError):
                    listing.rows(Store(store))
        finally:
            files[number].write_bytes(contents[number])

    pick = st.integers(0, len(files) - 1)
    fuzz(
        pick.flatmap(lambda n: st.tuples(st.just(n), damaged(contents[n]))),
        check,
        effort=effort,
        examples=15,
    )
