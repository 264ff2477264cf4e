"""What Ray writes to disk, bounded, so that a sweep of days does not fill it.

    /tmp/ray/session_<time>_<pid>/logs/worker-*.out, worker-*.err, raylet.*, gcs_server.*, …

Every process has files of its own there, each of up to 512 MiB and five older ones of as much by
Ray's defaults: a worker that warns at every step fills a small disk. The folders of sessions that
have ended stay until somebody deletes them. raykernel itself keeps no log: a study's journal has a
few lines for each choice, and what a run found is in the store.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 8 << 20
"""Of a log file, before it becomes an older one."""
BACKUPS = 2
"""Older files that are kept."""


@dataclass(frozen=True, slots=True)
class Sessions:
    """Folders that Ray has left on this machine."""

    path: Path
    count: int
    num_bytes: int


def bound_logs() -> None:
    """Have a cluster that this process starts turn its logs over; what the user has set stands."""
    os.environ.setdefault("RAY_ROTATION_MAX_BYTES", str(MAX_BYTES))
    os.environ.setdefault("RAY_ROTATION_BACKUP_COUNT", str(BACKUPS))


def sessions() -> Sessions:
    """What is left of Ray's sessions, running or ended.

    Returns:
        Where, how many and how large.
    """
    root = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    folders = [path for path in root.glob("session_2*") if path.is_dir()]
    sizes = (
        path.lstat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()
    )
    return Sessions(root, len(folders), sum(sizes))
