"""Spectra of a kernel, layer by layer: the stage of `raykernel spectrum`.

    config → K(train, train) of every layer group → spectrum of each, of all, of spectrum.sets

Only blocks of train are wanted, and a set of layers is a sum of them. Every spectrum is of what
softmax sees of the outputs, and two readings each of the centred kernel and of all outputs stand
beside it (analysis/spectrum.py). Beside these, which know no labels, stands how ridge regression
with the same kernel and ridge predicts train examples from the others (analysis/leave_one_out.py).
changes.py says what a layer more or less does to a set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from raykernel.analysis.duplicates import duplicates
from raykernel.analysis.gram import DEAD
from raykernel.analysis.leave_one_out import LeaveOneOut, leave_one_out
from raykernel.analysis.outputs import Outputs
from raykernel.analysis.spectrum import Spectrum, spectrum
from raykernel.analysis.targets import one_hot
from raykernel.changes import Change, change_columns, changes
from raykernel.config import RunConfig, SpectrumConfig, canonical_json, require
from raykernel.console import Screen
from raykernel.errors import InputError, NotPositiveSemidefiniteError, NotWritableError
from raykernel.pipeline import Completion, complete_train
from raykernel.prepared import Prepared, example_labels, prepare
from raykernel.provenance import Meter
from raykernel.store.blocks import Store
from raykernel.store.groups import layer_of, module_of, parts, select_groups
from raykernel.store.kernels import KernelHandle
from raykernel.terms import Kind, PromptStyle


@dataclass(frozen=True, slots=True)
class LayerSpectrum:
    """Spectra of the kernel of one layer group, or of the sum of several."""

    layer_group: str | None
    """None: the sum of several."""
    patterns: tuple[str, ...]
    """Of `spectrum.sets`, where these chose the sum; none of one layer group, and of all."""
    num_groups: int
    layers: tuple[int, ...]
    """Transformer layers that the groups lie in."""
    modules: tuple[str, ...]
    """Last parts of the groups' paths."""
    num_features: int | None
    """Numbers of a gradient of one output that are not zero at the start, at most: an upper bound
    of the kernel's rank. None if not counted."""
    share: float
    """Of the trace of all layers' kernel."""
    seen: Spectrum
    """Of what softmax sees of the outputs."""
    full: Spectrum
    """Of all outputs."""
    centred: Spectrum | None
    """As `seen`, without the mean over examples; None of a single example."""
    left_out: LeaveOneOut | None
    """Every train example predicted from the others, with the kernel and the ridge of `seen`. None
    with a linear probe, whose f_0 and kernel have seen all labels; of a kernel that is but noise;
    and of one with noise and no ridge."""
    duplicates: tuple[tuple[str, str], ...]
    """Ids of train examples with the same gradients, of sums; each makes κ infinite."""

    def is_singular(self, size: int) -> bool:
        """Whether κ of so many rows is infinite for want of features; a zero kernel has no κ."""
        return self.num_features is not None and 0 < self.num_features < size


@dataclass(frozen=True, slots=True)
class Spectra:
    """Everything that `raykernel spectrum` reports."""

    prepared: Prepared
    completion: Completion
    by_kind: dict[Kind, list[LayerSpectrum]]
    """All layers, the choices of `spectrum.sets`, then every layer group."""
    changes: dict[Kind, list[Change]]
    """Of the choices; of all layers if there are none."""
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
    meter = Meter()
    kinds = [kind for kind in config.kernel.kinds if kind.is_symmetric]
    names = [kind.value for kind in config.kernel.kinds]
    require(bool(kinds), "kernel.kinds", names, "sgd or signgd: asigngd is not symmetric")
    prepared = prepare(config, screen)
    store = Store(config.store.path)
    handle, completion = complete_train(prepared, screen)
    for kind in config.kernel.kinds:
        if kind not in kinds:
            screen.note(f"{kind.value} is not symmetric and has no spectrum: left out.")
    if config.solver.groups:
        screen.note("solver.groups is of kernel regression; sets here are spectrum.sets.")
    labels = None
    if config.prompt.style is PromptStyle.none:
        screen.note("no leave-one-out accuracy: the linear probe was fitted to all of train.")
    else:
        labels = example_labels(prepared.data)[: len(handle.grid.train)]
    found = Spectra(
        prepared,
        completion,
        {
            kind: layer_spectra(handle, kind, config.spectrum, screen, labels=labels)
            for kind in kinds
        },
        {kind: layer_changes(handle, kind, config.spectrum, screen) for kind in kinds},
        handle.has_pinned("projection"),
    )
    cost = meter.columns(completion.peak_memory_bytes)
    try:
        for rows in result_rows(found, overrides):
            store.write_results("spectra", [row | cost for row in rows])
    except NotWritableError as error:  # the kernel was stored: this is how somebody reads it
        screen.note(f"{error} These spectra are shown and not kept.")
    return found


def layer_spectra(
    handle: KernelHandle,
    kind: Kind,
    settings: SpectrumConfig,
    screen: Screen,
    *,
    labels: Int[np.ndarray, " n"] | None,
) -> list[LayerSpectrum]:
    """Spectra of all layers, of choices of them, and of every layer group.

    Args:
        handle: a kernel whose train blocks are stored.
        kind: a symmetric kind.
        settings: the choices and the ridge.
        screen: where progress is shown.
        labels: of train, for leave-one-out errors; None: no such errors.

    Returns:
        In this order.
    """
    names, train = handle.groups(kind.value), handle.grid.train
    plain = [name for name in names if parts(name) is None]
    resolution = handle.resolution
    read = partial(measure, resolution=resolution, ridge=settings.ridge)
    targets = None if labels is None else one_hot(labels, handle.num_outputs)
    leave = partial(_leave, targets=targets, f0=handle.logits(train), resolution=resolution)
    whole = handle.kernel(kind=kind.value, rows=train)
    every = read(whole)
    counts = handle.read_pinned("features") if handle.has_pinned("features") else {}
    alone = {}
    with screen.progress(f"spectra ({kind.value})", len(plain)) as advance:
        for name, kernel in handle.group_kernels(kind=kind.value, rows=train):
            if name in plain:  # a cross group is no kernel of its own
                three = measure_one(
                    name,
                    kernel,
                    read,
                    floor=DEAD * every[0].top,
                    noise=resolution * every[1].top,
                )
                if not kernel.any():  # no gradient at all: that of LoRA's A, where B is 0
                    counts = counts | {name: 0}
                left = leave(kernel, three[0])
                alone[name] = _layers([name], counts, three, every, left, layer_group=name)
                advance(1)
    left, same = leave(whole, every[0]), same_gradients(handle, whole, settings)
    sums = [_layers(plain, counts, every, every, left, same=same)]
    for patterns in settings.sets:
        chosen = [name for name in select_groups(names, groups=patterns) if name in plain]
        kernel = handle.kernel(patterns, kind=kind.value, rows=train)
        three, same = read(kernel), same_gradients(handle, kernel, settings)
        left = leave(kernel, three[0])
        sums.append(_layers(chosen, counts, three, every, left, patterns=patterns, same=same))
    return [*sums, *alone.values()]


def layer_changes(
    handle: KernelHandle, kind: Kind, settings: SpectrumConfig, screen: Screen
) -> list[Change]:
    """What a layer more or less does to every choice of layers; to all layers if there is none.

    Args:
        handle: a kernel whose train blocks are stored.
        kind: a symmetric kind.
        settings: the choices and the ridge.
        screen: where progress is shown.

    Returns:
        Choice after choice.
    """
    resolution = handle.resolution
    return [
        change
        for patterns in settings.sets or [[]]
        for change in changes(
            handle, kind, patterns, ridge=settings.ridge, resolution=resolution, screen=screen
        )
    ]


def same_gradients(
    handle: KernelHandle, kernel: Float[np.ndarray, "n c n c"], settings: SpectrumConfig
) -> tuple[tuple[str, str], ...]:
    """Ids of train examples that a kernel does not tell apart.

    Args:
        handle: where their ids are.
        kernel: K(train, train).
        settings: how near they may be.

    Returns:
        Pairs of ids.
    """
    ids = handle.examples()["id"].to_pylist()
    rounding = float(np.finfo(np.dtype(handle.manifest.dtype)).eps)
    pairs = duplicates(kernel, tolerance=settings.duplicate, rounding=rounding)
    return tuple((ids[pair.first], ids[pair.second]) for pair in pairs)


def _leave(
    kernel: Float[np.ndarray, "n c n c"],
    seen: Spectrum,
    *,
    targets: Float[np.ndarray, "n c"] | None,
    f0: Float[np.ndarray, "n c"],
    resolution: float,
) -> LeaveOneOut | None:
    """Leave-one-out errors of the outputs and the ridge of a spectrum; labels and f_0 as those."""
    is_noise = seen.num_unresolved == seen.size
    if targets is None or is_noise or (seen.num_unresolved and seen.sigma == 0):
        return None
    return leave_one_out(
        kernel,
        targets,
        sigma=seen.sigma,
        f0=f0,
        outputs=seen.outputs,
        resolution=resolution,
        floor=seen.floor,
    )


Readings = tuple[Spectrum, Spectrum, Spectrum | None]
"""Of what softmax sees, of all outputs, and of the centred kernel; the last not of one example."""


def measure(
    kernel: Float[np.ndarray, "n c n c"], *, resolution: float, ridge: float, floor: float = 0.0
) -> Readings:
    """Spectra of what softmax sees, of all outputs, and of the centred kernel.

    Args:
        kernel: K(train, train).
        resolution: of what it was summed from.
        ridge: relative to the mean eigenvalue.
        floor: an eigenvalue that is known to be noise.

    Returns:
        The three; the last is None of a single example.
    """
    read = partial(spectrum, kernel, resolution=resolution, ridge=ridge, floor=floor)
    centred = read(centred=True) if len(kernel) > 1 else None
    return read(), read(outputs=Outputs.full), centred


def measure_one(
    name: str,
    kernel: Float[np.ndarray, "n c n c"],
    read: Callable[..., Readings],
    *,
    floor: float,
    noise: float,
) -> Readings:
    """The same of one layer group, which may be what rounding left of cancelling terms.

    The gradient of attention's key bias is zero, for example: what is stored is noise, and need be
    neither symmetric nor positive. It is below the noise of the whole kernel then; what is above it
    and cannot be a kernel of gradients is no rounding.

    Args:
        name: of the layer group.
        kernel: K(train, train).
        read: `measure` with its settings.
        floor: an eigenvalue that is known to be noise.
        noise: norm of what rounding may leave of cancelling terms.

    Returns:
        The three; all eigenvalues are noise where the kernel cannot be one of gradients.

    Raises:
        NotPositiveSemidefiniteError: if the kernel is none, and not for being noise.
    """
    try:
        return read(kernel, floor=floor)
    except (InputError, NotPositiveSemidefiniteError) as error:
        if not np.linalg.norm(kernel) <= noise:
            raise NotPositiveSemidefiniteError(f"layer group {name}: {error}") from error
        even = (kernel + kernel.transpose(2, 3, 0, 1)) / 2
        return read(even, floor=float(np.linalg.norm(even)))


def _layers(
    groups: Sequence[str],
    counts: Mapping[str, int],
    three: Readings,
    every: Readings,
    left_out: LeaveOneOut | None,
    *,
    layer_group: str | None = None,
    patterns: Sequence[str] = (),
    same: tuple[tuple[str, str], ...] = (),
) -> LayerSpectrum:
    seen, full, centred = three
    numbers = [counts.get(name) for name in groups]
    known = [number for number in numbers if number is not None]
    return LayerSpectrum(
        layer_group=layer_group,
        patterns=tuple(patterns),
        num_groups=len(groups),
        layers=tuple(sorted({n for name in groups if (n := layer_of(name)) is not None})),
        modules=tuple(sorted(set(map(module_of, groups)))),
        num_features=sum(known) if len(known) == len(numbers) else None,
        share=seen.mean / every[0].mean if every[0].mean > 0 else math.nan,
        seen=seen,
        full=full,
        centred=centred,
        left_out=left_out,
        duplicates=same,
    )


# ---------------------------------------------------------------- what is kept


def result_rows(found: Spectra, overrides: tuple[str, ...]) -> Iterator[list[dict[str, object]]]:
    """Rows of the table `spectra`, a list for each file.

    Args:
        found: of `spectra`.
        overrides: the command line that made it.

    Yields:
        Value by column: all layers and every group; then each choice of `spectrum.sets`, with its
        changes. Choices and ridges of other runs keep rows of their own.
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
            "parameters": canonical_json(config.parameters.identity),
            "ridge": config.spectrum.ridge,
            "overrides": list(overrides),
        }
        for patterns in dict.fromkeys(each.patterns for each in layers):
            own = common | {"groups": list(patterns)}
            rows = [own | _row(each, kind) for each in layers if each.patterns == patterns]
            yield rows + [
                own | _readings(each.after) | change_columns(each)
                for each in found.changes[kind]
                if each.patterns == patterns
            ]


def _row(layers: LayerSpectrum, kind: Kind) -> dict[str, object]:
    """The columns of one set of layers."""
    full, centred, left = layers.full, layers.centred, layers.left_out
    name = layers.layer_group
    singular = {
        key: math.inf
        for key, read in (
            ("condition_number", layers.seen),
            ("full_condition_number", full),
            ("centred_condition_number", centred),
        )
        if read is not None and layers.is_singular(read.size)
    }
    numbers = {
        "trace_share": layers.share,
        "full_condition_number": full.raw,
        "full_regularised": full.regularised,
        "centred_condition_number": math.nan if centred is None else centred.raw,
        "centred_regularised": math.nan if centred is None else centred.regularised,
        "loo_accuracy": math.nan if left is None else left.accuracy,
        "loo_error": math.nan if left is None else left.error,
        "lipschitz": math.sqrt(full.top) if kind is Kind.sgd else math.nan,
    }
    return {
        "layer_group": name,
        "layer": None if name is None else layer_of(name),
        "layers": list(layers.layers),
        "modules": list(layers.modules),
        "num_groups": layers.num_groups,
        "num_features": layers.num_features,
        "duplicates": [f"{first} = {second}" for first, second in layers.duplicates],
        **_readings(layers.seen),
        **_without_nan(numbers),
        **singular,
    }


def _readings(seen: Spectrum) -> dict[str, object]:
    """The columns of a spectrum."""
    numbers = {
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
    }
    return {
        "outputs": seen.outputs.value,
        "num_rows": seen.size,
        "num_unresolved": seen.num_unresolved,
        **_without_nan(numbers),
    }


def _without_nan(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Null for NaN, which SQL compares as the largest number."""
    return {key: None if math.isnan(value) else value for key, value in numbers.items()}
