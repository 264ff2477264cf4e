"""Kill everything in the middle; the same command computes what is missing, to the bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from raykernel.store.blocks import open_store
from raykernel.store.query import query
from tests import tiny

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.save_masked_lm(folder / "tiny", hidden_size=64, num_hidden_layers=4)
    tiny.write_reviews(folder / "reviews.tsv", num=200)
    return folder


def command(store: str) -> list[str]:
    return [
        *(sys.executable, "-m", "raykernel", "kernel", "task=file", "task.train=reviews.tsv"),
        *("task.text=[review]", "task.label=rating", "task.k=8", "task.test_limit=60"),
        *("model=hf", "model.name=tiny", 'prompt.template="{review} It was {label}."'),
        *("prompt.words={negative: terrible, positive: great}", "kernel.block_size=4"),
        *("compute=ray", "compute.workers=2", f"store.path={store}"),
    ]


def run(here: Path, store: str) -> str:
    done = subprocess.run(command(store), cwd=here, capture_output=True, text=True, check=True)
    return done.stderr


def blocks(here: Path, store: str, kind: str = "block") -> dict[str, int]:
    """Inode of every committed block: a block that is written again gets another one."""
    return {path.name: path.stat().st_ino for path in here.glob(f"{store}/kernels/*/{kind}-*")}


def kill_tree(driver: psutil.Process) -> None:
    """SIGKILL to the driver and to every process that it started, Ray's included."""
    family = [*driver.children(recursive=True), driver]
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)


def kill_workers(driver: psutil.Process) -> None:
    """SIGKILL to the processes that compute."""
    for process in driver.children(recursive=True):
        if "".join(process.cmdline()[:1]).startswith("ray::Shell"):
            process.send_signal(signal.SIGKILL)


def start_and_wait(
    here: Path, store: str, num_blocks: int, kind: str = "block"
) -> subprocess.Popen[str]:
    """A run that has committed some of its blocks."""
    process = subprocess.Popen(command(store), cwd=here, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(blocks(here, store, kind)) < num_blocks:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_killed_and_resumed_equals_uninterrupted(here):
    run(here, "whole")
    process = start_and_wait(here, "killed", 3)
    kill_tree(psutil.Process(process.pid))
    process.communicate()
    before = blocks(here, "killed")
    total = len(blocks(here, "whole"))
    assert 3 <= len(before) < total
    message = run(here, "killed")
    assert f"{len(before)} of {total} blocks are stored" in message
    after = blocks(here, "killed")
    assert {name: after[name] for name in before} == before
    whole, killed = (open_store(here / name).open() for name in ("whole", "killed"))
    assert whole.fingerprint == killed.fingerprint
    known = whole.grid.train_and_dev
    np.testing.assert_array_equal(whole.kernel(rows=known), killed.kernel(rows=known))
    np.testing.assert_array_equal(whole.logits(), killed.logits())
    for table in ("predictions", "kernels"):
        columns = {"predictions": "example, fitted", "kernels": "kernel_regression, dev"}[table]
        sql = f"SELECT {columns} FROM {table} ORDER BY 1"
        assert query(here / "whole", sql).equals(query(here / "killed", sql))
    again = run(here, "killed")
    assert "computing 0 blocks" in again
    assert "computing 0 predictions" in again
    assert blocks(here, "killed") == after


def test_killed_while_predicting_loses_only_what_was_not_written(here):
    """The blocks are there; a prediction is written before the next one begins."""
    process = start_and_wait(here, "predicting", 1, "prediction")
    kill_tree(psutil.Process(process.pid))
    process.communicate()
    before = blocks(here, "predicting", "prediction")
    run(here, "predicting")
    after = blocks(here, "predicting", "prediction")
    assert {name: after[name] for name in before} == before
    assert len(after) == 15


def test_killed_workers_are_replaced_within_the_run(here):
    process = start_and_wait(here, "orphaned", 2)
    kill_workers(psutil.Process(process.pid))
    _, message = process.communicate(timeout=200)
    assert process.returncode == 0, message
    whole, orphaned = (open_store(here / name).open() for name in ("whole", "orphaned"))
    known = whole.grid.train_and_dev
    np.testing.assert_array_equal(whole.kernel(rows=known), orphaned.kernel(rows=known))
