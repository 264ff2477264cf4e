"""A second pass in other company, in every worker's first block: is f a function of the example?

A kernel of examples means something only if what the model says of one does not depend on chance,
on the examples beside it, or on padding. The engine compares captures with autograd for every new
pattern of calls, but where a model mixes examples it turns to passes of one, quietly; and what
lengths it has met is chance. So the example with most padding in the first block is passed through
the model alone, and has to get the logits that were captured of it; where the engine has given up
batches, it is passed in company instead. One short forward pass, to which the block is hundreds.

Tolerances. Another batch is another order of summation in every product: errors of some machine
epsilons by layer, which add up like a random walk, and the logits' relative error is theirs times
the condition of what comes after. Measured between company and alone on SmolLM2-135M, in float32:
2e-7 of the largest logit. The limits are a thousand machine epsilons of float32, ten of tf32 and
bfloat16, which leaves hundreds of what was measured; dropout and neighbours change logits by
percents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raykernel.compute.captures import Captures
from raykernel.compute.examples import split
from raykernel.compute.memory import Sizes
from raykernel.compute.naming import named
from raykernel.compute.spec import WorkerSpec
from raykernel.errors import InconsistentError
from raykernel.ntk import witness
from raykernel.ntk.passes import prepared
from raykernel.problem.models import Problem
from raykernel.terms import Precision

TOLERANCE = {
    Precision.float64: 1e-6,  # rotary angles and some norms are float32 inside transformers
    Precision.float32: 1e-4,
    Precision.tf32: 1e-2,
    Precision.bfloat16: 1e-1,
}
"""Relative change that company and padding of its examples may make by rounding."""


def check_second_pass(
    spec: WorkerSpec,
    captures: Captures,
    rows: range,
    sizes: Sizes,
    logits: Float[np.ndarray, "n c"],
) -> None:
    """Refuse a model that says something else of an example in a second pass.

    Args:
        spec: which kernel.
        captures: how its examples were captured.
        rows: examples of the block's rows.
        sizes: how many of them were in a pass.
        logits: what was captured of them.

    Raises:
        InconsistentError: with the layer whose output differs first, and the example.
    """
    company = _most_padded(captures, next(split(rows, sizes.rows)), sizes.batch)
    example, beside = company[-1], len(company) > 1
    apart = beside and captures.tracer.batched
    second = company[-1:] if apart or not beside else [company[0], example]
    limit = TOLERANCE[spec.kernel.precision]
    allowed = limit * max(float(np.abs(logits).max()), 1e-3)
    problem = captures.problem
    with prepared(problem.module, ()), torch.no_grad(), named(spec, [example]):
        found = _logits(problem, captures, second)[-1]
        change = float(np.abs(found - logits[example - rows.start]).max())
        if change <= allowed:
            return
        batches = [captures.examples.batch(own) for own in ([example], company)]
        _explain(problem, batches, limit)
        raise InconsistentError(
            f"the logits: a second pass over an example changed them by {change:.1e}, expected at "
            f"most {allowed:.1e} by rounding. Remove what the model keeps from one pass to the "
            "next.",
            row=0,
        )


def _most_padded(captures: Captures, rows: range, batch: int) -> Sequence[int]:
    """The pass of some rows whose last example is shortest against its first, or by itself."""
    tokens, passes = captures.examples.num_tokens, captures.examples.passes(rows, batch)

    def padding(own: Sequence[int]) -> tuple[bool, int, int]:
        return len(own) > 1, tokens(own[0]) - tokens(own[-1]), -tokens(own[-1])

    return max(passes, key=padding)


def _logits(
    problem: Problem, captures: Captures, examples: Sequence[int]
) -> Float[np.ndarray, "n c"]:
    logits = problem.readout(problem.module, captures.examples.batch(examples))
    found: np.ndarray = logits.double().cpu().numpy()
    return found


def _explain(problem: Problem, batches: Sequence[dict[str, Tensor]], limit: float) -> None:
    """Name the layer: by chance, or by company, of which the example is the last."""
    module, readout = problem.module, problem.readout
    witness.check_steady(module, readout, batches[0], limit)
    alone, beside = (list(witness.outputs(module, readout, batch)) for batch in batches)
    last = len(beside[-1].output) - 1
    if difference := witness.first_difference(alone, beside, (0, last), limit):
        layer, change = difference
        raise InconsistentError(
            f"{layer}: its output for an example alone and beside others differs by {change:.1e} "
            f"of the largest, expected at most {limit:.0e} by rounding: each example by itself. "
            "Take batch statistics or attention across examples out of the model, and mask "
            "padding; or take examples one by one with compute.batch_size=1.",
            row=0,
        )
