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

from raykernel.analysis.predictors import PREDICTORS, Reads
from raykernel.analysis.ranks import redistributed
from raykernel.analysis.stability import Stability
from raykernel.baselines import measure
from raykernel.candidates import Member, find_members
from raykernel.compute.executor import Executor
from raykernel.config import RunConfig, canonical_json, require
from raykernel.console import Screen
from raykernel.jobs import LateExecutor
from raykernel.pipeline import Completion, complete_train
from raykernel.prepared import Prepared, identity_of, prepare
from raykernel.problem.skeleton import layer_linears
from raykernel.provenance import Meter
from raykernel.ranked import KindSelection, rank
from raykernel.store.baselines import Measured
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle
from raykernel.store.results import key_of
from raykernel.terms import Criterion, Kind, Method, Projection, PromptStyle
from raykernel.training.adapter import write_adapter_config


@dataclass(frozen=True, slots=True)
class Selections:
    """Everything that `raykernel select` reports."""

    prepared: Prepared
    completion: Completion
    by_kind: tuple[KindSelection, ...]
    verdicts: tuple[bool | None, ...]
    """What `raykernel behavior` found before of this data set, prompt and model: does fine-tuning
    behave like its kernel? None: undefined."""


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
    meter = Meter()
    _check(config)
    prepared = prepare(config, screen)
    has_prompt = config.prompt.style is not PromptStyle.none
    linears = layer_linears(prepared.config.model, has_prompt=has_prompt)
    members = find_members(prepared, linears)
    _check_budget(config, members)
    store, paths = Store(config.store.path), [path for one in members for path in one.modules]
    store.require_writable()
    with contextlib.closing(LateExecutor(config.compute, screen)) as executor:
        handle, completion = complete_train(prepared, screen, executor)
        measured = None
        if config.select.baselines:
            measured = measure(prepared, handle, paths, executor=executor, screen=screen)
        others = _other_seeds(prepared, executor, screen)
    found = []
    for kind in config.kernel.kinds:
        if not kind.is_symmetric:
            screen.note(f"{kind.value} is not symmetric and has no spectrum: left out.")
            continue
        key = key_of("selections", result_key(prepared, kind))
        one = rank(
            prepared,
            handle,
            kind,
            members,
            measured=measured,
            others=others,
            adapter=store.path / "selections" / f"selection-{key}",
            screen=screen,
        )
        ranks = _ranks(config, one, measured)
        write_adapter_config(
            one.adapter,
            {path: linears[path] for path in ranks},
            model=prepared.config.model,
            parameters=config.parameters,
            has_prompt=has_prompt,
            ranks=ranks,
        )
        one = replace(one, ranks=ranks)
        cost = meter.columns(completion.peak_memory_bytes)
        rows = result_rows(prepared, one, overrides)
        store.write_results("selections", [row | cost for row in rows])
        found.append(one)
    return Selections(prepared, completion, tuple(found), _verdicts(prepared))


def _ranks(
    config: RunConfig, found: KindSelection, measured: Mapping[str, Measured] | None
) -> dict[str, int]:
    """Rank of every module of the best choice that is adapted."""
    best = [path for member in found.choices[0].members for path in member.modules]
    if measured is None:
        return dict.fromkeys(best, config.parameters.r)
    shares = {path: measured[path].shares for path in best}
    ranks = redistributed(shares, r=config.parameters.r, rho=config.select.rho)
    return {path: rank for path, rank in ranks.items() if rank}


def _verdicts(prepared: Prepared) -> tuple[bool | None, ...]:
    """Stored verdicts on the same problem, whatever layers they are of."""
    config, task = prepared.config, prepared.config.task
    problem = (task.name, config.model.name, config.prompt.style.value, task.k, task.seed)
    names = ("task", "model", "prompt", "k", "seed")
    rows = Store(config.store.path).results("behavior").to_pylist()
    same = [row for row in rows if tuple(row[name] for name in names) == problem]
    return tuple(row["kernel_behavior"] for row in same)


def _other_seeds(
    prepared: Prepared, executor: Executor, screen: Screen
) -> list[tuple[Prepared, KernelHandle]]:
    """The kernels of the same LoRA with other random A, completed."""
    config, found = prepared.config, []
    for seed in config.select.seeds:
        other = replace(config, parameters=replace(config.parameters, seed=seed))
        identity = identity_of(other, prepared.data, prepared.prompt, prepared.encoded)
        seeded = replace(prepared, config=other, identity=identity)
        screen.say(f"Kernel of the LoRA with parameters.seed={seed}:")
        found.append((seeded, complete_train(seeded, screen, executor)[0]))
    return found


def _check(config: RunConfig) -> None:
    """What can be refused before anything is read."""
    select = config.select
    kinds = [kind.value for kind in config.kernel.kinds]
    is_any = any(kind.is_symmetric for kind in config.kernel.kinds)
    require(is_any, "kernel.kinds", kinds, "sgd or signgd: asigngd is not symmetric")
    require(config.spectrum.ridge > 0, "spectrum.ridge", config.spectrum.ridge, "more than 0")
    asked = {"criterion": [select.criterion], "objectives": select.objectives}
    for key, criteria in asked.items():
        names = [one.value for one in criteria]
        left_out = {Criterion.loo_error, Criterion.loo_accuracy} & set(criteria)
        require(
            not (left_out and config.prompt.style is PromptStyle.none),
            f"select.{key}",
            names,
            "another one with prompt=none, whose linear probe was fitted to all of train",
        )
        require(
            select.baselines or not any(PREDICTORS[one].reads is Reads.weights for one in criteria),
            f"select.{key}",
            names,
            "a criterion of the kernel, or select.baselines=true",
        )
    own, seeds = config.parameters.seed, select.seeds
    require(
        not seeds or config.parameters.method is Method.lora,
        "select.seeds",
        seeds,
        "none without parameters=lora: no other kernel is random",
    )
    require(
        len({own, *seeds}) == 1 + len(seeds),
        "select.seeds",
        seeds,
        f"seeds that differ from each other and from parameters.seed={own}",
    )
    method = config.kernel.projection.method
    require(
        method is not Projection.intrinsic_dimension,
        "kernel.projection.method",
        method.value,
        "another one, for this one projects all layers together",
    )
    bounded = select.max_size is not None or config.parameter_budget is not None
    require(
        bounded or not PREDICTORS[select.criterion].is_monotone,
        "select.criterion",
        select.criterion.value,
        "one that more layers can make worse, or a budget: every layer betters this one, so that "
        "it would choose all of them. Set select.max_size, select.max_parameters or "
        "select.max_memory_mb",
    )


def _check_budget(config: RunConfig, members: Sequence[Member]) -> None:
    """A budget that no candidate is within is refused before its kernel is computed."""
    allowed, least = config.parameter_budget, min(one.num_parameters for one in members)
    require(
        allowed is None or allowed >= least,
        "select.max_parameters" if config.select.max_memory_mb is None else "select.max_memory_mb",
        allowed,
        f"at least {least}: that many parameters the smallest of {len(members)} candidates trains "
        f"with parameters.r={config.parameters.r}",
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
        "guarantee": found.ranking.guarantee,
        "num_ranked": found.num_ranked,
        "is_front_exact": found.is_front_exact if found.front else None,
        "sigma": found.sigma,
        "overrides": list(overrides),
    }
    shown = {choice.members for choice in found.choices[:-1]}
    others = [choice for choice in found.front if choice.members not in shown]
    folder = f"selections/{found.adapter.name}"
    return [
        common
        | {
            "rank": choice.rank,
            "front": choice.front,
            "candidates": [member.name for member in choice.members],
            "layers": sorted({member.layer for member in choice.members}),
            "target_modules": [path for member in choice.members for path in member.modules],
            "adapter": folder if choice.rank == 1 else None,
            "ranks": canonical_json(found.ranks) if choice.rank == 1 else None,
            "outputs": choice.start.outputs.value,
            "num_rows": choice.start.spectrum.size,
            "top": choice.start.spectrum.top,
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
        | _stability_columns("half", choice.halves)
        | _stability_columns("seed", choice.seeds)
        for choice in (*found.choices[:-1], *others, found.choices[-1])
    ]


def _stability_columns(of: str, found: Stability | None) -> dict[str, object]:
    names = ("mean_rank", "best_rank", "worst_rank", "first")
    return {f"{of}_{name}": None if found is None else getattr(found, name) for name in names}
