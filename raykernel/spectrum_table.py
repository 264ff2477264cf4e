"""What `raykernel spectrum` prints: condition numbers, those that are infinite, duplicates.

Beside them, the accuracy on train examples that are left out (analysis/leave_one_out.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from raykernel.changes import show_changes
from raykernel.console import Screen, counted, duration, short
from raykernel.spectra import LayerSpectrum, Spectra

_MAX_PAIRS = 10
"""Pairs of duplicates that are printed."""


def show_spectra(found: Spectra, screen: Screen) -> None:
    """Print one table per kind; layer groups that are alike share a line, with their medians.

    Args:
        found: of `spectra`.
        screen: where to print.
    """
    prepared, config, done = found.prepared, found.prepared.config, found.completion
    seen = next(iter(found.by_kind.values()))[0].seen
    for kind, layers in found.by_kind.items():
        screen.table(
            [
                "layers",
                "no.",
                "share",
                "raw",
                "ridge",
                "range",
                "centred",
                "median",
                "rank",
                "noise",
                "loo",
            ],
            [_line(name, alike) for name, alike in _alike(layers).items()],
            title=(
                f"{config.task.name}, {config.model.name}, k={config.task.k}, seed "
                f"{config.task.seed}: condition numbers of {kind.value}, {seen.outputs.value} of "
                f"{len(prepared.data.labels)} outputs of {len(prepared.grid.train)} train examples"
            ),
        )
    screen.out.print(
        "no.: layer groups on a line, which has their medians; share: of the trace; raw: top over "
        f"bottom of {seen.size} eigenvalues, > where\nthe bottom is rounding noise; ridge: both "
        f"plus {config.spectrum.ridge:g} of the mean eigenvalue, ≤ where noise may lower it; "
        "range: of that;\ncentred: the same without the mean over examples; median: top over "
        "median; rank: effective rank; noise: eigenvalues\nthat rounding hides, of all groups of "
        "the line. loo, the one that knows labels: leave-one-out accuracy, on each\ntrain example "
        "of ridge regression on the others, same kernel and ridge, ~ where noise may move it; none "
        "of a linear probe."
    )
    for kind, layers in found.by_kind.items():
        show_infinite(layers, screen)
        title = f"A layer more or less: condition numbers of {kind.value}"
        show_changes(found.changes[kind], title, screen)
    if found.is_projected:
        screen.out.print(
            "Note: gradients are random projections, which flatten the lower end of a spectrum."
        )
    screen.out.print(
        f"{done.blocks_computed} of {done.blocks_total} blocks computed now"
        + (f" in {duration(done.seconds)}" if done.blocks_computed else "")
        + f". Kernel {prepared.fingerprint}, in {config.store.path}"
    )
    screen.out.print(
        'Next: raykernel query "select layer, layer_group, regularised, effective_rank '
        f'from spectra where change is null order by regularised" --store {config.store.path}',
        markup=False,
    )


def show_infinite(layers: Sequence[LayerSpectrum], screen: Screen) -> None:
    """Say which condition numbers are infinite, and why.

    Args:
        layers: spectra of one kind.
        screen: where to print.
    """
    for name, alike in _alike(layers).items():
        poor = [each for each in alike if each.is_singular(each.seen.size)]
        if poor:
            few = min(each.num_features or 0 for each in poor)
            most = max(each.num_features or 0 for each in poor)
            spread = str(most) if few == most else f"{few} to {most}"
            screen.out.print(
                f"Infinite: {name} has {spread} features for {poor[0].seen.size} eigenvalues, so "
                "that its condition number is infinite whatever the examples; read ridge and rank.",
                markup=False,
            )
    pairs = {pair: None for each in layers for pair in each.duplicates}
    shown = ", ".join(f"{first} = {second}" for first, second in list(pairs)[:_MAX_PAIRS])
    if pairs:
        more = f" and {len(pairs) - _MAX_PAIRS} more" if len(pairs) > _MAX_PAIRS else ""
        screen.out.print(
            f"Duplicates: {counted(len(pairs), 'pair')} of train examples with the same gradients, "
            f"{shown}{more}. Each makes a raw condition number infinite: leave one of the two out.",
            markup=False,
        )


def _alike(layers: Sequence[LayerSpectrum]) -> dict[str, list[LayerSpectrum]]:
    """Layers by the name that they are shown under: numbers in paths as `*`."""
    found: dict[str, list[LayerSpectrum]] = {}
    for each in layers:
        name = " ".join(each.patterns) or "all"
        if each.layer_group is not None:
            name = re.sub(r"\d+", "*", each.layer_group)
        found.setdefault(name, []).append(each)
    return found


def _line(name: str, alike: Sequence[LayerSpectrum]) -> list[str]:
    """Cells of groups that are alike: medians of what is known."""

    def median(of: Callable[[LayerSpectrum], float], sign: str = "") -> str:
        known = [value for value in map(of, alike) if not math.isnan(value)]
        return sign + short(float(np.median(known))) if known else ""

    hidden = sum(each.seen.num_unresolved for each in alike)
    covered = all(each.seen.is_ridge_covering for each in alike)
    ridged = [each.seen.regularised for each in alike if not math.isnan(each.seen.regularised)]
    return [
        name,
        str(sum(each.num_groups for each in alike)),
        f"{sum(each.share for each in alike):.3f}",
        "∞"
        if all(each.is_singular(each.seen.size) for each in alike)
        else median(lambda each: each.seen.at_least, "> " if hidden else ""),
        median(lambda each: each.seen.regularised, "" if covered else "≤ "),
        f"{short(min(ridged))} to {short(max(ridged))}" if len(ridged) > 1 else "",
        median(lambda each: math.nan if each.centred is None else each.centred.regularised),
        median(lambda each: each.seen.median),
        median(lambda each: each.seen.effective_rank),
        str(hidden),
        median(
            lambda each: math.nan if each.left_out is None else each.left_out.accuracy,
            "" if covered else "~",
        ),
    ]
