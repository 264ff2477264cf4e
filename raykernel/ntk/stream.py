"""The factors of a model block by block: its last transformer block first, one at a time.

    forward    h_1 → … → h_L → logits      only the inputs h_l of the blocks are kept
    backward   block l runs again from h_l; with ∂f/∂h_{l+1} at its output, its factors and ∂f/∂h_l

The peak is one block's factors instead of all of them, for one forward pass more, (2 + c) for
(1 + c); many batches may go through the blocks side by side. It is checkpointing (Chen et al.
2016, arXiv:1604.06174) with the kernel taken on the way back.

A model is such a chain if the elements of one of its module lists run once each, in order, each
on the output of the one before. That, and that nothing else passes a gradient around the blocks,
is not read off its code: every new pattern of calls is compared once with the capture of the
whole model, and where they differ the whole capture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raykernel.errors import is_out_of_memory
from raykernel.ntk.backward import Gradients, gradients_of
from raykernel.ntk.batches import Batch, check_batch
from raykernel.ntk.capture import Capture, Parts, Tracer, pattern_of
from raykernel.ntk.contract import gram
from raykernel.ntk.passes import check_logits, saved_storages
from raykernel.ntk.recorder import Call, Recorder

_TOLERANCE, _NOISE = 4e-6, 1e-4
"""Relative error of a squared gradient, 32 roundings of float32; rounding of one that is zero,
relative to the layer group with the largest."""


class NotAChainError(Exception):
    """The blocks did not run one after the other."""


@dataclass(slots=True, eq=False)
class _Input:
    """What a block was called with."""

    hidden: Tensor
    others: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(slots=True, eq=False)
class _Way:
    """A batch on its way back through the chain."""

    batch: Batch
    logits: Tensor
    calls: tuple[Call, ...]
    """Those outside the blocks."""
    gradients: list[Gradients]
    """Of the calls outside, as far as they are known."""
    upstream: Gradients
    """Of the output of the block that comes next."""
    inputs: list[_Input] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    capture: Capture
    key: object
    """What has to be known for the capture to be trusted; None: it never is."""


class Streamer:
    """Captures a model's examples block by block.

    Args:
        tracer: of the model.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._blocks = find_blocks(tracer.model)
        self._groups = _groups_by_block(self._blocks, tracer)
        if self._groups is None:
            self._blocks = {}
        self._first: int | None = None
        self._known: set[object] = set()

    @property
    def segments(self) -> tuple[tuple[str, ...], ...]:
        """Layer groups in the order in which they come; all at once if the model is no chain.

        Known once a batch went through.
        """
        if not self._blocks or self._groups is None:
            return (self._tracer.groups,)
        blocks = self._groups[self._first or 0 :]
        inside = {group for groups in blocks for group in groups}
        outside = tuple(group for group in self._tracer.groups if group not in inside)
        return (*reversed(blocks), outside)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Transformer blocks that are gone through one by one; known once a batch went through."""
        return tuple(self._blocks.values())[self._first or 0 :]

    def stream(self, batch: Batch) -> Iterator[Capture]:
        """Captures of a batch, segment by segment; each is complete for its layer groups.

        Args:
            batch: tensors whose leading dimension is the examples.

        Yields:
            One capture per segment.

        Raises:
            InputError: as `Tracer.capture` does.
            NonFiniteError: likewise.
        """
        check_batch(batch)
        way = self._start(batch)
        whole: Capture | None = None
        for groups in self.segments:
            capture = None if way is None else self._next(way, groups)
            if capture is None or (capture.key not in self._known):
                whole = whole or self._tracer.capture(batch)
            if capture is not None and whole is not None and capture.key not in self._known:
                if not _same(capture.capture, whole):
                    capture = None
                elif capture.key is not None:
                    self._known.add(capture.key)
            if capture is None:
                self._blocks, way = {}, None
                assert whole is not None
                yield _taken(whole, groups)
            else:
                yield capture.capture

    # ------------------------------------------------------------ forward

    def _start(self, batch: Batch) -> _Way | None:
        """The forward pass, or None where the model turns out to be no chain."""
        if not self._blocks or self._tracer.through_model:
            return None
        try:
            with self._tracer.prepared():
                way = self._forward(batch)
        except NotAChainError:
            self._blocks = {}
            return None
        return way

    def _forward(self, batch: Batch) -> _Way:
        n, lengths = check_batch(batch), _lengths(batch)
        assert self._groups is not None
        holds = [bool(groups) for groups in self._groups]
        visit = _Visit(list(self._blocks.values()), holds, self._first)
        outside = [group for group in self.segments[-1] if group in self._tracer.modules]
        watched = self._tracer.watched({g: self._tracer.modules[g] for g in outside})
        recorder = Recorder(watched, n, lengths=lengths, clone=False)
        with visit.cutting(), recorder.watching():
            logits = self._tracer.readout(self._tracer.model, batch)
        if recorder.modified() or recorder.uncovered or visit.leaf is None:
            raise NotAChainError
        check_logits(self._tracer.model, self._tracer.readout, batch, logits)
        self._first = visit.first
        outputs = [logits[:, a].sum() for a in range(logits.shape[1])]
        *own, upstream = gradients_of(
            outputs,
            [*(call.output for call in recorder.calls), visit.leaf],
            features=[*(call.features for call in recorder.calls), visit.leaf.dim()],
            keep=True,
        )
        calls = tuple(recorder.calls)
        return _Way(batch, logits.detach(), calls, own, upstream, visit.inputs)

    # ------------------------------------------------------------ backward

    def _next(self, way: _Way, groups: Sequence[str]) -> _Step | None:
        """The next segment, or None where the model turns out to be no chain."""
        try:
            with self._tracer.prepared():
                return self._step(way, groups)
        except NotAChainError:
            return None

    def _step(self, way: _Way, groups: Sequence[str]) -> _Step:
        if way.inputs:
            block = list(self._blocks.values())[(self._first or 0) + len(way.inputs) - 1]
            calls, parts = self._through(block, way, groups)
            crosses: dict[str, tuple[str, str]] = {}
        else:
            calls, parts, crosses = way.calls, self._outside(way, groups), self._tracer.crosses
        # Where examples may be elsewhere under the same shapes, every pass is compared.
        doubtful = any(call.ambiguous for call in calls)
        key = None if doubtful else (groups, pattern_of(calls, len(way.logits)))
        return _Step(Capture(way.logits, parts, crosses), key)

    def _through(
        self, block: nn.Module, way: _Way, groups: Sequence[str]
    ) -> tuple[Sequence[Call], Parts]:
        """Run a block again and go back through it."""
        given = way.inputs.pop()
        needs_gradient = bool(way.inputs) or given.hidden.requires_grad
        hidden = given.hidden.detach().requires_grad_(needs_gradient)
        watched = self._tracer.watched({g: self._tracer.modules[g] for g in groups})
        recorder = Recorder(watched, len(way.logits), lengths=_lengths(way.batch), clone=False)
        try:
            with recorder.watching():
                out = _hidden(block(hidden, *given.others, **given.options))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # It keeps something from the first run, such as a cache.
            raise NotAChainError from error
        if recorder.modified() or recorder.uncovered:
            raise NotAChainError
        tensors = [*(call.output for call in recorder.calls), *([hidden] if needs_gradient else [])]
        if way.upstream is None or not out.requires_grad:
            gradients: list[Gradients] = [None] * len(tensors)
        else:
            features = [
                *(call.features for call in recorder.calls),
                *[hidden.dim()] * needs_gradient,
            ]
            gradients = gradients_of(
                [out] * way.logits.shape[1], tensors, way.upstream, features=features
            )
        way.upstream = gradients.pop() if needs_gradient else None
        if not way.inputs and needs_gradient:
            _add_before(way, given.hidden)
        parts = self._tracer.parts_of(recorder.calls, gradients, groups, way.batch)
        return recorder.calls, parts

    def _outside(self, way: _Way, groups: Sequence[str]) -> Parts:
        own = [group for group in groups if group in self._tracer.modules]
        return self._tracer.parts_of(way.calls, way.gradients, own, way.batch)

    # ------------------------------------------------------------ memory

    def num_bytes(self, batch: Batch) -> StreamBytes | None:
        """Memory of one example on its way, measured on the first example of a batch.

        Args:
            batch: tensors whose leading dimension is the examples.

        Returns:
            What is kept between the steps, what a step takes, and its factors; None if the model
            is no chain.
        """
        one = {key: value[:1] for key, value in batch.items()}
        list(self.stream(one))  # what is new is learnt first
        factors = step = 0
        way = self._start(one)
        if way is None:
            return None
        kept = sum(_num_bytes(given.hidden) for given in way.inputs)
        kept += sum(call.num_bytes for call in way.calls)
        kept += sum(_num_bytes(g) for g in way.gradients if g is not None)
        kept += 0 if way.upstream is None else 2 * _num_bytes(way.upstream)
        for groups in self.segments:
            with self._tracer.prepared(), saved_storages(self._tracer.model) as saved:
                capture = self._step(way, groups).capture
            factors = max(factors, capture.num_bytes)
            # Saved activations, the gradients of every output, and the factors made of them.
            step = max(step, sum(saved.values()) + 3 * capture.num_bytes)
        return StreamBytes(kept, factors, step)


@dataclass(frozen=True, slots=True)
class StreamBytes:
    """Memory of one example, in bytes."""

    kept: int
    """Between the steps."""
    factors: int
    """Those of the largest segment."""
    step: int
    """Peak of a step, factors included."""


class _Visit:
    """One forward pass through the blocks, cut at their inputs."""

    def __init__(
        self, blocks: Sequence[nn.Module], holds: Sequence[bool], first: int | None
    ) -> None:
        self._blocks = blocks
        self._holds = holds
        self._next = 0
        self._last: Tensor | None = None
        self.first = first
        self.inputs: list[_Input] = []
        self.leaf: Tensor | None = None
        """What the last block gave."""

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Run every block without gradients, from its own input."""
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.enter_context(_replaced(block, self._runner(index, block.forward)))
            yield

    def _runner(self, index: int, run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **options: Any) -> Any:
            return self._run(index, run, args, options)

        return forward

    def _run(
        self, index: int, run: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        if index != self._next or not args or not isinstance(args[0], Tensor):
            raise NotAChainError
        if index > 0 and args[0] is not self._last:
            raise NotAChainError
        self._next += 1
        if self.first is None and (args[0].requires_grad or self._holds[index]):
            self.first = index
        if self.first is None or index < self.first:
            out = run(*args, **options)  # no selected parameter comes before its end
        else:
            if any(_needs_gradient(value) for value in (*args[1:], *options.values())):
                raise NotAChainError
            self.inputs.append(_Input(args[0], args[1:], options))
            with torch.no_grad():
                out = run(*args, **options)
            if index == len(self._blocks) - 1:
                out = self._made_leaf(out)
        self._last = _hidden(out)
        return out

    def _made_leaf(self, out: Any) -> Any:
        self.leaf = _hidden(out).detach().requires_grad_()
        return self.leaf if isinstance(out, Tensor) else (self.leaf, *out[1:])


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The module list that holds most selected parameters, by path.

    Args:
        model: the network; parameters with `requires_grad` are selected.

    Returns:
        Its elements in order; empty if no list of two or more holds any.
    """
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    sizes = {path: _num_selected(module) for path, module in lists.items()}
    best = max(sizes, key=lambda path: sizes[path], default="")
    if not sizes.get(best):
        return {}
    return {f"{best}.{name}": module for name, module in lists[best].named_children()}


def _groups_by_block(
    blocks: dict[str, nn.Module], tracer: Tracer
) -> tuple[tuple[str, ...], ...] | None:
    """Layer groups of every block; None if a parameter is tied into one."""
    found = tuple(
        tuple(g for g in tracer.modules if g == path or g.startswith(f"{path}.")) for path in blocks
    )
    inside = {group for groups in found for group in groups}
    tied = {group for pair in tracer.crosses.values() for group in pair}
    return None if inside & tied else found


def _num_selected(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@contextmanager
def _replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A block whose `forward` is another function for a while."""
    own = block.__dict__.get("forward")
    object.__setattr__(block, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(block, "forward")
        if own is not None:
            object.__setattr__(block, "forward", own)


def _hidden(out: Any) -> Tensor:
    hidden = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(hidden, Tensor):
        raise NotAChainError
    return hidden


def _needs_gradient(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_needs_gradient(item) for item in value)
    return isinstance(value, Tensor) and value.requires_grad


def _add_before(way: _Way, hidden: Tensor) -> None:
    """Go back from the first block's input to the calls before it."""
    if way.upstream is None or not way.calls:
        return
    outputs = [call.output for call in way.calls]
    features = [call.features for call in way.calls]
    before = gradients_of(
        [hidden] * len(way.upstream), outputs, way.upstream, features=features, keep=True
    )
    for index, (known, new) in enumerate(zip(way.gradients, before, strict=True)):
        if known is None or new is None:
            way.gradients[index] = new if known is None else known
        else:
            way.gradients[index] = known + new


def _taken(whole: Capture, groups: Sequence[str]) -> Capture:
    """The share of some layer groups, which the whole capture gives up."""
    parts = {group: whole.parts.pop(group) for group in groups if group in whole.parts}
    crosses = {group: pair for group, pair in whole.crosses.items() if group in groups}
    return Capture(whole.logits, parts, crosses)


def _same(capture: Capture, whole: Capture) -> bool:
    """Whether two captures hold the same gradients of the first one's groups."""
    # |g - g'|² = ⟨g, g⟩ - 2 ⟨g, g'⟩ + ⟨g', g'⟩
    other = Capture(whole.logits, {g: whole.parts[g] for g in capture.parts}, {})
    own = Capture(capture.logits, capture.parts, {})
    pairs = [gram(a, b) for a, b in ((own, own), (own, other), (other, other))]
    squares = [[_diagonal(blocks[group]) for blocks in pairs] for group in own.parts]
    total = max((float(there.max()) for _, _, there in squares), default=0.0)
    return all(
        bool(((here - 2 * both + there).abs() <= _TOLERANCE * (there + _NOISE * total)).all())
        for here, both, there in squares
    )


def _diagonal(block: Tensor) -> Tensor:
    n, c = block.shape[:2]
    return block.reshape(n * c, n * c).diagonal().double()


def _lengths(batch: Batch) -> frozenset[int]:
    return frozenset(value.shape[1] for value in batch.values() if value.dim() > 1)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
