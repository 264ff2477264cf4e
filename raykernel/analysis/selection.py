"""Which layers to train: the sets of candidates that a predictor ranks best.

    kernels of the candidates → search under a budget → K_S = Σ_{l ∈ S} K_l → score of S

Kernels of disjoint parameters add, so that a set costs one sum and one eigendecomposition. Few
sets are tried one by one. Of many, a greedy choice is improved by single additions, removals and
exchanges; only of a submodular score (log det) is that known to come near the best. No set is
ruled out by its parts: two singular kernels can sum to a multiple of the identity.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from raykernel.analysis.outputs import choose_outputs, combined
from raykernel.analysis.predictors import Predictor, Start
from raykernel.analysis.spectrum import RIDGE
from raykernel.errors import InputError

EXHAUSTIVE = 2**16
"""Sets that are tried one by one at the most."""

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
    sigma: float = field(init=False)
    """The ridge that all sets share."""
    _tops: Float[np.ndarray, " l"] = field(init=False, repr=False)
    """||K_l||_op of each."""

    def __post_init__(self) -> None:
        count, n, c = self.kernels.shape[:3]
        if not count == len(self.names) == len(self.num_parameters) == len(set(self.names)):
            raise InputError(
                f"Found {count} kernels, {len(self.names)} names and {len(self.num_parameters)} "
                "sizes, expected one of each for every candidate, and names that differ."
            )
        if not self.ridge > 0:
            raise InputError(f"ridge: found {self.ridge}, expected more than 0.")
        seen = combined(self.kernels.sum(axis=0), choose_outputs(None, c))
        mean = float(np.einsum("iaia->", seen)) / (n * seen.shape[1])
        if not mean > 0:
            raise InputError("The candidates have no gradient, expected at least one that has.")
        flat = self.kernels.reshape(count, n * c, n * c)
        object.__setattr__(self, "sigma", self.ridge * mean)
        object.__setattr__(self, "_tops", np.linalg.eigvalsh(flat)[:, -1])

    def start(self, chosen: Chosen) -> Start:
        """A set before training: K_S = Σ_{l ∈ S} K_l.

        Args:
            chosen: the set, not empty.

        Returns:
            What predictors score.
        """
        kernel = self.kernels[chosen[0]].copy()
        for i in chosen[1:]:
            kernel += self.kernels[i]
        text = f"{self.seed}/{'/'.join(self.names[i] for i in chosen)}".encode()
        digest = hashlib.blake2b(text, digest_size=6).digest()
        return Start(
            kernel,
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
        )

    def cost(self, chosen: Chosen) -> int:
        """Parameters that a set would train."""
        return sum(self.num_parameters[i] for i in chosen)


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


@dataclass(frozen=True, slots=True)
class Choice:
    """A set and how good the criterion finds it."""

    chosen: Chosen
    goodness: float
    """Larger is better; -inf: the criterion has no number of it."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a search found."""

    choices: tuple[Choice, ...]
    """Best first; of equal ones the smaller set, then the earlier candidates."""
    num_scored: int
    """Sets that were scored."""
    is_exhaustive: bool
    """Whether these are all that the budget allows, so that the first is the best."""


def search(
    candidates: Candidates,
    predictor: Predictor,
    budget: Budget,
    *,
    top: int = 10,
    exhaustive: int = EXHAUSTIVE,
    advance: Progress | None = None,
) -> Ranking:
    """The best sets by a predictor, within a budget.

    Args:
        candidates: to choose among.
        predictor: what ranks them.
        budget: how large a set may be.
        top: sets to return at the most.
        exhaustive: sets tried one by one at the most; of more, greedy choice and exchanges.
        advance: told of every set that is scored.

    Returns:
        The best sets that were scored.

    Raises:
        InputError: if the budget allows no set.
    """
    scores = _Scores(candidates, predictor, advance or (lambda count: None))
    alone = [(i,) for i in range(len(candidates.names)) if budget.allows(candidates, (i,))]
    if not alone:
        raise InputError(
            f"The budget allows no set: found max_size={budget.max_size} and "
            f"max_parameters={budget.max_parameters}, the smallest of {len(candidates.names)} "
            f"candidates trains {min(candidates.num_parameters)} parameters. Raise it."
        )
    is_exhaustive = num_sets(len(alone), budget.max_size) <= exhaustive
    if is_exhaustive:
        for chosen in _all_sets([i for (i,) in alone], budget.max_size):
            if budget.allows(candidates, chosen):
                scores.of(chosen)
    else:
        first = _lazy_greedy if predictor.is_submodular else _greedy
        _improve(first(scores, budget), scores, budget)
    found = [Choice(chosen, goodness) for chosen, goodness in scores.known.items()]
    found.sort(key=lambda choice: (-choice.goodness, len(choice.chosen), choice.chosen))
    return Ranking(tuple(found[:top]), len(found), is_exhaustive)


def num_sets(count: int, max_size: int | None) -> int:
    """Sets of so many candidates that are not empty and no larger than allowed.

    Args:
        count: candidates.
        max_size: of a set; None: any.

    Returns:
        Their number.
    """
    largest = count if max_size is None else min(count, max_size)
    return sum(math.comb(count, size) for size in range(1, largest + 1))


class _Scores:
    """Goodness of every set asked for, each found once."""

    def __init__(self, candidates: Candidates, predictor: Predictor, advance: Progress) -> None:
        self.candidates, self.known = candidates, dict[Chosen, float]()
        self._predictor, self._advance = predictor, advance

    def of(self, chosen: Chosen) -> float:
        if chosen not in self.known:
            self.known[chosen] = self._predictor.goodness(self.candidates.start(chosen))
            self._advance(1)
        return self.known[chosen]


def _all_sets(indices: Sequence[int], max_size: int | None) -> Iterator[Chosen]:
    largest = len(indices) if max_size is None else min(len(indices), max_size)
    for size in range(1, largest + 1):
        yield from itertools.combinations(indices, size)


def _greedy(scores: _Scores, budget: Budget) -> Chosen:
    """Add the best candidate while the budget lasts; the best set on the way."""
    chosen: Chosen = ()
    passed: list[Chosen] = []
    while options := _additions(chosen, scores.candidates, budget):
        chosen = max(options, key=scores.of)
        passed.append(chosen)
    return max(passed, key=scores.of)


def _lazy_greedy(scores: _Scores, budget: Budget) -> Chosen:
    """The same of a submodular score, without scoring what cannot be the best (Minoux 1978)."""
    # A candidate's gain only falls as the set grows, so that its last known gain bounds it: once
    # the best known gain is up to date, no other can be larger.
    chosen: Chosen = ()
    base = 0.0  # of the empty set
    queue = [(-scores.of(one), one[0], 0) for one in _additions((), scores.candidates, budget)]
    heapq.heapify(queue)
    while queue:
        gain, i, size = heapq.heappop(queue)
        larger = _with(chosen, i)
        if not budget.allows(scores.candidates, larger):
            continue  # nor will it be within the budget of a larger set
        if size == len(chosen):
            chosen, base = larger, base - gain
        else:
            heapq.heappush(queue, (base - scores.of(larger), i, len(chosen)))
    return chosen


def _improve(chosen: Chosen, scores: _Scores, budget: Budget) -> Chosen:
    """Add, remove or exchange one candidate as long as that is better."""
    while True:
        best = max(_neighbours(chosen, scores.candidates, budget), key=scores.of, default=chosen)
        if not scores.of(best) > scores.of(chosen):
            return chosen
        chosen = best


def _neighbours(chosen: Chosen, candidates: Candidates, budget: Budget) -> list[Chosen]:
    removals = [tuple(i for i in chosen if i != out) for out in chosen]
    exchanges = [more for fewer in removals for more in _additions(fewer, candidates, budget)]
    options = [*_additions(chosen, candidates, budget), *removals, *exchanges]
    return [option for option in options if option and option != chosen]


def _additions(chosen: Chosen, candidates: Candidates, budget: Budget) -> list[Chosen]:
    larger = (_with(chosen, i) for i in range(len(candidates.names)) if i not in chosen)
    return [option for option in larger if budget.allows(candidates, option)]


def _with(chosen: Chosen, one: int) -> Chosen:
    return tuple(sorted((*chosen, one)))
