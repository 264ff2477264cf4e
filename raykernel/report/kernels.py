"""Figures of kernels: eigenvalues by layer, κ and alignment over layers and modules.

The table `spectra` says which kernels were decomposed, with which ridge, and holds every κ. Single
eigenvalues and alignments are in no table: they are read off the same stored blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, to_hex

from raykernel.analysis.predictors import Start, alignment
from raykernel.analysis.spectrum import Spectrum, spectrum
from raykernel.analysis.targets import one_hot
from raykernel.console import counted, short
from raykernel.errors import RaykernelError
from raykernel.report.chart import Chart, Panel, Series, fitted, logarithmic, power
from raykernel.report.evidence import Evidence
from raykernel.report.ink import colour
from raykernel.spectra import resolution_of
from raykernel.store import manifest
from raykernel.store.groups import layer_of, parts
from raykernel.store.kernels import KernelHandle
from raykernel.study import Row

MAX_KERNELS = 4
"""The newest ones are drawn."""
MAX_ROWS = 1536
"""Outputs times train examples of a kernel that is decomposed once more for its eigenvalues."""
MAX_TEXT = 60
"""Cells of a heat map that have their number written in."""
SECTION = "Kernels at the start"
OUTSIDE = "other"
"""Layer groups outside of transformer layers: embeddings, heads."""


@dataclass(frozen=True, slots=True)
class Decomposed:
    """A kernel that `raykernel spectrum` has decomposed."""

    row: Row
    """Of the table `spectra`: the sum of all layers."""
    spectra: Mapping[str, Spectrum]
    """By transformer layer; empty where the blocks are too large or not there."""
    alignments: Mapping[str, float]
    """By layer group."""

    @property
    def text(self) -> str:
        """Task, k and seed, and what else tells it apart."""
        row = self.row
        kind = "" if row["kind"] == "sgd" else f" {row['kind']}"
        return f"{row['task']}, k={row['k']}, seed {row['seed']}{kind}"


_SUMS = """select fingerprint, kind, ridge, task, model, k, seed, regularised, effective_rank,
  num_rows, num_train, num_outputs, layers, created
from spectra where layer_group is null and change is null and len(groups) = 0
qualify row_number() over (partition by fingerprint, kind order by created desc) = 1
order by created desc"""
_GROUPS = """select fingerprint, kind, ridge, task, model, k, seed, layer, layer_group, regularised
from spectra where layer_group is not null and change is null and layer is not null
qualify rank() over (partition by fingerprint, kind order by created desc) = 1
order by created desc, layer, layer_group"""


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
    found = [_read(evidence, row) for row in sums[:MAX_KERNELS]]
    groups = evidence.rows(_GROUPS)
    charts = [
        _eigenvalues([each for each in found if each.spectra], len(sums)),
        _kappas(groups, found),
        _alignments(groups, [each for each in found if each.alignments]),
    ]
    return [chart for chart in charts if chart is not None]


# ---------------------------------------------------------------- out of the stored blocks


def _read(evidence: Evidence, row: Row) -> Decomposed:
    """Eigenvalues and alignments of a kernel whose blocks are there and not too large."""
    if row["num_train"] * row["num_outputs"] > MAX_ROWS:
        return Decomposed(row, {}, {})
    try:
        handle = evidence.store.open(row["fingerprint"])
        layers, groups = _layer_kernels(handle, row["kind"])
    except (RaykernelError, OSError):  # blocks may be elsewhere, or removed
        return Decomposed(row, {}, {})
    resolution, spectra = resolution_of(handle), {}
    for name, kernel in layers.items():
        if kernel.any():
            spectra[name] = spectrum(kernel, ridge=row["ridge"], resolution=resolution)
    return Decomposed(row, spectra, _label_alignments(handle, groups))


def _layer_kernels(
    handle: KernelHandle, kind: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """K(train, train) of every transformer layer, and of every layer group."""
    layers: dict[str, np.ndarray] = {}
    groups: dict[str, np.ndarray] = {}
    for name, kernel in handle.group_kernels(kind=kind, rows=handle.grid.train):
        symmetric = (kernel + kernel.transpose(2, 3, 0, 1)) / 2
        places = {_place(part) for part in parts(name) or (name,)}
        if len(places) == 1:  # what two layers have in common is no kernel of either
            (place,) = places
            layers[place] = layers.get(place, np.zeros(())) + symmetric
        if parts(name) is None:
            groups[name] = symmetric
    return dict(sorted(layers.items(), key=lambda item: _order(item[0]))), groups


def _place(group: str) -> str:
    layer = layer_of(group)
    return OUTSIDE if layer is None else str(layer)


def _order(place: str) -> tuple[bool, int]:
    return (place == OUTSIDE, 0 if place == OUTSIDE else int(place))


def _label_alignments(
    handle: KernelHandle, groups: Mapping[str, Float[np.ndarray, "n c n c"]]
) -> dict[str, float]:
    """Centred alignment of every layer group's kernel with the labels of train."""
    names = manifest.at(handle.identity, "task", "labels")
    train = handle.grid.train
    labels = handle.examples()["label"].to_pylist()[train.start : train.stop]
    if handle.num_outputs < 2 or not isinstance(names, list) or not set(labels) <= set(names):
        return {}
    targets = one_hot(np.array([names.index(label) for label in labels]), len(names))
    f0 = np.zeros_like(targets)  # no part of an alignment
    return {
        name: alignment(Start(kernel, targets, f0, sigma=1.0))
        for name, kernel in groups.items()
        if kernel.any()
    }


# ---------------------------------------------------------------- eigenvalues


def _eigenvalues(found: Sequence[Decomposed], total: int) -> Chart | None:
    if not found:
        return None
    places = sorted({place for each in found for place in each.spectra}, key=_order)
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
        SECTION,
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


# ---------------------------------------------------------------- heat maps


@dataclass(frozen=True, slots=True)
class Grid:
    """Values over modules and layers."""

    title: str
    modules: Sequence[str]
    layers: Sequence[int]
    values: Mapping[tuple[str, int], float]


def module_in_layer(group: str) -> str:
    """A layer group's path below its transformer layer: `attention.self.query`."""
    rest = re.split(r"(?:^|\.)\d+\.", group, maxsplit=1)[-1]
    return re.sub(r"\.lora_([A-Z])\..*", r" \1", rest)


def _grid(title: str, values: Mapping[str, float]) -> Grid:
    """Values by layer group as a grid."""
    places = {(module_in_layer(name), layer_of(name) or 0): v for name, v in values.items()}
    modules = sorted({module for module, _ in places})
    return Grid(title, modules, sorted({layer for _, layer in places}), places)


def _kappas(groups: Sequence[Row], found: Sequence[Decomposed]) -> Chart | None:
    grids = []
    for each in found:
        key = (each.row["fingerprint"], each.row["kind"])
        own = {
            row["layer_group"]: row["regularised"]
            for row in groups
            if (row["fingerprint"], row["kind"]) == key and row["regularised"] is not None
        }
        if own:
            grids.append(_grid(each.text, own))
    if not grids:
        return None
    return Chart(
        "kappa-by-module",
        "κ over layers and modules",
        f"{_extremes(grids[0], 'κ')} A small κ says that gradient descent at a step size of the "
        "kernel's own is fast.",
        "Heat map of the regularised condition number κ, modules as lines and transformer layers "
        "as columns, on a logarithmic scale.",
        _GROUPS,
        pa.Table.from_pylist([dict(row) for row in groups]),
        [Panel(f"κ · {grid.title}", _heat(grid, is_log=True)) for grid in grids],
        section=SECTION,
    )


def _alignments(groups: Sequence[Row], found: Sequence[Decomposed]) -> Chart | None:
    if not found:
        return None
    grids = [
        _grid(each.text, {n: v for n, v in each.alignments.items() if layer_of(n) is not None})
        for each in found
    ]
    grids = [grid for grid in grids if grid.values]
    if not grids:
        return None
    rows = [
        {
            "fingerprint": each.row["fingerprint"], "kind": each.row["kind"],
            "task": each.row["task"], "k": each.row["k"], "seed": each.row["seed"],
            "layer_group": name, "layer": layer_of(name), "alignment": value,
        }
        for each in found
        for name, value in each.alignments.items()
    ]  # fmt: skip
    return Chart(
        "alignment-by-module",
        "Alignment with the labels",
        _extremes(grids[0], "alignment"),
        "Heat map of the centred alignment of kernel and labels, modules as lines and transformer "
        "layers as columns, from 0 to 1.",
        "raykernel.analysis.predictors.alignment of every layer group's stored K(train, train) "
        "with the labels of train, centred (Cortes et al. 2012); no table holds them",
        pa.Table.from_pylist(rows),
        [Panel(f"alignment · {grid.title}", _heat(grid, is_log=False)) for grid in grids],
        section=SECTION,
    )


def _extremes(grid: Grid, name: str) -> str:
    """Where the smallest and the largest value are."""
    low = min(grid.values, key=lambda place: grid.values[place])
    high = max(grid.values, key=lambda place: grid.values[place])
    first, last = (f"{short(grid.values[at])} ({at[0]} of layer {at[1]})" for at in (low, high))
    count = counted(len(grid.values), "module")
    if low == high:
        return f"{grid.title}: {name} is {first}."
    return f"{grid.title}: over {count} {name} goes from {first} to {last}."


def _heat(grid: Grid, *, is_log: bool) -> Callable[[Axes], None]:
    matrix = np.full((len(grid.modules), len(grid.layers)), math.nan)
    for (module, layer), value in grid.values.items():
        matrix[grid.modules.index(module), grid.layers.index(layer)] = value
    known = matrix[np.isfinite(matrix)]

    def draw(axes: Axes) -> None:
        low, high = float(known.min()), float(known.max())
        norm: Normalize = Normalize(0.0, max(high, 1e-9))
        if is_log:
            norm = LogNorm(low, high if high > low else low * 1.01)
        x, y = np.arange(len(grid.layers) + 1) - 0.5, np.arange(len(grid.modules) + 1) - 0.5
        mesh = axes.pcolormesh(
            x, y, np.ma.masked_invalid(matrix), cmap="cividis", norm=norm,
            edgecolors=colour("paper"), linewidth=1.0,
        )  # fmt: skip
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        step = -(-len(grid.layers) // 12)
        axes.set_xticks(range(0, len(grid.layers), step), map(str, grid.layers[::step]))
        axes.set_yticks(range(len(grid.modules)), [_cut(name) for name in grid.modules])
        axes.tick_params(axis="y", labelsize=6.5 if len(grid.modules) <= 12 else 5.5)
        axes.set_xlabel("transformer layer")
        if matrix.size <= MAX_TEXT and len(grid.layers) <= 6:
            _write(axes, matrix, norm, short if is_log else "{:.2f}".format)
        else:
            assert axes.figure is not None, "panels are drawn on a figure"
            bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.03)
            bar.outline.set_visible(False)
            if is_log:
                logarithmic(bar.ax.yaxis)

    return draw


def _write(
    axes: Axes,
    matrix: Float[np.ndarray, "modules layers"],
    norm: Normalize,
    text: Callable[[float], str],
) -> None:
    """The number in every cell, light on dark and dark on light."""
    for (line, column), value in np.ndenumerate(matrix):
        if math.isfinite(value):
            dark = float(norm(value)) < 0.55
            axes.text(
                column, line, text(float(value)), ha="center", va="center", fontsize=6.5,
                color="#fefefe" if dark else "#101010",
            )  # fmt: skip


def _cut(name: str) -> str:
    """A module's path with its first parts by their initials, where it is long."""
    *first, last = name.split(".")
    return name if len(name) <= 22 else fitted(".".join([*(part[:4] for part in first), last]), 22)
