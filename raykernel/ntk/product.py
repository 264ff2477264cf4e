"""J w and Jᵀ α: kernel regression at new examples without their kernel.

The predictor of kernel regression is linear in the parameters, so α folds back into them:

    Σ_j,b K[i, a, j, b] α[j, b]  =  ⟨∂f_a(x_i)/∂θ, w⟩,    w = Σ_j,b α[j, b] ∂f_b(x_j)/∂θ

w is one ordinary gradient of the training set, and one forward-mode product per batch gives all c
outputs of all its examples, where their kernel needs c backward passes and a contraction with
every training example. For the kernel with signs on the training side see `sign_product`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from raykernel.errors import InputError, NonFiniteError, is_out_of_memory, nearest
from raykernel.ntk import audit
from raykernel.ntk.batches import Batch, Readout, check_batch, example, num_examples
from raykernel.ntk.factors import accumulator
from raykernel.ntk.passes import (
    apart,
    backward,
    check_outputs,
    checked_logits,
    on_gradients,
    paired,
    prepared,
    saved_storages,
    selected_parameters,
    zeros_like,
)


def weighted_gradient(
    model: nn.Module,
    readout: Readout,
    batches: Iterable[Batch],
    weights: Float[Tensor, "n c"],
) -> dict[str, Tensor]:
    """Jᵀ α, the gradient w of the weighted sum of all logits.

        w = Σ_i,c  α[i, c] ∂f_c(x_i)/∂θ

    Cost: one forward and one ordinary backward pass per batch. Memory: one gradient, in float32 at
    least. Modules run in eval mode; modes, flags and `.grad` are as before afterwards.

    Args:
        model: the network; parameters with `requires_grad` are selected.
        readout: logits (n, c) of a batch.
        batches: the examples, in the order of the weights.
        weights: α, in any floating type.

    Returns:
        A tensor of the parameter's shape by name, every selected parameter once.

    Raises:
        InputError: if nothing is selected, or weights do not match the examples or outputs.
        NonFiniteError: if logits or gradients are NaN or infinite.
    """
    selected = selected_parameters(model)
    total = zeros_like(selected)

    def receive(name: str, gradient: Tensor) -> None:
        total[name] += gradient

    with prepared(model, selected.values()), on_gradients(selected, receive):
        for batch, own in _apart(model, readout, paired(batches, weights)):
            logits = checked_logits(model, readout, batch)
            check_outputs(logits, own)
            backward(logits, own.to(logits), selected)
    for name, gradient in total.items():
        if not bool(gradient.isfinite().all()):
            raise NonFiniteError(
                f"{name}: its weighted gradient is NaN or infinite, expected finite values. "
                "Use kernel.precision=float64."
            )
    return total


def tangent(
    model: nn.Module, readout: Readout, batch: Batch, direction: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Logits and J w of one batch, see `tangents`."""
    return tangents(model, readout, [batch], direction)


def tangents(
    model: nn.Module,
    readout: Readout,
    batches: Iterable[Batch],
    direction: Mapping[str, Tensor],
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Logits, and how fast they change when the parameters move along w.

        (J w)[i, a] = ⟨∂f_a(x_i)/∂θ, w⟩

    By forward mode: the cost of about three forward passes, and no graph is kept. Where an
    operation has no forward-mode formula, by differentiating the ordinary backward pass, J w =
    ∂⟨Jᵀ u, w⟩/∂u, and where that fails too by one backward pass per example and output. The two
    short ways are held against an ordinary backward pass over one example before they are
    believed: forward mode, for one, passes through `torch.no_grad`, which a gradient does not.
    Attention runs in its plain form, the only one that has such derivatives.

    Args:
        model: the network.
        readout: logits (n, c) of a batch.
        batches: the examples.
        direction: w, by name in `model.named_parameters()`; parameters that it lacks stay fixed.

    Returns:
        Logits and J w of all examples, in their order.

    Raises:
        InputError: if the direction does not fit the model, or there is no example.
        NonFiniteError: if logits or the product are NaN or infinite.
    """
    product = TangentMap(model, readout)
    found = [product(batch, direction) for batch in batches]
    if not found:
        raise InputError("no batch of examples, expected at least one. Check what makes them.")
    logits, products = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(products)


class TangentMap:
    """J w of one batch after the other, along directions that may differ, see `tangents`.

    The way to it that has held of a first batch and direction is kept; a direction of zeros shows
    nothing, so the first one should have none.

    Args:
        model: the network; whatever its parameters are at a call is where J is.
        readout: logits (n, c) of a batch.
    """

    def __init__(self, model: nn.Module, readout: Readout) -> None:
        self._model, self._readout = model, readout
        self._ways = list(_WAYS)
        self._checked = 0

    def __call__(
        self, batch: Batch, direction: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        """Logits and J w.

        Args:
            batch: the examples.
            direction: w, by name in `model.named_parameters()`.

        Returns:
            Both, in the order of the examples.
        """
        task = _task(self._model, self._readout, direction)
        # A single example says nothing of how the model treats several.
        several = min(check_batch(batch), 2)
        constant = {key: value.detach() for key, value in batch.items()}
        with prepared(self._model, task.parameters.values()), sdpa_kernel(SDPBackend.MATH):
            while (
                found := _attempt(self._ways, task, constant, check=self._checked < several)
            ) is None:
                self._ways.pop(0)
                self._checked = 0
        self._checked = max(self._checked, several)
        return found


@dataclass(frozen=True, slots=True)
class ProductBytes:
    """Memory of `weighted_gradient` and `tangents`, in bytes, without the weights."""

    fixed: int
    """w, and gradients on their way to it."""
    example: int
    """Of every example of a batch."""

    def of(self, num_examples: int) -> int:
        """Of a batch."""
        return self.fixed + num_examples * self.example


def product_bytes(model: nn.Module, readout: Readout, batch: Batch) -> ProductBytes:
    """Memory of products with a model's gradients, measured by one forward pass.

    w and its copy in the parameters' type; all gradients once, which the double backward pass
    holds and the check against autograd of a tied matrix may; per example twice what a backward
    pass saves (values and tangents, or a pass differentiated once more), and some outputs of the
    largest layer, for layers that save nothing.

    Args:
        model: the network; parameters with `requires_grad` are selected.
        readout: logits (n, c) of a batch.
        batch: one example, as long as the longest.

    Returns:
        The bytes.

    Raises:
        InputError: if nothing is selected, or the readout is not (n, c).
        NonFiniteError: if the logits are NaN or infinite.
    """
    selected = selected_parameters(model)
    gradients = [p.numel() * p.element_size() for p in selected.values()]
    direction = sum(p.numel() * accumulator(p.dtype).itemsize for p in selected.values())
    copied = sum(
        p.numel() * p.element_size() for p in selected.values() if accumulator(p.dtype) != p.dtype
    )
    largest = 0

    def note(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with prepared(model, selected.values()):
            with saved_storages(model) as saved:
                logits = checked_logits(model, readout, batch)
            del logits  # until here the graph keeps what is saved, so that no address repeats
    finally:
        for hook in hooks:
            hook.remove()
    return ProductBytes(
        fixed=direction + copied + max(sum(gradients), 3 * max(gradients)),
        example=2 * sum(saved.values()) + _OUTPUTS_ALIVE * largest,
    )


_OUTPUTS_ALIVE = 6
"""Outputs of a layer alive at once in a forward-mode pass: queries, scores, their tangents, …"""


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """J w of one model, wanted for some batches."""

    model: nn.Module
    readout: Readout
    parameters: dict[str, nn.Parameter]
    direction: dict[str, Tensor]
    """Of the parameters' types, on their devices."""


def _task(model: nn.Module, readout: Readout, direction: Mapping[str, Tensor]) -> _Task:
    known = dict(model.named_parameters())
    if not direction:
        raise InputError("the direction is empty, expected a tensor by name of a parameter.")
    for name, value in direction.items():
        if name not in known:
            raise InputError(f"direction: {name!r} is no parameter, {nearest(name, known)}")
        if value.shape != known[name].shape:
            raise InputError(
                f"direction: {name!r} has shape {tuple(value.shape)}, expected the parameter's, "
                f"{tuple(known[name].shape)}. Take the direction from the same model."
            )
    own = {name: value.detach().to(known[name]) for name, value in direction.items()}
    return _Task(model, readout, {name: known[name] for name in own}, own)


_Product = tuple[Tensor, Tensor]
"""Logits and J w of a batch."""


class _Network(nn.Module):
    """The readout as a module, so that `functional_call` reaches every place of a parameter."""

    def __init__(self, model: nn.Module, readout: Readout) -> None:
        super().__init__()
        self.model = model
        self._readout = readout

    def forward(self, batch: Batch) -> Tensor:
        """Logits (n, c) of a batch."""
        return checked_logits(self.model, self._readout, batch)


class _PaddingFixed(TorchFunctionMode):
    """Forward mode as a gradient has it: an embedding's `padding_idx` row does not vary."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        out = func(*args, **options)
        if func is not F.embedding:
            return out
        named = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | options
        if named.get("padding_idx") is None:
            return out
        padding = named["input"] == named["padding_idx"] % len(named["weight"])
        return torch.where(padding.unsqueeze(-1), out.detach(), out)


_make_dual: Callable[[Tensor, Tensor], Tensor] = forward_ad.make_dual
_unpack_dual: Callable[[Tensor], tuple[Tensor, Tensor | None]] = forward_ad.unpack_dual


def _forward_mode(task: _Task, batch: Batch) -> _Product | None:
    with forward_ad.dual_level(), _PaddingFixed():
        network = _Network(task.model, task.readout)
        out: Tensor = torch.func.functional_call(network, _duals(task), (batch,))
        # No dual needs a gradient. If the logits do, a parameter came from elsewhere than its
        # module (a list, a closure), and its part of the product is missing.
        if out.requires_grad:
            return None
        logits, change = _unpack_dual(out)
        return logits, torch.zeros_like(logits) if change is None else change


def _duals(task: _Task) -> dict[str, Tensor]:
    """Parameters with their directions, as `_Network` names them."""
    with warnings.catch_warnings():
        # The first dual tensor of a process makes torch load formulas, of which it warns itself.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return {
            f"model.{name}": _make_dual(parameter.detach(), task.direction[name])
            for name, parameter in task.parameters.items()
        }


def _double_backward(task: _Task, batch: Batch) -> _Product:
    logits = checked_logits(task.model, task.readout, batch)
    if not logits.requires_grad:
        return logits, torch.zeros_like(logits)
    u = torch.ones_like(logits, requires_grad=True)
    wanted = list(task.parameters.values())
    gradients = torch.autograd.grad(logits, wanted, u, create_graph=True, allow_unused=True)
    pairs = zip(gradients, task.direction.values(), strict=True)
    change = torch.stack([(g * w).sum() for g, w in pairs if g is not None]).sum()
    return logits.detach(), torch.autograd.grad(change, u)[0]


def _by_output(task: _Task, batch: Batch) -> _Product:
    rows, products = [], []
    for i in range(num_examples(batch)):
        logits = checked_logits(task.model, task.readout, example(batch, i))
        units = torch.eye(logits.shape[1], device=logits.device, dtype=logits.dtype)
        changes = [_inner_products(task, logits, unit.unsqueeze(0))[0].sum() for unit in units]
        rows.append(logits.detach())
        products.append(torch.stack(changes).to(logits))
    return torch.cat(rows), torch.stack(products)


_WAYS: tuple[Callable[[_Task, Batch], _Product | None], ...] = (
    _forward_mode,
    _double_backward,
    _by_output,
)
"""To the same J w, the cheapest first; the last is its definition."""


def _attempt(
    ways: Sequence[Callable[[_Task, Batch], _Product | None]],
    task: _Task,
    batch: Batch,
    *,
    check: bool,
) -> _Product | None:
    """J w in the first way, or None if it cannot be had so or is not what a gradient says."""
    last = len(ways) == 1
    try:
        product = ways[0](task, batch)
    except RuntimeError as error:
        if last or is_out_of_memory(error):
            raise
        return None
    if product is None or (check and not last and not _holds(task, batch, product[1])):
        return None
    if bool(product[1].isfinite().all()):
        return product
    if last:
        raise NonFiniteError(
            "J w is NaN or infinite although the logits are finite, expected finite values. "
            "Check the direction, or use kernel.precision=float64."
        )
    return None


def _holds(task: _Task, batch: Batch, products: Float[Tensor, "n c"]) -> bool:
    """Whether one sum of the last example's outputs changes as its gradient says."""
    # The last, because a model that mixes examples may do so in their order.
    logits = checked_logits(task.model, task.readout, example(batch, num_examples(batch) - 1))
    weights = audit.output_weights(logits)
    terms, norms = _inner_products(task, logits, weights.unsqueeze(0))
    error = abs(float((products[-1] * weights).sum(dtype=torch.float64) - terms.sum()))
    # Many models normalise in float32 whatever their type.
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = eps**0.5 * float(terms.abs().sum()) + 10 * eps * float(norms.sum())
    return bool(error <= allowed)


def _inner_products(
    task: _Task, logits: Float[Tensor, "n c"], weights: Float[Tensor, "n c"]
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """⟨g, w⟩ and |g| |w| of each of q parameters, g the gradient of the weighted logits."""
    found = dict.fromkeys(task.parameters, (0.0, 0.0))

    def receive(name: str, gradient: Tensor) -> None:
        g, w = gradient.to(accumulator(gradient.dtype)), task.direction[name]
        found[name] = (float((g * w).sum(dtype=torch.float64)), float(g.norm() * w.norm()))

    with on_gradients(task.parameters, receive):
        backward(logits, weights, task.parameters, keep=True)
    terms, norms = torch.tensor(list(found.values()), dtype=torch.float64).unbind(1)
    return terms, norms


def _apart(
    model: nn.Module, readout: Readout, pairs: Iterable[tuple[Batch, Tensor]]
) -> Iterator[tuple[Batch, Tensor]]:
    """The batches, or their examples one by one if the model would mix them."""
    whole: bool | None = None
    for batch, own in pairs:
        if whole is None and len(own) > 1:
            whole = apart(model, readout, batch)
        if whole or len(own) == 1:
            yield batch, own
        else:
            yield from ((example(batch, i), own[i : i + 1]) for i in range(len(own)))
