"""Neural tangent kernels of language models, per layer, on Ray, in Arrow.

A *problem* (task + prompt + model) is a function f from texts to logits. Its *ntk* is cut into
*blocks*, per layer; workers *compute* the missing ones into a *store*; *analysis* solves kernel
regression with any sum of them.

    conf/ ──► cli ──► pipeline ◄── sweep ◄── sweeps/*.py
                        │
        ┌───────────────┼──────────────┐
     compute         analysis        query
        │
        ├── problem   task + prompt + model = f: texts → logits
        ├── ntk       ∇f per layer → K per layer, exactly
        └── store     one Arrow file per block of K
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raykernel.adapters import adapter_kernels
    from raykernel.analysis.asymmetric import solve_asymmetric
    from raykernel.analysis.layer_choice import select_layers
    from raykernel.analysis.logistic import solve_logistic
    from raykernel.analysis.ridge import solve_ridge
    from raykernel.analysis.spectrum import spectrum
    from raykernel.ntk.empirical import empirical_kernel
    from raykernel.store.blocks import open_store
    from raykernel.store.query import query

__all__ = [
    "adapter_kernels",
    "empirical_kernel",
    "open_store",
    "query",
    "select_layers",
    "solve_asymmetric",
    "solve_logistic",
    "solve_ridge",
    "spectrum",
]

_HOMES = {
    "adapter_kernels": "raykernel.adapters",
    "empirical_kernel": "raykernel.ntk.empirical",
    "open_store": "raykernel.store.blocks",
    "query": "raykernel.store.query",
    "select_layers": "raykernel.analysis.layer_choice",
    "solve_asymmetric": "raykernel.analysis.asymmetric",
    "solve_logistic": "raykernel.analysis.logistic",
    "solve_ridge": "raykernel.analysis.ridge",
    "spectrum": "raykernel.analysis.spectrum",
}


def __getattr__(name: str) -> object:
    """Import a public name at first use: torch alone takes seconds, and `--help` needs none."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'raykernel' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
