"""Kernels of many PEFT methods at once, from one capture of the plain model.

PEFT itself says what a configuration does: it is applied to a twin of the model whose parameters
take no memory, and what it made trainable there is read off. What has no closed form at its start
(`ntk.adapters`) is refused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykernel.errors import InputError, nearest
from raykernel.ntk.adapters import dora, ia3, lora, lora_matrices
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.empirical import capture_in_batches
from raykernel.ntk.groups import ROOT
from raykernel.ntk.selections import is_bias, norm_groups, only, varying

if TYPE_CHECKING:
    from peft import PeftConfig

SELECTIONS = ("bitfit", "norm", "head")
"""Methods that train some of the model's own parameters."""

_ADAPTER = "default"
"""PEFT's name for an adapter that has none."""


def adapter_kernels(
    model: nn.Module,
    readout: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    rows: dict[str, Tensor],
    cols: dict[str, Tensor] | None = None,
    *,
    adapters: Mapping[str, PeftConfig | str],
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, dict[str, Float[Tensor, "n c m c"]]]:
    """Exact empirical NTK of PEFT methods where they start, one capture for all of them.

        K[i, a, j, b] = Σ_p ∂f_a(x_i)/∂θ_p · ∂f_b(x_j)/∂θ_p    over what the method trains

    A method is `peft.LoraConfig` (also with `use_rslora`, `use_dora`, patterns of ranks),
    `peft.IA3Config`, or one of the model's own parameters: "bitfit" (biases), "norm"
    (normalisations), "head" (the last of the model's children that has parameters; of a matrix
    that it shares with the embedding, its own share). B is 0 and l is 1 where they start. LoRA's A
    is `ntk.adapters.lora_matrices` of the seed and the layer's name: as PEFT distributes it,
    but the same for every method, process and machine. `requires_grad` plays no role.
    Cost: one forward and c backward passes over rows and columns, then a contraction per method.

    Args:
        model: the plain network, without adapters.
        readout: called as readout(model, batch), gives logits (n, c).
        rows: the row examples; tensors whose leading dimension is the examples.
        cols: the column examples; None: the rows.
        adapters: methods by a name of your own.
        seed: of LoRA's A.
        batch_size: examples of one forward pass at the most.

    Returns:
        Blocks by method and layer, whose name ends in what is trained there (`.lora_B`,
        `.lora_magnitude`, `.ia3_l`); their sum is the method's kernel.

    Raises:
        InputError: for a method that is unknown, fits no layer, or trains something else.
        NonFiniteError: if logits, gradients or blocks are NaN or infinite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: found {batch_size}, expected at least 1.")
    if not adapters:
        raise InputError("adapters: found none, expected at least one. Add adapters={'name': …}.")
    methods = {name: _method(model, name, chosen, seed) for name, chosen in adapters.items()}
    needed = frozenset().union(*(method.parameters for method in methods.values()))
    with varying(model, needed):
        tracer = Tracer(model, readout)
        of_rows = capture_in_batches(tracer, rows, batch_size)
        of_cols = of_rows if cols is None else capture_in_batches(tracer, cols, batch_size)
        kernels = {}
        for name, method in methods.items():
            own = method.apply(of_rows)
            other = own if of_cols is of_rows else method.apply(of_cols)
            kernels[name] = gram(own, other)
    return kernels


@dataclass(frozen=True, slots=True)
class _Method:
    parameters: frozenset[str]
    """Of the plain model, whose factors are needed."""
    apply: Callable[[Capture], Capture]


def _method(model: nn.Module, name: str, chosen: PeftConfig | str, seed: int) -> _Method:
    if isinstance(chosen, str):
        return _selection(model, name, chosen)
    layers = _layers(model, name, chosen)
    weights = frozenset(f"{path}.weight" if path else "weight" for path in layers)
    return _Method(weights, partial(_adapted, model=model, layers=layers, seed=seed))


# ------------------------------------------------------------------ the model's own parameters


def _selection(model: nn.Module, name: str, chosen: str) -> _Method:
    if chosen not in SELECTIONS:
        raise InputError(
            f"adapters[{name!r}]: found {chosen!r}, expected a PEFT configuration or one of "
            f"{', '.join(SELECTIONS)}; {nearest(chosen, SELECTIONS)}"
        )
    keep = _keep(model, chosen)
    kept = [
        (path or ROOT, f"{path}.{own}" if path else own)
        for path, module in model.named_modules(remove_duplicate=False)
        for own, _ in module.named_parameters(recurse=False)
    ]
    parameters = frozenset(full for group, full in kept if keep(group, full))
    if not parameters:
        raise InputError(
            f"adapters[{name!r}]: the model has no parameter for {chosen!r}, expected at least "
            "one. Leave it out."
        )
    return _Method(parameters, partial(only, keep=keep))


def _keep(model: nn.Module, chosen: str) -> Callable[[str, str], bool]:
    if chosen == "bitfit":
        return is_bias
    if chosen == "norm":
        norms = norm_groups(model)
        return lambda group, _: group in norms
    owners = [
        name for name, child in model.named_children() if any(True for _ in child.parameters())
    ]
    head = owners[-1] if owners else ""
    return lambda group, _: group == head or group.startswith(f"{head}.")


# ------------------------------------------------------------------ adapters


@dataclass(frozen=True, slots=True)
class _Layer:
    """What PEFT puts at one layer."""

    kind: str
    """lora, dora, ia3 or ia3_input."""
    d_in: int
    rank: int = 0
    scale: float = 1.0


def _layers(model: nn.Module, name: str, config: PeftConfig) -> dict[str, _Layer]:
    """By path of the plain model."""
    start = getattr(config, "init_lora_weights", getattr(config, "init_ia3_weights", None))
    if start is not True:
        raise _no_closed_form(name, f"{type(config).__name__} with weights set by {start!r}")
    twin = _injected(model, name, config)
    found: dict[str, _Layer] = {}
    explained: set[str] = set()
    for path, module in twin.named_modules():
        layer, trained = _layer(module)
        if layer is not None:
            found[path] = layer
            explained |= {f"{path}.{own}" if path else own for own in trained}
    trainable = {own for own, p in twin.named_parameters() if p.requires_grad}
    if trainable != explained:
        raise _no_closed_form(name, f"{min(trainable ^ explained)!r}, which is trained, too")
    return found


def _no_closed_form(name: str, found: str) -> InputError:
    return InputError(
        f"adapters[{name!r}]: found {found}; expected LoRA, rsLoRA, DoRA or IA3 of linear layers "
        "and nothing else, as PEFT initialises them by default. For other methods compute "
        "`empirical_kernel` of the PEFT model."
    )


def _injected(model: nn.Module, name: str, config: PeftConfig) -> nn.Module:
    """The model as PEFT changes it, on the device `meta`: modules without numbers."""
    import peft  # takes a second

    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    twin = copy.deepcopy(model, memo)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D and of tied heads, which do not matter here
        try:
            return peft.inject_adapter_in_model(
                copy.deepcopy(config), twin, _ADAPTER, low_cpu_mem_usage=True
            )
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InputError(
                f"adapters[{name!r}]: PEFT refuses it for this model: {error} Correct its "
                "target_modules."
            ) from error


def _layer(module: nn.Module) -> tuple[_Layer | None, list[str]]:
    """What an injected module does, and the parameters it trains; None if it is none we know."""
    from peft.tuners import ia3 as peft_ia3
    from peft.tuners import lora as peft_lora
    from peft.tuners.lora.dora import DoraLinearLayer

    if type(module) is peft_ia3.Linear and _ADAPTER in module.ia3_l:
        kind = "ia3_input" if module.is_feedforward else "ia3"
        return _Layer(kind, module.in_features), [f"ia3_l.{_ADAPTER}"]
    if type(module) is not peft_lora.Linear or _ADAPTER not in module.lora_A:
        return None, []
    assert module.in_features is not None, "of a linear layer"
    trained = [f"lora_A.{_ADAPTER}.weight", f"lora_B.{_ADAPTER}.weight"]
    layer = _Layer("lora", module.in_features, module.r[_ADAPTER], float(module.scaling[_ADAPTER]))
    magnitudes = module.lora_magnitude_vector
    if _ADAPTER in magnitudes and type(magnitudes[_ADAPTER]) is DoraLinearLayer:
        layer = replace(layer, kind="dora")
        trained.append(f"lora_magnitude_vector.{_ADAPTER}.weight")
    elif _ADAPTER in module.lora_variant:
        return None, []
    return layer, trained


def _adapted(
    capture: Capture, *, model: nn.Module, layers: Mapping[str, _Layer], seed: int
) -> Capture:
    """Capture of what is trained, layer by layer in the order of the model."""
    parts = {}
    for path, layer in layers.items():
        group = path or ROOT
        if layer.kind.startswith("ia3"):
            inner = [group] if layer.kind == "ia3_input" else []
            own = ia3(capture, model, [group], feedforward=inner)
        else:
            matrices = lora_matrices({group: layer.d_in}, rank=layer.rank, seed=seed)
            if layer.kind == "dora":
                own = dora(capture, model, matrices, scale=layer.scale)
            else:
                own = lora(capture, matrices, scale=layer.scale)
        parts.update(own.parts)
    return Capture(capture.logits, parts, {})
