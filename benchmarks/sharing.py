"""What one capture serves: kernels of several kinds, and those of many LoRA configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

import raykernel
from benchmarks.tables import Table
from benchmarks.timing import Say, measure
from benchmarks.workloads import Workload, read, roberta
from raykernel.ntk.adapters import expected_lora_scale, lora_matrices, lora_scale
from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import grams
from raykernel.ntk.distortion import lora_rank_needed, projection_error
from raykernel.ntk.packed import signed_capture
from raykernel.ntk.selections import varying
from raykernel.terms import Kind

ALL = (Kind.sgd, Kind.signgd, Kind.asigngd)

MODULES = (["query", "value"], ["query", "key", "value"], ["attention.output.dense"])
RANKS = (1, 4, 8, 16)
"""Of the LoRA configurations: every set of modules with every rank."""

Run = Callable[[], object]


def kinds_table(rounds: int, say: Say) -> Table:
    """Seconds of sgd alone, of all kinds together, and of signgd from packed signs; bytes."""
    workload = roberta("W1", "")
    timings = measure(
        {
            "sgd": lambda: _kinds(workload, (Kind.sgd,)),
            "sgd, signgd and asigngd together": lambda: _kinds(workload, ALL),
            "signgd": lambda: _kinds(workload, (Kind.signgd,)),
            "signgd of packed signs, contraction alone": lambda: _packed(workload),
        },
        rounds,
        say=say,
    )
    table = Table("Kinds on W1", ["", "seconds", "/ sgd"])
    for name, timing in timings.items():
        table.add(name, f"{timing.seconds:.3f}", f"{timing.over(timings['sgd']):.2f}")
    capture = Tracer(workload.model, read, signs=True).capture(workload.batch)
    factors = capture.num_bytes
    gradients = workload.jacobian_bytes
    packed = signed_capture(capture).num_bytes
    table.note(
        f"Memory of 32 texts: gradients in float32 {gradients / 2**20:.0f} MiB, factors "
        f"{factors / 2**20:.0f} MiB, packed signs {packed / 2**20:.1f} MiB, 1/"
        f"{gradients / packed:.1f} of the gradients (of an embedding only rows that occur)."
    )
    return table


def _kinds(workload: Workload, kinds: tuple[Kind, ...]) -> Run:
    tracer = Tracer(workload.model, read, signs=any(kind.has_signs for kind in kinds))

    def run() -> object:
        capture = tracer.capture(workload.batch)
        return grams(capture, capture, kinds=kinds)

    return run


def _packed(workload: Workload) -> Run:
    signs = signed_capture(Tracer(workload.model, read, signs=True).capture(workload.batch))
    return lambda: grams(signs, signs, kinds=(Kind.signgd,))


def lora_table(rounds: int, say: Say) -> Table:
    """Seconds of the kernels of twelve LoRA configurations: one capture, and twelve models."""
    workload = roberta("W1", "")
    timings = measure(
        {
            "one capture": lambda: _from_one_capture(workload),
            "twelve PEFT models": lambda: _from_models(workload),
        },
        rounds,
        say=say,
    )
    table = Table("Kernels of twelve LoRA configurations on W1", ["", "seconds", "/ one capture"])
    for name, timing in timings.items():
        ratio = timing.over(timings["one capture"])
        table.add(name, f"{timing.seconds:.3f}", f"{ratio:.1f}")
    own, theirs = (timing.result for timing in timings.values())
    error = max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(own, theirs, strict=True))
    table.note(f"Three sets of modules with ranks 1, 4, 8 and 16; largest difference {error:.0e}.")
    table.note(_distances(workload))
    return table


def _distances(workload: Workload) -> str:
    """How far LoRA's kernels, over their expected scales, are from those of the full weights."""
    model, configs = workload.model, _configs()
    lora = raykernel.adapter_kernels(model, read, workload.batch, adapters=configs)
    paths = {group.removesuffix(".lora_B") for blocks in lora.values() for group in blocks}
    with varying(model, frozenset(f"{path}.weight" for path in paths)):
        full = raykernel.empirical_kernel(model, read, workload.batch)["sgd"]
    worst = dict.fromkeys(RANKS, 0.0)
    for config, blocks in zip(configs.values(), lora.values(), strict=True):
        for group, block in blocks.items():
            path = group.removesuffix(".lora_B")
            d_in = model.get_submodule(path).in_features
            scale = expected_lora_scale(config.r, lora_scale(config.lora_alpha, config.r), d_in)
            error = projection_error(full[path], block / scale)
            worst[config.r] = max(worst[config.r], error)
    num_rows = full[path].shape[:2].numel()
    needed = lora_rank_needed(0.5, failure=0.05 / len(paths), num_rows=num_rows)
    found = ", ".join(f"r = {rank}: {error:.2f}" for rank, error in worst.items())
    return (
        "Largest error of an entry against the kernel of the full weight, relative to |g| |g'|, in "
        f"any layer: {found}. Theorem D.5 promises 0.5 from r = {needed:,} on (probability 0.95)."
    )


def _configs() -> dict[str, LoraConfig]:
    return {
        f"{r} {modules}": LoraConfig(r=r, lora_alpha=16, target_modules=list(modules))
        for modules in MODULES
        for r in RANKS
    }


def _from_one_capture(workload: Workload) -> Callable[[], list[np.ndarray]]:
    def run() -> list[np.ndarray]:
        found = raykernel.adapter_kernels(workload.model, read, workload.batch, adapters=_configs())
        return [_total(blocks) for blocks in found.values()]

    return run


def _from_models(workload: Workload) -> Callable[[], list[np.ndarray]]:
    def run() -> list[np.ndarray]:
        kernels = []
        for config in _configs().values():
            model = copy.deepcopy(workload.model)
            inject_adapter_in_model(config, model)
            _draw_same(model, config.r)
            kernels.append(_total(raykernel.empirical_kernel(model, read, workload.batch)["sgd"]))
        return kernels

    return run


def _draw_same(model: nn.Module, rank: int) -> None:
    """Give PEFT's layers the A that raykernel draws for them."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    widths = {name: layer.in_features for name, layer in layers.items()}
    drawn = lora_matrices(widths, rank=rank, seed=0)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(drawn[name])


def _total(blocks: dict[str, torch.Tensor]) -> np.ndarray:
    total: np.ndarray = torch.stack(list(blocks.values())).sum(0).flatten(2).flatten(0, 1).numpy()
    return total
