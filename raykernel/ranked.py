"""Choices of candidates of one kernel: ranked, ranked again on other samples, and on a front."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from raykernel.analysis.pareto import Front, pareto
from raykernel.analysis.predictors import PREDICTORS
from raykernel.analysis.selection import Ranking, num_sets, search
from raykernel.analysis.sets import Budget, Candidates, Chosen, Progress
from raykernel.analysis.stability import POOL, Stability, halves, rank_again
from raykernel.analysis.start import Start
from raykernel.candidates import Member, stack_kernels, with_groups
from raykernel.config import SelectConfig
from raykernel.console import Screen
from raykernel.location import StorePath
from raykernel.prepared import Prepared
from raykernel.spectra import same_gradients
from raykernel.store.baselines import Measured
from raykernel.store.kernels import KernelHandle
from raykernel.terms import Criterion, Kind


@dataclass(frozen=True, slots=True)
class RankedChoice:
    """A choice of candidates and all that is foretold of it."""

    rank: int | None
    """1: the best by the criterion; None: all candidates, for comparison, or of the front alone."""
    members: tuple[Member, ...]
    start: Start
    scores: Mapping[Criterion, float]
    front: int | None = None
    """Its place on the Pareto front, 1: the best in the first objective; None: not on it."""
    halves: Stability | None = None
    """Ranks among the best choices on halves of train; None: not ranked again."""
    seeds: Stability | None = None
    """The same with a LoRA's other random A."""

    @property
    def num_features(self) -> int | None:
        """A bound of the kernel's rank; None if not counted."""
        counts = [member.num_features for member in self.members]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @property
    def is_singular(self) -> bool:
        """Whether there are fewer features than rows."""
        return self.num_features is not None and self.num_features < self.start.spectrum.size


@dataclass(frozen=True, slots=True)
class KindSelection:
    """What was found of one kind of kernel."""

    kind: Kind
    ranking: Ranking
    choices: tuple[RankedChoice, ...]
    """Best first, all candidates last."""
    front: tuple[RankedChoice, ...]
    """The Pareto front of the objectives; empty if there are none."""
    is_front_exact: bool
    """Whether it is of all choices within the budget."""
    num_ranked: int
    """Best choices that were ranked again."""
    num_candidates: int
    """That have a gradient."""
    num_dead: int
    """That have none."""
    sigma: float
    duplicates: tuple[tuple[str, str], ...]
    """Ids of train examples that the best choice takes for one."""
    adapter: StorePath
    """Folder of `adapter_config.json`."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """In it: rank of every module that is adapted."""


def rank(
    prepared: Prepared,
    handle: KernelHandle,
    kind: Kind,
    members: Sequence[Member],
    *,
    measured: Mapping[str, Measured] | None,
    others: Sequence[tuple[Prepared, KernelHandle]],
    adapter: StorePath,
    screen: Screen,
) -> KindSelection:
    """Rank choices of candidates by `select.criterion`.

    Args:
        prepared: the run.
        handle: its kernel, with all blocks of train.
        kind: a symmetric kind.
        members: the candidates.
        measured: the weights of their modules, where these were measured.
        others: the same LoRA with other random A, complete, too.
        adapter: folder of the best choice's `adapter_config.json`.
        screen: where progress is shown.

    Returns:
        The best choices, and all candidates for comparison.
    """
    config, select = prepared.config, prepared.config.select
    before, stack = len(members), partial(stack_kernels, kind=kind)
    members = with_groups(prepared, handle, kind, members)
    members, candidates = stack(prepared, handle, members=members, measured=measured)
    budget = Budget(select.max_size, config.parameter_budget)
    find = partial(search, candidates, PREDICTORS[select.criterion], budget)
    name = f"choices of layers ({kind.value})"
    total = num_sets(len(members), select.max_size)
    with _shown(screen, name, total if total <= select.exhaustive else None) as advance:
        ranking = find(top=max(select.top, POOL), exhaustive=select.exhaustive, advance=advance)
    pool = [choice.chosen for choice in ranking.choices]
    ranking = replace(ranking, choices=ranking.choices[: select.top])
    seeded = [stack(*other, members=members)[1] for other in others]
    by_half, by_seed = _ranked_again(candidates, seeded, pool, select)
    front = _front(candidates, budget, pool, select, screen)
    place_of = {chosen: place for place, chosen in enumerate(front.choices, start=1)}
    rank_of = {chosen: number for number, chosen in enumerate(pool, start=1)}

    def described(chosen: Chosen, number: int | None) -> RankedChoice:
        start = candidates.start(chosen)
        return RankedChoice(
            number,
            tuple(members[i] for i in chosen),
            start,
            {criterion: one.score(start) for criterion, one in PREDICTORS.items()},
            front=place_of.get(chosen),
            halves=None if number is None else by_half.get(chosen),
            seeds=None if number is None else by_seed.get(chosen),
        )

    best = [described(chosen, rank_of[chosen]) for chosen in pool[: select.top]]
    return KindSelection(
        kind,
        ranking,
        (*best, described(tuple(range(len(members))), None)),
        tuple(described(chosen, rank_of.get(chosen)) for chosen in front.choices),
        front.is_exact,
        len(pool),
        len(members),
        before - len(members),
        candidates.sigma,
        same_gradients(handle, best[0].start.kernel, config.spectrum),
        adapter,
    )


def _ranked_again(
    candidates: Candidates,
    seeded: Sequence[Candidates],
    pool: Sequence[Chosen],
    select: SelectConfig,
) -> tuple[dict[Chosen, Stability], dict[Chosen, Stability]]:
    """Ranks of the best choices on halves of train, and with other random A."""
    predictor = PREDICTORS[select.criterion]
    if not predictor.reads.is_of_kernel:  # nothing of it is sampled
        return {}, {}
    labels = candidates.targets.argmax(axis=1)
    parts = [candidates.of_examples(half) for half in halves(labels, select.halves, select.seed)]
    found = [
        dict(zip(pool, rank_again(samples, predictor, pool), strict=True)) if samples else {}
        for samples in (parts, seeded and [candidates, *seeded])
    ]
    return found[0], found[1]


def _front(
    candidates: Candidates,
    budget: Budget,
    pool: Sequence[Chosen],
    select: SelectConfig,
    screen: Screen,
) -> Front:
    """The Pareto front of `select.objectives`, if there are any."""
    if not select.objectives:
        return Front((), 0, False)
    total = num_sets(len(candidates.names), select.max_size)
    count = total if total <= select.exhaustive else None
    with _shown(screen, "choices for the Pareto front", count) as advance:
        return pareto(
            candidates,
            select.objectives,
            budget,
            exhaustive=select.exhaustive,
            trials=select.trials,
            seed=select.seed,
            known=pool[: select.top],
            advance=advance,
        )


@contextlib.contextmanager
def _shown(screen: Screen, name: str, total: int | None) -> Iterator[Progress]:
    """Progress of a search, whose length is known where it is exhaustive."""
    if total is None:
        with screen.stage(f"Searching {name}"):
            yield lambda count: None
    else:
        with screen.progress(name, total) as advance:
            yield advance
