"""Which layer groups a kernel is the sum of.

A layer group is named by its module's path (`encoder.layer.3.attention.self.query`). A cross
group `cross(a, b)` holds what two groups of tied weights have in common; it belongs to a
selection exactly if both of them do, so that the sum is the kernel of the chosen parameters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from raykernel.errors import InputError, nearest
from raykernel.names import compiled, ends_in, last_parts

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_CROSS = re.compile(r"cross\((.+)\)")


def select_groups(
    names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    target_modules: Sequence[str] | None = None,
) -> list[str]:
    """Layer groups that satisfy every criterion given.

    Args:
        names: stored groups, cross groups included.
        groups: exact names, or regular expressions searched in names. Empty or None: all.
        layers_to_transform: transformer layers, as in PEFT (0-based; negative counts from the
            last stored). None: all, and what lies outside of layers.
        target_modules: module names or their dotted ends, as in PEFT. Empty or None: all.

    Returns:
        The selection in the order of `names`.

    Raises:
        InputError: if an entry, or all of them together, match nothing.
    """
    plain = [name for name in names if parts(name) is None]
    chosen = set(plain)
    if groups:
        chosen &= _in_groups(names, plain, groups)
    if layers_to_transform is not None:
        chosen &= _in_layers(plain, layers_to_transform)
    if target_modules:
        chosen &= {name for target in target_modules for name in _ending_in(plain, target)}
    selection = [name for name in names if chosen.issuperset(parts(name) or (name,))]
    if not selection:
        raise InputError(
            f"found no layer group that satisfies groups={_shown(groups)}, "
            f"layers_to_transform={_shown(layers_to_transform)} and "
            f"target_modules={_shown(target_modules)} at once, expected at least one of the "
            f"{len(plain)} stored. Widen one of them."
        )
    return selection


def halved_ties(names: Sequence[str], selection: Sequence[str]) -> list[str]:
    """Cross groups of tied parameters of which a selection has some uses but not all.

    Args:
        names: stored groups, cross groups included.
        selection: of `select_groups`.

    Returns:
        Those; the kernel of the others is one of gradients with respect to parameters.
    """
    chosen = set(selection)
    held = {name: [part in chosen for part in parts(name) or ()] for name in names}
    return [name for name, uses in held.items() if any(uses) and not all(uses)]


def parts(name: str) -> tuple[str, ...] | None:
    """The groups that a cross group connects; None for an ordinary group."""
    match = _CROSS.fullmatch(name)
    return tuple(match[1].split(", ")) if match else None


def layer_of(name: str) -> int | None:
    """Transformer layer of a group: the first number in its path; None outside of layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def module_of(name: str) -> str:
    """Last part of the path of a group's module; of an adapter that of the module it adapts."""
    return adapted_module(name).rsplit(".", 1)[-1]


def adapted_module(name: str) -> str:
    """Path of a group's module; of an adapter that of the module it adapts."""
    # An adapter's parameters belong to the module that it adapts: `…query.lora_A.default`.
    return name.split(".lora_")[0]


def _in_groups(names: Sequence[str], plain: Sequence[str], entries: Sequence[str]) -> set[str]:
    chosen = {name for entry in entries for name in _matching(entry, names, plain)}
    for entry in entries:
        if entry in names and not chosen.issuperset(parts(entry) or ()):
            raise InputError(
                f"groups: found {entry!r} alone, expected both of its groups: a cross group is "
                f"no kernel of its own. Name both groups and it comes with them."
            )
    return chosen


def _matching(entry: str, names: Sequence[str], plain: Sequence[str]) -> list[str]:
    if entry in names:  # an exact name wins: `layer.1` is not also `layer.10`
        return [entry] if entry in plain else []
    found = list(filter(compiled("groups", entry).search, plain))
    if not found:
        hint = nearest(entry, plain)
        if not hint.startswith("did"):  # layers that are alike once; `.*.` is an expression, too
            hint = nearest(entry, {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in plain})
        raise InputError(f"groups: {entry!r} matches none of the {len(plain)} layer groups; {hint}")
    return found


def _in_layers(plain: Sequence[str], layers: Sequence[int]) -> set[str]:
    layer_by_name = {name: layer_of(name) for name in plain}
    stored = {layer for layer in layer_by_name.values() if layer is not None}
    count = max(stored, default=-1) + 1
    wanted = {layer + count if layer < 0 else layer for layer in layers}
    if not wanted <= stored:
        raise InputError(
            f"layers_to_transform: found {list(layers)}, expected layers among "
            f"{sorted(stored)} (negative counts from the last)."
        )
    return {name for name, layer in layer_by_name.items() if layer in wanted}


def _ending_in(plain: Sequence[str], target: str) -> list[str]:
    modules = {name: adapted_module(name) for name in plain}
    found = [name for name, path in modules.items() if ends_in(path, target)]
    if not found:
        raise InputError(
            f"target_modules: {target!r} ends none of the {len(plain)} layer groups' paths; "
            f"{nearest(target, last_parts(modules.values()))}"
        )
    return found


def _shown(entries: Sequence[object] | None) -> str:
    return "all" if not entries else str(list(entries))
