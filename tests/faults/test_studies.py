"""SIGKILL of a driver in the middle of a study; the same command goes on.

Every run writes its own row when it ends. So a row that is the same before and after was written
by a run that was done once.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raykernel.store.blocks import Store
from raykernel.study import Row
from tests.faults.problem import NUM_TRIALS, prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    prepare(folder, hidden_size=16, num_hidden_layers=1)
    return folder


def start(here: Path, store: str, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "raykernel", "sweep", "rates", f"store.path={store}"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *settings],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(here: Path, store: str) -> dict[str, Row]:
    if not (here / store).exists():
        return {}
    return {row["run"]: row for row in Store(here / store).results("runs").to_pylist()}


def wait_for(number: int, here: Path, store: str, driver: subprocess.Popen[str]) -> None:
    """Until so many runs have ended."""
    while driver.poll() is None and len(rows(here, store)) < number:
        time.sleep(0.05)


def kill(driver: subprocess.Popen[str]) -> None:
    """The driver dies, and the processes of its Ray with it."""
    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    psutil.wait_procs(family, timeout=60)


def finish(here: Path, store: str, *settings: str) -> None:
    """Run it to the end; what had ended before is as it was, and nothing is there twice."""
    before = rows(here, store)
    driver = start(here, store, *settings)
    out, _ = driver.communicate()
    assert driver.returncode == 0, out
    assert f"{NUM_TRIALS} of {NUM_TRIALS} runs are complete" in out
    assert_whole(here, store, before)


def assert_whole(here: Path, store: str, before: dict[str, Row]) -> None:
    after = rows(here, store)
    assert len(after) == NUM_TRIALS
    assert {row["status"] for row in after.values()} == {"ok"}
    assert {run: after[run] for run in before} == before
    trials = Store(here / store).results("trials").to_pylist()
    assert len({(row["learning_rate"], row["seed"]) for row in trials}) == len(trials) == NUM_TRIALS
    assert not list((here / store / "trials").rglob("checkpoint*"))


@pytest.mark.slow
def test_a_driver_that_is_killed_at_random_loses_nothing(made):
    """Two kills, each after a few more runs; runs are done in the driver's own process."""
    generator = random.Random(0)
    for _ in range(2):
        driver = start(made, "alone")
        wait_for(len(rows(made, "alone")) + generator.randint(1, 4), made, "alone", driver)
        time.sleep(generator.random() * 0.3)
        kill(driver)
    assert 2 <= len(rows(made, "alone")) < NUM_TRIALS
    finish(made, "alone")
