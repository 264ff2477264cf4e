"""Which layers to train, from kernels by name: the search of selection.py for Python users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from raykernel.analysis.outputs import total
from raykernel.analysis.predictors import PREDICTORS, Reads
from raykernel.analysis.selection import EXHAUSTIVE, search
from raykernel.analysis.sets import Budget, Candidates
from raykernel.analysis.spectrum import RIDGE
from raykernel.errors import InputError
from raykernel.terms import Criterion


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """A set of layers and all that is foretold of it."""

    layers: tuple[str, ...]
    scores: Mapping[Criterion, float]
    """NaN where rounding hides what a score is made of."""


def select_layers(
    kernels: Mapping[str, Float[np.ndarray, "_ _ _ _"]],
    targets: Float[np.ndarray, "n c"],
    *,
    f0: Float[np.ndarray, "n c"] | None = None,
    criterion: Criterion = Criterion.regularised,
    max_size: int | None = None,
    ridge: float = RIDGE,
    resolution: float | None = None,
    top: int = 10,
    exhaustive: int = EXHAUSTIVE,
) -> list[LayerChoice]:
    """The sets of layers that a predictor ranks best, before any training.

    Reference: Rahimi Afzal et al. 2025 choose by the condition number of K_S = Σ_{l ∈ S} K_l.

    Args:
        kernels: K(train, train) of each layer, (n, c, n, c); no parameter is in two of them.
        targets: what f should be, one-hot for classification.
        f0: initial logits; None: zero.
        criterion: what ranks the sets.
        max_size: layers in a set at the most; None: any number.
        ridge: relative to the mean eigenvalue.
        resolution: relative size of an eigenvalue that is rounding noise; default nc times the
            machine epsilon of the kernels' dtype.
        top: sets to return at the most.
        exhaustive: sets tried one by one at the most; of more, greedy choice and exchanges.

    Returns:
        The best sets, best first, with the scores of all predictors but those of parameters,
        which kernels do not know.

    Raises:
        InputError: if the criterion is one of parameters, or every layer betters it and there is
            no `max_size`, or the kernels are not alike, square, symmetric and finite.
    """
    predictor = PREDICTORS[criterion]
    if predictor.reads is Reads.weights:
        raise InputError(
            f"criterion: found {criterion.value}, which is of a model's weights; expected one of "
            "kernels. `raykernel select` has it."
        )
    if criterion is Criterion.num_parameters or (predictor.is_monotone and max_size is None):
        raise InputError(
            f"criterion: found {criterion.value}, which every layer betters; expected max_size "
            "beside it, or one that more layers can make worse."
        )
    _, relative = total(list(kernels.values()), resolution)
    candidates = Candidates(
        names=tuple(kernels),
        kernels=np.stack([total(kernel, resolution)[0] for kernel in kernels.values()]),
        num_parameters=(0,) * len(kernels),
        targets=targets,
        f0=np.zeros(targets.shape) if f0 is None else f0,
        ridge=ridge,
        resolution=relative,
    )
    found = search(candidates, predictor, Budget(max_size), top=top, exhaustive=exhaustive)
    return [
        LayerChoice(
            tuple(candidates.names[i] for i in choice.chosen),
            {
                name: one.score(candidates.start(choice.chosen))
                for name, one in PREDICTORS.items()
                if name is not Criterion.num_parameters and one.reads is not Reads.weights
            },
        )
        for choice in found.choices
    ]
