"""Figures of kernels at the start: eigenvalues by layer, and the heat maps beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from raykernel.console import short
from raykernel.report.chart import KERNELS, Chart, Panel, Series, logarithmic, power
from raykernel.report.decomposed import OUTSIDE, Decomposed, decomposed, place_order
from raykernel.report.evidence import Evidence
from raykernel.report.heatmaps import alignment_map, kappa_map
from raykernel.report.ink import colour

MAX_KERNELS = 4
"""The newest ones are drawn."""

_SUMS = """select fingerprint, kind, ridge, task, model, k, seed, regularised, effective_rank,
  num_rows, num_train, num_outputs, layers, created
from spectra where layer_group is null and change is null and len(groups) = 0
qualify row_number() over (partition by fingerprint, kind order by created desc) = 1
order by created desc"""


def kernel_charts(evidence: Evidence) -> list[Chart]:
    """Figures of the decomposed kernels.

    Args:
        evidence: of a store or a study.

    Returns:
        Eigenvalues by layer and two heat maps, as far as there are data.
    """
    if not evidence.has("spectra"):
        return []
    sums = evidence.rows(_SUMS)
    found = [decomposed(evidence.store, row) for row in sums[:MAX_KERNELS]]
    charts = [
        _eigenvalues([each for each in found if each.spectra], len(sums)),
        kappa_map(evidence, found),
        alignment_map(found),
    ]
    return [chart for chart in charts if chart is not None]


def _eigenvalues(found: Sequence[Decomposed], total: int) -> Chart | None:
    if not found:
        return None
    places = sorted({place for each in found for place in each.spectra}, key=place_order)
    colours = _shades(places)
    rows = [
        {
            "fingerprint": each.row["fingerprint"], "kind": each.row["kind"],
            "task": each.row["task"], "k": each.row["k"], "seed": each.row["seed"],
            "layer": place, "index": number, "eigenvalue": float(value),
        }
        for each in found
        for place, own in each.spectra.items()
        for number, value in enumerate(own.resolved[::-1], start=1)
        if value > 0
    ]  # fmt: skip
    more = f" The newest {len(found)} of {total} kernels are drawn." if total > len(found) else ""
    return Chart(
        "eigenvalues",
        "Eigenvalues by layer",
        _spread(found[0]) + more,
        "Eigenvalues of the train kernel of every transformer layer from the largest to the "
        "smallest, on a logarithmic axis; a line for each layer.",
        "eigenvalues of K(train, train) in the outputs that softmax sees, those above rounding: "
        "raykernel.spectrum(raykernel.open_store(STORE).kernel(FINGERPRINT, "
        "layers_to_transform=[LAYER], rows=TRAIN)); no table holds them",
        pa.Table.from_pylist(rows),
        [Panel(f"eigenvalue · {each.text}", _lines(each, colours)) for each in found],
        [Series(_layer_name(place), colours[place], line="-") for place in places],
        KERNELS,
    )


def _spread(found: Decomposed) -> str:
    """How layers differ in scale and rank."""
    tops = {place: own.top for place, own in found.spectra.items()}
    ranks = {place: own.effective_rank for place, own in found.spectra.items()}
    low, high = min(tops, key=lambda place: tops[place]), max(tops, key=lambda place: tops[place])
    text = (
        f"{found.text}: the sum of all layers has κ = {_kappa(found.row['regularised'])} and "
        f"effective rank {short(found.row['effective_rank'])} of {found.row['num_rows']}."
    )
    if low == high:
        return text
    return (
        f"{text} The largest eigenvalue goes from {power(tops[low])} ({_layer_name(low)}) to "
        f"{power(tops[high])} ({_layer_name(high)}), the effective rank from "
        f"{short(min(ranks.values()))} to {short(max(ranks.values()))}."
    )


def _kappa(value: float | None) -> str:
    return "unknown, for rounding," if value is None else short(value)


def _layer_name(place: str) -> str:
    return "other parameters" if place == OUTSIDE else f"layer {place}"


def _shades(places: Sequence[str]) -> dict[str, str]:
    """Viridis by depth, without the ends that vanish on white or on black."""
    layers = [place for place in places if place != OUTSIDE]
    shades = colormaps["viridis"](np.linspace(0.3, 0.82, max(len(layers), 2)))
    found = {place: to_hex(shade) for place, shade in zip(layers, shades, strict=False)}
    return found | {OUTSIDE: "muted"}


def _lines(found: Decomposed, colours: Mapping[str, str]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for place, own in found.spectra.items():
            values = own.resolved[::-1]
            values = values[values > 0]
            style = "--" if place == OUTSIDE else "-"
            axes.plot(
                np.arange(1, values.size + 1), values, style, color=colour(colours[place]), lw=1.3
            )
        axes.set_yscale("log")
        logarithmic(axes.yaxis)
        axes.set_xlabel("number of the eigenvalue, from the largest")

    return draw
