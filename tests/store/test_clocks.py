"""Clocks that are set forward and back: the answer given last counts, and nothing is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raykernel.store import results
from raykernel.store.blocks import Store
from raykernel.store.commit import commit_written, stale_temporaries
from raykernel.store.compaction import compact
from raykernel.store.verify import verify

HOUR = 3600
Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets this process's clock off by so many hours."""
    real = time.time_ns

    def off(hours: float) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: real() + int(hours * HOUR * 10**9))

    return off


def answer(store: Store, status: str) -> None:
    row = {"study": "s", "run": "r", "status": status, "results": "[]", "seconds": 0.0}
    store.write_result("runs", row)


def status(store: Store) -> list[str]:
    """By both ways to look."""
    (row,) = store.rows("runs", study="s", run="r")
    assert store.results("runs")["status"].to_pylist() == [row["status"]]
    return [row["status"]]


@pytest.mark.parametrize("hours", [-1, -9000, 1, 90000])
@pytest.mark.parametrize("is_compacted", [False, True])
def test_the_last_answer_counts_whatever_the_clock_says(
    tmp_path: Path, clock: Clock, hours: float, is_compacted: bool
) -> None:
    """A run that failed, then the same run after the clock was set, or on another machine."""
    store = Store(tmp_path)
    answer(store, "failed")
    clock(hours)
    if is_compacted:
        compact(tmp_path)
    answer(store, "ok")
    assert status(store) == ["ok"]
    clock(-2 * hours)
    compact(tmp_path)
    assert status(store) == ["ok"]
    answer(store, "stopped")
    assert status(store) == ["stopped"]


def test_versions_sort_after_what_is_there() -> None:
    assert results.new_version(["f" * 15 + "0" + "a" * 8])[:16] == "f" * 15 + "1"


@pytest.mark.parametrize("hours", [-5, 5])
def test_temporaries_of_a_clock_that_was_set_are_old_too(tmp_path: Path, hours: float) -> None:
    """One far ahead of the device's clock was not written now either."""
    Store(tmp_path).create()
    old, young = (tmp_path / f".block.{name}.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.touch()
    then = time.time() + hours * HOUR
    os.utime(old, (then, then))
    assert verify(tmp_path, remove=True).leftovers == (old,)
    assert not old.exists()
    assert young.exists()
    assert [path.name for path in tmp_path.iterdir() if "clock" in path.name] == []


def test_the_devices_clock_decides_not_the_processs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is two hours ahead of the file server's takes no living writer's file."""
    (tmp_path / ".block.1.tmp").touch()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 2 * HOUR)
    assert list(stale_temporaries(tmp_path)) == []


def test_a_writer_whose_temporary_was_swept_writes_again(tmp_path: Path) -> None:
    swept = []

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"whole")
        if not swept:
            swept.append(temporary)
            temporary.unlink()

    assert commit_written(tmp_path / "file", write, num_bytes=5) == 5
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
