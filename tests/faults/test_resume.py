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

pytestmark = pytest.mark.ray


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


def test_killed_workers_are_replaced_within_the_run(story: Story) -> None:
    assert "A worker died" in story.screens[0]


def test_what_was_stored_is_not_computed_again(story: Story) -> None:
    assert 5 <= len(story.first_blocks) < NUM_BLOCKS
    assert f"{len(story.first_blocks)} of {NUM_BLOCKS} blocks are stored" in story.screens[1]
    blocks = files(story.folder, "block")
    assert story.first_blocks.items() <= blocks.items()
    assert len(blocks) == NUM_BLOCKS


def test_killed_and_resumed_equals_uninterrupted(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uninterrupted one is computed in this process, without Ray."""
    monkeypatch.chdir(story.folder)
    assert main([*KERNEL, "store.path=whole"]) == 0
    whole, killed = (open_store(name).open() for name in ("whole", "killed"))
    assert whole.fingerprint == killed.fingerprint
    known = whole.grid.train_and_dev
    np.testing.assert_array_equal(whole.kernel(rows=known), killed.kernel(rows=known))
    np.testing.assert_array_equal(whole.logits(), killed.logits())
    for table in ("predictions", "kernels"):
        columns = {"predictions": "example, fitted", "kernels": "kernel_regression, dev"}[table]
        sql = f"SELECT {columns} FROM {table} ORDER BY 1"
        assert query(sql, "whole").equals(query(sql, "killed"))


def test_only_the_predictions_that_are_missing_are_computed(
    story: Story, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a death between two of them: one, of four examples, is written before the next."""
    monkeypatch.chdir(story.folder)
    blocks, predictions = (files(story.folder, kind) for kind in ("block", "prediction"))
    assert len(predictions) == NUM_PREDICTIONS
    table = query("SELECT example, fitted FROM predictions ORDER BY 1", "killed")
    for path in list((story.folder / "killed").rglob("prediction-*"))[3:5]:
        path.unlink()
    left = files(story.folder, "prediction")
    assert main([*KERNEL, "store.path=killed"]) == 0
    again = capsys.readouterr().err
    assert "computing 0 blocks" in again
    assert "test predictions: 8/8" in again
    assert left.items() <= files(story.folder, "prediction").items()
    assert query("SELECT example, fitted FROM predictions ORDER BY 1", "killed").equals(table)
    assert files(story.folder, "block") == blocks
