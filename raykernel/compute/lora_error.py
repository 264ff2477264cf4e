"""How far the kernel of a fresh LoRA is from that of the weights that it adapts.

    K_LoRA[i, j] = s² ⟨G_i Aᵀ, G_j Aᵀ⟩,    E K_LoRA = s² r / (3 d_in) · K,    K[i, j] = ⟨G_i, G_j⟩

by adapted layer, G its weight's gradient: a random projection of the layer's inputs. Divided by
its scale it is measured against K on a sample of examples, beside the bound of Theorem D.5 of
Malladi et al. 2023 for all of them. `ntk.distortion` says what that theorem assumes, and why it
holds for PEFT's uniform A and for several tokens per example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykernel.compute.sketches import FAILURE
from raykernel.config import Json
from raykernel.ntk.adapters import expected_lora_scale
from raykernel.ntk.capture import Capture
from raykernel.ntk.contract import grams
from raykernel.ntk.distortion import (
    failure_bound,
    lora_error_bound,
    lora_rank_needed,
    projection_error,
)
from raykernel.ntk.rates import Rates
from raykernel.terms import Kind

_ADAPTER = "default"
"""PEFT's name for an adapter that has none."""


def adapted_layers(module: nn.Module) -> dict[str, float]:
    """Linear layers whose LoRA varies.

    Args:
        module: a model with fresh adapters.

    Returns:
        s² r / (3 d_in) by path of the adapted layer: the scale of its kernel's expectation.
    """
    from peft.tuners.lora import Linear  # takes a second, and only LoRA needs it

    found = {}
    for path, layer in module.named_modules():
        if isinstance(layer, Linear) and layer.lora_B[_ADAPTER].weight.requires_grad:
            d_in, rank, scale = layer.in_features, layer.r[_ADAPTER], layer.scaling[_ADAPTER]
            assert d_in is not None, "of a linear layer"
            found[path] = expected_lora_scale(rank, scale, d_in)
    return found


def compared_parameters(layers: Iterable[str]) -> frozenset[str]:
    """Parameters whose factors `lora_distortion` needs: B, and the weight that it adapts."""
    return frozenset(
        f"{path}.{own}.weight" for path in layers for own in (_adapter(), "base_layer")
    )


def _adapter() -> str:
    return f"lora_B.{_ADAPTER}"


def lora_distortion(
    segments: Iterable[Capture],
    layers: Mapping[str, float],
    *,
    rank: int,
    num_gradients: int,
    rates: Rates,
    max_bytes: int,
) -> dict[str, Json]:
    """Error of the LoRA kernel on a sample, and the bound of Theorem D.5 for all examples.

    Args:
        segments: captures of the sample with `compared_parameters`; each of some layers, taken
            one at a time.
        layers: see `adapted_layers`; at least one.
        rank: r.
        num_gradients: N, all examples times outputs.
        rates: of the device.
        max_bytes: bound on temporary memory.

    Returns:
        Largest errors of an entry, relative to |g| |g'|, of the sum of all adapted layers and of
        the worst of them; the Frobenius error of the sum; and the bounds.
    """
    exact: dict[str, Tensor] = {}
    scaled: dict[str, Tensor] = {}
    examples = 0
    for capture in segments:
        examples = len(capture.logits)
        blocks = grams(capture, capture, rates=rates, max_bytes=max_bytes)[Kind.sgd]
        for path, scale in layers.items():
            if f"{path}.base_layer" in blocks:
                exact[path] = blocks[f"{path}.base_layer"].double()
                scaled[path] = blocks[f"{path}.{_adapter()}"].double() / scale
    return {
        "rank": rank,
        "modules": len(layers),
        "examples": examples,
        **_measured(exact, scaled),
        **_bounds(rank, num_gradients, len(layers)),
    }


def _measured(
    exact: Mapping[str, Float[Tensor, "n c n c"]], scaled: Mapping[str, Float[Tensor, "n c n c"]]
) -> dict[str, Json]:
    of_modules = {path: projection_error(exact[path], scaled[path]) for path in exact}
    worst = max(of_modules, key=lambda path: of_modules[path])
    whole, found = (torch.stack(list(blocks.values())).sum(0) for blocks in (exact, scaled))
    norm = float(whole.norm())
    return {
        "relative_error": float((found - whole).norm()) / norm if norm else 0.0,
        "largest_error": projection_error(whole, found),
        "worst_module": worst,
        "worst_module_error": of_modules[worst],
    }


def _bounds(rank: int, num_gradients: int, num_modules: int) -> dict[str, Json]:
    """Theorem D.5 for every module at once, each at its share of δ, and Remark D.6."""
    share = FAILURE / num_modules
    limit = lora_error_bound(rank, failure=share, num_rows=num_gradients)
    remark = lora_error_bound(rank, failure=FAILURE, num_rows=num_gradients, num_layers=num_modules)
    least = num_modules * failure_bound(1.0, dimension=rank, num_rows=num_gradients)
    return {
        "theorem": "D.5",
        "gradients": num_gradients,
        "failure": FAILURE,
        "bound": limit if math.isfinite(limit) else None,
        "least_failure": least,
        "rank_needed": {
            f"{error:g}": lora_rank_needed(error, failure=share, num_rows=num_gradients)
            for error in (0.1, 0.5)
        },
        "remark": remark / num_modules if math.isfinite(remark) else None,
    }
