"""Other ways to the same kernel, and the float64 reference that all are held against.

The loop, torch.func and LM-Kernel-FT's algorithm need nothing but PyTorch; dattri-llm and opacus
live in an environment of their own (see README.md), and where they are missing the table says so.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vmap

from benchmarks.contenders import Contender, Kernel, Prepare, Run
from benchmarks.workloads import Workload, untied_without_rms_norm, without_head_bias

REFERENCE_BYTES = 6 << 30
"""Gradients that the float64 reference holds; workloads that need more are checked in part."""

LOOP_BYTES = 6 << 30
"""Gradients that the float32 loop holds; more take their turn in further passes."""

MAX_CHECKED = 64
"""Texts that are checked at the most."""

JVP_EXAMPLES = 1
"""Examples whose rows LM-Kernel-FT's algorithm computes; its time is scaled to all."""

JVP_BATCH = 32
"""Examples of one forward-mode pass."""


# ------------------------------------------------------------------ one backward pass per row


def reference(workload: Workload) -> Tensor:
    """The kernel (nc, nc) by definition: float64, one backward pass per text and output."""
    model = copy.deepcopy(workload.model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return _loop_kernel(model, workload, parameters)


def checked_texts(workload: Workload) -> int:
    """First texts of a workload whose float64 gradients fit `REFERENCE_BYTES`."""
    each = 2 * workload.jacobian_bytes // workload.num_examples
    return min(workload.num_examples, MAX_CHECKED, max(2, REFERENCE_BYTES // each))


def _loop_kernel(model: nn.Module, workload: Workload, parameters: list[nn.Parameter]) -> Kernel:
    rows: list[list[Tensor]] = [[] for _ in parameters]
    for i in range(workload.num_examples):
        logits = model(**{key: value[i : i + 1] for key, value in workload.batch.items()})[0]
        for logit in logits:
            found = torch.autograd.grad(
                logit, parameters, retain_graph=True, materialize_grads=True
            )
            for own, gradient in zip(rows, found, strict=True):
                own.append(gradient.flatten())
    total = rows[0][0].new_zeros(len(rows[0]), len(rows[0]))
    while rows:
        jacobian = torch.stack(rows.pop())
        total += jacobian @ jacobian.mT
    return total


def _loop(workload: Workload) -> Run:
    """The same in float32; parameters in turns where the gradients of all would be too many."""
    num_rows = workload.num_examples * workload.num_outputs
    turns = list(_turns(list(workload.parameters.values()), LOOP_BYTES // (4 * num_rows)))

    def run() -> Kernel:
        return torch.stack([_loop_kernel(workload.model, workload, turn) for turn in turns]).sum(0)

    return run


def _turns(parameters: list[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of at most `size` coordinates together, or one that is larger."""
    turn: list[nn.Parameter] = []
    for parameter in parameters:
        if turn and sum(p.numel() for p in turn) + parameter.numel() > size:
            yield turn
            turn = []
        turn.append(parameter)
    yield turn


def _quiet(prepare: Prepare) -> Prepare:
    """The same without the warnings that a package raises on its own account."""

    def quietly(workload: Workload) -> Run:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = prepare(workload)

        def quiet() -> Kernel:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return run()

        return quiet

    return quietly


# ------------------------------------------------------------------ torch.func


def _jacrev(workload: Workload) -> Run:
    """The recipe of PyTorch's NTK tutorial: per-example Jacobians, contracted per parameter."""
    values = {name: p.detach() for name, p in workload.parameters.items()}

    def outputs(values: dict[str, Tensor], text: dict[str, Tensor]) -> Tensor:
        batch = {key: value.unsqueeze(0) for key, value in text.items()}
        logits: Tensor = functional_call(workload.model, values, (), batch)
        return logits[0]

    def run() -> Kernel:
        jacobians = vmap(jacrev(outputs), (None, 0))(values, workload.batch)
        total = torch.zeros(())
        for jacobian in jacobians.values():
            rows = jacobian.flatten(2).flatten(0, 1)
            total = total + rows @ rows.mT
        return total

    return run


@_quiet
def _jvp(workload: Workload) -> Run:
    """Rows of the kernel as directional derivatives J(x') (∂f_a(x_i)/∂θ), one pass over all x'.

    Source: Malladi et al. 2023, the SGD kernel of their code (princeton-nlp/LM-Kernel-FT).
    """
    values = {name: p.detach() for name, p in workload.parameters.items()}
    parameters = list(workload.parameters.values())
    batches = [
        {key: value[start : start + JVP_BATCH] for key, value in workload.batch.items()}
        for start in range(0, workload.num_examples, JVP_BATCH)
    ]

    def derivative(tangent: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        def outputs(values: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(workload.model, values, (), batch)
            return logits

        change: Tensor = jvp(outputs, (values,), (tangent,))[1]
        return change.flatten()

    def run() -> Kernel:
        rows = []
        for logit in workload.model(**workload.first(JVP_EXAMPLES).batch).flatten():
            found = torch.autograd.grad(
                logit, parameters, retain_graph=True, materialize_grads=True
            )
            tangent = dict(zip(values, found, strict=True))
            rows.append(torch.cat([derivative(tangent, batch) for batch in batches]))
        return torch.stack(rows)

    return run


# ------------------------------------------------------------------ packages


@_quiet
def _dattri_llm(workload: Workload) -> Run:
    """Factors of every layer from hooks, one backward pass per output; Grams of output pairs."""
    from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig

    model, c = workload.model, workload.num_outputs
    hooks = HookManager(model, config=HookManagerConfig(linear_io=REGISTER_ALL))

    def run() -> Kernel:
        found = []
        with hooks.collect():
            for a in range(c):
                model.zero_grad(set_to_none=True)
                model(**workload.batch)[:, a].sum().backward()
                found.append(hooks.get_gradient())
        n = workload.num_examples
        kernel = torch.zeros(n, c, n, c)
        for a in range(c):
            for b in range(a, c):
                block = found[a].similarity(found[b], reduce="all", mode="auto")
                kernel[:, a, :, b], kernel[:, b, :, a] = block, block.mT
        return kernel.flatten(2).flatten(0, 1)

    return run


@_quiet
def _opacus(workload: Workload) -> Run:
    """Per-example gradients from hooks, one backward pass per output; one product per parameter."""
    from opacus import GradSampleModule

    model = workload.model.train()  # its hooks are silent in eval mode
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    sampled = GradSampleModule(model, loss_reduction="sum", strict=False)
    parameters = [p for p in sampled.parameters() if p.requires_grad]

    def run() -> Kernel:
        by_output = []
        for a in range(workload.num_outputs):
            sampled.zero_grad(set_to_none=True)
            sampled(**workload.batch)[:, a].sum().backward()
            by_output.append([p.grad_sample.flatten(1) for p in parameters])
            for parameter in parameters:
                parameter.grad_sample = None
        total = torch.zeros(())
        for own in zip(*by_output, strict=True):
            rows = torch.stack(own, dim=1).flatten(0, 1)
            total = total + rows @ rows.mT
        return total

    return run


LOOP = Contender("loop of backward passes", _loop)

PEERS = (
    LOOP,
    Contender("torch.func vmap(jacrev)", _jacrev, jacobians=1.3),
    Contender(
        "dattri-llm",
        _dattri_llm,
        "without cross terms of tied weights and RMSNorm, which it lacks",
        needs="dattri-llm",
        variant=untied_without_rms_norm,
    ),
    Contender(
        "opacus",
        _opacus,
        "without lm_head.bias, which it cannot do",
        needs="opacus",
        variant=without_head_bias,
        jacobians=1.3,
    ),
    Contender(
        "LM-Kernel-FT's algorithm",
        _jvp,
        f"rows of {JVP_EXAMPLES} text measured, time scaled to all",
        num_rows=JVP_EXAMPLES,
    ),
)
"""Everything that raykernel is compared with."""
