"""A worker's process and its model: settled as configured, loaded once, and handed on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from raykernel.compute import kept, process
from raykernel.compute.spec import WorkerSpec
from raykernel.compute.weights import assign, read_parameters
from raykernel.config import ComputeConfig, canonical_json, plain
from raykernel.errors import BlockCorruptError
from raykernel.problem.models import Problem, load_problem
from raykernel.problem.probe import Head
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle


def settle(compute: ComputeConfig) -> None:
    """Threads, algorithms and heap from the configuration: Ray and the shell would set others.

    Args:
        compute: threads and device.
    """
    torch.set_num_threads(compute.threads)
    if compute.device.startswith("cuda"):
        # cuBLAS may otherwise split a product differently from call to call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)
    process.keep_heap_ready(compute)


def stored_head(spec: WorkerSpec, handle: KernelHandle) -> Head | None:
    """The linear head of the kernel, None with a prompt or if it is not fitted yet."""
    stored = None if spec.encoded.label_ids else handle.read_head()
    return None if stored is None else Head(*stored)


@dataclass(frozen=True, slots=True, eq=False)
class _Loaded:
    """A problem, and which parameters varied when it was loaded."""

    problem: Problem
    varying: dict[nn.Parameter, bool]


def take_problem(worker: object, spec: WorkerSpec, head: Head | None) -> Problem:
    """The problem of a worker: that of the worker before in this process, if it is the same.

    Args:
        worker: whose it is while it lives.
        spec: what to compute.
        head: linear head, if there is one.

    Returns:
        The problem as it was loaded.
    """

    def make() -> _Loaded:
        problem = load(spec, head)
        return _Loaded(problem, {p: p.requires_grad for p in problem.module.parameters()})

    loaded = kept.take_over(worker, _problem_key(spec, head), make)
    for parameter, varies in loaded.varying.items():
        parameter.requires_grad_(varies)
    process.trim_heap()  # of what the worker before had in memory beside it
    return loaded.problem


def _problem_key(spec: WorkerSpec, head: Head | None) -> str:
    """All that decides a module; the kernel's fingerprint knows what the model's files hold."""
    facts = [
        spec.fingerprint,
        spec.trial,
        plain(spec.model),
        plain(spec.parameters),
        spec.kernel.precision.value,
        spec.encoded.label_ids,
        spec.num_labels,
        spec.compute.device,
        None if head is None else [head.weight.tolist(), head.bias.tolist()],
    ]
    return canonical_json(facts)


def load(spec: WorkerSpec, head: Head | None) -> Problem:
    """The problem of a worker, with its trial's weights; without a head, to read features from."""
    problem = load_problem(
        spec.model,
        spec.parameters,
        label_ids=spec.encoded.label_ids,
        num_labels=spec.num_labels,
        head=head,
        device=spec.compute.device,
        precision=spec.kernel.precision,
    )
    if head is None and not spec.encoded.label_ids:
        # A head of zeros would pass no gradient on, and a plan made with it would be all too
        # small. Features do not depend on it, and no block is computed with it.
        for parameter in problem.module.get_submodule("classifier").parameters():
            parameter.data.fill_(1.0)
    if spec.trial is not None:
        assign(problem.module, read_parameters(Store(spec.store_path).trial(spec.trial)))
    return problem


def can_read(read: Callable[[], object]) -> bool:
    """Whether a stored file is there and whole; a damaged one is computed again."""
    try:
        read()
    except (FileNotFoundError, BlockCorruptError):
        return False
    return True


def model_bytes(module: nn.Module) -> int:
    """Memory of a model's parameters and buffers."""
    return tensor_bytes([*module.parameters(), *module.buffers()])


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Memory of tensors; those that share it count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
