"""The files of a fine-tuning run.

    trials/<trial>/
      checkpoint.safetensors   while it runs: all that it needs to go on, replaced at evaluations
      head.safetensors         linear head that it starts from (prompt=none)
      best.safetensors         the trained parameters where dev was best
      adapter/                 the same as PEFT loads them, where an adapter was trained
      curve-<key>.parquet      its evaluations; written before the next one
      trial-<key>.parquet      its result (results.py): it is there, so the run has ended

Each is written at once, and twice with the same content, so nobody locks and nobody waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class TrialFiles:
    """Where a trial's files lie."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """State of a run that has not ended."""
        return self.path / "checkpoint.safetensors"

    @property
    def head(self) -> Path:
        """Linear head of the start."""
        return self.path / "head.safetensors"

    @property
    def weights(self) -> Path:
        """Best parameters."""
        return self.path / "best.safetensors"

    @property
    def adapter(self) -> Path:
        """Folder that PEFT loads."""
        return self.path / "adapter"


def checksum(path: Path) -> str:
    """The xxh3 hash of a file, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
