"""Predictions come back to the bit, and whatever is not theirs is refused, named and removed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from raykernel.config import GridPoint
from raykernel.errors import BlockCorruptError, KernelIncompleteError
from raykernel.store import arrowfile
from raykernel.store.blocks import Store
from raykernel.store.grid import Grid
from raykernel.store.predictions import (
    Solution,
    missing_predictions,
    read_prediction,
    read_predictions,
    solution_of,
    write_prediction,
)
from raykernel.store.verify import verify
from raykernel.terms import Solver
from tests.store import stores

GRID = Grid(num_cols=4, num_rows=11, block_size=2, num_dev=2)
SOLUTION = stores.SOLUTION


@pytest.fixture
def handle(tmp_path: Path) -> stores.KernelHandle:
    """Train and dev stored, two of three row blocks of test predicted."""
    handle = stores.begin(tmp_path, grid=GRID)
    for cell in handle.missing(GRID.train_and_dev):
        stores.write(handle, cell)
    for i in (3, 5):
        stores.predict(handle, i)
    return handle


def test_predictions_come_back_to_the_bit(handle: stores.KernelHandle) -> None:
    assert missing_predictions(handle, SOLUTION, GRID.test) == [4]
    with pytest.raises(KernelIncompleteError, match="no predictions of 1 row blocks"):
        read_predictions(handle, SOLUTION, GRID.test)
    stores.predict(handle, 4)
    assert missing_predictions(handle, SOLUTION, GRID.test) == []
    found = read_predictions(handle, SOLUTION, GRID.test)
    assert found.tobytes() == (-stores.logits(GRID.test)).tobytes()
    assert handle.logits(GRID.test).tobytes() == stores.logits(GRID.test).tobytes()
    with pytest.raises(ValueError, match="found shape"):
        write_prediction(handle, SOLUTION, 4, np.zeros((1, 2)))


def at(**changes: object) -> dict[str, object]:
    return {"point": dataclasses.replace(SOLUTION.point, **changes)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "signgd"},
        {"groups": ("head",)},
        at(ridge=0.1),
        at(f0_scaling=10.0),
        at(solver=Solver.logistic),
        at(solver=Solver.asymmetric, gamma=0.1, c=1.0),
    ],
)
def test_every_solution_has_files_of_its_own(
    handle: stores.KernelHandle, change: dict[str, object]
) -> None:
    other = dataclasses.replace(SOLUTION, **change)
    assert missing_predictions(handle, other, GRID.test) == [3, 4, 5]
    write_prediction(handle, other, 3, np.zeros((2, 2)))
    assert missing_predictions(handle, other, GRID.test) == [4, 5]
    path = handle.path / other.file_name(3)
    assert solution_of(path, arrowfile.read_header(path)) == other
    assert read_prediction(handle, SOLUTION, 3).any()
    assert verify(handle.path.parents[1]).ok


def test_logits_are_needed_too(handle: stores.KernelHandle) -> None:
    (handle.path / "logits-0005.arrow").unlink()
    assert missing_predictions(handle, SOLUTION, GRID.test) == [4, 5]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    one = (-stores.logits(range(6, 8))).tobytes()
    content[content.index(one)] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_row_block(path: Path) -> None:
    path.write_bytes(path.with_name(SOLUTION.file_name(5)).read_bytes())


def other_solution(path: Path) -> None:
    file = arrowfile.read(path, check=True)
    arrowfile.write(
        path, file.table, {**file.header, "point": {**file.header["point"], "ridge": 0.5}}
    )


def logits(path: Path) -> None:
    path.write_bytes(path.with_name("logits-0003.arrow").read_bytes())


@pytest.mark.parametrize("damage", [flip, truncate, other_row_block, other_solution, logits])
def test_damage_is_named_removed_and_computed_again(
    handle: stores.KernelHandle, damage: object
) -> None:
    root, name = handle.path.parents[1], SOLUTION.file_name(3)
    damage(handle.path / name)  # type: ignore[operator]
    for reader in (handle, Store(root).open()):
        with pytest.raises(BlockCorruptError, match=rf"{name}.*raykernel verify --remove"):
            read_prediction(reader, SOLUTION, 3)
    assert missing_predictions(handle, SOLUTION, GRID.test) == [3, 4]
    assert [file.path.name for file in verify(root).bad] == [name]
    report = verify(root, remove=True)
    assert (report.ok, report.num_missing) == (True, 0)
    assert not (handle.path / name).exists()
    stores.predict(handle, 3)
    assert missing_predictions(handle, SOLUTION, GRID.test) == [4]


def test_a_prediction_of_no_row_block_is_bad(handle: stores.KernelHandle) -> None:
    path = handle.path / SOLUTION.file_name(6)
    path.write_bytes((handle.path / SOLUTION.file_name(5)).read_bytes())
    (bad,) = verify(handle.path.parents[1], remove=True).bad
    assert (bad.path, bad.removed) == (path, True)
    assert "6 row blocks" in bad.reason


def test_names_do_not_depend_on_the_process() -> None:
    """A golden name: another one would compute every stored prediction again."""
    solution = Solution("sgd", ("a", "cross(a, b)"), GridPoint(Solver.ridge, 0.01, math.inf))
    assert solution.file_name(12) == "prediction-4914c5353499a6bf-0012.arrow"
