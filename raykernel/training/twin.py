"""What a worker does for the linear twin of a trial: it trains f̄, and measures f and f̄ at the end.

    step → (load, go on from the checkpoint) → train f̄ → … → θ̄_T stored → f, f̄(θ̄_T), f̄(θ_T)

f̄_A = f̄(θ̄_T) has followed its own gradients and f̄_B = f̄(θ_T) is the expansion at the parameters of
the run: ‖f - f̄_B‖ is what curvature does in one step of that size, ‖f - f̄_A‖ adds that the two ways
part. They differ in what they say: at a weak pull both models fit train, and are near each other
there however far they went (Rahimi Afzal et al. 2025 define A; Malladi et al. 2023 measure B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raykernel.analysis.closeness import closeness, mean_distance
from raykernel.analysis.regression import score
from raykernel.compute import examples, process
from raykernel.compute.tensorfile import read_tensors, write_tensors
from raykernel.compute.weights import assign
from raykernel.errors import DivergedError
from raykernel.ntk.matmul import fast_products
from raykernel.ntk.operator_norm import norm_of_change, norms_on_sphere, operator_norm
from raykernel.ntk.passes import checked_logits, selected_parameters
from raykernel.ntk.product import tangents
from raykernel.store.trials import checksum
from raykernel.terms import Loss, Split
from raykernel.training.bounds import why_no_flow
from raykernel.training.finetune import distance, objective
from raykernel.training.linearized import Linearized, read_linearized_logits
from raykernel.training.spec import (
    AdaptedModule,
    Receipt,
    Steepness,
    TrialSpec,
    TwinResult,
    TwinSplit,
)
from raykernel.training.trial import Start, advance

_ADAPTER = "default"
"""PEFT's name of the only adapter."""

_Logits = Float[np.ndarray, "n c"]


class Twin:
    """A model at θ_0 in a process of its own, and how far its linear twin is trained.

    Args:
        spec: of the trial, which has ended.
    """

    def __init__(self, spec: TrialSpec) -> None:
        start = Start(spec, twin=True)
        self._spec, self._problem, self._pass = spec, start.problem, start.pass_size
        self._batches = start.batches
        probe = start.batches.batch(start.batches.longest)
        linearized = Linearized(start.problem.module, start.problem.readout, probe)
        self._trainer = start.trainer(
            linearized, read_linearized_logits, spec.files.twin_checkpoint
        )
        self._result: TwinResult | None = None

    @fast_products()
    def train(self, until: int) -> Receipt[TwinResult]:
        """Train the twin up to a step, with a checkpoint at every evaluation.

        Args:
            until: steps done afterwards; at the last one, both models are compared.

        Returns:
            What was found on the way.

        Raises:
            DivergedError: if the twin's loss or gradient stop being finite.
        """
        trainer, files = self._trainer, self._spec.files
        try:
            points = advance(trainer, until, files.twin_checkpoint)
        except DivergedError as error:
            raise DivergedError(
                f"The linear twin has left the numbers while its run, which is stored, has not: "
                f"{error}"
            ) from error
        if trainer.step == self._spec.training.steps and self._result is None:
            write_tensors(files.twin, trainer.values(), {"step": trainer.step})
            self._result = self._compared()
        return Receipt(points, self._result, self._pass, trainer.halved)

    # ------------------------------------------------------------ at the last step

    @property
    def _is_flow(self) -> bool:
        spec = self._spec
        num_train = len(spec.splits[Split.train])
        return why_no_flow(spec.training, spec.regularization, num_train) is None

    def _compared(self) -> TwinResult:
        spec, module = self._spec, self._problem.module
        start = {name: p.detach().clone() for name, p in selected_parameters(module).items()}
        twin = {name: value.to(start[name]) for name, value in self._trainer.values().items()}
        last = {n: v.to(start[n]) for n, v in read_tensors(spec.files.last)[0].items()}
        bounded = self._is_flow  # norms cost as much as many steps
        f0 = {split: self._logits(split) for split in Split}
        a = {split: f0[split] + self._change(split, start, twin) for split in Split}
        b = {split: f0[split] + self._change(split, start, last) for split in Split}
        moved = distance(last, start)
        steepness = self._steepness(last, moved) if bounded else None
        assign(module, last)
        try:
            f = {split: self._logits(split) for split in Split}
            modules = adapted_modules(module)
        finally:
            assign(module, start)
        return TwinResult(
            splits={split: self._split(split, f0, f, a, b) for split in Split},
            start=distance(start, {name: torch.zeros_like(v) for name, v in start.items()}),
            deviation=moved,
            twin_deviation=distance(twin, start),
            apart=distance(last, twin),
            modules=modules,
            start_risk=summed_risk(f0[Split.train], self._labels(Split.train), spec.training.loss),
            remainder=float(np.linalg.norm(f[Split.train] - b[Split.train])),
            distance=float(np.linalg.norm(f[Split.train] - a[Split.train])),
            steepness=steepness,
            seconds=self._trainer.seconds,
            last_checksum=checksum(spec.files.last),
            weights_checksum=checksum(spec.files.twin),
            peak_memory_bytes=process.peak_bytes(spec.compute.device),
        )

    def _split(
        self,
        split: Split,
        f0: Mapping[Split, _Logits],
        f: Mapping[Split, _Logits],
        a: Mapping[Split, _Logits],
        b: Mapping[Split, _Logits],
    ) -> TwinSplit:
        labels, metric = self._labels(split), self._spec.metric
        scores = [score(metric, labels, own[split]) for own in (f0, f, a, b)]
        return TwinSplit(
            num_examples=len(labels),
            change=mean_distance(f[split], f0[split]),
            a=closeness(f[split], a[split]),
            b=closeness(f[split], b[split]),
            start_score=scores[0],
            score=scores[1],
            score_a=scores[2],
            score_b=scores[3],
        )

    def _passes(self, split: Split) -> list[dict[str, Tensor]]:
        return [
            self._batches.batch(own) for own in examples.split(self._spec.splits[split], self._pass)
        ]

    def _logits(self, split: Split) -> _Logits:
        module, readout = self._problem.module.eval(), self._problem.readout
        with torch.no_grad():
            found = [checked_logits(module, readout, batch) for batch in self._passes(split)]
        logits: _Logits = torch.cat(found).double().cpu().numpy()
        return logits

    def _change(
        self, split: Split, start: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> _Logits:
        """J_0(x) (θ − θ_0)."""
        direction = {name: values[name] - own for name, own in start.items()}
        module, readout = self._problem.module, self._problem.readout
        _, change = tangents(module, readout, self._passes(split), direction)
        found: _Logits = change.double().cpu().numpy()
        return found

    def _steepness(self, last: Mapping[str, Tensor], moved: float) -> Steepness:
        module, readout = self._problem.module.eval(), self._problem.readout
        of = module, readout, self._passes(Split.train)
        samples = self._spec.training.twin_samples
        at_start = operator_norm(*of)
        sampled = norms_on_sphere(*of, radius=moved, samples=samples)
        change = norm_of_change(*of, last)
        before = assign(module, last)
        try:
            at_end = operator_norm(*of)
        finally:
            assign(module, before)
        return Steepness(at_start, at_end, tuple(sampled), change)

    def _labels(self, split: Split) -> Int[np.ndarray, " n"]:
        return np.array([self._spec.labels[i] for i in self._spec.splits[split]], dtype=np.int64)


def summed_risk(
    logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], loss: Loss
) -> float:
    """R of `analysis.bounds`: Σ ||f - y||², without ½, or the summed cross-entropy.

    Args:
        logits: f.
        labels: y.
        loss: which.

    Returns:
        The sum.
    """
    found = objective(torch.from_numpy(logits), torch.from_numpy(labels), loss, reduction="sum")
    return float(found) * (2 if loss is Loss.squared else 1)


def adapted_modules(module: nn.Module) -> tuple[AdaptedModule, ...]:
    """||s B A||_F of every LoRA in a module, and the same over ||W_0||_F.

    By the r × r products, ||BA||² = ⟨BᵀB, AAᵀ⟩: the matrix itself is not formed.

    Args:
        module: with the adapters at some values.

    Returns:
        One per adapted matrix, in order; none of a model without adapters.
    """
    found = []
    for path, layer in module.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        low = layer.get_submodule(f"lora_A.{_ADAPTER}").get_parameter("weight").detach().double()
        high = layer.get_submodule(f"lora_B.{_ADAPTER}").get_parameter("weight").detach().double()
        square = float(((high.T @ high) * (low @ low.T)).sum())
        scaling: dict[str, float] = layer.scaling
        change = abs(scaling[_ADAPTER]) * math.sqrt(max(square, 0.0))
        weight = layer.get_submodule("base_layer").get_parameter("weight").detach()
        whole = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
        found.append(AdaptedModule(path, change, change / whole))
    return tuple(found)
