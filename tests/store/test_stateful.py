"""A store under writes, crashes, damage and reopening, against a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raykernel.errors import BlockCorruptError, KernelIncompleteError
from raykernel.store.blocks import Store
from raykernel.store.grid import Grid
from raykernel.store.predictions import missing_predictions
from raykernel.store.verify import verify
from tests.store import stores

GRID = Grid(num_cols=5, num_rows=10, block_size=2, num_dev=3)
CELLS = GRID.cells()
GRID_CELLS = st.sampled_from(CELLS)
ROWS = st.sampled_from([GRID.rows, GRID.train_and_dev, GRID.test])
TEST_BLOCKS = st.sampled_from(GRID.row_indices(GRID.test))


class StoreMachine(RuleBasedStateMachine):
    """Blocks, logits and predictions written and damaged are what the store says they are."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="raykernel-test-"))
        self.blocks: set[tuple[int, int]] = set()
        self.logits: set[int] = set()
        self.damaged: set[tuple[int, int]] = set()
        self.predicted: set[int] = set()
        self.damaged_predictions: set[int] = set()

    @initialize()
    def begin(self) -> None:
        self.handle = stores.begin(self.path, grid=GRID)

    @rule()
    def begin_again(self) -> None:
        self.handle = stores.begin(self.path, grid=GRID)

    @rule()
    def reopen_by_name(self) -> None:
        self.handle = Store(self.path).open(self.handle.fingerprint)

    @rule(cell=GRID_CELLS)
    def write(self, cell: stores.Cell) -> None:
        stores.write(self.handle, cell)
        self.blocks.add((cell.i, cell.j))
        self.logits.add(cell.i)
        self.damaged.discard((cell.i, cell.j))

    @rule(rows=ROWS)
    def complete(self, rows: range) -> None:
        for cell in self.handle.missing(rows):
            self.write(cell)

    @rule(i=TEST_BLOCKS)
    def predict(self, i: int) -> None:
        stores.predict(self.handle, i)
        self.logits.add(i)
        self.predicted.add(i)
        self.damaged_predictions.discard(i)

    @precondition(lambda self: self.predicted)
    @rule(data=st.data(), kept=st.floats(0, 0.99))
    def damage_prediction(self, data: st.DataObject, kept: float) -> None:
        i = data.draw(st.sampled_from(sorted(self.predicted)))
        self.cut(self.handle.path / stores.SOLUTION.file_name(i), kept)
        self.damaged_predictions.add(i)

    @rule(cell=GRID_CELLS)
    def crash_between_logits_and_block(self, cell: stores.Cell) -> None:
        self.handle.write_logits(cell.rows, stores.logits(cell.rows))
        self.logits.add(cell.i)

    @rule(cell=GRID_CELLS, content=st.binary(max_size=50))
    def crash_while_writing(self, cell: stores.Cell, content: bytes) -> None:
        name = f".block-{cell.i:04d}-{cell.j:04d}.arrow.{len(content)}.tmp"
        (self.handle.path / name).write_bytes(content)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), kept=st.floats(0, 0.99))
    def damage(self, data: st.DataObject, kept: float) -> None:
        i, j = data.draw(st.sampled_from(sorted(self.blocks)))
        self.cut(self.handle.path / f"block-{i:04d}-{j:04d}.arrow", kept)
        self.damaged.add((i, j))

    def cut(self, path: Path, kept: float) -> None:
        content = path.read_bytes()
        replacement = path.with_name(".damaged")  # a mapped file must not shrink under its reader
        replacement.write_bytes(content[: int(len(content) * kept)])
        replacement.replace(path)

    @rule()
    def repair(self) -> None:
        report = verify(self.path, remove=True)
        assert len(report.bad) == len(self.damaged) + len(self.damaged_predictions)
        self.blocks -= self.damaged
        self.damaged.clear()
        self.predicted -= self.damaged_predictions
        self.damaged_predictions.clear()
        begun = {i for i, _ in self.blocks}
        wanted = [
            c for c in self.missing(GRID.rows) if c.rows.start not in GRID.test or c.i in begun
        ]
        assert report.num_missing == len(wanted)

    def missing(self, rows: range) -> list[stores.Cell]:
        return [
            cell
            for cell in CELLS
            if set(cell.rows) & set(rows) or (set(cell.cols) & set(rows) and cell.i < cell.j)
            if (cell.i, cell.j) not in self.blocks or cell.i not in self.logits
        ]

    @invariant()
    def what_is_missing_is_known(self) -> None:
        if not hasattr(self, "handle"):
            return
        for rows in (GRID.rows, GRID.train_and_dev, GRID.test):
            assert self.handle.missing(rows) == self.missing(rows)
        found = missing_predictions(self.handle, stores.SOLUTION, GRID.test)
        whole = self.predicted - self.damaged_predictions
        assert found == [i for i in GRID.row_indices(GRID.test) if i not in whole]

    @rule()
    def read(self) -> None:
        try:
            found = self.handle.kernel()
        except KernelIncompleteError:
            assert len(self.blocks) < len(CELLS)
        except BlockCorruptError:
            assert self.damaged
        else:
            assert len(self.blocks) == len(CELLS)
            assert not self.damaged
            total = np.zeros_like(found)
            for kernel in stores.truth(self.handle).values():
                total += kernel
            np.testing.assert_array_equal(found, total)

    def teardown(self) -> None:
        shutil.rmtree(self.path)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
