"""The files of a fine-tuning run.

    trials/<trial>/
      checkpoint.safetensors   while it runs: all that it needs to go on, replaced at evaluations
      head.safetensors         linear head that it starts from (prompt=none)
      best.safetensors         the trained parameters where dev was best
      adapter/                 the same as PEFT loads them, where an adapter was trained
      last.safetensors         the trained parameters of the last step, where a twin needs them
      twin-checkpoint.safetensors, twin.safetensors
                               of the linear twin: while it runs, and its parameters at the end

Its rows are results (results.py): those of `curves` are written before that of `trials`, which
says that the run has ended; `bounds` before `twins`, which say that the twin has.

Each is written at once, and twice with the same content, so nobody locks and nobody waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from raykernel.location import StorePath, local_copy

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class TrialFiles:
    """Where a trial's files lie."""

    path: StorePath

    @property
    def checkpoint(self) -> StorePath:
        """State of a run that has not ended."""
        return self.path / "checkpoint.safetensors"

    @property
    def head(self) -> StorePath:
        """Linear head of the start."""
        return self.path / "head.safetensors"

    @property
    def weights(self) -> StorePath:
        """Best parameters."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> StorePath:
        """Parameters of the last step."""
        return self.path / "last.safetensors"

    @property
    def twin_checkpoint(self) -> StorePath:
        """State of a linear twin that has not ended."""
        return self.path / "twin-checkpoint.safetensors"

    @property
    def twin(self) -> StorePath:
        """Parameters of the linear twin at its last step."""
        return self.path / "twin.safetensors"

    @property
    def adapter(self) -> StorePath:
        """Folder that PEFT loads."""
        return self.path / "adapter"


def checksum(path: StorePath) -> str:
    """The xxh3 hash of a file, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with local_copy(path) as copy, copy.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
