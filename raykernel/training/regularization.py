"""The pull of fine-tuning to its start: λ/2 ‖θ - θ_0‖², three ways (L2-SP, Li et al. 2018).

    coupled     g = ∇L(θ) + λ(θ - θ_0), then clipping and the optimiser
    decoupled   θ ← θ - ηλ(θ - θ_0) and the optimiser's step, both from the same θ
    selective   decoupled where ⟨∇L(θ), θ - θ_0⟩ ≥ 0, nothing elsewhere

L is the mean loss of the batch, λ the weight beside it (`RegularizationConfig.weight`), η the
step's learning rate and θ_0 the true start.

- *coupled* is gradient descent on the sum. The gradient is clipped as a whole: clipping that only
  scales it leaves the points where it vanishes, the minima of the sum, as they are, whereas the sum
  of a clipped gradient and a pull vanishes elsewhere.
- *decoupled* is what AdamW does with weight decay: no clipping, no sign and no moments in the way.
  With plain SGD it is the same as coupled; with the others it does not minimise the sum.
- *selective* follows Tian et al. 2024 (Selective Projection Decay) and Rahimi Afzal et al. 2025:
  the pull rests while descent on L leads away from θ_0. Where the sum has its minimum, ∇L is
  -λ(θ - θ_0), so that it rests there, too: with full batches it is L alone that is minimised,
  whatever λ is, and the sum's bound of ‖θ - θ_0‖ does not hold. For L = (θ - 1)², θ_0 = 0 and
  λ = 10 it goes to 1; the sum has its minimum at 1/6. What it changes comes from the noise of
  batches and from overshooting. The product is over all that is trained, as the condition is
  printed; Tian et al. decide tensor by tensor, and project by a strength in another unit than ηλ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raykernel.terms import Regularization


class Pull:
    """What the loop calls to be pulled; without state, so that a run which goes on needs none.

    Args:
        variables: θ, by name.
        start: θ_0, by the same names; not copied.
        weight: λ beside the mean loss.
        method: how.
    """

    def __init__(
        self,
        variables: Mapping[str, nn.Parameter],
        start: Mapping[str, Tensor],
        *,
        weight: float,
        method: Regularization,
    ) -> None:
        self._pairs = [(variable, start[name]) for name, variable in variables.items()]
        self._weight, self._method = weight, method

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Coupled: add λ(θ - θ_0) to `.grad`, which is ∇L and not clipped yet."""
        if self._method is not Regularization.coupled:
            return
        for variable, start in self._pairs:
            # λθ - λθ_0 would round twice where the two are close, which is nearly everywhere.
            deviation = variable - start
            if variable.grad is None:  # not part of this batch's loss
                variable.grad = deviation.mul_(self._weight)
            else:
                variable.grad.add_(deviation, alpha=self._weight)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Decoupled and selective: θ ← θ - ηλ(θ - θ_0), before the optimiser's step.

        Optimisers read `.grad`, which was taken at θ already; only their weight decay, which
        reads the parameters, sees the pulled ones.

        Args:
            learning_rate: η of this step.
        """
        decoupled = self._method is Regularization.decoupled
        if decoupled or (self._method is Regularization.selective and self._leads_back()):
            for variable, start in self._pairs:
                variable.lerp_(start, learning_rate * self._weight)

    def _leads_back(self) -> bool:
        """Whether ⟨∇L, θ - θ_0⟩ ≥ 0; clipping has not changed the sign."""
        products = [
            torch.dot(variable.grad.flatten(), (variable - start).flatten())
            for variable, start in self._pairs
            if variable.grad is not None
        ]
        return float(torch.stack(products).sum(dtype=torch.float64)) >= 0
