"""What chaos judges by, on stores that are wrong on purpose; and two of its scenarios.

All of them: `python -m benchmarks.chaos`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raykernel.store.blocks import Store
from raykernel.store.compaction import compact
from raykernel.store.results import table_files
from tests.faults.chaos import evidence
from tests.faults.chaos.evidence import Snapshot, differences, numbers, sweep_up
from tests.faults.chaos.nodes import Nodes, processes_below
from tests.faults.chaos.plan import Victim, make_plan
from tests.store import stores

SEEDS = (8, 11)
"""One scenario by each engine: a worker, a node and the driver; a node and the driver."""

# ---------------------------------------------------------------- plans


def test_a_seed_names_one_scenario_and_a_hundred_kill_all_there_is():
    plans = [make_plan(seed) for seed in range(100)]
    assert plans == [make_plan(seed) for seed in range(100)]
    strikes = [strike for plan in plans for run in plan.runs for strike in run]
    assert {strike.victim for strike in strikes} == set(Victim)
    assert {plan.engine for plan in plans} == {"pool", "tune"}
    assert min(len(run) for plan in plans for run in plan.runs) == 1
    # What follows a run that is disturbed must be there to be done.
    earlier = [run for plan in plans for run in plan.runs[:-1]]
    assert all(run[-1].victim is Victim.driver for run in earlier)


# ---------------------------------------------------------------- stores


def write_run(store: Store, name: str, dev: float = 0.5) -> None:
    store.write_result("trials", {"trial": name, "dev": dev, "seconds": 1.0})
    row = {"study": "rates", "run": name, "arm": "SGD", "command": "finetune", "status": "ok"}
    store.write_result("runs", row | {"results": "[]", "seconds": 1.0})


def fill(path: Path) -> Path:
    """A kernel with a prediction, and two runs."""
    handle = stores.complete(path)
    stores.predict(handle, 3)
    for name in ("first", "second"):
        write_run(Store(path), name)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


def test_a_store_made_again_has_the_same_numbers(store: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other")
    compact(other)
    assert differences(numbers(store), numbers(other)) == []


def test_a_number_in_a_block_or_a_row_is_missed_by_nobody(store: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other")
    handle = Store(other).open()
    cell = handle.grid.cell(0, 1)
    values = stores.block(handle, cell)
    values["sgd"]["head"][0, 0, 0, 0] += 1e-6
    handle.write_block(cell, values)
    write_run(Store(other), "second", dev=0.5 + 1e-12)
    (block,) = other.glob("kernels/*/block-0000-0001.arrow")
    assert differences(numbers(store), numbers(other)) == [
        str(block.relative_to(other)),
        "trials",
    ]


def test_a_block_or_a_row_written_again_is_not_what_it_was(store: Path) -> None:
    before = Snapshot.of(store)
    assert before.lost(Snapshot.of(store)) == []
    compact(store)  # other files, the same rows
    assert before.lost(Snapshot.of(store)) == []
    (block,) = store.glob("kernels/*/block-0000-0001.arrow")
    shutil.copy2(block, copy := store / "copy")
    copy.replace(block)
    write_run(Store(store), "second")
    lost = before.lost(Snapshot.of(store))
    assert lost[0] == block.name
    assert sorted(row[: row.index("{")] for row in lost[1:]) == ["runs", "trials"]
    (prediction,) = store.glob("kernels/*/prediction-*")
    prediction.unlink()
    assert prediction.name in before.lost(Snapshot.of(store))


def test_everything_that_the_dead_leave_is_removed_or_named(store: Path) -> None:
    assert sweep_up(store) == (0, [])
    (block,) = store.glob("kernels/*/block-0000-0001.arrow")
    block.with_name(f".{block.name}.0.tmp").write_bytes(b"half")
    assert sweep_up(store) == (1, [])
    (store / ".tune").mkdir()
    answer = table_files(store, "runs").answers[0]
    answer.write_bytes(answer.read_bytes()[:-1])
    block.unlink()
    _, wrong = sweep_up(store)
    assert [text.split()[0].removesuffix(":") for text in wrong] == [
        *(str(answer), "1", str(store / ".tune"))
    ]


def test_counts_are_of_blocks_predictions_runs_and_trials(store: Path, monkeypatch) -> None:
    found = {"NUM_BLOCKS": 12, "NUM_PREDICTIONS": 1, "NUM_TRIALS": 2}
    for name, number in found.items():
        monkeypatch.setattr(evidence, name, number)
    said = evidence.check_counts(store)
    assert said == ["1 trials, expected 2", "0 rows of kernels, expected 1"]
    assert evidence.steps(store) == sum(found.values())


def test_a_process_that_works_below_the_folder_is_seen(tmp_path: Path) -> None:
    (below := tmp_path / "below").mkdir()
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], cwd=below, stdin=subprocess.PIPE)
    try:
        assert [one.pid for one in processes_below(tmp_path)] == [sleeper.pid]
    finally:
        sleeper.communicate(b"\n")
    assert list(processes_below(tmp_path)) == []
    assert os.getpid() not in [one.pid for one in processes_below(Path.cwd())]


# ---------------------------------------------------------------- scenarios


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(0)
def test_scenarios_of_both_engines(tmp_path: Path) -> None:
    """A worker, a node and the driver die; the results are those of one process, to the bit."""
    from tests.faults.chaos.scenario import Stage

    with Nodes(tmp_path) as nodes:
        stage = Stage(tmp_path, nodes)
        stage.prepare()
        for seed in SEEDS:
            found = stage.play(make_plan(seed))
            assert found.wrong == [], "\n".join(found.story)
            assert sum(found.kills.values()) >= 2
    assert nodes.strays() == []
