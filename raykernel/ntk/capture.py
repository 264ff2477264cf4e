"""One forward and c backward passes → the logits and every layer's factors of ∂f/∂θ.

The pass goes over a whole batch as long as the model treats its examples apart; that is checked,
and a model that does not (parameters projected once for the whole batch, tokens first, experts)
is traced one example at a time. Parameters that no rule covers are differentiated through their
module alone; where that is not possible either, they need a gradient themselves in passes of one
example, which is theirs. Either way the result is exact; only the cost differs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykernel.errors import InconsistentError, is_out_of_memory
from raykernel.ntk import audit, witness
from raykernel.ntk.backward import Gradients, output_gradients
from raykernel.ntk.batches import Batch, Readout, check_batch, example, num_examples
from raykernel.ntk.factors import (
    Part,
    compress,
    examples,
    join_calls,
    join_examples,
    num_bytes,
    one_example,
)
from raykernel.ntk.groups import ROOT, find_groups
from raykernel.ntk.passes import (
    check_logits,
    prepared,
    saved_storages,
    selected_parameters,
)
from raykernel.ntk.recorder import Call, Recorder, Recording, Watched

Parts = dict[str, dict[str, tuple[Part, ...]]]
"""Parts by layer group and parameter."""


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """What the kernel needs of some examples: their logits and the factors of their gradients."""

    logits: Float[Tensor, "n c"]
    parts: Parts
    crosses: dict[str, tuple[str, str]]
    """The two groups that share a parameter, by cross group."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Every layer group, cross groups last."""
        return (*self.parts, *self.crosses)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Parameters by layer group."""
        return {group: tuple(by_name) for group, by_name in self.parts.items()}

    @property
    def num_bytes(self) -> int:
        """Memory of the factors, in bytes."""
        return sum(self.bytes_by_group().values())

    def bytes_by_group(self) -> dict[str, int]:
        """Memory of the factors by layer group, in bytes."""
        return {
            group: sum(num_bytes(part) for parts in by_name.values() for part in parts)
            for group, by_name in self.parts.items()
        }

    @staticmethod
    def concatenate(
        captures: Sequence[Capture], *, after_group: Callable[[], None] | None = None
    ) -> Capture:
        """Captures of one tracer as one, along examples; token counts may differ.

        The captures give up their factors layer by layer, so that never more than one layer's
        exist twice; they are empty afterwards.

        Args:
            captures: at least one.
            after_group: called whenever a layer's factors have been joined and the pieces freed.

        Returns:
            All their examples, in order.
        """
        first = captures[0]
        if len(captures) == 1:
            return first
        counts = [len(capture.logits) for capture in captures]
        parts: Parts = {}
        for group in list(first.parts):
            own = [capture.parts.pop(group) for capture in captures]
            names = dict.fromkeys(name for by_name in own for name in by_name)
            parts[group] = {
                name: join_examples([by_name.get(name, ()) for by_name in own], counts)
                for name in names
            }
            del own
            if after_group is not None:
                after_group()
        return Capture(torch.cat([c.logits for c in captures]), parts, first.crosses)


_MAX_REFUSALS = 3
"""Shapes of batches that may turn out not to be apart before no batch is tried any more.

A table of as many positions as there are examples looks like examples, but only in that shape.
"""


class Tracer:
    """Captures examples of one model; its layer groups are fixed when it is made.

    The parameters with `requires_grad` are the kernel's. They need no gradient during a pass, and
    modules are in eval mode; both are as before afterwards, also after an error.

    Args:
        model: the network.
        readout: logits (n, c) of a batch of n examples, a dict of tensors with leading n.
        signs: whether kernels of signs are wanted, which need to know what rounding is relative to.

    Raises:
        InputError: if no parameter needs a gradient.
    """

    def __init__(self, model: nn.Module, readout: Readout, *, signs: bool = False) -> None:
        self._signs = signs
        self.model = model
        self.readout = readout
        self._parameters = selected_parameters(model)
        self._groups = find_groups(model)
        paths = [path or ROOT for path, _ in model.named_modules()]
        modules = dict(zip(paths, model.modules(), strict=True))
        self.modules = {group: modules[group] for group in self._groups.members}
        self.crosses = self._groups.crosses
        # What the first passes teach about the model.
        self._local: dict[str, nn.Module] = {}
        self._through_model: set[str] = set()
        self._audited: set[object] = set()
        self._clone = False
        self._refused: set[tuple[torch.Size, ...]] = set()
        self._batched = True

    @property
    def groups(self) -> tuple[str, ...]:
        """Every layer group in registration order, cross groups of tied parameters last."""
        return self._groups.names

    @property
    def through_model(self) -> bool:
        """Whether some parameter takes a gradient of the whole model."""
        return bool(self._through_model)

    @property
    def batched(self) -> bool:
        """Whether the last batch was traced in one pass, not one example at a time."""
        return self._batched

    @property
    def fallbacks(self) -> dict[str, str]:
        """Parameters that no rule covers so far: `module` or `model`, what is differentiated."""
        return {
            **dict.fromkeys(self._local, "module"),
            **dict.fromkeys(sorted(self._through_model), "model"),
        }

    def capture(self, batch: Batch) -> Capture:
        """Logits and gradient factors of a batch.

        Cost: one forward pass and one backward pass to the activations per output; the first
        batch, and the first of every new pattern of calls, is checked against plain autograd.

        Args:
            batch: tensors whose leading dimension is the examples.

        Returns:
            The capture of its examples.

        Raises:
            InputError: if the batch is empty or uneven, or the readout is not (n, c).
            InconsistentError: if two passes over one example differ.
            NonFiniteError: if logits or gradients are NaN or infinite.
        """
        n = check_batch(batch)
        with self.prepared():
            if n > 1 and not self._audited:
                self._trace_one(batch, 0)
            shapes = tuple(value.shape for value in batch.values())
            given_up = len(self._refused) >= _MAX_REFUSALS or bool(self._through_model)
            if n > 1 and not given_up and shapes not in self._refused:
                capture = self._trace(batch)
                if capture is not None:
                    self._batched = True
                    return capture
                self._refused.add(shapes)
            self._batched = n == 1
            return Capture.concatenate([self._trace_one(batch, i) for i in range(n)])

    def bytes_per_example(self, batch: Batch) -> int:
        """Peak memory of a pass over `batch` per example, in bytes, without the weights.

        Measured by a forward pass over the first example, as long as the batch is padded.

        Args:
            batch: tensors whose leading dimension is the examples.

        Returns:
            Saved activations, watched outputs with their gradients, and the factors.
        """
        check_batch(batch)
        with self.prepared():
            self._trace_one(batch, 0)
            with saved_storages(self.model) as storages:
                recording = self._watch(example(batch, 0))
        assert isinstance(recording, Recording)
        num_outputs = recording.logits.shape[1]
        calls = sum(call.num_bytes for call in recording.calls)
        outputs = [c.output.numel() * c.output.element_size() for c in recording.calls]
        # All gradients once, and those of one call on their way from one place to the next.
        gradients = num_outputs * (sum(outputs) + 2 * max(outputs, default=0))
        whole = sum(self._parameters[name].numel() for name in self._through_model)
        return sum(storages.values()) + calls + gradients + 4 * num_outputs * whole

    def _trace_one(self, batch: Batch, index: int) -> Capture:
        capture = self._trace(example(batch, index))
        assert capture is not None
        return capture

    def _trace(self, batch: Batch) -> Capture | None:
        """A capture in one pass, or None if the examples of the batch are not apart."""
        n = num_examples(batch)
        while True:
            recording = self._watch(batch)
            if recording is None:
                return None
            if recording.uncovered:
                for name, module in recording.uncovered.items():
                    self._demote(name, module)
                if n > 1 and self._through_model:
                    return None
                continue
            capture = self._differentiate(recording, batch)
            pattern = _pattern(recording)
            if capture is None or pattern in self._audited:
                return capture
            wrong = self._wrong_parameters(capture, batch)
            if wrong is None or (wrong and n > 1):
                return None
            if not wrong:
                self._audited.add(pattern)
                return capture
            for name in wrong:
                self._demote(name, None)

    def _watch(self, batch: Batch) -> Recording | None:
        n = num_examples(batch)
        lengths = frozenset(value.shape[1] for value in batch.values() if value.dim() > 1)
        watched = self.watched(self.modules)
        for clone in (False, True) if not self._clone else (True,):
            recorder = Recorder(watched, n, lengths=lengths, clone=clone)
            try:
                with recorder.watching():
                    logits = self.readout(self.model, batch)
            except Exception as error:
                # An in-place change of a leaf is cured by cloning; a value expanded to all
                # examples where the model did not expect it, by tracing them one by one.
                if is_out_of_memory(error) or (n == 1 and clone):
                    raise
                continue
            if recorder.modified():
                continue
            self._clone = clone
            check_logits(self.model, self.readout, batch, logits)
            return Recording(logits, tuple(recorder.calls), recorder.uncovered)
        return None

    def watched(self, modules: Mapping[str, nn.Module]) -> Watched:
        """Selected parameters as a recorder reads them, and modules (by layer group) to follow."""
        return Watched(
            names={id(p): k for k, p in self._parameters.items() if k not in self._through_model},
            owners=self._groups.owners,
            modules=dict(modules),
            local=self._local,
            scaled=self._signs,
        )

    def _demote(self, name: str, module: nn.Module | None) -> None:
        """Take a parameter from the rules to its module's gradient, or to the whole model's."""
        parameter = self._parameters[name]
        owned = module is not None and any(p is parameter for p in module.parameters(recurse=False))
        if module is not None and owned and name not in self._local:
            self._local[name] = module
        else:
            self._local.pop(name, None)
            self._through_model.add(name)
            parameter.requires_grad_(True)

    def _differentiate(self, recording: Recording, batch: Batch) -> Capture | None:
        logits, calls = recording.logits, recording.calls
        unruled = self._unruled()
        tensors = [*(call.output for call in calls), *unruled.values()]
        doubtful = self._doubtful(recording)
        features = [*(call.features for call in calls), *(p.dim() for p in unruled.values())]
        gradients = output_gradients(logits, tensors, features=features, keep=bool(doubtful))
        if doubtful and not _is_separated(logits, calls, gradients, doubtful):
            return None
        of_unruled = [gradients.pop() for _ in unruled][::-1]
        parts = self.parts_of(calls, gradients, self._groups.members, batch)
        for name, of_parameter in zip(unruled, of_unruled, strict=True):
            if of_parameter is not None:
                part, finite = compress(one_example(of_parameter))
                group = self._groups.owners[name][0]
                parts[group][name] = (part,)
                if not finite:
                    self.raise_non_finite(batch, group, part)
        return Capture(logits.detach(), parts, self.crosses)

    def parts_of(
        self,
        calls: Sequence[Call],
        gradients: list[Gradients],
        groups: Iterable[str],
        batch: Batch,
    ) -> Parts:
        """Factors of some layer groups, from the gradients of their calls' outputs.

        Each call's gradients are let go of once its factors exist, so that never more than one
        call's are there twice.

        Args:
            calls: every call of these groups' parameters.
            gradients: of every model output, by call; None in all places afterwards.
            groups: the groups; those without a call have no part.
            batch: the examples, for an error message.

        Returns:
            Parts by group and parameter.

        Raises:
            NonFiniteError: if a gradient is NaN or infinite.
        """
        found: dict[tuple[str, str], list[Part]] = {}
        for place, call in enumerate(calls):
            of_call, gradients[place] = gradients[place], None
            for name, part in ({} if of_call is None else call.build(of_call)).items():
                found.setdefault((dict(call.groups)[name], name), []).append(part)
            del of_call
        parts: Parts = {group: {} for group in groups}
        broken: tuple[str, Part] | None = None
        for group, name in list(found):
            compressed = [compress(part) for part in join_calls(found.pop((group, name)))]
            parts.setdefault(group, {})[name] = tuple(part for part, _ in compressed)
            wrong = next((part for part, finite in compressed if not finite), None)
            broken = broken if wrong is None else (group, wrong)
        if broken is not None:
            self.raise_non_finite(batch, *broken)
        return parts

    def raise_non_finite(self, batch: Batch, group: str, part: Part) -> NoReturn:
        """Name the layer at which NaN or infinity comes in, and the example (NonFiniteError)."""
        row = witness.first_row(part.gradients)
        witness.raise_non_finite(self.model, self.readout, batch, gradient_of=group, example=row)

    def _unruled(self) -> dict[str, nn.Parameter]:
        return {name: self._parameters[name] for name in sorted(self._through_model)}

    def _doubtful(self, recording: Recording) -> set[int]:
        """Calls whose examples may not be where their shape says."""
        if len(recording.logits) == 1 or not recording.logits.requires_grad:
            return set()
        known = _pattern(recording) in self._audited
        return {k for k, call in enumerate(recording.calls) if call.ambiguous or not known}

    def _wrong_parameters(self, capture: Capture, batch: Batch) -> set[str] | None:
        n = num_examples(batch)
        last = slice(n - 1, n)
        parts: dict[str, list[Part]] = {}
        for group in capture.parts.values():
            for name, own in group.items():
                parts.setdefault(name, []).extend(examples(part, last) for part in own)
        ruled = {k: p for k, p in self._parameters.items() if k not in self._through_model}
        wrong = audit.wrong_parameters(
            self.model, self.readout, example(batch, n - 1), ruled, parts, capture.logits[last]
        )
        if wrong is None and n == 1:
            witness.check_steady(self.model, self.readout, batch, tolerance=1e-6)
            raise InconsistentError(
                "two passes over the same example gave different logits, expected a function of "
                "the example. Remove state from the model.",
                row=0,
            )
        return wrong

    def prepared(self) -> AbstractContextManager[None]:
        """Context of a pass: eval mode, and gradients only of parameters without a rule."""
        return prepared(self.model, self._unruled().values())


def _pattern(recording: Recording) -> object:
    return pattern_of(recording.calls, len(recording.logits))


def pattern_of(calls: Sequence[Call], n: int) -> object:
    """What has to be the same for an audit to hold: which calls, and where their examples are."""
    return n > 1, tuple((call.groups, call.layout, len(call.shape)) for call in calls)


def _is_separated(
    logits: Float[Tensor, "n c"],
    calls: Sequence[Call],
    gradients: Sequence[Gradients],
    doubtful: Collection[int],
) -> bool:
    """Whether these calls' gradients of the first output are apart, by one backward pass more."""
    scales = audit.example_scales(logits)
    own = {k: of_call[0] for k in doubtful if (of_call := gradients[k]) is not None}
    scaled = torch.autograd.grad(
        (logits[:, 0] * scales).sum(), [calls[k].output for k in own], materialize_grads=True
    )
    return audit.separated(list(own.values()), scaled, scales)
