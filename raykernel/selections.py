"""Which layers to adapt, before any training: the stage of `raykernel select`.

    config → K(train, train) of every layer → sets of layers, ranked → the best for PEFT

Candidates are transformer layers, or the modules in them (`select.candidates`); their kernels are
sums of stored blocks, so that no choice costs a new one. The kernel may be that of a LoRA, or of
the full weights: the LoRA's is a random one whose mean is the full one's up to scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raykernel.analysis.predictors import PREDICTORS, Start
from raykernel.analysis.selection import Budget, Ranking, num_sets, search
from raykernel.candidates import Member, find_members, stack_kernels
from raykernel.config import RunConfig, canonical_json, require
from raykernel.console import Screen
from raykernel.pipeline import Completion, complete_train
from raykernel.prepared import Prepared, prepare
from raykernel.problem.skeleton import adapted_paths, layer_linears
from raykernel.spectra import same_gradients
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle
from raykernel.store.results import key_of
from raykernel.terms import Criterion, Kind, Method, Projection, PromptStyle
from raykernel.training.adapter import write_adapter_config


@dataclass(frozen=True, slots=True)
class RankedChoice:
    """A choice of candidates and all that is foretold of it."""

    rank: int | None
    """1: the best; None: all candidates, for comparison."""
    members: tuple[Member, ...]
    start: Start
    scores: Mapping[Criterion, float]

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
    num_candidates: int
    """That have a gradient."""
    num_dead: int
    """That have none."""
    sigma: float
    duplicates: tuple[tuple[str, str], ...]
    """Ids of train examples that the best choice takes for one."""
    adapter: Path
    """Folder of `adapter_config.json`."""


@dataclass(frozen=True, slots=True)
class Selections:
    """Everything that `raykernel select` reports."""

    prepared: Prepared
    completion: Completion
    by_kind: tuple[KindSelection, ...]


def selections(config: RunConfig, overrides: tuple[str, ...], screen: Screen) -> Selections:
    """Complete a kernel's train blocks, rank choices of layers, keep the best.

    Args:
        config: the run.
        overrides: the command line that made it, kept with the results.
        screen: where progress is shown.

    Returns:
        The rankings.

    Raises:
        InputError: if the criterion needs a budget, the kernel has no spectrum, or no layer fits.
    """
    _check(config)
    prepared = prepare(config, screen)
    linears = layer_linears(
        prepared.config.model, has_prompt=config.prompt.style is not PromptStyle.none
    )
    paths = list(linears)
    if config.parameters.method is not Method.lora or config.select.modules:
        paths = adapted_paths(linears, config.select.modules, prepared.config.model)
    store = Store(config.store.path)
    handle, completion = complete_train(prepared, screen)
    found = []
    for kind in config.kernel.kinds:
        if not kind.is_symmetric:
            screen.note(f"{kind.value} is not symmetric and has no spectrum: left out.")
            continue
        members = find_members(prepared, handle, kind, {path: linears[path] for path in paths})
        one = rank(prepared, handle, kind, members, screen=screen)
        best = [path for member in one.choices[0].members for path in member.modules]
        write_adapter_config(
            one.adapter,
            {path: linears[path] for path in best},
            model=prepared.config.model,
            parameters=config.parameters,
        )
        store.write_results("selections", result_rows(prepared, one, overrides))
        found.append(one)
    return Selections(prepared, completion, tuple(found))


def _check(config: RunConfig) -> None:
    """What can be refused before anything is read."""
    select = config.select
    kinds = [kind.value for kind in config.kernel.kinds]
    is_any = any(kind.is_symmetric for kind in config.kernel.kinds)
    require(is_any, "kernel.kinds", kinds, "sgd or signgd: asigngd is not symmetric")
    require(config.spectrum.ridge > 0, "spectrum.ridge", config.spectrum.ridge, "more than 0")
    is_probed = config.prompt.style is PromptStyle.none
    require(
        not (is_probed and select.criterion in (Criterion.loo_error, Criterion.loo_accuracy)),
        "select.criterion",
        select.criterion.value,
        "another one with prompt=none, whose linear probe was fitted to all of train",
    )
    method = config.kernel.projection.method
    require(
        method is not Projection.intrinsic_dimension,
        "kernel.projection.method",
        method.value,
        "another one, for this one projects all layers together",
    )
    bounded = select.max_size is not None or select.max_parameters is not None
    require(
        bounded or not PREDICTORS[select.criterion].is_monotone,
        "select.criterion",
        select.criterion.value,
        "one that more layers can make worse, or a budget: every layer betters this one, so that "
        "it would choose all of them. Set select.max_size or select.max_parameters",
    )


def rank(
    prepared: Prepared,
    handle: KernelHandle,
    kind: Kind,
    members: Sequence[Member],
    *,
    screen: Screen,
) -> KindSelection:
    """Rank choices of candidates by `select.criterion`.

    Args:
        prepared: the run.
        handle: its kernel, with all blocks of train.
        kind: a symmetric kind.
        members: the candidates.
        screen: where progress is shown.

    Returns:
        The best choices, and all candidates for comparison.
    """
    config, select = prepared.config, prepared.config.select
    before = len(members)
    members, candidates = stack_kernels(prepared, handle, kind, members)
    predictor = PREDICTORS[select.criterion]
    budget = Budget(select.max_size, select.max_parameters)
    find = partial(
        search, candidates, predictor, budget, top=select.top, exhaustive=select.exhaustive
    )
    total, name = num_sets(len(members), select.max_size), f"choices of layers ({kind.value})"
    if total <= select.exhaustive:
        with screen.progress(name, total) as advance:
            ranking = find(advance=advance)
    else:
        with screen.stage(f"Searching {name}"):
            ranking = find()
    sets = [(number, choice.chosen) for number, choice in enumerate(ranking.choices, start=1)]
    every: list[tuple[int | None, tuple[int, ...]]] = [*sets, (None, tuple(range(len(members))))]
    choices = []
    for number, chosen in every:
        start = candidates.start(chosen)
        scores = {criterion: one.score(start) for criterion, one in PREDICTORS.items()}
        choices.append(RankedChoice(number, tuple(members[i] for i in chosen), start, scores))
    row = result_key(prepared, kind)
    return KindSelection(
        kind,
        ranking,
        tuple(choices),
        len(members),
        before - len(members),
        candidates.sigma,
        same_gradients(handle, choices[0].start.kernel, config.spectrum),
        Path(config.store.path) / "selections" / f"selection-{key_of('selections', row)}",
    )


# ---------------------------------------------------------------- what is kept


def result_key(prepared: Prepared, kind: Kind) -> dict[str, object]:
    """Key columns of a ranking.

    Args:
        prepared: the run.
        kind: of kernel.

    Returns:
        Value by column.
    """
    config = prepared.config
    return {
        "fingerprint": prepared.fingerprint,
        "kind": kind.value,
        "settings": canonical_json(config.select),
        "ridge": config.spectrum.ridge,
    }


def result_rows(
    prepared: Prepared, found: KindSelection, overrides: tuple[str, ...]
) -> list[dict[str, object]]:
    """Rows of the table `selections`, one for each choice.

    Args:
        prepared: the run.
        found: of one kind.
        overrides: the command line that made it.

    Returns:
        Value by column.
    """
    config = prepared.config
    common = result_key(prepared, found.kind) | {
        "criterion": config.select.criterion.value,
        "task": config.task.name,
        "model": config.model.name,
        "prompt": config.prompt.style.value,
        "k": config.task.k,
        "seed": config.task.seed,
        "num_outputs": len(prepared.data.labels),
        "num_train": len(prepared.grid.train),
        "parameters": canonical_json(config.parameters),
        "num_scored": found.ranking.num_scored,
        "is_exhaustive": found.ranking.is_exhaustive,
        "sigma": found.sigma,
        "overrides": list(overrides),
    }
    folder = found.adapter.relative_to(Path(config.store.path)).as_posix()
    return [
        common
        | {
            "rank": choice.rank,
            "candidates": [member.name for member in choice.members],
            "layers": sorted({member.layer for member in choice.members}),
            "target_modules": [path for member in choice.members for path in member.modules],
            "adapter": folder if choice.rank == 1 else None,
            "outputs": choice.start.outputs.value,
            "num_rows": choice.start.spectrum.size,
            "num_unresolved": choice.start.spectrum.num_unresolved,
            "num_features": choice.num_features,
            "size": choice.start.size,
            "num_parameters": choice.start.num_parameters,
        }
        | {
            criterion.value: None if math.isnan(score) else score
            for criterion, score in choice.scores.items()
            if criterion not in (Criterion.size, Criterion.num_parameters)
        }
        for choice in found.choices
    ]
