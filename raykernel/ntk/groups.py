"""Layer groups: which module's share of the kernel each parameter belongs to.

A group is one module with the selected parameters (`requires_grad`) that it owns. A parameter
owned by several modules, a tied matrix, is in the group of each; with θ used in a and in b,

    ∂f/∂θ = g_a + g_b,    ⟨g_a + g_b, g'_a + g'_b⟩ = ⟨g_a, g'_a⟩ + ⟨g_b, g'_b⟩ + cross(a, b),

so every such pair has a cross group, and the sum over all groups is the whole kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from torch import nn

ROOT = "(model)"
"""Group of parameters that the outermost module owns itself."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The layer groups of a model."""

    owners: dict[str, tuple[str, ...]]
    """Groups by parameter (its first name in `named_parameters`), in registration order."""
    members: dict[str, tuple[str, ...]]
    """Parameters by group, named as the group's module names them."""
    crosses: dict[str, tuple[str, str]]
    """The two groups that share a parameter, by name of their cross group."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every group, cross groups last."""
        return (*self.members, *self.crosses)


def find_groups(model: nn.Module) -> Groups:
    """Layer groups of the selected parameters.

    A module that only hands its parameter to a module inside it (the bias of a masked-LM head
    and of its decoder is one parameter) does not own it: the inner module does.

    Args:
        model: the network; parameters with `requires_grad` are selected.

    Returns:
        Groups in registration order.
    """
    first_name = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    paths: dict[int, list[str]] = {key: [] for key in first_name}
    members: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in paths:
                paths[id(parameter)].append(path)
                members.setdefault(path, []).append(name)
    outer = {
        (key, path) for key, owned in paths.items() for path in owned if _is_outer(path, owned)
    }
    owners = {
        first_name[key]: tuple(path or ROOT for path in owned if (key, path) not in outer)
        for key, owned in paths.items()
    }
    modules = dict(model.named_modules())
    kept = {
        path or ROOT: tuple(
            f"{path}.{name}" if path else name
            for name in names
            if (id(getattr(modules[path], name)), path) not in outer
        )
        for path, names in members.items()
    }
    pairs = dict.fromkeys(pair for owned in owners.values() for pair in combinations(owned, 2))
    return Groups(
        owners=owners,
        members={group: names for group, names in kept.items() if names},
        crosses={f"cross({a}, {b})": (a, b) for a, b in pairs},
    )


def _is_outer(path: str, owned: list[str]) -> bool:
    return any(other != path and (not path or other.startswith(f"{path}.")) for other in owned)


def layer_groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter names by layer group (module path), selected parameters only.

    A tied parameter is listed in the group of each module that owns it.

    Args:
        model: the network; parameters with `requires_grad` are selected.

    Returns:
        Parameters as their module names them, by group.
    """
    return find_groups(model).members


def num_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers that are selected, by layer group; those of a tied parameter count in each.

    Args:
        model: the network; parameters with `requires_grad` are selected.

    Returns:
        How many, by group.
    """
    values = dict(model.named_parameters(remove_duplicate=False))
    return {
        group: sum(values[name].numel() for name in names)
        for group, names in find_groups(model).members.items()
    }
