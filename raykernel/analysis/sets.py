"""Sets of candidates for training, and how good a predictor finds them: many at a time.

Kernels of disjoint parameters add, so that a set costs one sum and one eigendecomposition. Both
are done for batches of sets in the threads that this process may use; the same set has the same
score whatever batch it is in, but for rounding of the order in which its parts are added.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from threadpoolctl import ThreadpoolController

from raykernel.analysis.outputs import choose_outputs, combined
from raykernel.analysis.predictors import Predictor, Reads
from raykernel.analysis.spectrum import RIDGE
from raykernel.analysis.start import Baseline, Known, Start
from raykernel.errors import InputError

BATCH = 128
"""Sets that are scored together at the most."""
BATCH_BYTES = 16 << 20
"""Their kernels' memory at the most, in each thread."""

Chosen = tuple[int, ...]
"""A set of candidates, ascending."""
Progress = Callable[[int], None]
"""Takes how many more sets are scored."""


@dataclass(frozen=True)
class Candidates:
    """Kernels to choose among, and what they are to fit."""

    names: tuple[str, ...]
    kernels: Float[np.ndarray, "l n c n c"]
    """K(train, train) of each, symmetric, in float64; no parameter is in two of them."""
    num_parameters: tuple[int, ...]
    """That each would train."""
    targets: Float[np.ndarray, "n c"]
    """One-hot labels."""
    f0: Float[np.ndarray, "n c"]
    """Initial logits."""
    ridge: float = RIDGE
    """Relative to the mean eigenvalue; also of the ridge σ that all sets share, in units of the
    mean eigenvalue of all candidates' kernel."""
    resolution: float = 0.0
    """Relative size of an eigenvalue that is rounding noise."""
    is_f0_fitted: bool = False
    """Whether the initial logits were fitted to these labels."""
    seed: int = 0
    """Of the random control."""
    baselines: tuple[Baseline, ...] | None = None
    """What was measured of each one's weights."""
    sigma: float = field(init=False)
    """The ridge that all sets share."""
    _seen: Float[np.ndarray, "l m m"] = field(init=False, repr=False)
    """Each one's kernel in the outputs that softmax sees."""
    _tops: Float[np.ndarray, " l"] = field(init=False, repr=False)
    """||K_l||_op of each."""
    # A large set is made of hundreds of these, tens of thousands of times.
    _kernels: tuple[Float[np.ndarray, "n c n c"], ...] = field(init=False, repr=False)
    """`kernels`, taken apart."""
    _texts: tuple[bytes, ...] = field(init=False, repr=False)
    """`names`, encoded."""

    def __post_init__(self) -> None:
        count, n, c = self.kernels.shape[:3]
        alike = {count, len(self.names), len(self.num_parameters), len(set(self.names))}
        if self.baselines is not None:
            alike.add(len(self.baselines))
        if len(alike) > 1:
            raise InputError(
                f"Found {count} kernels, {len(self.names)} names and {len(self.num_parameters)} "
                "sizes, expected one of each for every candidate, and names that differ."
            )
        if not self.ridge > 0:
            raise InputError(f"ridge: found {self.ridge}, expected more than 0.")
        if not np.isfinite(self.kernels).all():
            raise InputError("The candidates' kernels hold NaN or infinite values.")
        outputs = choose_outputs(None, c)
        seen = np.stack([combined(kernel, outputs) for kernel in self.kernels])
        m = n * seen.shape[2]
        mean = float(np.einsum("liaia->", seen)) / m
        if not mean > 0:
            raise InputError("The candidates have no gradient, expected at least one that has.")
        flat = self.kernels.reshape(count, n * c, n * c)
        object.__setattr__(self, "sigma", self.ridge * mean)
        object.__setattr__(self, "_seen", seen.reshape(count, m, m))
        object.__setattr__(self, "_tops", np.linalg.eigvalsh(flat)[:, -1])
        object.__setattr__(self, "_kernels", tuple(self.kernels))
        object.__setattr__(self, "_texts", tuple(name.encode() for name in self.names))

    def start(self, chosen: Chosen, known: Known | None = None) -> Start:
        """A set before training: K_S = Σ_{l ∈ S} K_l.

        Args:
            chosen: the set, not empty.
            known: what of it has been found.

        Returns:
            What predictors score.
        """
        text = f"{self.seed}/".encode() + b"/".join(map(self._texts.__getitem__, chosen))
        digest = hashlib.blake2b(text, digest_size=6).digest()
        return Start(
            tuple(map(self._kernels.__getitem__, chosen)),
            self.targets,
            self.f0,
            sigma=self.sigma,
            ridge=self.ridge,
            resolution=self.resolution,
            # The norm of a sum is no more than the sum of norms.
            bound=float(self._tops[list(chosen)].sum()),
            is_f0_fitted=self.is_f0_fitted,
            size=len(chosen),
            num_parameters=self.cost(chosen),
            draw=int.from_bytes(digest, "little") / 2**48,
            baseline=self._baseline(chosen),
            known=known,
        )

    def starts(self, sets: Sequence[Chosen], reads: Reads) -> list[Start]:
        """Several at once, with what a predictor reads found together.

        Args:
            sets: not empty.
            reads: what of them will be asked for.

        Returns:
            The same as `start` of each.
        """
        if not reads.is_of_kernel:
            return [self.start(chosen) for chosen in sets]
        # What all of them have in common is summed once.
        core = set.intersection(*map(set, sets))
        common = self._seen[sorted(core)].sum(axis=0)
        seen = np.empty((len(sets), *common.shape))
        for at, chosen in enumerate(sets):
            own = [i for i in chosen if i not in core]
            np.add(common, self._seen[own].sum(axis=0), out=seen[at])
        if reads is Reads.entries:
            known = [Known(kernel) for kernel in seen]
        elif reads is Reads.eigenvalues:
            known = list(map(Known, seen, np.linalg.eigvalsh(seen)))
        else:
            known = list(map(Known, seen, *np.linalg.eigh(seen)))
        return list(map(self.start, sets, known))

    def of_examples(self, examples: Sequence[int]) -> Candidates:
        """The same candidates where train is some of its examples: sub-matrices of their kernels.

        Args:
            examples: which.

        Returns:
            Candidates with a shared ridge of these examples' own.
        """
        rows = np.asarray(examples)
        return replace(
            self,
            kernels=self.kernels[:, rows][:, :, :, rows],
            targets=self.targets[rows],
            f0=self.f0[rows],
        )

    def cost(self, chosen: Chosen) -> int:
        """Parameters that a set would train."""
        return sum(map(self.num_parameters.__getitem__, chosen))

    @property
    def batch(self) -> int:
        """Sets that are scored together."""
        # Their kernels, and what their eigendecomposition takes beside them.
        return max(1, min(BATCH, BATCH_BYTES // int(3 * self._seen[0].nbytes)))

    def _baseline(self, chosen: Chosen) -> Baseline | None:
        if self.baselines is None:
            return None
        total = self.baselines[chosen[0]]
        for i in chosen[1:]:
            total += self.baselines[i]
        return total


@dataclass(frozen=True, slots=True)
class Budget:
    """How large a set may be."""

    max_size: int | None = None
    """Candidates at the most; None: any number."""
    max_parameters: int | None = None
    """Trained parameters at the most; None: any number."""

    def allows(self, candidates: Candidates, chosen: Chosen) -> bool:
        """Whether a set is within it."""
        return (self.max_size is None or len(chosen) <= self.max_size) and (
            self.max_parameters is None or candidates.cost(chosen) <= self.max_parameters
        )


Goodness = tuple[float, ...]
"""Of a set by one predictor or several; larger is better, -inf: it has no number."""


class Scores:
    """Goodness of sets by predictors, each set scored once.

    Args:
        candidates: what the sets are of.
        predictors: what scores them.
        advance: told of every set that is scored.

    Attributes:
        known: what has been found.
    """

    def __init__(
        self,
        candidates: Candidates,
        predictors: Sequence[Predictor],
        advance: Progress = lambda count: None,
    ) -> None:
        self.candidates, self.known = candidates, dict[Chosen, Goodness]()
        self._predictors, self._advance = tuple(predictors), advance
        self._reads = max((one.reads for one in predictors), key=lambda reads: reads.value)

    def of(self, chosen: Chosen) -> float:
        """Goodness of one set by the first predictor."""
        if chosen not in self.known:
            self.score([chosen])
        return self.known[chosen][0]

    def score(self, sets: Sequence[Chosen]) -> None:
        """Find the goodness of those that are not known yet."""
        new = [chosen for chosen in dict.fromkeys(sets) if chosen not in self.known]
        size = self.candidates.batch
        batches = [new[at : at + size] for at in range(0, len(new), size)]
        # Linear algebra leaves Python's lock alone, so that threads share its work.
        threads = min(len(batches), num_threads()) if self._reads.is_of_kernel else 0
        pool = ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext()
        # A library that starts threads of its own in each of ours would be twice as slow.
        alone = _libraries().limit(limits=1) if threads > 1 else contextlib.nullcontext()
        with alone, pool as workers:
            found = (workers.map if workers else map)(self._batch, batches)
            for batch, values in zip(batches, found, strict=True):
                self.known.update(zip(batch, values, strict=True))
                self._advance(len(batch))

    def _batch(self, sets: Sequence[Chosen]) -> list[Goodness]:
        starts = self.candidates.starts(sets, self._reads)
        return [tuple(one.goodness(start) for one in self._predictors) for start in starts]


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    """Linear algebra that is loaded; to look for it takes milliseconds."""
    return ThreadpoolController()


def num_threads() -> int:
    """CPU cores that this process may use."""
    count = getattr(os, "sched_getaffinity", None)
    return len(count(0)) if count is not None else os.cpu_count() or 1
