"""Heat maps of κ and of alignment with the labels, over transformer layers and their modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from raykernel.console import counted, short
from raykernel.report.chart import KERNELS, Chart, Panel, fitted, logarithmic
from raykernel.report.decomposed import Decomposed
from raykernel.report.evidence import Evidence
from raykernel.report.ink import colour
from raykernel.store.groups import layer_of

MAX_TEXT = 60
"""Cells of a heat map that have their number written in."""

_GROUPS = """select fingerprint, kind, ridge, task, model, k, seed, layer, layer_group, regularised
from spectra where layer_group is not null and change is null and layer is not null
qualify rank() over (partition by fingerprint, kind order by created desc) = 1
order by created desc, layer, layer_group"""


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


def kappa_map(evidence: Evidence, found: Sequence[Decomposed]) -> Chart | None:
    """κ of every module, from the table `spectra`.

    Args:
        evidence: of a store or a study.
        found: the kernels that are drawn.

    Returns:
        The figure; None if no module has a κ.
    """
    groups = evidence.rows(_GROUPS)
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
        section=KERNELS,
    )


def alignment_map(found: Sequence[Decomposed]) -> Chart | None:
    """Alignment of every module's kernel with the labels.

    Args:
        found: the kernels that are drawn.

    Returns:
        The figure; None if no alignment is known.
    """
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
        section=KERNELS,
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
