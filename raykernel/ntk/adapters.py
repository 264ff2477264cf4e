"""Kernels of adapters from one capture of the plain model: LoRA, DoRA and IA3.

An adapter leaves the forward pass unchanged where training starts (B = 0, m = ‖W‖, l = 1), so its
gradients follow from the factors a_t (inputs) and b_t (gradients of outputs) that a capture of the
plain model holds already, with output W a + bias of the adapted layer:

    LoRA        (W + s B A) a + bias            ∂f/∂B = s Σ_t b_t ⊗ A a_t,  ∂f/∂A = 0
    DoRA        m ⊙ (W + s B A) a / ‖·‖ + bias  ∂f/∂B as in LoRA,  ∂f/∂m = Σ_t b_t ⊙ W a_t / ‖W‖
    IA3         l ⊙ (W a + bias)                ∂f/∂l = Σ_t b_t ⊙ (W a_t + bias)
    IA3, input  W (l ⊙ a) + bias                ∂f/∂l = Σ_t Wᵀ b_t ⊙ a_t

Every function here turns a capture into another one, which shares the gradients b_t; `gram` of
that is the adapter's kernel, at the cost of neither a forward nor a backward pass. The capture
must hold the weight of every adapted layer, and such a weight must be used by its layer alone.
Kernels of several adapters add: LoRA beside a trained head is the sum of both captures' kernels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykernel.errors import InputError, nearest
from raykernel.ntk.capture import Capture, Parts
from raykernel.ntk.factors import Part, Product, Rows, accumulator
from raykernel.ntk.groups import ROOT
from raykernel.ntk.matmul import fast_products


def lora_scale(alpha: float | int, rank: int, *, rslora: bool = False) -> float:
    """LoRA's scale s = alpha / r, with rank stabilisation alpha / √r.

    Reference: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (arXiv:2312.03732).

    Args:
        alpha: PEFT's lora_alpha.
        rank: r, at least 1.
        rslora: whether to stabilise.

    Returns:
        s.

    Raises:
        InputError: if the rank is not positive.
    """
    _check_rank(rank)
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise InputError(f"rank: found {rank}, expected at least 1. Change it.")


def expected_lora_scale(rank: int, scale: float, d_in: int) -> float:
    """What the expectation over A of a layer's LoRA kernel is of its weight's full kernel.

    The entries of A are independent, of mean 0 and variance 1 / (3 d_in) (see `lora_matrices`), so

        E[AᵀA] = r / (3 d_in) · I,
        E K_LoRA = s² Σ_tu ⟨b_t, b'_u⟩ a_tᵀ E[AᵀA] a'_u = s² r / (3 d_in) · K_full.

    Exact at every rank and width; Malladi et al. 2023, Lemma D.4, is the concentration around it.

    Args:
        rank: r.
        scale: s.
        d_in: inputs of the layer.

    Returns:
        s² r / (3 d_in), to multiply the kernel of the weight (without its bias) with.
    """
    return scale**2 * rank / (3 * d_in)


def input_widths(groups: Iterable[str], *captures: Capture) -> dict[str, int]:
    """Number of inputs d_in of linear layers.

    Args:
        groups: layer groups.
        captures: where to look; a layer that no example used (an expert) has no factors.

    Returns:
        d_in by group; those that no capture used are left out.

    Raises:
        InputError: if a group is no captured linear layer.
    """
    widths: dict[str, int] = {}
    for group in groups:
        for capture in captures:
            for part in _linear_parts(capture, group):
                widths[group] = part.inputs.shape[-1]
    return widths


def lora_matrices(
    widths: Mapping[str, int], *, rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Float[Tensor, "r i"]]:
    """LoRA's random A by layer, uniform on ±1/√d_in as PEFT initialises it (variance 1/(3 d_in)).

    A layer's matrix depends on the seed and its name alone, so every process draws the same
    whatever else is adapted, and on every platform (counter-based generator, Salmon et al. 2011).
    A smaller rank's matrix is the first rows of a larger one's.

    Args:
        widths: d_in by layer group.
        rank: r, at least 1.
        seed: of all layers together.
        dtype: of the matrices.

    Returns:
        A by layer group.

    Raises:
        InputError: if the rank is not positive.
    """
    _check_rank(rank)
    return {
        group: (_uniform(seed, group, rank, width) / math.sqrt(width)).to(dtype)
        for group, width in widths.items()
    }


def _uniform(seed: int, name: str, rank: int, width: int) -> Float[Tensor, "r i"]:
    """Uniform on [-1, 1), in float64."""
    key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest()
    # The generator's bits are numpy's promise; its distributions may change between versions.
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(rank * width)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-52 - 1).view(rank, width)


@fast_products()
def lora(
    capture: Capture, matrices: Mapping[str, Float[Tensor, "r i"]], *, scale: float
) -> Capture:
    """Capture of LoRA's B where B = 0: ∂f/∂B = s Σ_t b_t ⊗ A a_t.

    A has no gradient there (∂f/∂A = s Σ_t Bᵀ b_t ⊗ a_t), so it is left out. The kernel is that of
    the layer with its inputs projected: s² Σ_tu ⟨b_t, b'_u⟩ ⟨A a_t, A a'_u⟩.
    Reference: Hu et al. 2021 (arXiv:2106.09685); Malladi et al. 2023, Definition 7.1 (where the
    names A and B are exchanged).

    Args:
        capture: of the plain model.
        matrices: A by layer group.
        scale: s, see `lora_scale`.

    Returns:
        A group `<layer>.lora_B` for every matrix.

    Raises:
        InputError: if a group is no captured linear layer, or A does not fit it.
    """
    parts: Parts = {}
    for group, matrix in matrices.items():
        own = (_projected(part, matrix, scale, group) for part in _linear_parts(capture, group))
        parts[f"{group}.lora_B"] = _named(f"{group}.lora_B.weight", own)
    return Capture(capture.logits, parts, {})


def _projected(part: Product, matrix: Float[Tensor, "r i"], scale: float, group: str) -> Product:
    d_in = part.inputs.shape[-1]
    if matrix.shape[-1] != d_in:
        raise InputError(
            f"matrices: A of {group!r} has shape {tuple(matrix.shape)}, expected (rank, {d_in}). "
            "Draw it for this layer."
        )
    inputs = part.inputs.to(accumulator(part.inputs.dtype))
    low = inputs @ (scale * matrix.detach().to(inputs)).mT
    # B is stored (o, r) whichever way round W is.
    return replace(part, inputs=low, transposed=False)


@fast_products()
def dora(
    capture: Capture,
    model: nn.Module,
    matrices: Mapping[str, Float[Tensor, "r i"]],
    *,
    scale: float,
) -> Capture:
    """Capture of DoRA's B and m where B = 0 and m is the norms of W's rows.

        W' = diag(m / ‖W + s B A‖) (W + s B A),    ∂f/∂m = Σ_t b_t ⊙ W a_t / ‖W‖

    The norm counts as a constant (Liu et al. 2024, arXiv:2402.09353, section 4.3), as in PEFT, so
    B's gradient is LoRA's.

    Args:
        capture: of the plain model.
        model: that model, for its weights.
        matrices: A by layer group.
        scale: s, see `lora_scale`.

    Returns:
        Groups `<layer>.lora_B` and `<layer>.lora_magnitude` for every matrix.

    Raises:
        InputError: if a group is no captured linear layer, A does not fit it, or a row of its
            weight is zero.
    """
    parts = dict(lora(capture, matrices, scale=scale).parts)
    for group in matrices:
        name = f"{group}.lora_magnitude"
        own = (_magnitudes(part, model, group) for part in _linear_parts(capture, group))
        parts[name] = _named(f"{name}.weight", own)
    return Capture(capture.logits, parts, {})


def _magnitudes(part: Product, model: nn.Module, group: str) -> Part:
    weight = _weight(part, model, group)
    norms = weight.norm(dim=1)
    if not bool(norms.all()):
        raise InputError(
            f"{group}: a row of its weight is zero, expected a direction to scale. DoRA is not "
            "defined there; use LoRA for this layer."
        )
    outputs = part.inputs.to(weight) @ (weight / norms.unsqueeze(1)).mT
    return _output_scale(part, outputs)


@fast_products()
def ia3(
    capture: Capture,
    model: nn.Module,
    groups: Collection[str],
    *,
    feedforward: Collection[str] = (),
) -> Capture:
    """Capture of IA3's scaling vectors l where l = 1.

        output   Σ_t b_t ⊙ (W a_t + bias)        input (feedforward)   Σ_t Wᵀ b_t ⊙ a_t

    Both are sums over one side of W ⊙ Σ_t b_t ⊗ a_t. Reference: Liu et al. 2022
    (arXiv:2205.05638), section 3.3.

    Args:
        capture: of the plain model.
        model: that model, for its weights and biases.
        groups: layers that are scaled.
        feedforward: those of them whose inputs are scaled instead of their outputs.

    Returns:
        A group `<layer>.ia3_l` for every layer.

    Raises:
        InputError: if a group is no captured linear layer, or `feedforward` has others.
    """
    for group in feedforward:
        if group not in groups:
            raise InputError(
                f"feedforward: {group!r} is not among the layers that are scaled, "
                f"{nearest(group, groups)}"
            )
    parts: Parts = {}
    for group in groups:
        scaled = _scaled_inputs if group in feedforward else _scaled_outputs
        own = (scaled(part, model, group) for part in _linear_parts(capture, group))
        parts[f"{group}.ia3_l"] = _named(f"{group}.ia3_l", own)
    return Capture(capture.logits, parts, {})


def _scaled_inputs(part: Product, model: nn.Module, group: str) -> Part:
    weight = _weight(part, model, group)
    gradients = (own.to(weight) @ weight for own in part.gradients.unbind(1))
    return _token_sums(gradients, part.inputs.to(weight))


def _scaled_outputs(part: Product, model: nn.Module, group: str) -> Part:
    weight = _weight(part, model, group)
    outputs = part.inputs.to(weight) @ weight.mT
    bias = getattr(_module(model, group), "bias", None)
    if bias is not None:
        bias = bias.detach() if part.rows is None else bias.detach()[part.rows]
        outputs += bias.to(weight)
    return _output_scale(part, outputs)


def _output_scale(part: Product, outputs: Float[Tensor, "n t o"]) -> Part:
    """Σ_t b_t ⊙ outputs_t, of those rows that the part has."""
    sums = _token_sums((own.to(outputs) for own in part.gradients.unbind(1)), outputs)
    if part.rows is None:
        return sums
    ones = outputs.new_ones((len(outputs), 1, 1))
    return Product(ones, sums.gradients.unsqueeze(2), part.rows, transposed=False)


def _token_sums(
    gradients: Iterable[Float[Tensor, "n t p"]], factor: Float[Tensor, "n t p"]
) -> Rows:
    """Σ_t g_t ⊙ factor_t for the gradients of every output, one output at a time for memory."""
    p = factor.shape[-1]
    sums, lengths = [], []
    for own in gradients:
        by_token = own * factor
        sums.append(by_token.sum(1))
        lengths.append(by_token.norm(dim=2).sum(1))
    return Rows(torch.stack(sums, 1), p, torch.stack(lengths, 1) / math.sqrt(p))


def _named(name: str, parts: Iterable[Part]) -> dict[str, tuple[Part, ...]]:
    found = tuple(parts)
    return {name: found} if found else {}


def _linear_parts(capture: Capture, group: str) -> list[Product]:
    """Uses of a linear layer's weight; none where no output depends on the layer."""
    if group not in capture.parts:
        raise InputError(f"layer group {group!r} does not exist, {nearest(group, capture.parts)}")
    by_name = capture.parts[group]
    parts = [p for name, own in by_name.items() if name.rsplit(".", 1)[-1] == "weight" for p in own]
    products = [part for part in parts if isinstance(part, Product)]
    if len(products) == len(parts) and (products or not by_name):
        return products
    kinds = {name: [type(part).__name__ for part in own] for name, own in by_name.items()}
    raise InputError(
        f"{group}: found {kinds}, expected factors of a linear layer's weight. Choose linear "
        "layers whose weights have requires_grad."
    )


def _module(model: nn.Module, group: str) -> nn.Module:
    return model.get_submodule("" if group == ROOT else group)


def _weight(part: Product, model: nn.Module, group: str) -> Float[Tensor, "o i"]:
    """The layer's weight, those rows that the part has, in the type of sums."""
    stored = _module(model, group).weight
    assert isinstance(stored, Tensor)
    weight = stored.detach()
    weight = weight.mT if part.transposed else weight
    weight = weight if part.rows is None else weight[part.rows]
    return weight.to(part.inputs.device, accumulator(weight.dtype))
