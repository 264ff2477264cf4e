"""Which layers and parameters of a capture count: PEFT's target modules, BitFit, norms, a head."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from raykernel.errors import InputError, nearest
from raykernel.names import compiled, ends_in, last_parts
from raykernel.ntk.capture import Capture, Parts
from raykernel.ntk.groups import ROOT


def target_groups(groups: Iterable[str], targets: str | Collection[str]) -> tuple[str, ...]:
    """Layer groups that an adapter goes to, chosen as PEFT chooses modules.

    Args:
        groups: every layer group, such as `capture.parts`.
        targets: names or their last parts (`query`, `mlp.c_proj`); or one string, an expression
            that the whole name has to match.

    Returns:
        Those chosen, in their order.

    Raises:
        InputError: if a target chooses nothing, or is no regular expression.
    """
    names = tuple(groups)
    if isinstance(targets, str):
        chosen = set(filter(compiled("targets", targets).fullmatch, names))
        missing = [] if chosen else [targets]
    else:
        found = {target: [name for name in names if ends_in(name, target)] for target in targets}
        missing = [target for target, own in found.items() if not own]
        chosen = {name for own in found.values() for name in own}
    if missing or not chosen:
        wrong = missing[0] if missing else ""
        known = last_parts(names) | set(names)
        raise InputError(f"targets: {wrong!r} fits no layer group, {nearest(wrong, known)}")
    return tuple(name for name in names if name in chosen)


def only(capture: Capture, keep: Callable[[str, str], bool]) -> Capture:
    """Capture of some of the parameters, as if only they had `requires_grad`.

    Layers of which nothing is kept are left out, but those that no example used stay, with a
    kernel of zeros.

    Args:
        capture: of more parameters.
        keep: from layer group and parameter whether it varies, see `is_bias` for BitFit.

    Returns:
        The capture of those kept.

    Raises:
        InputError: if none is kept.
    """
    parts: Parts = {}
    for group, by_name in capture.parts.items():
        kept = {name: own for name, own in by_name.items() if keep(group, name)}
        if kept or not by_name:
            parts[group] = kept
    if not any(parts.values()):
        known = [name for by_name in capture.parts.values() for name in by_name]
        raise InputError(
            f"keep: found none of {len(known)} parameters, expected at least one. They are named "
            f"like {', '.join(known[:5])}. Correct the condition."
        )
    crosses = {k: pair for k, pair in capture.crosses.items() if set(pair) <= parts.keys()}
    return Capture(capture.logits, parts, crosses)


def is_bias(group: str, parameter: str) -> bool:
    """Whether a parameter is a bias: BitFit's choice (Ben Zaken et al. 2022), norms included."""
    del group
    return parameter.rsplit(".", 1)[-1].endswith("bias")


def norm_groups(model: nn.Module) -> frozenset[str]:
    """Layer groups that are normalisations, known by their class (LlamaRMSNorm, BatchNorm1d)."""
    return frozenset(
        path or ROOT
        for path, module in model.named_modules()
        if re.search(r"norm(\dd)?$", type(module).__name__, re.IGNORECASE)
    )


@contextmanager
def varying(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Context in which only these parameters vary, under any of their names.

    Args:
        model: the network; its flags are as before afterwards, also after an error.
        names: of parameters.

    Yields:
        Nothing.
    """
    before = {p: p.requires_grad for p in model.parameters()}
    chosen = {p for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
