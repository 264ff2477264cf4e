from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from raykernel.config import fingerprint
from raykernel.errors import InputError, KernelIncompleteError, StoreMismatchError
from raykernel.store.blocks import Store, open_store
from raykernel.store.grid import Grid
from raykernel.store.sealed import seal, unseal
from tests.store import stores


def expected(handle: stores.KernelHandle, groups: list[str]) -> np.ndarray:
    whole = stores.truth(handle)
    total = np.zeros_like(whole[groups[0]], np.float64)
    for group in groups:
        total += whole[group]
    return total


def test_kernel_is_the_sum_of_the_chosen_groups(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    assert handle.missing() == []
    assert handle.kinds() == ["sgd"]
    assert handle.groups() == stores.GROUPS
    np.testing.assert_array_equal(handle.kernel(), expected(handle, stores.GROUPS))
    some = ["layer.0.query", "layer.1.query"]
    np.testing.assert_array_equal(handle.kernel(["query"]), expected(handle, some))
    np.testing.assert_array_equal(handle.kernel(target_modules=["query"]), handle.kernel(some))
    np.testing.assert_array_equal(
        handle.kernel(layers_to_transform=[-1]), expected(handle, some[1:])
    )


def test_kernel_is_the_same_to_the_bit_for_every_block_size(tmp_path: Path) -> None:
    first, *others = [
        stores.complete(tmp_path / str(size), grid=Grid(5, 8, size)).kernel() for size in (1, 3, 16)
    ]
    for other in others:
        np.testing.assert_array_equal(first, other)


def test_rectangles_are_parts_of_the_whole(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    whole = handle.kernel()
    part = handle.kernel(rows=range(1, 7), cols=range(3, 5))
    np.testing.assert_array_equal(part, whole[1:7, :, 3:5])
    np.testing.assert_array_equal(whole[:5], whole[:5].transpose(2, 3, 0, 1))


def test_group_kernels_sum_to_the_kernel(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    kernels = dict(handle.group_kernels(rows=range(5)))
    assert list(kernels) == stores.GROUPS
    for group, kernel in kernels.items():
        np.testing.assert_array_equal(kernel, stores.truth(handle)[group][:5])
    np.testing.assert_array_equal(sum(kernels.values()), handle.kernel(rows=range(5)))


@settings(max_examples=40, deadline=None)
@given(values=npst.arrays(st.sampled_from([np.float32, np.float64]), (2, 3, 2, 3)))
def test_any_array_survives_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray
) -> None:
    handle = stores.begin(
        tmp_path_factory.mktemp("store"),
        grid=Grid(2, 2, 2),
        num_outputs=3,
        dtype=str(values.dtype),
    )
    (cell,) = handle.missing()
    handle.write_block(cell, {"sgd": {"any": values}})
    found = handle.read_block(cell)
    assert found.names == [("sgd", "any")]
    assert found.values.tobytes() == values.tobytes()
    handle.write_logits(cell.rows, values[:, :, 0, 0])
    assert handle.logits().tobytes() == values[:, :, 0, 0].astype(np.float64).tobytes()
    assert handle.missing() == []


def test_blocks_are_memory_mapped(tmp_path: Path) -> None:
    handle = stores.begin(tmp_path, grid=Grid(64, 64, 64))
    (cell,) = handle.missing()
    kernel = np.ones((64, 2, 64, 2), np.float32)
    handle.write_block(cell, {"sgd": {f"layer.{n}": kernel for n in range(64)}})
    before = pa.total_allocated_bytes()
    block = handle.read_block(cell)
    assert block.values.nbytes == 64 * kernel.nbytes
    assert pa.total_allocated_bytes() - before < kernel.nbytes
    assert not block.values.flags.writeable


def test_block_files_are_plain_arrow(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    with pa.memory_map(str(handle.path / "block-0000-0001.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.schema.names == ["kind", "group", "block"]
    assert table.schema.field("block").type == pa.fixed_shape_tensor(pa.float32(), [2, 2, 2, 2])
    header = json.loads(table.schema.metadata[b"raykernel"])
    assert header["fingerprint"] == handle.fingerprint
    place = ["format", "i", "j", "row0", "row1", "col0", "col1"]
    assert [header[key] for key in place] == [1, 0, 1, 0, 2, 2, 4]
    known = {"host", "pid", "created", "seconds", "peak_memory_bytes", "raykernel", "pyarrow"}
    assert set(header["provenance"]) == known


def test_missing_counts_blocks_and_logits(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    cells = handle.grid.cells()
    (handle.path / "block-0000-0001.arrow").unlink()
    assert handle.missing() == [handle.grid.cell(0, 1)]
    (handle.path / "logits-0003.arrow").unlink()
    wanted = [cell for cell in cells if cell.i == 3 or (cell.i, cell.j) == (0, 1)]
    assert handle.missing() == wanted
    with pytest.raises(KernelIncompleteError, match="1 of the 12 blocks"):
        handle.kernel()
    with pytest.raises(KernelIncompleteError, match="logits of 1 of 5"):
        handle.logits()
    assert handle.kernel(rows=range(4, 8), cols=range(2)).shape == (4, 2, 2, 2)


def test_an_empty_kernel_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(KernelIncompleteError, match="all 12 blocks"):
        stores.begin(tmp_path).kernel()


def test_logits_head_and_examples_come_back(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    np.testing.assert_array_equal(handle.logits(), stores.logits(range(8)))
    assert handle.examples().equals(stores.examples(8))
    assert handle.read_head() is None
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)
    handle.write_head(weight, bias)
    head = handle.read_head()
    assert head is not None
    np.testing.assert_array_equal(head[0], weight)
    np.testing.assert_array_equal(head[1], bias)


def test_blocks_of_another_shape_or_more_precision_are_refused(tmp_path: Path) -> None:
    handle = stores.begin(tmp_path)
    cell = handle.missing()[0]
    with pytest.raises(ValueError, match=r"block \(0, 0\): sgd g: found float32"):
        handle.write_block(cell, {"sgd": {"g": np.zeros((2, 2, 1, 2), np.float32)}})
    with pytest.raises(ValueError, match="found float64"):
        handle.write_block(cell, {"sgd": {"g": np.zeros((2, 2, 2, 2))}})
    with pytest.raises(ValueError, match="no row block"):
        handle.write_logits(range(1, 3), np.zeros((2, 2)))


def test_reopening_needs_path_and_fingerprint_only(tmp_path: Path) -> None:
    handle = stores.complete(tmp_path)
    again = Store(tmp_path).open(handle.fingerprint)
    assert again.manifest == handle.manifest
    assert again.fingerprint == fingerprint(stores.IDENTITY)
    np.testing.assert_array_equal(again.kernel(), handle.kernel())
    np.testing.assert_array_equal(
        open_store(tmp_path).kernel(handle.fingerprint[:6]), again.kernel()
    )


def test_begin_twice_continues(tmp_path: Path) -> None:
    handle = stores.begin(tmp_path)
    stores.write(handle, handle.missing()[0])
    assert len(stores.begin(tmp_path).missing()) == handle.grid.num_cells - 1


def test_another_kernel_in_the_folder_is_shown_field_by_field(tmp_path: Path) -> None:
    handle = stores.begin(tmp_path)
    path = handle.path / "identity.json"
    tree = unseal(path, path.read_bytes())
    tree["identity"]["task"]["k"] = 64
    path.write_bytes(seal(tree))
    with pytest.raises(StoreMismatchError, match=r"identity.task.k: found 64, expected 16"):
        stores.begin(tmp_path)
    with pytest.raises(StoreMismatchError, match=r"grid.block_size: found 2, expected 3"):
        stores.begin(tmp_path, grid=Grid(5, 8, 3))


def test_nearest_kernel_says_what_differs(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").nearest_kernel(stores.IDENTITY) is None
    near = stores.begin(tmp_path)
    far = {**stores.IDENTITY, "model": {"name": "other", "revision": "1"}}
    stores.begin(tmp_path, identity=far)
    wanted = {**stores.IDENTITY, "task": {"name": "sst2", "k": 64, "seed": 13}}
    assert Store(tmp_path).nearest_kernel(wanted) == (near.fingerprint, [("task.k", 16, 64)])
    assert Store(tmp_path).nearest_kernel(stores.IDENTITY) == (near.fingerprint, [])
    assert not (tmp_path / "none").exists()


def test_several_kernels_need_a_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no store"):
        open_store(tmp_path)
    one = stores.begin(tmp_path)
    assert open_store(tmp_path).open().fingerprint == one.fingerprint
    other = stores.begin(tmp_path, identity={"task": {"name": "rte", "k": 4}})
    with pytest.raises(InputError, match=r"task=rte model=None k=4 seed=None") as error:
        open_store(tmp_path).kernel()
    assert one.fingerprint in str(error.value)
    assert open_store(tmp_path).open(other.fingerprint[:8]).fingerprint == other.fingerprint
    with pytest.raises(InputError, match="no kernel 'zz'"):
        open_store(tmp_path).open("zz")


def test_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found 'sgdd'.*did you mean 'sgd'"):
        stores.complete(tmp_path).kernel(kind="sgdd")


def test_a_kernel_without_test_reads_what_it_has_and_says_how_to_get_the_rest(
    tmp_path: Path,
) -> None:
    grid = Grid(num_cols=4, num_rows=11, block_size=2, num_dev=3)
    handle = stores.begin(tmp_path, grid=grid)
    assert handle.missing(grid.train_and_dev) == handle.missing()[:3] + handle.missing()[5:9]
    for cell in handle.missing(grid.train_and_dev):
        stores.write(handle, cell)
    assert handle.missing_begun() == []
    known = handle.kernel(rows=grid.train_and_dev)
    np.testing.assert_array_equal(known, expected(handle, stores.GROUPS)[:7])
    np.testing.assert_array_equal(handle.logits(range(7)), stores.logits(range(7)))
    hint = r"kernel\.test_block=true to store that, too, or read .* rows=range\(0, 7\)"
    for read in (handle.kernel, lambda: handle.kernel(rows=range(7, 8)), handle.logits):
        with pytest.raises(KernelIncompleteError, match=hint):
            read()
    stores.write(handle, grid.cell(5, 1))
    # The row block of test that was begun is wanted, the other one is not.
    assert [(cell.i, cell.j) for cell in handle.missing_begun()] == [(5, 0)]
    (handle.path / "block-0000-0001.arrow").unlink()
    assert [(cell.i, cell.j) for cell in handle.missing_begun()] == [(5, 0), (0, 1)]
    with pytest.raises(KernelIncompleteError, match="to compute what is missing"):
        handle.kernel()
