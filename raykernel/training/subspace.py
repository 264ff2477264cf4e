"""Fine-tuning in k random directions: θ = θ_0 + Π z, and only z is trained.

    Π = k^(-1/2) Sᵀ (p × k),    ∂L/∂z = Πᵀ ∂L/∂θ

(Malladi et al. 2023, Definition D.1; Li et al. 2018; Aghajanyan et al. 2021.) S is that of
`ntk.project.intrinsic_dimension`, whose kernel is the one of this method: a matrix per parameter,
by its name, so that nothing is stored and every process has the same one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykernel.ntk.random_matrix import RandomMatrices

_TILE_BYTES = 1 << 26
_BYTES_PER_ENTRY = 32
"""What making one entry takes at the most."""

KEPT_BYTES = 1 << 30
"""Size up to which S is kept; a larger one is made again for every product, which takes long."""


class Subspace:
    """The directions in which some parameters move together.

    Args:
        parameters: at θ_0, by the name of each one's matrix.
        matrices: S.

    Attributes:
        z: the coordinates (k), zero at θ_0.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], matrices: RandomMatrices) -> None:
        self._parameters, self._matrices = dict(parameters), matrices
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        first = next(iter(self._start.values()))
        self.z = nn.Parameter(first.new_zeros(matrices.dimension))
        self._keeps = _matrix_bytes(self._start.values(), matrices.dimension) <= KEPT_BYTES
        self._kept: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def pull_back(self) -> None:
        """Set the gradient of z to what the parameters' gradients amount to."""
        total = torch.zeros_like(self.z)
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.flatten()
            for start, stop, tile in self._tiles(name):
                total += gradient[start:stop] @ tile
        self.z.grad = total / self._matrices.dimension**0.5

    @torch.no_grad()
    def move(self) -> None:
        """Set the parameters to θ_0 + Π z."""
        z = self.z / self._matrices.dimension**0.5
        for name, parameter in self._parameters.items():
            own = self._start[name].flatten().clone()
            for start, stop, tile in self._tiles(name):
                own[start:stop] += tile @ z
            parameter.copy_(own.view_as(parameter))

    def _tiles(self, name: str) -> Iterator[tuple[int, int, Float[Tensor, "q k"]]]:
        """Pieces of Sᵀ: first coordinate, the one after the last, entries."""
        numbers = self._start[name].numel()
        size = max(1, _TILE_BYTES // (_BYTES_PER_ENTRY * self._matrices.dimension))
        for start in range(0, numbers, size):
            stop = min(start + size, numbers)
            tile = self._kept.get((name, start))
            if tile is None:
                tile = self._matrices.columns(name, start, stop, like=self.z)
                if self._keeps:
                    self._kept[name, start] = tile
            yield start, stop, tile


def kept_bytes(parameters: Iterable[Tensor], dimension: int) -> int:
    """Memory of S, or of the pieces of it that are made for every product.

    Args:
        parameters: those that move together.
        dimension: k.

    Returns:
        The bytes.
    """
    whole = _matrix_bytes(parameters, dimension)
    return _TILE_BYTES + (whole if whole <= KEPT_BYTES else 0)


def _matrix_bytes(parameters: Iterable[Tensor], dimension: int) -> int:
    return dimension * sum(p.numel() * p.element_size() for p in parameters)
