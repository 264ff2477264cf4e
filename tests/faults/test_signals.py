"""Ctrl-C and SIGTERM at any moment: a word, the command that goes on, the exit code, nothing left.

A child is forked after the imports, so that each moment takes little time; on Ray it is a process
of its own.
"""

from __future__ import annotations

import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from raykernel.cli import interrupted_text, main
from tests import tiny
from tests.faults.contents import contents

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
DATA = tiny.overrides("tiny", task__test_limit="6")
KERNEL = ["kernel", *DATA[:-1], "kernel.block_size=2"]
FINETUNE = ["finetune", *DATA[:-1], "training=adam", "training.steps=30", "training.eval_every=5"]

INTERRUPTED = """
import glob, os, signal, sys, time
import psutil
import raykernel.pipeline, raykernel.trials, raykernel.training.trial, raykernel.compute.worker
from raykernel.cli import main

signum, delays, command = int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
for number, delay in enumerate(delays):
    child = os.fork()
    if not child:
        sys.argv = ["raykernel", *command]
        sys.exit(main())
    if number < len(delays) - 1:
        if delay == "begun":
            here = psutil.Process(child)
            while not glob.glob("broken*/trials/*/checkpoint*") and here.status() != "zombie":
                time.sleep(0.002)
        else:
            time.sleep(float(delay))
        os.kill(child, signum)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended", code, file=sys.stderr, flush=True)
"""
"""Interrupts one child after the other, at a moment or at a checkpoint, and lets the last end."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("signals")
    tiny.save_masked_lm(folder / "tiny", num_hidden_layers=1)
    tiny.write_reviews(folder / "reviews.tsv", num=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.mark.parametrize(
    ("signum", "command", "times"),
    [
        (signal.SIGTERM, FINETUNE, 0),
        pytest.param(signal.SIGTERM, KERNEL, 9, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, KERNEL, 9, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, FINETUNE, 9, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_command_says_how_to_go_on_and_ends_the_same(
    here: Path, signum: signal.Signals, command: list[str], times: int
) -> None:
    """Each child goes on where the one before stood; the last one's store is an undisturbed one."""
    name = f"{command[0]}-{times}-{signum.name}"
    assert main([*command, f"store.path=whole-{name}"]) == 0
    mine = [*command, f"store.path=broken-{name}"]
    generator = random.Random(0)
    moments = [f"{0.3 + 0.8 * generator.random():.3f}" for _ in range(times)]
    delays = ",".join([*moments, *["begun"] * (command is FINETUNE), "0"])
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(int(signum)), delays, *mine],
        capture_output=True,
        text=True,
        check=True,
    )
    err = done.stderr
    codes = [int(line.split()[1]) for line in err.splitlines() if line.startswith("ended")]
    assert codes[-1] == 0
    assert set(codes[:-1]) <= {CODES[signum], 0}  # on a quick machine it may have ended before
    assert CODES[signum] in codes, err
    assert err.count(f"to go on:\n  {shlex.join(['raykernel', *mine])}") == codes.count(
        CODES[signum]
    )
    assert "Traceback" not in err
    assert contents(here / f"whole-{name}") == contents(here / f"broken-{name}")
    assert not list((here / f"broken-{name}").rglob(".*.tmp"))


def test_what_keeps_nothing_says_no_command() -> None:
    assert interrupted_text("query", ["query", "select 1"]) == "Interrupted."
    assert "raykernel sweep 'a b'" in interrupted_text("sweep", ["sweep", "a b"])


STUBBORN = """
import subprocess, sys, time
from raykernel.interruption import interruptible

with interruptible(lasts=True) as interruption:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        print(child.pid, flush=True)
        time.sleep(1000)
    except KeyboardInterrupt:
        print("unwinding", interruption.code, flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize("signum", CODES)
def test_the_second_signal_ends_at_once_with_all_that_was_started(signum: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.send_signal(signum)
        assert process.stdout.readline() == f"unwinding {CODES[signum]}\n"
        process.send_signal(signum)
        assert process.wait() == CODES[signum]
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


DEAF = """
import time
from raykernel.interruption import interruptible

class Deaf:
    def __del__(self):
        print("deleting", flush=True)
        time.sleep(1000)

with interruptible(lasts=True) as interruption:
    try:
        Deaf()
        time.sleep(1000)
    except KeyboardInterrupt:
        print("unwinding", interruption.code, flush=True)
"""


@pytest.mark.parametrize("signum", CODES)
def test_a_signal_while_an_object_is_deleted_is_not_lost(signum: signal.Signals) -> None:
    """Python prints and drops what `__del__` raises."""
    with subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "deleting\n"
        process.send_signal(signum)
        assert process.communicate() == (f"unwinding {CODES[signum]}\n", "")


def test_signals_do_afterwards_what_they_did_before(here: Path) -> None:
    before = [signal.getsignal(signum) for signum in CODES], sys.unraisablehook
    assert main(["list", "tasks"]) == 0
    assert ([signal.getsignal(signum) for signum in CODES], sys.unraisablehook) == before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("delay", [1, 4, 7, 10, 14])
@pytest.mark.parametrize("signum", CODES)
def test_on_ray_too_and_its_processes_are_gone(
    here: Path, tmp_path: Path, signum: signal.Signals, delay: float
) -> None:
    """While it imports, while Ray starts, while workers load, and in the middle of the blocks."""
    command = [*KERNEL, f"store.path={tmp_path / 'store'}", "compute=ray", "compute.workers=2"]
    process = psutil.Popen(
        [sys.executable, "-m", "raykernel", *command], stderr=subprocess.PIPE, text=True
    )
    started: set[psutil.Process] = set()
    end = time.monotonic() + delay
    while time.monotonic() < end and process.poll() is None:
        started |= {*process.children(recursive=True)}
        time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate()
    assert process.returncode in {CODES[signum], 0}, err
    assert "Traceback" not in err
    if process.returncode:
        assert shlex.join(["raykernel", *command]) in err
    _, alive = psutil.wait_procs(list(started), timeout=90)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
