"""Kernels that `raykernel spectrum` has decomposed: their layers, read off the stored blocks.

The table `spectra` says which, with which ridge, and holds every κ. Single eigenvalues and
alignments are in no table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.predictors import alignment
from raykernel.analysis.spectrum import Spectrum, spectrum
from raykernel.analysis.start import Start
from raykernel.analysis.targets import one_hot
from raykernel.errors import RaykernelError
from raykernel.store import manifest
from raykernel.store.blocks import Store
from raykernel.store.groups import layer_of, parts
from raykernel.store.kernels import KernelHandle
from raykernel.study import Row

MAX_ROWS = 1536
"""Outputs times train examples of a kernel that is decomposed once more for its eigenvalues."""
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


def decomposed(store: Store, row: Row) -> Decomposed:
    """Eigenvalues of a kernel's layers, and alignments of its layer groups.

    Args:
        store: where its blocks are.
        row: of the table `spectra`: the sum of all layers.

    Returns:
        Neither where the blocks are too large or not there.
    """
    if row["num_train"] * row["num_outputs"] > MAX_ROWS:
        return Decomposed(row, {}, {})
    try:
        handle = store.open(row["fingerprint"])
        layers, groups = _layer_kernels(handle, row["kind"])
    except (RaykernelError, OSError):  # blocks may be elsewhere, or removed
        return Decomposed(row, {}, {})
    resolution, spectra = handle.resolution, {}
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
    return dict(sorted(layers.items(), key=lambda item: place_order(item[0]))), groups


def _place(group: str) -> str:
    layer = layer_of(group)
    return OUTSIDE if layer is None else str(layer)


def place_order(place: str) -> tuple[bool, int]:
    """Layers by number, and what is in none of them last."""
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
        name: alignment(Start((kernel,), targets, f0, sigma=1.0))
        for name, kernel in groups.items()
        if kernel.any()
    }
