"""Where a result comes from: versions, commit, machine, and what it took."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import psutil


def versions() -> dict[str, str]:
    """Versions that decide whether two processes compute the same numbers."""
    return dict(_installed())


def origin() -> dict[str, str]:
    """Columns of every result row that say what made it.

    Returns:
        `versions`, as JSON with the commit where raykernel is a checkout, and `host`.
    """
    made_by = versions() | ({"commit": commit()} if commit() else {})
    return {"versions": json.dumps(made_by, sort_keys=True), "host": platform.node()}


@dataclass(frozen=True, slots=True)
class Meter:
    """What a command takes, from here on."""

    start: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds until now."""
        return time.monotonic() - self.start

    def columns(self, workers_peak: int = 0) -> dict[str, object]:
        """Columns of a result row.

        Args:
            workers_peak: largest memory of its workers, bytes.

        Returns:
            `seconds` until now, and `peak_memory_bytes`, this process included.
        """
        return {
            "seconds": self.seconds,
            "peak_memory_bytes": max(workers_peak, peak_resident_bytes()),
        }


def peak_resident_bytes() -> int:
    """Largest resident memory that this process had, in bytes.

    NOTE: not `getrusage`, whose maximum a process inherits from the one that started it.

    Returns:
        The maximum; on systems that do not keep one, the present value.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


@lru_cache(maxsize=1)
def commit() -> str:
    """Commit of the checkout that raykernel runs from; empty if it is none."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git, or not its owner
        return ""
    return found.stdout.strip()


@lru_cache(maxsize=1)
def _installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("raykernel", "torch", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
