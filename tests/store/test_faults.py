"""Real damage: each ends in the right numbers or the right words."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raykernel.errors import BlockCorruptError, InputError, StorageFullError
from raykernel.store import arrowfile, kernelfiles
from raykernel.store.blocks import Store, open_store
from raykernel.store.commit import commit, commit_first
from raykernel.store.grid import Grid
from raykernel.store.sealed import seal, unseal
from raykernel.store.verify import verify
from tests.store import stores

BLOCK = "block-0000-0001.arrow"


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_value(path: Path) -> None:
    one = np.float32(stores.truth(Store(path.parents[2]).open())["head"][0, 0, 2, 0]).tobytes()
    flip(path, path.read_bytes().index(one))


def foreign(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([])):
        pass


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not arrow")


def other_cell(path: Path) -> None:
    path.write_bytes((path.parent / "block-0000-0000.arrow").read_bytes())


@pytest.mark.parametrize("damage", [truncate, flip_value, foreign, empty, text, other_cell])
def test_damage_is_named_and_removed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    handle = stores.complete(tmp_path)
    whole = handle.kernel()
    damage(handle.path / BLOCK)
    for reader in (handle, Store(tmp_path).open()):
        with pytest.raises(BlockCorruptError, match=rf"{BLOCK}.*raykernel verify --remove"):
            reader.kernel()
    report = verify(tmp_path)
    assert [file.path.name for file in report.bad] == [BLOCK]
    assert not report.ok
    report = verify(tmp_path, remove=True)
    assert report.ok
    assert report.num_missing == 1
    again = stores.begin(tmp_path)
    assert [(cell.i, cell.j) for cell in again.missing()] == [(0, 1)]
    stores.write(again, again.missing()[0])
    np.testing.assert_array_equal(again.kernel(), whole)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 2**16), bit=st.integers(0, 7))
def test_any_flipped_bit_is_harmless_or_noticed(tmp_path: Path, position: int, bit: int) -> None:
    path = tmp_path / "file.arrow"
    table = pa.table({"kind": ["sgd", "sgd"], "group": ["a", "b"]})
    block = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(32.0).reshape(2, 2, 2, 2, 2))
    table = table.append_column("block", block)
    arrowfile.write(path, table, {"fingerprint": "f"})
    flip(path, position, bit)
    try:
        found = arrowfile.read(path, check=True)
    except InputError:
        return
    assert found.header == {"fingerprint": "f", "format": 1}
    assert found.table["group"].to_pylist() == ["a", "b"]
    np.testing.assert_array_equal(arrowfile.values(found.table["block"]), block.to_numpy_ndarray())


def test_a_block_of_another_kernel_is_foreign(tmp_path: Path) -> None:
    here, there = (
        stores.complete(tmp_path / "here"),
        stores.complete(tmp_path / "there", identity={"task": {"name": "rte"}}),
    )
    (here.path / BLOCK).write_bytes((there.path / BLOCK).read_bytes())
    with pytest.raises(BlockCorruptError, match=there.fingerprint):
        here.kernel()


def test_blocks_with_other_groups_are_not_summed(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    cell = handle.grid.cell(0, 1)
    handle.write_block(cell, {"sgd": {"head": np.zeros((2, 2, 2, 2), np.float32)}})
    with pytest.raises(BlockCorruptError, match="other layer groups"):
        handle.kernel()
    assert [file.path.name for file in verify(tmp_path, remove=True).bad] == [BLOCK]


def test_a_newer_format_is_refused_and_not_removed(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    path = handle.path / BLOCK
    file = arrowfile.read(path, check=True)
    arrowfile.write(path, file.table, {**file.header, "format": 2})
    with pytest.raises(InputError, match="newer raykernel") as error:
        Store(tmp_path).open().kernel()
    assert not isinstance(error.value, BlockCorruptError)
    report = verify(tmp_path, remove=True)
    assert not report.ok
    assert (handle.path / BLOCK).exists()


@pytest.mark.parametrize("name", ["raykernel.json", "identity.json"])
def test_newer_stores_and_manifests_are_refused(tmp_path: Path, name: str) -> None:
    handle = stores.begin(tmp_path)
    path = tmp_path / name if name == "raykernel.json" else handle.path / name
    path.write_bytes(seal({**unseal(path, path.read_bytes()), "format": 2}))
    with pytest.raises(InputError, match="newer raykernel"):
        Store(tmp_path).open()


def test_a_damaged_manifest_is_named_and_written_again(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    (handle.path / "identity.json").write_text('{"format": 1')
    with pytest.raises(BlockCorruptError, match=r"identity\.json"):
        Store(tmp_path).open()
    assert verify(tmp_path, remove=True).ok
    assert stores.begin(tmp_path).missing() == []


def test_folders_that_are_no_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        Store(tmp_path)
    with pytest.raises(InputError, match="expected a folder"):
        Store(tmp_path / "thesis.tex")
    hidden = tmp_path / "new"
    hidden.mkdir()
    (hidden / ".gitkeep").touch()
    assert stores.begin(hidden).missing()


def test_unwritable_places_are_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        stores.begin(tmp_path / "file" / "store")


def test_a_full_device_says_so_and_leaves_nothing(small_disk: Path) -> None:
    handle = stores.begin(small_disk, grid=Grid(64, 64, 64))
    (cell,) = handle.missing()
    kernel = np.ones((64, 2, 64, 2), np.float32)
    before = sorted(small_disk.rglob("*"))
    with pytest.raises(StorageFullError, match=r"block-0000-0000.arrow.*[0-9,]{7,} bytes"):
        handle.write_block(cell, {"sgd": {f"layer.{n}": kernel for n in range(64)}})
    assert sorted(small_disk.rglob("*")) == before
    assert handle.missing() == [cell]


def test_a_file_size_limit_counts_as_full(tmp_path: Path) -> None:
    script = (
        "import resource, pathlib, sys\n"
        "from raykernel.store.commit import commit\n"
        "from raykernel.errors import StorageFullError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    commit(pathlib.Path(sys.argv[1]) / 'x', b'0' * 2000)\n"
        "except StorageFullError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "2,000 bytes" in found.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs a privileged user")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_what_several_workers_measure_at_once_is_the_first_ones_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them find nothing, measure, and write: one file, and everybody goes on with it."""
    handle = stores.begin(tmp_path)
    everybody, written = threading.Barrier(8), list[int]()

    def together(path: Path, payload: bytes) -> int:
        everybody.wait(timeout=30)
        written.append(commit_first(path, payload))
        return written[-1]

    monkeypatch.setattr(kernelfiles, "commit_first", together)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda own: handle.pin("rates", {"first": own}), range(8)))
    assert len({one["first"] for one in found}) == 1
    assert sorted(written)[:-1] == [0] * 7
    assert not list(tmp_path.rglob(".*.tmp"))


def test_leftovers_go_when_they_are_old(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    old, young = (handle.path / f".block-0000-0000.arrow.{n}.tmp" for n in "01")
    for path in (old, young):
        path.touch()
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    assert verify(tmp_path).leftovers == (old,)
    assert old.exists()
    assert verify(tmp_path, remove=True).ok
    assert not old.exists()
    assert young.exists()


def test_files_of_unknown_name_are_named_and_stay(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    (handle.path / "notes.txt").write_text("mine")
    (bad,) = verify(tmp_path, remove=True).bad
    assert (bad.path.name, bad.removed) == ("notes.txt", False)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    commit(path, b"old")
    with pytest.raises(BufferError):  # which only the file's `write` finds out
        commit(path, memoryview(b"every other byte")[::2])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def _write_everything(path: Path, barrier: Barrier) -> None:
    barrier.wait()
    handle = stores.begin(path)
    for cell in handle.grid.cells():
        stores.write(handle, cell)


def test_two_processes_write_the_same_kernel_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    writers = [
        context.Process(target=_write_everything, args=(tmp_path / "new", barrier))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    alone = stores.complete(tmp_path / "alone")
    handle = open_store(tmp_path / "new").open()
    np.testing.assert_array_equal(handle.kernel(), alone.kernel())
    assert verify(tmp_path / "new").bad == ()
    assert not list((tmp_path / "new").rglob(".*.tmp"))
