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
from raykernel.store.verify import verify
from tests.store import stores

CELLS = Grid(num_cols=5, num_rows=8, block_size=2).cells()
GRID_CELLS = st.sampled_from(CELLS)


class StoreMachine(RuleBasedStateMachine):
    """Blocks written, logits written and blocks damaged are what the store says they are."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="raykernel-test-"))
        self.blocks: set[tuple[int, int]] = set()
        self.logits: set[int] = set()
        self.damaged: set[tuple[int, int]] = set()

    @initialize()
    def begin(self) -> None:
        self.handle = stores.begin(self.path)

    @rule()
    def begin_again(self) -> None:
        self.handle = stores.begin(self.path)

    @rule()
    def reopen_by_name(self) -> None:
        self.handle = Store(self.path).open(self.handle.fingerprint)

    @rule(cell=GRID_CELLS)
    def write(self, cell: stores.Cell) -> None:
        stores.write(self.handle, cell)
        self.blocks.add((cell.i, cell.j))
        self.logits.add(cell.i)
        self.damaged.discard((cell.i, cell.j))

    @rule()
    def complete(self) -> None:
        for cell in self.handle.missing():
            self.write(cell)

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
        path = self.handle.path / f"block-{i:04d}-{j:04d}.arrow"
        content = path.read_bytes()
        replacement = path.with_name(".damaged")  # a mapped file must not shrink under its reader
        replacement.write_bytes(content[: int(len(content) * kept)])
        replacement.replace(path)
        self.damaged.add((i, j))

    @rule()
    def repair(self) -> None:
        report = verify(self.path, remove=True)
        assert len(report.bad) == len(self.damaged)
        self.blocks -= self.damaged
        self.damaged.clear()

    @invariant()
    def what_is_missing_is_known(self) -> None:
        if not hasattr(self, "handle"):
            return
        expected = [
            cell
            for cell in CELLS
            if (cell.i, cell.j) not in self.blocks or cell.i not in self.logits
        ]
        assert self.handle.missing() == expected

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
