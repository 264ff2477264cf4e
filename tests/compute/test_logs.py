"""Ray on this machine: a worker that prints too much, and one that its monitor ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raykernel.compute import logs

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys, time
from contextlib import closing
from pathlib import Path
from raykernel.compute import logs
from raykernel.config import ComputeConfig
from raykernel.console import Screen
from raykernel.errors import WorkerLostError
from raykernel.jobs import open_executor
from raykernel.runs import cause_of
from raykernel.terms import ExecutorName

def make_printing():
    def work(size):
        for _ in range(size // 1000):
            print("x" * 999)
        sys.stdout.flush()
        time.sleep(0.5)
        return size
    return work

def make_sleeping():
    return time.sleep

logs.MAX_BYTES, logs.BACKUPS = 100_000, 1
compute = ComputeConfig(executor=ExecutorName.ray, workers=1, max_attempts=1)
found = {}
with closing(open_executor(compute, Screen())) as executor:
    import ray
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    (outcome,) = executor.run(make_printing, [3_000_000])
    found["printed"] = outcome.value()
    found["sizes"] = [path.stat().st_size for path in folder.glob("worker-*.out*")]
    found["whole"] = sum(path.stat().st_size for path in folder.glob("worker-*"))
os.environ |= {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "20"}
with closing(open_executor(compute, Screen())) as executor:
    try:
        list(executor.run(make_sleeping, [60.0]))
    except WorkerLostError as error:
        found["lost"], found["cause"] = str(error), cause_of(error).value
json.dump(found, sys.stdout)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_cluster_bounds_its_logs_and_says_that_memory_ran_out(tmp_path: Path) -> None:
    """3 MB printed, two files of 100 kB kept; and every process is beyond a limit of 0.1 %."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_")
    } | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["printed"] == 3_000_000
    assert len(found["sizes"]) >= 2
    assert max(found["sizes"]) < 150_000
    assert found["whole"] < 400_000
    assert "ran out of memory" in found["lost"]
    assert found["cause"] == "memory"


def test_what_the_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ROTATION_MAX_BYTES", "7")
    monkeypatch.delenv("RAY_ROTATION_BACKUP_COUNT", raising=False)
    logs.bound_logs()
    assert os.environ["RAY_ROTATION_MAX_BYTES"] == "7"
    assert os.environ["RAY_ROTATION_BACKUP_COUNT"] == str(logs.BACKUPS)


def test_sessions_are_counted_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert logs.sessions() == logs.Sessions(tmp_path / "ray", 0, 0)
    for name in ("session_2026-01-01_1", "session_2026-01-02_1"):
        (tmp_path / "ray" / name / "logs").mkdir(parents=True)
        (tmp_path / "ray" / name / "logs" / "raylet.out").write_bytes(b"x" * 10)
    (tmp_path / "ray" / "session_latest").symlink_to(tmp_path / "ray" / "session_2026-01-02_1")
    assert logs.sessions() == logs.Sessions(tmp_path / "ray", 2, 20)
