"""Plain forward and backward passes over a model that is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raykernel.errors import InputError
from raykernel.ntk import witness
from raykernel.ntk.batches import Batch, Readout, check_batch, example, num_examples
from raykernel.ntk.factors import accumulator
from raykernel.ntk.matmul import fast_products, is_onednn_faster


def selected_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with `requires_grad`, by their first name.

    Args:
        model: the network.

    Returns:
        Those, each once.

    Raises:
        InputError: if there are none.
    """
    selected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not selected:
        raise InputError(
            "no parameter of the model has requires_grad, expected at least one. "
            "Select those that vary, for example model.requires_grad_(True)."
        )
    return selected


@contextmanager
def prepared(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Context of a pass: eval mode, a gradient of these parameters alone, the faster products.

    Args:
        model: the network; its modes and flags are as before afterwards, also after an error.
        parameters: some of it.

    Yields:
        Nothing.
    """
    training = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for module in training:
            module.training = False
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), fast_products(), _attention(model):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _attention(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which attention is a few large products where these are oneDNN's."""
    # Fused on a CPU it calls the library for every head of every example, and a call of oneDNN
    # takes longer than so small a product: a whole capture took two to four times as long.
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return sdpa_kernel(SDPBackend.MATH) if on_cpu and is_onednn_faster() else nullcontext()


def checked_logits(model: nn.Module, readout: Readout, batch: Batch) -> Float[Tensor, "n c"]:
    """Logits of a batch, of the shape and with the values that they must have.

    Args:
        model: the network.
        readout: logits (n, c) of a batch.
        batch: the examples.

    Returns:
        What the readout returned.

    Raises:
        InputError: if that is not (n, c).
        NonFiniteError: if it is NaN or infinite.
    """
    logits = readout(model, batch)
    check_logits(model, readout, batch, logits)
    return logits


def check_logits(model: nn.Module, readout: Readout, batch: Batch, logits: Any) -> None:
    """Refuse logits of another shape than (n, c), or with values that are not finite.

    Args:
        model: the network.
        readout: what returned them.
        batch: the examples.
        logits: to be checked.

    Raises:
        InputError: if they are not (n, c).
        NonFiniteError: if they are NaN or infinite.
    """
    n = num_examples(batch)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != n:
        raise InputError(
            f"readout returned {found} for {n} examples, expected a tensor ({n}, c). "
            "Return one row of logits per example, such as logits[:, label_ids]."
        )
    if not bool(logits.isfinite().all()):
        row = witness.first_row(logits)
        witness.raise_non_finite(model, readout, batch, gradient_of=None, example=row)


def apart(model: nn.Module, readout: Readout, batch: Batch) -> bool:
    """Whether the model treats examples apart, tried on the first and the last of a batch.

    Args:
        model: the network.
        readout: logits (n, c) of a batch.
        batch: the examples.

    Returns:
        True if the last one's logits beside the first are those that it has alone.
    """
    n = num_examples(batch)
    with torch.no_grad():
        both = checked_logits(model, readout, {k: v[:: max(n - 1, 1)] for k, v in batch.items()})
        alone = checked_logits(model, readout, example(batch, n - 1))
    eps = max(torch.finfo(alone.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = eps**0.5 * alone.abs().max().clamp(min=1e-3)
    return bool((both[-1:] - alone).abs().max() <= allowed)


@contextmanager
def on_gradients(
    parameters: Mapping[str, nn.Parameter], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Context in which each parameter's gradient is handed over once complete, and let go of.

    Args:
        parameters: by name; their `.grad` is not touched.
        receive: called with name and gradient during `backward`.

    Yields:
        Nothing.
    """

    def take(name: str, gradient: Tensor) -> Tensor:
        if gradient.is_sparse:
            receive(name, gradient.to_dense())
            return gradient
        receive(name, gradient)
        # What autograd holds until the pass is over: one number, spread out.
        return gradient.new_zeros(()).expand_as(gradient)

    handles = [_hook(parameter, partial(take, name)) for name, parameter in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(parameter: nn.Parameter, take: Callable[[Tensor], Tensor]) -> Any:
    register: Callable[..., Any] = parameter.register_hook
    return register(take)


def backward(
    logits: Float[Tensor, "n c"],
    weights: Float[Tensor, "n c"],
    parameters: Mapping[str, nn.Parameter],
    *,
    keep: bool = False,
) -> None:
    """Backward pass of the weighted sum of logits, for use within `on_gradients`.

    Args:
        logits: of a forward pass.
        weights: of the same type.
        parameters: by name.
        keep: whether there will be another backward pass from these logits.
    """
    if logits.requires_grad:
        wanted = list(parameters.values())
        torch.autograd.grad(logits, wanted, weights, retain_graph=keep, allow_unused=True)


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[dict[int, int]]:
    """Context that notes what autograd saves for a backward pass.

    Args:
        model: its weights are not counted.

    Yields:
        Bytes by address of a storage, complete once the context is left; the graph has to live
        until then, lest an address be another tensor's.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        # The tensor itself may be an output of the function that saves it, which would then keep
        # itself and the whole graph alive for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages
    for weight in (*model.parameters(), *model.buffers()):
        storages.pop(weight.untyped_storage().data_ptr(), None)


def zeros_like(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Zeros to add gradients to.

    Args:
        parameters: by name.

    Returns:
        A tensor of each one's shape, in float32 at least.
    """
    return {
        name: torch.zeros(p.shape, dtype=accumulator(p.dtype), device=p.device)
        for name, p in parameters.items()
    }


def paired(
    batches: Iterable[Batch], weights: Float[Tensor, "n c"]
) -> Iterator[tuple[Batch, Float[Tensor, "m c"]]]:
    """Batches with the weights of their examples.

    Args:
        batches: the examples.
        weights: of all of them, in their order.

    Yields:
        A batch and the weights of its examples.

    Raises:
        InputError: if there are not as many examples as weights, or the weights are not finite.
    """
    if not bool(weights.isfinite().all()):
        raise InputError(
            "weights: found NaN or infinity, expected finite values. Check the solver."
        )
    count = 0
    for batch in batches:
        n = check_batch(batch)
        own = weights[count : count + n]
        count += n
        if len(own) == n:
            yield batch, own
    if count != len(weights):
        raise InputError(
            f"weights of {len(weights)} examples, but the batches hold {count}, expected one row "
            "of weights per example. Give the batches that the weights were solved for."
        )


def check_outputs(logits: Tensor, weights: Tensor) -> None:
    """Refuse weights that are not of as many outputs as the logits.

    Args:
        logits: (n, c) of some examples.
        weights: of these.

    Raises:
        InputError: if the outputs differ.
    """
    if logits.shape[1] != weights.shape[1]:
        raise InputError(
            f"weights of {weights.shape[1]} outputs, but the readout gives {logits.shape[1]}, "
            "expected as many. Give the readout that the weights were solved for."
        )
