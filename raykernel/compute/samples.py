"""Errors of a kernel that a few of its examples show, measured by its first worker."""

from __future__ import annotations

import dataclasses

import torch

from raykernel.compute import memory, sketches
from raykernel.compute.captures import Captures
from raykernel.compute.loading import load
from raykernel.compute.lora_error import compared_parameters, lora_distortion
from raykernel.compute.memory import Sizes
from raykernel.compute.spec import WorkerSpec
from raykernel.config import Json
from raykernel.ntk import contract
from raykernel.ntk.capture import Tracer
from raykernel.ntk.rates import Rates
from raykernel.ntk.selections import varying
from raykernel.ntk.stream import Streamer
from raykernel.problem.models import set_matmul_precision
from raykernel.problem.probe import Head
from raykernel.terms import Precision


def precision_error(spec: WorkerSpec, head: Head | None, captures: Captures) -> dict[str, Json]:
    """Relative Frobenius errors of a reduced precision on the longest examples.

    Args:
        spec: which kernel.
        head: its linear head, if it has one.
        captures: of its examples.

    Returns:
        Errors of the whole kernel and of the worst layer group.
    """
    examples = captures.examples
    batch = examples.batch(examples.longest)
    capture = captures.tracer.capture(batch)
    found = contract.gram(capture, capture)
    kernel = dataclasses.replace(spec.kernel, precision=Precision.float32)
    exact = load(dataclasses.replace(spec, kernel=kernel), head)
    capture = Tracer(exact.module, exact.readout).capture(batch)
    expected = contract.gram(capture, capture)
    set_matmul_precision(spec.kernel.precision)
    errors = {g: float((found[g] - expected[g]).norm()) for g in expected}
    whole = float(torch.stack(list(expected.values())).sum(0).norm())
    total = float((torch.stack([found[g] - expected[g] for g in expected])).sum(0).norm())
    worst = max(errors, key=lambda group: errors[group])
    return {
        "relative_error": total / whole if whole else 0.0,
        "worst_group": worst,
        "worst_group_error": errors[worst] / whole if whole else 0.0,
        "examples": len(examples.longest),
    }


def projected_error(
    spec: WorkerSpec, captures: Captures, sizes: Sizes, rates: Rates
) -> dict[str, Json]:
    """Errors of a projection on the first examples, beside the bound for all of them.

    Args:
        spec: which kernel.
        captures: of its examples.
        sizes: how they are captured.
        rates: of the device.

    Returns:
        See `sketches.distortion`.
    """
    num_examples = len(captures.examples)
    return sketches.distortion(
        captures.of(range(min(sketches.SAMPLE, sizes.rows, num_examples)), sizes),
        spec.kernel.projection,
        num_gradients=num_examples * spec.num_labels,
        rates=rates,
        max_bytes=memory.GRAM_BYTES,
    )


def lora_error(spec: WorkerSpec, captures: Captures, sizes: Sizes, rates: Rates) -> dict[str, Json]:
    """Errors of a LoRA kernel on the first examples, beside the bound for all of them.

    Args:
        spec: which kernel.
        captures: of its examples.
        sizes: how they are captured.
        rates: of the device.

    Returns:
        See `lora_error.lora_distortion`.
    """
    problem, examples, adapted = captures.problem, captures.examples, captures.adapted
    with varying(problem.module, compared_parameters(adapted)):
        tracer = Tracer(problem.module, problem.readout)
        streamer = Streamer(tracer)
        factors = tracer.capture(examples.batch(examples.longest[:1])).num_bytes
        most = min(sketches.SAMPLE, len(examples))
        sample = memory.sample_size(factors, captures.footprint, spec.compute, most=most)
        return lora_distortion(
            captures.of(range(sample), sizes, tracer=tracer, streamer=streamer),
            adapted,
            rank=spec.parameters.r,
            num_gradients=len(examples) * spec.num_labels,
            rates=rates,
            max_bytes=memory.GRAM_BYTES,
        )
