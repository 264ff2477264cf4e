"""Spectra of a kernel, layer by layer: the stage of `raykernel spectrum`.

    config → K(train, train) of every layer group → spectrum of each, of all, of solver.groups

Only blocks of train are wanted. Every spectrum is of what softmax sees of the outputs, and two
readings each of the centred kernel and of all outputs stand beside it (analysis/spectrum.py).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.gram import DEAD
from raykernel.analysis.outputs import Outputs
from raykernel.analysis.spectrum import RIDGE, Spectrum, spectrum
from raykernel.config import RunConfig, require
from raykernel.console import Screen, duration
from raykernel.errors import InputError, NotPositiveSemidefiniteError
from raykernel.jobs import LateExecutor
from raykernel.pipeline import Completion, complete_rows, open_kernel, why_new
from raykernel.prepared import Prepared, prepare
from raykernel.store.blocks import Store
from raykernel.store.groups import layer_of, parts, select_groups
from raykernel.store.kernels import KernelHandle
from raykernel.terms import Kind


@dataclass(frozen=True, slots=True)
class LayerSpectrum:
    """Spectra of the kernel of one layer group, or of the sum of several."""

    layer_group: str | None
    """None: the sum of several."""
    patterns: tuple[str, ...]
    """Of `solver.groups`, where these chose the sum; none of one layer group, and of all."""
    num_groups: int
    share: float
    """Of the trace of all layers' kernel."""
    seen: Spectrum
    """Of what softmax sees of the outputs."""
    full: Spectrum
    """Of all outputs."""
    centred: Spectrum | None
    """As `seen`, without the mean over examples; None of a single example."""


@dataclass(frozen=True, slots=True)
class Spectra:
    """Everything that `raykernel spectrum` reports."""

    prepared: Prepared
    completion: Completion
    by_kind: dict[Kind, list[LayerSpectrum]]
    """All layers, the choice of `solver.groups` if there is one, then every layer group."""
    is_projected: bool
    """Whether gradients were projected to fewer numbers."""


def spectra(config: RunConfig, overrides: tuple[str, ...], screen: Screen) -> Spectra:
    """Complete a kernel's train blocks, decompose every layer's, keep the readings.

    Args:
        config: the run.
        overrides: the command line that made it, kept with the results.
        screen: where progress is shown.

    Returns:
        The spectra.

    Raises:
        InputError: if no kind of kernel that the run names has a spectrum.
    """
    kinds = [kind for kind in config.kernel.kinds if kind.is_symmetric]
    names = [kind.value for kind in config.kernel.kinds]
    require(bool(kinds), "kernel.kinds", names, "sgd or signgd: asigngd is not symmetric")
    prepared = prepare(config, screen)
    store = Store(config.store.path)
    if note := why_new(prepared, store):
        screen.aside(note)
    handle = open_kernel(prepared)
    train = handle.grid.train
    with contextlib.closing(LateExecutor(config.compute, screen)) as executor:
        completion = complete_rows(prepared, handle, train, executor=executor, screen=screen)
    for kind in config.kernel.kinds:
        if kind not in kinds:
            screen.note(f"{kind.value} is not symmetric and has no spectrum: left out.")
    by_kind = {kind: layer_spectra(handle, kind, config.solver.groups, screen) for kind in kinds}
    found = Spectra(prepared, completion, by_kind, handle.has_pinned("projection"))
    for rows in result_rows(found, overrides):
        store.write_results("spectra", rows)
    return found


def layer_spectra(
    handle: KernelHandle, kind: Kind, patterns: Sequence[str], screen: Screen
) -> list[LayerSpectrum]:
    """Spectra of all layers, of a choice of them, and of every layer group.

    Args:
        handle: a kernel whose train blocks are stored.
        kind: a symmetric kind.
        patterns: the choice, as in `solver.groups`; empty: none.
        screen: where progress is shown.

    Returns:
        In this order.
    """
    names, train = handle.groups(kind.value), handle.grid.train
    plain = [name for name in names if parts(name) is None]
    resolution = resolution_of(handle)
    every = measure(handle.kernel(kind=kind.value, rows=train), resolution)
    found = [_layers(None, (), len(plain), every, every)]
    if patterns:
        chosen = [name for name in select_groups(names, groups=patterns) if name in plain]
        kernel = handle.kernel(patterns, kind=kind.value, rows=train)
        three = measure(kernel, resolution)
        found.append(_layers(None, tuple(patterns), len(chosen), three, every))
    _, whole, _ = every
    with screen.progress(f"spectra ({kind.value})", len(plain)) as advance:
        for name, kernel in handle.group_kernels(kind=kind.value, rows=train):
            if name in plain:  # a cross group is no kernel of its own
                three = measure_one(kernel, resolution, DEAD * whole.top)
                found.append(_layers(name, (), 1, three, every))
                advance(1)
    return found


def resolution_of(handle: KernelHandle) -> float:
    """Relative size of an eigenvalue that is rounding noise.

    Args:
        handle: a stored kernel.

    Returns:
        nc times the machine epsilon of what is stored, or the error of a reduced precision as
        the kernel's first worker measured it.
    """
    eps = float(np.finfo(np.dtype(handle.manifest.dtype)).eps)
    stored = eps * handle.grid.num_cols * handle.num_outputs
    if not handle.has_pinned("precision"):
        return stored
    return max(stored, float(handle.read_pinned("precision")["relative_error"]))


def measure(
    kernel: Float[np.ndarray, "n c n c"], resolution: float, floor: float = 0.0
) -> tuple[Spectrum, Spectrum, Spectrum | None]:
    """Spectra of what softmax sees, of all outputs, and of the centred kernel.

    Args:
        kernel: K(train, train).
        resolution: of what it was summed from.
        floor: an eigenvalue that is known to be noise.

    Returns:
        The three; the last is None of a single example.
    """
    return (
        spectrum(kernel, resolution=resolution, floor=floor),
        spectrum(kernel, resolution=resolution, floor=floor, outputs=Outputs.full),
        spectrum(kernel, resolution=resolution, floor=floor, centred=True)
        if len(kernel) > 1
        else None,
    )


def measure_one(
    kernel: Float[np.ndarray, "n c n c"], resolution: float, floor: float
) -> tuple[Spectrum, Spectrum, Spectrum | None]:
    """The same of one layer group, which may be what rounding left of cancelling terms.

    The gradient of attention's key bias is zero, for example: what is stored is noise, and need be
    neither symmetric nor positive.

    Args:
        kernel: K(train, train).
        resolution: of what is stored.
        floor: an eigenvalue that is known to be noise.

    Returns:
        The three; all eigenvalues are noise where the kernel cannot be one of gradients.
    """
    try:
        return measure(kernel, resolution, floor)
    except (InputError, NotPositiveSemidefiniteError):
        even = (kernel + kernel.transpose(2, 3, 0, 1)) / 2
        return measure(even, resolution, float(np.linalg.norm(even)))


def _layers(
    layer_group: str | None,
    patterns: tuple[str, ...],
    num_groups: int,
    three: tuple[Spectrum, Spectrum, Spectrum | None],
    every: tuple[Spectrum, Spectrum, Spectrum | None],
) -> LayerSpectrum:
    seen, full, centred = three
    share = seen.mean / every[0].mean if every[0].mean > 0 else math.nan
    return LayerSpectrum(layer_group, patterns, num_groups, share, seen, full, centred)


# ---------------------------------------------------------------- what is kept


def result_rows(found: Spectra, overrides: tuple[str, ...]) -> Iterator[list[dict[str, object]]]:
    """Rows of the table `spectra`, a list for each file.

    Args:
        found: of `spectra`.
        overrides: the command line that made it.

    Yields:
        Value by column: all layers and every group; then the choice of `solver.groups`, whose
        other choices keep rows of their own.
    """
    prepared, config = found.prepared, found.prepared.config
    for kind, layers in found.by_kind.items():
        common = {
            "fingerprint": prepared.fingerprint,
            "kind": kind.value,
            "task": config.task.name,
            "model": config.model.name,
            "prompt": config.prompt.style.value,
            "k": config.task.k,
            "seed": config.task.seed,
            "num_outputs": len(prepared.data.labels),
            "num_train": len(prepared.grid.train),
            "overrides": list(overrides),
        }
        for patterns in dict.fromkeys(each.patterns for each in layers):
            chosen = [each for each in layers if each.patterns == patterns]
            yield [common | _row(each, kind) for each in chosen]


def _row(layers: LayerSpectrum, kind: Kind) -> dict[str, object]:
    """The columns of one set of layers."""
    seen, full, centred = layers.seen, layers.full, layers.centred
    name = layers.layer_group
    numbers = {
        "trace_share": layers.share,
        "floor": seen.floor,
        "sigma": seen.sigma,
        "top": seen.top,
        "bottom": seen.bottom,
        "mean": seen.mean,
        "condition_number": seen.raw,
        "condition_number_at_least": seen.at_least,
        "regularised": seen.regularised,
        "regularised_at_least": seen.regularised_at_least,
        "truncated": seen.truncated,
        "top_over_median": seen.median,
        "top_over_mean": seen.top_over_mean,
        "mean_over_bottom": seen.mean_over_bottom,
        "amgm_gap": seen.amgm_gap,
        "stable_rank": seen.stable_rank,
        "participation": seen.participation,
        "effective_rank": seen.effective_rank,
        "effective_dimension": seen.effective_dimension,
        "full_condition_number": full.raw,
        "full_regularised": full.regularised,
        "centred_condition_number": math.nan if centred is None else centred.raw,
        "centred_regularised": math.nan if centred is None else centred.regularised,
        "lipschitz": math.sqrt(full.top) if kind is Kind.sgd else math.nan,
    }
    return {
        "groups": list(layers.patterns),
        "layer_group": name,
        "layer": None if name is None else layer_of(name),
        "num_groups": layers.num_groups,
        "outputs": seen.outputs.value,
        "num_rows": seen.size,
        "num_unresolved": seen.num_unresolved,
        # SQL compares NaN as the largest number.
        **{key: None if math.isnan(value) else value for key, value in numbers.items()},
    }


# ---------------------------------------------------------------- what is shown


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
        f"plus {RIDGE:g} of the mean eigenvalue, ≤ where noise may lower it; range: of that;\n"
        "centred: the same without the mean over examples; median: top over median; rank: "
        "effective rank; noise: eigenvalues\nthat rounding hides, of all groups of the line."
    )
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
        f'from spectra order by regularised" --store {config.store.path}',
        markup=False,
    )


def _alike(layers: Sequence[LayerSpectrum]) -> dict[str, list[LayerSpectrum]]:
    """Layers by the name that they are shown under: numbers in paths as `*`."""
    found: dict[str, list[LayerSpectrum]] = {}
    for each in layers:
        name = "solver.groups" if each.patterns else "all"
        if each.layer_group is not None:
            name = re.sub(r"\d+", "*", each.layer_group)
        found.setdefault(name, []).append(each)
    return found


def _line(name: str, alike: Sequence[LayerSpectrum]) -> list[str]:
    """Cells of groups that are alike: medians of what is known."""

    def median(of: Callable[[LayerSpectrum], float], sign: str = "") -> str:
        known = [value for value in map(of, alike) if not math.isnan(value)]
        return sign + _short(float(np.median(known))) if known else ""

    hidden = sum(each.seen.num_unresolved for each in alike)
    covered = all(each.seen.is_ridge_covering for each in alike)
    ridged = [each.seen.regularised for each in alike if not math.isnan(each.seen.regularised)]
    return [
        name,
        str(sum(each.num_groups for each in alike)),
        f"{sum(each.share for each in alike):.3f}",
        median(lambda each: each.seen.at_least, "> " if hidden else ""),
        median(lambda each: each.seen.regularised, "" if covered else "≤ "),
        f"{_short(min(ridged))} to {_short(max(ridged))}" if len(ridged) > 1 else "",
        median(lambda each: math.nan if each.centred is None else each.centred.regularised),
        median(lambda each: each.seen.median),
        median(lambda each: each.seen.effective_rank),
        str(hidden),
    ]


def _short(value: float) -> str:
    """Three digits, without an exponent below a million."""
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"
