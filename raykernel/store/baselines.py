"""What was measured of the weights of a kernel's modules: a file beside its blocks.

    kernels/<fingerprint>/baselines.arrow    one row per linear layer

Modules that are wanted later are added, by a new file in place of the old one: of two runs that add
at once one may lose, and measures again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from raykernel.errors import BlockCorruptError
from raykernel.store import arrowfile
from raykernel.store.kernelfiles import KernelFiles

NAME = "baselines.arrow"


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Of the weight W of a linear layer, at the start."""

    weights: float
    """‖W‖²."""
    gradient: float
    """‖g‖², g the gradient of the mean cross-entropy over train."""
    importance: float
    """Mean over entries of sensitivity times uncertainty."""
    shares: Float[np.ndarray, " d_in"]
    """Of the variance of its inputs, by principal direction, the largest first."""


def read_baselines(handle: KernelFiles) -> dict[str, Measured]:
    """What is stored, by path of the module in the plain model.

    Args:
        handle: the kernel.

    Returns:
        Empty if nothing is, or it is damaged: then it is measured again.
    """
    try:
        return check_baselines(handle)
    except (FileNotFoundError, BlockCorruptError):
        return {}


def check_baselines(handle: KernelFiles) -> dict[str, Measured]:
    """The same of a file that must be whole.

    Args:
        handle: the kernel.

    Returns:
        Measurements by path.

    Raises:
        BlockCorruptError: if it is damaged, or another kernel's.
        FileNotFoundError: if there is none.
    """
    path = handle.path / NAME
    file = arrowfile.read(path, check=True)
    if file.header.get("fingerprint") != handle.fingerprint:
        raise BlockCorruptError(arrowfile.damage(path, "it is of another kernel"))
    return {
        row["module"]: Measured(
            row["weights"], row["gradient"], row["importance"], np.array(row["shares"])
        )
        for row in file.table.to_pylist()
    }


def add_baselines(handle: KernelFiles, found: Mapping[str, Measured]) -> int:
    """Commit measurements beside those that are stored.

    Args:
        handle: the kernel.
        found: by path of the module in the plain model.

    Returns:
        Bytes written.
    """
    every = {**read_baselines(handle), **found}
    table = pa.table(
        {
            "module": list(every),
            "weights": [one.weights for one in every.values()],
            "gradient": [one.gradient for one in every.values()],
            "importance": [one.importance for one in every.values()],
            "shares": pa.array(
                [one.shares.tolist() for one in every.values()], pa.list_(pa.float64())
            ),
        }
    )
    return arrowfile.write(handle.path / NAME, table, {"fingerprint": handle.fingerprint})
