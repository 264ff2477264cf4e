"""Full disks, read-only stores, and several drivers at once: a clear word, and nothing lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raykernel.cli import main
from raykernel.store.tables import TABLES
from raykernel.store.verify import verify
from tests import tiny
from tests.faults import places
from tests.faults.contents import contents

DATA = tiny.overrides("tiny", task__test_limit="6")
TRAINING = ["training=adam", "training.steps=4", "training.eval_every=2", "training.batch_size=2"]
KERNEL = ["kernel", *DATA]
FINETUNE = ["finetune", *DATA, *TRAINING]
SWEEP = ["sweep", "rates", "sweep.sampler=random", "sweep.trials=2"]
STUDY = f"""
from raykernel.study import Arm, Line, Study, TaskTable
from raykernel.terms import Command

study = Study(
    question="Which rate?",
    base=dict(text.split("=", 1) for text in {[*DATA[:-1], *TRAINING]!r}),
    space={{"task.seed": "13"}},
    arms=[Arm("Adam", Command.finetune, {{}}, {{"training.learning_rate": "interval(1e-3,1e-2)"}})],
    table=TaskTable([Line("Adam", "Adam", "finetuned")], title="Test", by=[]),
)
"""
COMMANDS = {"kernel": KERNEL, "finetune": FINETUNE, "sweep": SWEEP}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that commands run in, with an undisturbed store of each."""
    folder = tmp_path_factory.mktemp("places")
    tiny.save_masked_lm(folder / "tiny", num_hidden_layers=1)
    tiny.write_reviews(folder / "reviews.tsv", num=30)
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "rates.py").write_text(STUDY, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, command in COMMANDS.items():
            assert main([*command, f"store.path={name}"]) == 0
        yield folder


# ---------------------------------------------------------------- no space


@pytest.fixture(params=["limit", pytest.param("device", marks=pytest.mark.slow)])
def disk(request: pytest.FixtureRequest, here: Path) -> Iterator[tuple[Path, list[object]]]:
    """A folder, and contexts in which it has no space, then some but too little."""
    folder = here / "disk"
    if request.param == "limit":
        folder.mkdir()
        yield folder, [places.size_limit(num_bytes) for num_bytes in (10, 900)]
        shutil.rmtree(folder)
        return
    places.mount(folder, "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    yield folder, [places.filled(folder, pages * 4096) for pages in (0, 5)]
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.mark.parametrize(
    "name", ["kernel", "sweep", pytest.param("finetune", marks=pytest.mark.slow)]
)
def test_a_full_disk_is_said_and_with_space_the_same_command_goes_on(
    here: Path, disk: tuple[Path, list[object]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, fulls = disk
    store = folder / "store"
    command = [*COMMANDS[name], f"store.path={store}"]
    for full in fulls:
        with full:
            assert main(command) == 2
        err = capsys.readouterr().err
        assert "no space left" in err
        assert "Traceback" not in err
        assert not list(folder.rglob(".*.tmp"))
        assert not store.exists() or not list(store.iterdir()) or verify(store).ok
    assert main(command) == 0
    assert verify(store).bad == ()
    assert contents(store) == contents(here / name)


# ---------------------------------------------------------------- read-only


@pytest.fixture(params=["permissions", pytest.param("mount", marks=pytest.mark.slow)])
def archive(request: pytest.FixtureRequest, here: Path) -> Iterator[Path]:
    """A store with a kernel and a trial, which cannot be written to."""
    store = here / "archive"
    shutil.copytree(here / "kernel", store)
    shutil.copytree(here / "finetune", store, dirs_exist_ok=True)
    with contextlib.ExitStack() as opened:
        opened.callback(shutil.rmtree, store)
        if request.param == "permissions":
            opened.enter_context(places.read_only(store))
        else:
            places.mount(store, "--bind", str(store))
            opened.callback(subprocess.run, ["umount", str(store)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(store)], check=True)
        yield store


def test_a_read_only_store_can_be_read(
    here: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is stored is shown again; spectra, which are quick, are shown and not kept."""
    assert main(["query", "select dev from kernels", "--store", "archive"]) == 0
    assert main(["verify", "--store", "archive"]) == 0
    assert main(["compact", "--store", "archive"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    for command in (KERNEL, FINETUNE):
        assert main([*command, "store.path=archive"]) == 0
    assert main(["spectrum", *KERNEL[1:], "store.path=archive"]) == 0
    assert "shown and not kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [*KERNEL, "task.k=2"],
        [*KERNEL, "kernel.test_block=true"],
        [*FINETUNE, "training.steps=2"],
        SWEEP,
        pytest.param(["behavior", *FINETUNE[1:]], marks=pytest.mark.slow),
        pytest.param(
            ["select", *KERNEL[1:], "parameters=lora", "select.max_size=1"], marks=pytest.mark.slow
        ),
    ],
    ids=["kernel", "blocks", "finetune", "sweep", "behavior", "select"],
)
def test_writing_to_a_read_only_store_is_refused_before_any_work(
    archive: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "store.path=archive"]) == 2
    err = capsys.readouterr().err
    assert "cannot be written" in err
    assert "Choose another with store.path=FOLDER" in err
    assert not any(word in err for word in ("Traceback", "computing", "step ", "s left"))


# ---------------------------------------------------------------- several drivers

TOGETHER = """
import json, os, sys
import raykernel.pipeline, raykernel.trials, raykernel.training.trial, raykernel.compute.worker
from raykernel.cli import main

children = [os.fork() or os._exit(main(command)) for command in json.loads(sys.argv[1])]
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.mark.slow
def test_drivers_of_the_same_and_of_other_configurations_share_a_store(here: Path) -> None:
    """Two of the same kernel, one of another, two of the same trial: rows and files as of one."""
    other = [*KERNEL, "task.k=2"]
    commands = [
        [*command, "store.path=shared"] for command in (KERNEL, FINETUNE, KERNEL, other, FINETUNE)
    ]
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0]", done.stderr
    assert main([*other, "store.path=other"]) == 0
    shared = contents(here / "shared")
    alone = [contents(here / name) for name in ("kernel", "finetune", "other")]
    for name in set().union(*alone):
        found = [one[name] for one in alone if name in one]
        expected = sorted(row for rows in found for row in rows) if name in TABLES else found[0]
        assert shared[name] == expected
    assert verify(here / "shared").bad == ()
    assert not list((here / "shared").rglob(".*.tmp"))
    assert not list((here / "shared").rglob("checkpoint*"))
