"""Which layers to adapt, before any training: the stage of `raykernel select`.

    config → K(train, train) of every layer → sets of layers, ranked → the best for PEFT

Candidates are transformer layers, or the modules in them (`select.candidates`); their kernels are
sums of stored blocks, so that no choice costs a new one. The kernel may be that of a LoRA, or of
the full weights: the LoRA's is a random one whose mean is the full one's up to scale.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from raykernel.analysis.gram import DEAD
from raykernel.analysis.predictors import PREDICTORS, Start
from raykernel.analysis.selection import Budget, Candidates, Ranking, num_sets, search
from raykernel.analysis.targets import one_hot
from raykernel.config import RunConfig, SelectConfig, canonical_json, require
from raykernel.console import Screen
from raykernel.errors import InputError
from raykernel.jobs import LateExecutor
from raykernel.names import ends_in
from raykernel.pipeline import Completion, complete_rows, open_kernel, why_new
from raykernel.prepared import Prepared, example_labels, prepare
from raykernel.problem.parameters import layer_index
from raykernel.problem.skeleton import adapted_paths, layer_linears, lora_parameters
from raykernel.spectra import resolution_of, same_gradients
from raykernel.store.blocks import Store
from raykernel.store.groups import adapted_module, parts
from raykernel.store.kernels import KernelHandle
from raykernel.store.results import result_path
from raykernel.terms import CandidateUnit, Criterion, Kind, Method, Projection, PromptStyle
from raykernel.training.adapter import write_adapter_config


@dataclass(frozen=True, slots=True)
class Member:
    """A candidate: what is trained together or not at all."""

    name: str
    """`3`, or `3.query`."""
    layer: int
    groups: tuple[str, ...]
    """Layer groups of the kernel."""
    modules: tuple[str, ...]
    """Linear layers, by their whole paths in the plain model."""
    num_parameters: int
    """Of their LoRA."""
    num_features: int | None = None
    """Numbers of a gradient of one output that are not zero at the start, at most; None if not
    counted."""


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
    if note := why_new(prepared, store):
        screen.say(f"Note: {note}")
    handle = open_kernel(prepared)
    train = handle.grid.train
    with contextlib.closing(LateExecutor(config.compute, screen)) as executor:
        completion = complete_rows(prepared, handle, train, executor=executor, screen=screen)
    found = []
    for kind in config.kernel.kinds:
        if not kind.is_symmetric:
            screen.say(f"Note: {kind.value} is not symmetric and has no spectrum: left out.")
            continue
        members = find_members(prepared, handle, kind, {path: linears[path] for path in paths})
        one = rank(prepared, handle, kind, members, screen=screen)
        best = [path for member in one.choices[0].members for path in member.modules]
        write_adapter_config(
            one.adapter,
            {path: linears[path] for path in best},
            model=prepared.config.model,
            parameters=config.parameters,
            is_trained=False,
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


def find_members(
    prepared: Prepared, handle: KernelHandle, kind: Kind, linears: Mapping[str, nn.Module]
) -> list[Member]:
    """The candidates that a stored kernel has.

    Args:
        prepared: the run.
        handle: its kernel.
        kind: of the kernel.
        linears: linear layers that may be adapted, by their paths in the plain model.

    Returns:
        Candidates in the model's order.

    Raises:
        InputError: if the kernel has none of them, or two of them share a parameter.
    """
    config = prepared.config
    groups: dict[str, list[str]] = {}
    prefix = "model." if config.prompt.style is PromptStyle.none else ""
    names = handle.groups(kind.value)
    for name in names:
        path = adapted_module(name).removeprefix(prefix)
        if parts(name) is None and path in linears:
            groups.setdefault(path, []).append(name)
    if not groups:
        raise InputError(
            f"select.modules: found none of {len(linears)} linear layers among the "
            f"{len(names)} layer groups of the kernel, expected some. Choose parameters that have "
            "them, or other modules."
        )
    places: dict[str, list[str]] = {}
    for path in groups:
        places.setdefault(_name(path, config.select, list(groups)), []).append(path)
    members = []
    for name, paths in places.items():
        own = [group for path in paths for group in groups[path]]
        layer = layer_index(paths[0])
        assert layer is not None, "candidates lie in transformer layers"
        members.append(
            Member(
                name,
                layer,
                tuple(own),
                tuple(paths),
                sum(lora_parameters(linears[path], config.parameters.r) for path in paths),
            )
        )
    _check_ties(names, members)
    return members


def _name(path: str, select: SelectConfig, paths: Sequence[str]) -> str:
    """`3` of a layer; `3.query` of a module, with as much of its path as tells it apart."""
    layer = layer_index(path)
    if select.candidates is CandidateUnit.layer:
        return str(layer)
    alike = [other for other in paths if layer_index(other) == layer and other != path]
    own = path.split(f".{layer}.", 1)[-1].split(".")
    ends = (".".join(own[-length:]) for length in range(1, len(own)))
    short = next((end for end in ends if not any(ends_in(one, end) for one in alike)), None)
    return f"{layer}.{short or '.'.join(own)}"


def _check_ties(names: Sequence[str], members: Sequence[Member]) -> None:
    owner = {group: member.name for member in members for group in member.groups}
    for name in names:
        held = {owner[part] for part in parts(name) or () if part in owner}
        if len(held) > 1:
            raise InputError(
                f"select.candidates: {' and '.join(sorted(held))} share a parameter ({name}), "
                "expected candidates whose kernels add. Leave one out of select.modules, or choose "
                "whole layers."
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
    members, candidates = _candidates(prepared, handle, kind, members)
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
    row = _key(prepared, kind)
    return KindSelection(
        kind,
        ranking,
        tuple(choices),
        len(members),
        before - len(members),
        candidates.sigma,
        same_gradients(handle, choices[0].start.kernel, config.spectrum),
        result_path(Path(config.store.path), "selections", row).with_suffix(""),
    )


def _candidates(
    prepared: Prepared, handle: KernelHandle, kind: Kind, members: Sequence[Member]
) -> tuple[list[Member], Candidates]:
    """Kernels of the candidates that have a gradient, and these."""
    train, c = handle.grid.train, handle.num_outputs
    owner = {group: i for i, member in enumerate(members) for group in member.groups}
    kernels = np.zeros((len(members), len(train), c, len(train), c))
    counts = dict(handle.read_pinned("features")) if handle.has_pinned("features") else {}
    for name, kernel in handle.group_kernels(list(owner), kind=kind.value, rows=train):
        kernels[owner[(parts(name) or (name,))[0]]] += kernel
        if not kernel.any():  # no gradient at all: that of LoRA's A, where B is 0
            counts[name] = 0
    kernels = (kernels + kernels.transpose(0, 3, 4, 1, 2)) / 2
    traces = np.einsum("liaia->l", kernels)
    alive = np.flatnonzero(traces > DEAD * traces.sum()).tolist()
    if not alive:
        raise InputError(
            f"select.modules: the kernels of all {len(members)} candidates are zero, expected some "
            "with a gradient. Choose other modules."
        )
    kept = [replace(members[i], num_features=_features(members[i], counts)) for i in alive]
    settings = prepared.config
    return kept, Candidates(
        names=tuple(member.name for member in kept),
        kernels=kernels[alive],
        num_parameters=tuple(member.num_parameters for member in kept),
        targets=one_hot(
            example_labels(prepared.data)[train.start : train.stop], handle.num_outputs
        ),
        f0=handle.logits(train),
        ridge=settings.spectrum.ridge,
        resolution=resolution_of(handle),
        seed=settings.select.seed,
    )


def _features(member: Member, counts: Mapping[str, int]) -> int | None:
    known = [counts[group] for group in member.groups if group in counts]
    return sum(known) if len(known) == len(member.groups) else None


# ---------------------------------------------------------------- what is kept


def _key(prepared: Prepared, kind: Kind) -> dict[str, object]:
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
    common = _key(prepared, found.kind) | {
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
