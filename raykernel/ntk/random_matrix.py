"""Random matrices S (k × p) that are never stored: any part of one arises the same anywhere.

Entry S[j, q] is a function of a seed, a name and (j, q) alone, by a counter-based generator
(Philox 4x64-10, Salmon et al. 2011): the key is a hash of seed and name, and coordinate q owns the
counters [q B, (q + 1) B), B large enough for k entries. So neither the number of workers nor the
tiles in which S is made change it, and S for one k is no part of S for another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raykernel.errors import InputError

_WORDS_PER_BLOCK = 4
"""Words of 64 bits that Philox gives for one value of its counter."""


class Entries(Enum):
    """Distribution of the entries, of mean 0 and variance 1."""

    rademacher = "rademacher"
    """-1 or 1: a sixth of the time, and never more variance."""
    gaussian = "gaussian"


@dataclass(frozen=True, slots=True)
class RandomMatrices:
    """One matrix S (k × p) with independent entries for every name, and every p."""

    dimension: int
    """k."""
    seed: int = 0
    entries: Entries = Entries.rademacher

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise InputError(f"dimension: found {self.dimension}, expected at least 1.")

    def columns(
        self, name: str, start: int, stop: int, *, like: Tensor | None = None
    ) -> Float[Tensor, "q k"]:
        """Sᵀ at the coordinates from `start` to before `stop`.

        Args:
            name: whose matrix.
            start: first coordinate.
            stop: coordinate after the last.
            like: a tensor of the type and on the device wanted; None: float64 on the CPU.

        Returns:
            The entries.
        """
        make = _signs if self.entries is Entries.rademacher else _normals
        entries = make(self._key(name), start, stop, self.dimension)
        return entries.double() if like is None else entries.to(like)

    def _key(self, name: str) -> int:
        text = f"{self.seed}/{name}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def _signs(key: int, start: int, stop: int, k: int) -> Float[Tensor, "q k"]:
    words = _words(key, start, stop, per_coordinate=-(-k // 64))
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=k, bitorder="little")
    return torch.from_numpy(bits.view(np.int8)).mul_(2).sub_(1).float()


def _normals(key: int, start: int, stop: int, k: int) -> Float[Tensor, "q k"]:
    words = _words(key, start, stop, per_coordinate=-(-k // 2))
    integers = torch.from_numpy(words.view("<u4")[:, :k].astype(np.float64))
    # Through the inverse distribution function, which takes one number each: methods that reject,
    # as NumPy's own, would let an entry depend on those before it. 2^32 values reach to 6.3.
    entries: Tensor = torch.special.ndtri(integers.add_(0.5).mul_(2.0**-32))
    return entries


def _words(key: int, start: int, stop: int, *, per_coordinate: int) -> np.ndarray:
    """Random words (q, words) of 64 bits, in the order of bytes that all machines read alike."""
    blocks = -(-per_coordinate // _WORDS_PER_BLOCK)
    generator = np.random.Philox(key=key, counter=start * blocks)
    words = generator.random_raw((stop - start) * blocks * _WORDS_PER_BLOCK)
    return words.astype("<u8", copy=False).reshape(stop - start, blocks * _WORDS_PER_BLOCK)
