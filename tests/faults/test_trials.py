"""SIGKILL around every commit of a trial; the same command goes on, to the bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raykernel.store.blocks import open_store
from raykernel.store.query import query
from tests import tiny

COMMAND = [
    *("finetune", "task=file", "task.train=reviews.tsv", "task.text=[review]"),
    *("task.label=rating", "task.k=4", "task.test_limit=8", "model=hf", "model.name=tiny"),
    *('prompt.template="{review} It was {label}."', "training=adam"),
    *("prompt.words={negative: terrible, positive: great}", "training.learning_rate=3e-3"),
    *("training.batch_size=3", "training.steps=90", "training.eval_every=9"),
    "regularization=coupled",  # needs θ_0, which no checkpoint holds
]

# A child dies with SIGKILL before its n-th rename; the next one before its (n + 1)-th, and so on
# until one ends. Forked after the imports, so that each takes little time.
DYING = """
import os, signal, sys
from pathlib import Path
import raykernel.twins, raykernel.training.twin, raykernel.training.bounds
from raykernel.cli import main

def run(n):
    rename, count = Path.replace, 0
    def replace(self, target):
        nonlocal count
        count += 1
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    Path.replace = replace
    os._exit(main(sys.argv[1:]))

n, status = 0, 1
while status != 0:
    n += 1
    child = os.fork() or run(n)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
print("killed", n - 1)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny.save_masked_lm(folder / "tiny", hidden_size=32)
    tiny.write_reviews(folder / "reviews.tsv", num=60)
    done = python(folder, "-m", "raykernel", *COMMAND, "store.path=whole")
    assert "Going on" not in done.stderr
    return folder


def python(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)


def assert_same(here: Path, store: str) -> None:
    """Parameters, curve and scores are those of the undisturbed run."""
    (trial,) = open_store(here / store).trials()
    stores = [open_store(here / name) for name in ("whole", store)]
    whole, killed = (one.trial(trial).weights.read_bytes() for one in stores)
    assert whole == killed
    for sql in ("SELECT * FROM curves", "SELECT trial, dev, finetuned, best_step FROM trials"):
        assert query(sql, here / "whole").equals(query(sql, here / store))
    assert not stores[1].trial(trial).checkpoint.exists()


def test_killed_before_every_rename_and_run_again_is_the_undisturbed_run(here):
    done = python(here, "-c", DYING, *COMMAND, "store.path=dying")
    # Twelve files are renamed in all, and dying before the n-th loses one of them.
    assert int(done.stdout.split()[-1]) >= 4
    assert done.stderr.count("Going on after step") >= 3
    assert_same(here, "dying")


@pytest.mark.slow
def test_a_twin_killed_before_every_rename_is_the_undisturbed_one(here):
    command = [*COMMAND, "training.dropout=false", "training.twin=true"]
    command += ["training.steps=18", "training.eval_every=3"]
    python(here, "-m", "raykernel", *command, "store.path=twin")
    done = python(here, "-c", DYING, *command, "store.path=dying-twin")
    assert int(done.stdout.split()[-1]) >= 5
    twins = done.stderr.split("Linear twin\n")[1:]
    assert any(text.startswith("Going on after step") for text in twins)
    stores = [open_store(here / name) for name in ("twin", "dying-twin")]
    ((trial,), (other,)) = (one.trials() for one in stores)
    assert trial == other
    whole, killed = (one.trial(trial) for one in stores)
    assert whole.last.read_bytes() == killed.last.read_bytes()
    assert whole.twin.read_bytes() == killed.twin.read_bytes()
    assert not killed.twin_checkpoint.exists()
    sql = "SELECT split, distance_a, distance_b, kl_a, kl_b, deviation, apart FROM twins"
    assert query(sql, here / "twin").equals(query(sql, here / "dying-twin"))
    assert query("SELECT * FROM bounds", here / "twin").equals(
        query("SELECT * FROM bounds", here / "dying-twin")
    )


@pytest.mark.slow
def test_killed_at_some_instant_and_run_again_is_the_undisturbed_run(here):
    command = [sys.executable, "-m", "raykernel", *COMMAND, "store.path=killed"]
    process = subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(here.glob("killed/trials/*/checkpoint.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not open_store(here / "killed").trials()
    done = python(here, *command[1:])
    assert "Going on after step" in done.stderr
    assert_same(here, "killed")
