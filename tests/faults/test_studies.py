"""SIGKILL of a driver, a worker and a node in the middle of a study; the same command goes on.

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
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from raykernel.store.blocks import Store
from raykernel.study import Row
from tests import tiny

TRIALS = 24
STUDY = """
from raykernel.study import Arm, Line, Study, TaskTable
from raykernel.terms import Command

study = Study(
    question="Which rate?",
    base={
        "task": "file", "task.train": "reviews.tsv", "task.text": "[review]",
        "task.label": "rating", "task.k": "2", "task.test_limit": "6", "model": "hf",
        "model.name": "tiny", "prompt.template": '"{review} It was {label}."',
        "prompt.words": "{negative: terrible, positive: great}", "training.steps": "3",
        "training.eval_every": "1", "training.batch_size": "2", "training.keep_weights": "false",
    },
    space={"task.seed": "13,21"},
    arms=[Arm("SGD", Command.finetune, {"training": "sgd"},
              {"training.learning_rate": ",".join(f"{n}e-3" for n in range(1, 13))})],
    table=TaskTable([Line("SGD", "SGD", "finetuned")], title="Test", by=[]),
)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    tiny.save_masked_lm(folder / "tiny", num_hidden_layers=1)
    tiny.write_reviews(folder / "reviews.tsv")
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "rates.py").write_text(STUDY, encoding="utf-8")
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


def kill_worker(driver: subprocess.Popen[str]) -> None:
    """One actor dies."""
    family = psutil.Process(driver.pid).children(recursive=True)
    actors = [one for one in family if one.name().startswith(("ray::Shell", "ray::Implicit"))]
    random.choice(actors or [pytest.fail(f"no actor among {family}")]).kill()


def finish(here: Path, store: str, *settings: str) -> None:
    """Run it to the end; what had ended before is as it was, and nothing is there twice."""
    before = rows(here, store)
    driver = start(here, store, *settings)
    out, _ = driver.communicate()
    assert driver.returncode == 0, out
    assert f"{TRIALS} of {TRIALS} runs are complete" in out
    assert_whole(here, store, before)


def assert_whole(here: Path, store: str, before: dict[str, Row]) -> None:
    after = rows(here, store)
    assert len(after) == TRIALS
    assert {row["status"] for row in after.values()} == {"ok"}
    assert {run: after[run] for run in before} == before
    trials = Store(here / store).results("trials").to_pylist()
    assert len({(row["learning_rate"], row["seed"]) for row in trials}) == len(trials) == TRIALS
    assert not list((here / store / "trials").rglob("checkpoint*"))


def test_a_driver_that_is_killed_at_random_loses_nothing(made):
    """Two kills, each after a few more runs; runs are done in the driver's own process."""
    generator = random.Random(0)
    for _ in range(2):
        driver = start(made, "alone")
        wait_for(len(rows(made, "alone")) + generator.randint(1, 4), made, "alone", driver)
        time.sleep(generator.random() * 0.3)
        kill(driver)
    assert 2 <= len(rows(made, "alone")) < TRIALS
    finish(made, "alone")


ENGINES = [
    pytest.param(["sweep.engine=pool"], id="pool"),
    pytest.param(["sweep.engine=tune"], id="tune"),
]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_and_then_the_driver_are_killed(made, engine):
    store, settings = engine[0].replace("=", "-"), [*engine, "sweep.workers=2"]
    driver = start(made, store, *settings)
    wait_for(3, made, store, driver)
    kill_worker(driver)
    wait_for(9, made, store, driver)
    kill(driver)
    assert 9 <= len(rows(made, store)) < TRIALS
    finish(made, store, *settings)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_node_is_killed(made, engine, ray_nodes: Callable[[], None]):
    """Of three raylets one dies with its workers; the study goes on on the others."""
    address, kill_node = ray_nodes
    store = "node-" + engine[0].replace("=", "-")
    settings = [*engine, "sweep.workers=2", f"compute.address={address}"]
    driver = start(made, store, *settings)
    wait_for(4, made, store, driver)
    kill_node()
    out, _ = driver.communicate()
    before = rows(made, store)
    if driver.returncode:
        finish(made, store, *settings)
    else:
        assert f"{TRIALS} of {TRIALS} runs are complete" in out
    assert_whole(made, store, before)


@pytest.fixture
def ray_nodes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20},
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(3)]
    yield cluster.address, lambda: cluster.remove_node(nodes[0], allow_graceful=False)
    cluster.shutdown()
