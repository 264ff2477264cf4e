"""The layers that `raykernel select` chooses among, and their kernels out of the stored blocks.

A candidate is a transformer layer with all modules that may be adapted, or one such module. Its
kernel is the sum of its layer groups' blocks: of a module's own weights, or of its LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from raykernel.analysis.gram import DEAD
from raykernel.analysis.sets import Candidates
from raykernel.analysis.targets import one_hot
from raykernel.baselines import summed
from raykernel.config import SelectConfig
from raykernel.errors import InputError, nearest
from raykernel.names import ends_in, last_parts
from raykernel.prepared import Prepared, example_labels
from raykernel.problem.models import varying_parameters
from raykernel.problem.parameters import layer_index
from raykernel.problem.skeleton import adapted_paths, lora_parameters
from raykernel.store.baselines import Measured
from raykernel.store.groups import adapted_module, parts
from raykernel.store.kernels import KernelHandle
from raykernel.terms import CandidateUnit, Kind, Method, PromptStyle


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


def find_members(prepared: Prepared, linears: Mapping[str, nn.Module]) -> list[Member]:
    """The candidates that a kernel will have, known before anything of it is computed.

    Args:
        prepared: the run.
        linears: linear layers inside transformer layers, by their paths in the plain model.

    Returns:
        Candidates in the model's order, without their layer groups.

    Raises:
        InputError: if the kernel has none of them, or lacks modules that are asked for.
    """
    config = prepared.config
    modules = config.select.modules
    held = _held(prepared, linears)
    for name in modules:
        if any(ends_in(path, name) for path in linears) and not any(
            ends_in(path, name) for path in held
        ):
            raise InputError(
                f"select.modules: {name!r} is a module of the model whose weights do not vary in "
                f"this kernel (parameters.method={config.parameters.method.value}), expected one "
                f"that does. Widen the group parameters, or {nearest(name, last_parts(held))}"
            )
    paths: Sequence[str] = held
    if config.parameters.method is not Method.lora or modules:
        wanted = set(adapted_paths(dict(linears), modules, config.model))
        paths = [path for path in held if path in wanted]
    if not paths:
        raise InputError(
            f"select.modules: found none of {len(linears)} linear layers among what varies in "
            "this kernel, expected some. Choose parameters that have them, or other modules."
        )
    places: dict[str, list[str]] = {}
    for path in paths:
        places.setdefault(_name(path, config.select, paths), []).append(path)
    members = []
    for name, own in places.items():
        layer = layer_index(own[0])
        assert layer is not None, "candidates lie in transformer layers"
        size = sum(lora_parameters(linears[path], config.parameters.r) for path in own)
        members.append(Member(name, layer, (), tuple(own), size))
    return members


def _held(prepared: Prepared, linears: Mapping[str, nn.Module]) -> list[str]:
    """Those linear layers whose weights, or whose LoRA's, vary in the kernel."""
    names = varying_parameters(
        prepared.config.model,
        prepared.config.parameters,
        label_ids=prepared.encoded.label_ids,
        num_labels=len(prepared.data.labels),
    )
    found = {_path(name.rpartition(".")[0], prepared) for name in names}
    return [path for path in linears if path in found]


def _path(group: str, prepared: Prepared) -> str:
    """The plain model's path of a layer group's module."""
    prefix = "model." if prepared.config.prompt.style is PromptStyle.none else ""
    return adapted_module(group).removeprefix(prefix)


def with_groups(
    prepared: Prepared, handle: KernelHandle, kind: Kind, members: Sequence[Member]
) -> list[Member]:
    """The same with the layer groups that their kernels are sums of.

    Args:
        prepared: the run.
        handle: its kernel.
        kind: of the kernel.
        members: of `find_members`.

    Returns:
        Candidates in the same order.

    Raises:
        InputError: if two of them share a parameter.
    """
    names = handle.groups(kind.value)
    groups: dict[str, list[str]] = {}
    for name in names:
        if parts(name) is None:
            groups.setdefault(_path(name, prepared), []).append(name)
    found = [
        replace(one, groups=tuple(group for path in one.modules for group in groups[path]))
        for one in members
    ]
    _check_ties(names, found)
    return found


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


def stack_kernels(
    prepared: Prepared,
    handle: KernelHandle,
    kind: Kind,
    members: Sequence[Member],
    measured: Mapping[str, Measured] | None = None,
) -> tuple[list[Member], Candidates]:
    """The candidates that have a gradient, and what a search chooses among.

    Args:
        prepared: the run.
        handle: its kernel, with all blocks of train.
        kind: a symmetric kind.
        members: of `with_groups`.
        measured: their modules' weights, where these were measured.

    Returns:
        Those members, with their numbers of features, and their kernels in the same order.

    Raises:
        InputError: if none has a gradient.
    """
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
    baselines = None
    if measured is not None:
        r = settings.parameters.r
        baselines = tuple(summed((measured[p] for p in one.modules), r) for one in kept)
    return kept, Candidates(
        names=tuple(member.name for member in kept),
        kernels=kernels[alive],
        num_parameters=tuple(member.num_parameters for member in kept),
        targets=one_hot(
            example_labels(prepared.data)[train.start : train.stop], handle.num_outputs
        ),
        f0=handle.logits(train),
        ridge=settings.spectrum.ridge,
        resolution=handle.resolution,
        is_f0_fitted=settings.prompt.style is PromptStyle.none,
        seed=settings.select.seed,
        baselines=baselines,
    )


def _features(member: Member, counts: Mapping[str, int]) -> int | None:
    known = [counts[group] for group in member.groups if group in counts]
    return sum(known) if len(known) == len(member.groups) else None
