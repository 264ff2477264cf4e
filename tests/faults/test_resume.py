"""Kill everything in the middle; the same command computes what is missing, to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from raykernel.cli import main
from raykernel.store.blocks import open_store
from raykernel.store.query import query
from tests.faults.problem import KERNEL, NUM_BLOCKS, NUM_PREDICTIONS, prepare


class Run:
    """The command on two Ray workers, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = [sys.executable, "-m", "raykernel", *KERNEL, "store.path=killed", "compute=ray"]
        self._driver = psutil.Popen(
            [*command, "compute.workers=2"], cwd=folder, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, num: int) -> None:
        """Go on until so many blocks are committed."""
        deadline = time.monotonic() + 300
        while len(files(self._folder, "block")) < num:
            assert self._driver.poll() is None, self._driver.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill_workers(self) -> None:
        """SIGKILL to the processes that compute."""
        for process in self._driver.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "".join(process.cmdline()[:1]).startswith("ray::Shell"):
                    process.send_signal(signal.SIGKILL)

    def kill(self) -> str:
        """SIGKILL to the driver and to every process that it started, Ray's included."""
        family = [*self._driver.children(recursive=True), self._driver]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=30)
        return str(self._driver.communicate()[1])

    def finish(self) -> str:
        """Wait for the end; what the screen showed."""
        message = str(self._driver.communicate()[1])
        assert self._driver.returncode == 0, message
        return message


def files(folder: Path, kind: str) -> dict[str, int]:
    """Inode of every committed file of a kind: one that is written again gets another one."""
    return {path.name: path.stat().st_ino for path in folder.glob(f"killed/kernels/*/{kind}-*")}


@dataclasses.dataclass
class Story:
    """What became of one kernel in two runs, and what their screens showed."""

    folder: Path
    first_blocks: dict[str, int]
    screens: list[str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Without workers for a moment, then killed in its blocks; done."""
    folder = tmp_path_factory.mktemp("run")
    prepare(folder)
    first = Run(folder)
    first.wait_for(3)
    first.kill_workers()
    first.wait_for(len(files(folder, "block")) + 2)
    screens = [first.kill()]
    first_blocks = files(folder, "block")
    screens.append(Run(folder).finish())
    return Story(folder, first_blocks, screens)


@pytest.mark.ray
@pytest.mark.slow
def test_killed_workers_are_replaced_within_the_run(story: Story) -> None:
    assert "A worker died" in story.screens[0]


@pytest.mark.ray
@pytest.mark.slow
def test_what_was_stored_is_not_computed_again(story: Story) -> None:
    assert 5 <= len(story.first_blocks) < NUM_BLOCKS
    assert f"{len(story.first_blocks)} of {NUM_BLOCKS} blocks are stored" in story.screens[1]
    blocks = files(story.folder, "block")
    assert story.first_blocks.items() <= blocks.items()
    assert len(blocks) == NUM_BLOCKS


@pytest.mark.ray
@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uninterrupted one is computed in this process, without Ray."""
    monkeypatch.chdir(story.folder)
    assert main([*KERNEL, "store.path=whole"]) == 0
    whole, killed = (open_store(name).open() for name in ("whole", "killed"))
    assert whole.fingerprint == killed.fingerprint
    np.testing.assert_array_equal(train_and_dev("whole"), train_and_dev("killed"))
    np.testing.assert_array_equal(whole.logits(), killed.logits())
    for table in ("predictions", "kernels"):
        columns = {"predictions": "example, fitted", "kernels": "kernel_regression, dev"}[table]
        sql = f"SELECT {columns} FROM {table} ORDER BY 1"
        assert query(sql, "whole").equals(query(sql, "killed"))


def test_only_what_is_missing_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a death between two files, which come one by one."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = [*KERNEL, "store.path=killed"]
    assert main(command) == 0
    sql = "SELECT example, fitted FROM predictions ORDER BY 1"
    table, kernel = query(sql, "killed"), train_and_dev("killed")
    names = sorted((tmp_path / "killed").rglob("block-*"))[2:7]
    names += sorted((tmp_path / "killed").rglob("prediction-*"))[3:5]
    for path in names:
        path.unlink()
    left = [files(tmp_path, kind).items() for kind in ("block", "prediction")]
    assert [len(found) for found in left] == [NUM_BLOCKS - 5, NUM_PREDICTIONS - 2]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"{NUM_BLOCKS - 5} of {NUM_BLOCKS} blocks are stored: computing 5." in said
    assert "test predictions: 8/8" in said
    assert all(path.exists() for path in names)
    for kind, found in zip(("block", "prediction"), left, strict=True):
        assert found <= files(tmp_path, kind).items()
    assert query(sql, "killed").equals(table)
    np.testing.assert_array_equal(train_and_dev("killed"), kernel)
    assert main(command) == 0
    again = capsys.readouterr().err
    assert f"All {NUM_BLOCKS} blocks are stored" in again
    assert "computing 0 predictions" in again


def train_and_dev(store: str) -> np.ndarray:
    """The blocks, put together."""
    handle = open_store(store).open()
    return handle.kernel(rows=handle.grid.train_and_dev)
