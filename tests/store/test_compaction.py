"""Compaction changes the files of the result tables, and never what is in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raykernel.errors import BlockCorruptError
from raykernel.store.blocks import Store
from raykernel.store.compaction import compact
from raykernel.store.query import query
from raykernel.store.results import key_of, table_files, table_folder
from raykernel.store.verify import verify

NUM_TRIALS, NUM_POINTS = 4, 5


def write_trial(store: Store, trial: str, epoch: int) -> None:
    points = [
        {"trial": trial, "step": step, "epoch": float(epoch)}
        for step in reversed(range(NUM_POINTS))
    ]
    store.write_results("curves", points)
    store.write_result("trials", {"trial": trial, "overrides": ["a=1"], "lam": float(epoch)})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for number in range(NUM_TRIALS):
        write_trial(store, f"trial-{number}", 0)
    write_trial(store, "trial-3", 1)
    return store


def content(store: Store) -> dict[str, list[dict[str, Any]]]:
    """All rows, whole and by key."""
    found = {table: store.results(table).to_pylist() for table in ("trials", "curves")}
    for number in range(NUM_TRIALS):
        trial = f"trial-{number}"
        for table in ("trials", "curves"):
            found[f"{table} {trial}"] = store.rows(table, trial=trial)
    return found


def files(store: Store) -> list[Path]:
    return sorted(path for path in store.path.glob("results/**/*") if path.is_file())


def test_every_row_is_there_before_and_after_and_a_table_is_one_file(store: Store) -> None:
    before = content(store)
    assert [row["lam"] for row in before["trials trial-3"]] == [1.0]
    assert [row["step"] for row in before["curves trial-2"]] == [4, 3, 2, 1, 0]
    done = {table.table: table for table in compact(store.path)}
    assert {name: (table.num_rows, table.num_files) for name, table in done.items()} == {
        "trials": (NUM_TRIALS, NUM_TRIALS + 1),
        "curves": (NUM_TRIALS * NUM_POINTS, NUM_TRIALS + 1),
    }
    assert content(store) == before
    assert len(files(store)) == 2
    assert verify(store.path).ok
    assert compact(store.path) == []
    assert store.has_result("trials", {"trial": "trial-1"})
    assert not store.has_result("trials", {"trial": "trial-9"})


def test_a_newer_answer_replaces_a_compacted_one(store: Store) -> None:
    compact(store.path)
    write_trial(store, "trial-2", 5)
    for _ in range(2):
        (row,) = store.rows("trials", trial="trial-2")
        assert row["lam"] == 5
        assert {row["epoch"] for row in store.rows("curves", trial="trial-2")} == {5.0}
        assert store.results("curves").num_rows == NUM_TRIALS * NUM_POINTS
        assert sorted(store.results("trials")["lam"].to_pylist())[-2:] == [1.0, 5.0]
        compact(store.path)


def test_files_that_were_not_deleted_change_nothing(store: Store, tmp_path: Path) -> None:
    """As a compaction leaves them that dies after its commit, or two at once."""
    before = content(store)
    shutil.copytree(store.path, tmp_path / "copy")
    compact(store.path)
    write_trial(store, "trial-0", 3)
    compact(store.path)
    for source in (tmp_path / "copy" / "results").glob("**/*.arrow"):
        shutil.copy(source, store.path / source.relative_to(tmp_path / "copy"))
    compact(tmp_path / "copy")
    for source in (tmp_path / "copy" / "results").glob("**/*.parquet"):
        shutil.copy(source, store.path / source.relative_to(tmp_path / "copy"))
    for _ in range(2):
        now = content(store)
        assert [row["lam"] for row in now["trials trial-0"]] == [3.0]
        assert {row["epoch"] for row in now["curves trial-0"]} == {3.0}
        assert now["trials trial-3"] == before["trials trial-3"]
        assert len(now["trials"]) == NUM_TRIALS
        assert len(now["curves"]) == NUM_TRIALS * NUM_POINTS
        compact(store.path)


DYING = """
import os, shutil, sys
from pathlib import Path
from raykernel.store.compaction import compact

whole, place = map(Path, sys.argv[1:])
alive, number = True, 0
while alive:
    number += 1
    shutil.copytree(whole, place / str(number))
    if child := os.fork():
        alive = os.waitpid(child, 0)[1] != 0
        continue
    left = number
    def die(event, arguments):
        global left
        if event in ("os.rename", "os.remove") or (event == "open" and arguments[1] == "wb"):
            left -= 1
            if left == 0:
                os._exit(9)
    sys.addaudithook(die)
    compact(place / str(number))
    os._exit(0)
"""


def test_a_compaction_that_dies_at_any_instant_loses_and_doubles_nothing(
    store: Store, tmp_path: Path
) -> None:
    """Killed before every file that it creates, renames or deletes, each time on a fresh copy."""
    before = content(store)
    place = tmp_path / "killed"
    subprocess.run([sys.executable, "-c", DYING, str(store.path), str(place)], check=True)
    deaths = len(list(place.iterdir())) - 1
    assert deaths >= 2 * (NUM_TRIALS + 1 + 2)  # a temporary, its rename, and every old file
    for copy in place.iterdir():
        killed = Store(copy)
        assert content(killed) == before
        compact(copy)
        assert content(killed) == before
        assert len([path for path in files(killed) if not path.name.startswith(".")]) == 2


WRITER = """
import sys
from raykernel.store.blocks import Store
from tests.store.test_compaction import write_trial

store, writer = Store(sys.argv[1]), sys.argv[2]
for epoch in range(2):
    for number in range(6):
        write_trial(store, f"{writer}-{number}", epoch)
"""


OVERTAKEN = """
import shutil, sys
from pathlib import Path
from raykernel.store.blocks import Store
from raykernel.store.compaction import compact

whole, place = map(Path, sys.argv[1:])
left, root = 0, whole
def overtake(event, arguments):
    global left
    if event in ("open", "os.scandir") and left and str(root) in str(arguments[0]):
        left -= 1
        if left == 0:
            compact(root)
sys.addaudithook(overtake)
expected = Store(whole).results("curves"), Store(whole).rows("curves", trial="trial-3")
number, overtaken = 0, True
while overtaken:
    number += 1
    root = shutil.copytree(whole, place / str(number))
    store = Store(root)
    for read, wanted in zip(
        (lambda: store.results("curves"), lambda: store.rows("curves", trial="trial-3")), expected
    ):
        left = number
        assert read() == wanted, number
        overtaken, left = left == 0, 0
print(number)
"""


def test_a_reader_that_compaction_overtakes_at_any_instant_reads_everything(
    store: Store, tmp_path: Path
) -> None:
    """All files are merged and deleted before each listing and each opening of a reader."""
    command = [sys.executable, "-c", OVERTAKEN, str(store.path), str(tmp_path / "overtaken")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 4


COMPACTOR = """
import sys
from pathlib import Path
from raykernel.store.compaction import compact

replaced = 0
while not Path(sys.argv[2]).exists():
    replaced += sum(table.num_files for table in compact(sys.argv[1]))
print(replaced)
"""


def test_queries_beside_eight_writers_and_compaction_see_whole_answers(tmp_path: Path) -> None:
    """Every answer has all its rows, of one version, and what was seen once is never gone."""
    store = Store(tmp_path / "store")
    write_trial(store, "first", 0)
    command = [sys.executable, "-c", WRITER, str(store.path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(8)]
    stop = tmp_path / "stop"
    compacting = [sys.executable, "-c", COMPACTOR, str(store.path), str(stop)]
    compactor = subprocess.Popen(compacting, stdout=subprocess.PIPE, text=True)
    sql = (
        "SELECT trial, count(*) AS n, min(epoch) AS low, max(epoch) AS high FROM curves GROUP BY 1"
    )
    seen: dict[str, float] = {}
    num_queries = 0
    while any(writer.poll() is None for writer in writers):
        found = {row["trial"]: row for row in query(sql, store.path).to_pylist()}
        assert {row["n"] for row in found.values()} == {NUM_POINTS}
        assert all(row["low"] == row["high"] for row in found.values())
        assert all(found[trial]["high"] >= epoch for trial, epoch in seen.items())
        seen = {trial: row["high"] for trial, row in found.items()}
        for trial, epoch in list(seen.items())[:3]:
            assert store.rows("curves", trial=trial)[0]["epoch"] >= epoch
        num_queries += 1
    stop.touch()
    assert int(compactor.communicate()[0]) > 20
    assert [writer.returncode for writer in writers] == [0] * 8
    assert num_queries > 2
    rows = store.results("trials").to_pylist()
    assert len(rows) == 49
    assert {row["lam"] for row in rows if row["trial"] != "first"} == {1.0}


def test_rows_last_as_long_as_their_folder(store: Store) -> None:
    write = store.write_result
    for state in ("answers", "compacted"):
        shutil.rmtree(store.path / "trials" / "trial-1")
        assert store.rows("trials", trial="trial-1") == [], state
        assert "trial-1" not in store.trials()
        assert "trial-1" not in store.results("curves")["trial"].to_pylist()
        compact(store.path)
        write("trials", {"trial": "trial-1", "lam": 2.0})
        assert store.rows("curves", trial="trial-1") == []  # compaction has dropped them
        compact(store.path)


def flip(path: Path, position: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1
    path.write_bytes(damaged)


def test_a_damaged_answer_is_left_alone_and_no_older_one_takes_its_place(store: Store) -> None:
    key = key_of("trials", {"trial": "trial-3"})
    newest = table_files(store.path, "trials").newest()[key]
    flip(newest, 200)
    (damaged,) = [t.damaged for t in compact(store.path) if t.table == "trials"]
    assert damaged == (newest,)
    assert newest.exists()
    with pytest.raises(BlockCorruptError, match=newest.name):
        store.results("trials")
    assert verify(store.path, remove=True).ok
    assert store.results("trials").num_rows == NUM_TRIALS  # with the older answer of the key


def test_what_is_whole_of_a_damaged_compacted_file_is_rescued(store: Store) -> None:
    for number in range(600):  # more than one group of rows
        store.write_results("curves", [{"trial": f"more-{number:03}", "step": 0}])
    compact(store.path)
    (path,) = table_files(store.path, "curves").compacted
    every = {row["trial"] for row in store.results("curves").to_pylist()}
    flip(path, 20)
    with pytest.raises(BlockCorruptError, match=path.name):
        store.results("curves")
    report = verify(store.path, remove=True)
    assert [bad.path for bad in report.bad] == [path]
    kept = {row["trial"] for row in store.results("curves").to_pylist()}
    assert 0 < len(kept) < len(every)
    assert kept <= every
    assert verify(store.path).ok


def test_foreign_files_are_named_and_stay(store: Store) -> None:
    notes = table_folder(store.path, "trials") / "notes.txt"
    notes.write_text("mine")
    before = content(store)
    compact(store.path)
    assert content(store) == before
    report = verify(store.path, remove=True)
    assert [bad.path for bad in report.bad] == [notes]
    assert notes.exists()
