"""What adding or removing a layer does to the condition number of a set of layers.

    stored blocks → K of the set, K of a layer → what both foretell of the sum or difference, and it

A layer is a transformer layer: the layer groups of the kernel that lie in it. Those that a set has
can be taken away from it, the others can be added (analysis/perturbation.py). Groups that share a
tied parameter across that border do not add, and layers without any gradient change nothing: both
are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.gram import DEAD
from raykernel.analysis.perturbation import Addition, Range, Removal, adding, removing
from raykernel.analysis.spectrum import Spectrum
from raykernel.console import Screen, short
from raykernel.store.groups import layer_of, parts, select_groups
from raykernel.store.kernels import KernelHandle
from raykernel.terms import Kind


@dataclass(frozen=True, slots=True)
class Change:
    """A set of layer groups with a layer more or less."""

    patterns: tuple[str, ...]
    """Of the set; empty: all layer groups."""
    layer: int
    """The transformer layer that is added or removed."""
    num_groups: int
    """Of the set afterwards."""
    found: Addition | Removal

    @property
    def name(self) -> str:
        """Add or remove."""
        return "add" if isinstance(self.found, Addition) else "remove"

    @property
    def after(self) -> Spectrum:
        """Of the set afterwards."""
        return self.found.after


def changes(
    handle: KernelHandle,
    kind: Kind,
    patterns: Sequence[str],
    *,
    ridge: float,
    resolution: float,
    screen: Screen,
) -> list[Change]:
    """Every addition and removal of a layer.

    Args:
        handle: a kernel whose train blocks are stored.
        kind: a symmetric kind.
        patterns: the set; empty: all layer groups.
        ridge: relative to the mean eigenvalue.
        resolution: relative size of an eigenvalue that is rounding noise.
        screen: where progress is shown.

    Returns:
        By layer, additions first.
    """
    names, train = handle.groups(kind.value), handle.grid.train
    own = select_groups(names, groups=patterns)
    kernel = handle.kernel(own, kind=kind.value, rows=train)
    trace = _trace(kernel)
    steps = [
        step for sign in ("add", "remove") for step in _steps(names, own, is_added=sign == "add")
    ]
    found = []
    with screen.progress(f"layers added and removed ({kind.value})", len(steps)) as advance:
        for layer, moved, after in steps:
            other = handle.kernel(moved, kind=kind.value, rows=train)
            if _trace(other) > DEAD * trace:
                step = adding if len(after) > len(own) else removing
                pair = step(kernel, other, ridge=ridge, resolution=resolution)
                found.append(Change(tuple(patterns), layer, len(_plain(after)), pair))
            advance(1)
    return found


def _steps(
    names: Sequence[str], own: Sequence[str], *, is_added: bool
) -> Iterator[tuple[int, list[str], list[str]]]:
    """Layers that can be added, or removed: the layer, its groups and the set afterwards."""
    plain = _plain(names)
    for layer in sorted({number for name in plain if (number := layer_of(name)) is not None}):
        moved = [n for n in plain if layer_of(n) == layer and (n in own) != is_added]
        stay = [n for n in _plain(own) if n not in moved]
        if not moved or not stay:
            continue
        moved, stay, both = (
            select_groups(names, groups=chosen) for chosen in (moved, stay, [*moved, *stay])
        )
        if len(both) == len(moved) + len(stay):  # else a cross group connects the two
            yield layer, moved, both if is_added else stay


def _trace(kernel: Float[np.ndarray, "n c n c"]) -> float:
    return float(np.einsum("iaia->", kernel))


def _plain(names: Sequence[str]) -> list[str]:
    """Without cross groups."""
    return [name for name in names if parts(name) is None]


# ---------------------------------------------------------------- what is kept and shown


def change_columns(change: Change) -> dict[str, object]:
    """Columns of the table `spectra` beside the readings of the set afterwards.

    Args:
        change: of `changes`.

    Returns:
        Value by column.
    """
    found = change.found
    numbers = {
        "kappa_before": found.before.regularised,
        **_ends("kappa", found.kappa),
        **_ends("top", found.top),
        **_ends("bottom", found.bottom),
        "slope": found.slope if isinstance(found, Addition) else math.nan,
    }
    tests = (
        {"is_sufficient": found.is_sufficient, "is_necessary": found.is_necessary}
        if isinstance(found, Addition)
        else {}
    )
    return {
        "change": change.name,
        "layer": change.layer,
        "num_groups": change.num_groups,
        **tests,
        **{key: None if math.isnan(value) else value for key, value in numbers.items()},
    }


def show_changes(found: Sequence[Change], title: str, screen: Screen) -> None:
    """Print a line for every addition and removal; nothing if there is none.

    Args:
        found: of `changes`, of one or several sets.
        title: of the table.
        screen: where to print.
    """
    if not found:
        return
    columns = ["layers", "change", "κ before", "κ after", "foretold", "top", "bottom"]
    screen.table([*columns, "sufficient", "necessary"], [_line(each) for each in found], title)
    screen.out.print(
        "κ: with the ridge. foretold, top, bottom: bounds of κ and of both ends of the spectrum "
        "afterwards, from the two kernels\nalone (Weyl, mediant, Rayleigh). An addition lowers κ "
        "if the sufficient test holds, and cannot if the necessary one fails."
    )


def _line(change: Change) -> list[str]:
    found, covered = change.found, change.after.is_ridge_covering
    tests = (
        [str(found.is_sufficient), str(found.is_necessary)]
        if isinstance(found, Addition)
        else ["", ""]
    )
    return [
        " ".join(change.patterns) or "all",
        f"{'+' if change.name == 'add' else '-'} layer {change.layer}",
        short(found.before.regularised),
        ("" if covered else "≤ ") + short(change.after.regularised),
        *(f"{short(low)} to {short(high)}" for low, high in (found.kappa, found.top, found.bottom)),
        *({"True": "yes", "False": "no"}.get(test, test) for test in tests),
    ]


def _ends(name: str, bounds: Range) -> dict[str, float]:
    return {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}
