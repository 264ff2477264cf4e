"""How the examples of a kernel are captured, and what that takes: bytes, operations, time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from raykernel.compute import memory, process, sketches
from raykernel.compute.examples import Examples
from raykernel.compute.loading import model_bytes, tensor_bytes
from raykernel.compute.lora_error import adapted_layers
from raykernel.compute.memory import Footprint, PackedBytes, Sizes
from raykernel.compute.naming import named
from raykernel.compute.plan import token_flops
from raykernel.compute.sketches import Work
from raykernel.compute.spec import WorkerSpec
from raykernel.ntk import contract
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.groups import num_parameters
from raykernel.ntk.packed import packed_bytes
from raykernel.ntk.passes import selected_parameters
from raykernel.ntk.product import ProductBytes, product_bytes
from raykernel.ntk.rates import PassRate, pass_rate
from raykernel.ntk.sign_product import sign_product_bytes
from raykernel.ntk.stream import Streamer
from raykernel.ntk.witness import check_parameters
from raykernel.problem.models import Problem
from raykernel.store.groups import parts
from raykernel.terms import Kind, Method


class Captures:
    """The captures of one problem's examples.

    What is measured here is measured on the longest example, and depends on the spec alone.

    Args:
        spec: which kernel.
        problem: its model.
        itemsize: bytes of a stored number.

    Attributes:
        problem: as given.
        examples: those of the kernel.
    """

    def __init__(self, spec: WorkerSpec, problem: Problem, itemsize: int) -> None:
        self.problem = problem
        self.examples = Examples(spec.encoded, spec.compute.device)
        self._spec = spec
        self._itemsize = itemsize

    def learn(self) -> None:
        """Trace the longest examples, of finite weights.

        The engine checks itself against autograd on first sight, which takes a gradient of all
        parameters; and it learns the model's pattern here rather than from whichever cell comes
        first, so that cells do not depend on their order.
        """
        check_parameters(self.problem.module)
        for examples in (self.examples.longest[:1], self.examples.longest):
            for capture in self._of_pass(self.streamer, examples):
                del capture

    def of(
        self,
        examples: range,
        sizes: Sizes,
        *,
        tracer: Tracer | None = None,
        streamer: Streamer | None = None,
    ) -> Iterator[Capture]:
        """Factors of some examples by length: one transformer block's at a time, or all at once.

        Args:
            examples: which.
            sizes: how many are in a pass, and whether they are streamed.
            tracer: other than that of the kernel's parameters.
            streamer: likewise.

        Yields:
            A capture of some layers each, of all the examples.
        """
        tracer, streamer = tracer or self.tracer, streamer or self.streamer
        source: Tracer | Streamer = streamer if sizes.stream else tracer
        passes = list(self.examples.passes(examples, sizes.batch))
        for pieces in zip(*(self._of_pass(source, own) for own in passes), strict=True):
            process.trim_heap()
            yield Capture.concatenate(pieces, after_group=process.trim_heap)

    def _of_pass(self, source: Tracer | Streamer, examples: Sequence[int]) -> Iterator[Capture]:
        """Captures of one pass; what is wrong with an example is said with its id."""
        batch = self.examples.batch(examples)
        with named(self._spec, examples):
            if isinstance(source, Streamer):
                yield from source.stream(batch)
            else:
                yield source.capture(batch)

    def longest(self) -> Capture:
        """Factors of the longest example."""
        return self.tracer.capture(self.examples.batch(self.examples.longest[:1]))

    @cached_property
    def tracer(self) -> Tracer:
        """Of the kernel's parameters."""
        signs = any(kind.has_signs for kind in self._spec.kernel.kinds)
        return Tracer(self.problem.module, self.problem.readout, signs=signs)

    @cached_property
    def streamer(self) -> Streamer:
        """The same, block by block."""
        return Streamer(self.tracer)

    @property
    def groups(self) -> tuple[str, ...]:
        """Layer groups of a block."""
        return sketches.stored_groups(self._spec.kernel.projection, self.tracer.groups)

    @property
    def num_features(self) -> dict[str, int]:
        """Numbers that a gradient of one output has, by layer group: a kernel's rank at most."""
        counts = num_parameters(self.problem.module)
        projection = self._spec.kernel.projection
        if projection.is_on:
            plain = [name for name in self.groups if parts(name) is None]
            return {name: min(projection.dim, counts.get(name, projection.dim)) for name in plain}
        return counts

    @cached_property
    def adapted(self) -> dict[str, float]:
        """Layers whose LoRA's kernel is compared with their weight's: theory knows sgd alone."""
        kinds, method = self._spec.kernel.stored_kinds, self._spec.parameters.method
        compared = method is Method.lora and Kind.sgd in kinds
        return adapted_layers(self.problem.module) if compared else {}

    # ------------------------------------------------------------ what it takes

    @cached_property
    def work(self) -> Work:
        """What projecting examples like the longest takes."""
        parts = (p for own in self.longest().parts.values() for uses in own.values() for p in uses)
        return sketches.work_of(parts, self._spec.kernel.projection)

    def pass_rate(self, sizes: Sizes) -> PassRate:
        """Of this process now; no number of the kernel depends on it."""
        first = self.examples.longest[:1]

        def run(count: int) -> None:
            batch = self.examples.batch(first * count)
            if sizes.stream:
                for capture in self.streamer.stream(batch):
                    del capture
            else:
                self.tracer.capture(batch)

        num_tokens, device = self.examples.num_tokens(first[0]), self._spec.compute.device
        return pass_rate(run, num_tokens, device, most=sizes.batch)

    @property
    def product_flops(self) -> float:
        """Of the longest example's tokens with all weights: a pass has one, and one per output."""
        outputs, blocks = self._spec.num_labels, self.streamer.blocks
        of_token = token_flops(self.problem.module, outputs, streamed=blocks, again=False)
        num_tokens = self.examples.num_tokens(self.examples.longest[0])
        return max(of_token * num_tokens / (1 + outputs), 1.0)

    @cached_property
    def footprint(self) -> Footprint:
        """Bytes of the longest example."""
        batch = self.examples.batch(self.examples.longest[:1])
        edge = self._spec.kernel.block_size * self._spec.num_labels
        module, kinds = self.problem.module, self._spec.kernel.stored_kinds
        capture = self.tracer.capture(batch)
        by_group = capture.bytes_by_group()
        stream = self.streamer.num_bytes(batch)
        return Footprint(
            weights=model_bytes(module),
            audit=self._checking_bytes(),
            factors=sum(by_group.values()),
            largest=max(by_group.values()),
            forward=self.tracer.bytes_per_example(batch),
            stream=stream,
            packed=self._packed_bytes(capture) if contract.needs_signs_only(kinds) else None,
            output=len(self.groups) * len(kinds) * edge * edge * self._itemsize,
            product=self._product_bytes(batch) if self._spec.kernel.predicts else None,
            **sketches.num_bytes(capture, self._spec.kernel.projection),
        )

    def _checking_bytes(self) -> int:
        """Of a gradient of all parameters twice, for the engine's check against autograd."""
        module, precision = self.problem.module, self._spec.kernel.precision
        selected = list(selected_parameters(module).values())
        own = 2 * tensor_bytes(selected)
        if not precision.is_reduced:
            return own
        # It is compared with the same model in float32, which checks itself, too.
        wider = torch.float32.itemsize // next(iter(selected)).dtype.itemsize
        return wider * (model_bytes(module) + own)

    def _packed_bytes(self, capture: Capture) -> PackedBytes:
        """Of one example; segments are known once a batch was streamed."""
        by_group = packed_bytes(capture)
        segments = [sum(by_group.get(g, 0) for g in own) for own in self.streamer.segments]
        return PackedBytes(whole=sum(by_group.values()), segment=max(segments))

    def _product_bytes(self, batch: dict[str, torch.Tensor]) -> ProductBytes:
        if Kind.asigngd in self._spec.kernel.kinds:
            return sign_product_bytes(self.tracer, batch, max_bytes=memory.GRAM_BYTES)
        return product_bytes(self.problem.module, self.problem.readout, batch)

    def sizes(self) -> Sizes:
        """Chunks that fit the memory."""
        spec = self._spec
        block_size, num_outputs = spec.kernel.block_size, spec.num_labels
        if not spec.kernel.projection.is_on:
            return memory.chunk_sizes(
                self.footprint, spec.compute, block_size=block_size, num_outputs=num_outputs
            )
        footprint = self.footprint
        return memory.sketch_sizes(
            footprint,
            spec.compute,
            block_size=block_size,
            num_outputs=num_outputs,
            num_examples=len(self.examples),
            matrices=self.work.chunk_flops / self.product_flops,
        )
