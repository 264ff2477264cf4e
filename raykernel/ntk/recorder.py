"""One forward pass watched: every torch function that a selected parameter enters.

While the mode is on, parameters need no gradient. The output of each covered call is made a leaf
(or is already downstream of one), so that a backward pass runs through activations only, as deep
as there are selected parameters, and never forms a weight's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raykernel.ntk.factors import Part
from raykernel.ntk.local import module_gradients
from raykernel.ntk.rules import RULES, Function, Source, Use, derive


class Layout(Enum):
    """Where the examples are in a call's output."""

    batch = "batch"
    """In the first dimension, (n, ...)."""
    flat = "flat"
    """In the first of the flattened token dimensions, (n·t, ...)."""
    shared = "shared"
    """Nowhere: one value for all examples, such as position embeddings."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call that selected parameters entered."""

    groups: tuple[tuple[str, str], ...]
    """Each parameter used, with the layer group that uses it."""
    shape: torch.Size
    """Of the output, before it was expanded to all examples."""
    layout: Layout
    ambiguous: bool
    """Whether another batch could put the examples elsewhere under the same shapes."""
    output: Tensor
    num_bytes: int
    """Memory that this call keeps alive, in bytes."""
    build: Callable[[Tensor], dict[str, Part]]
    """Each parameter's part, from the gradient of every model output, (c, ...)."""
    features: int
    """Last dimensions of the output that are not tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A watched forward pass."""

    logits: Tensor
    calls: tuple[Call, ...]
    uncovered: dict[str, nn.Module | None]
    """Parameters that entered a function no rule covers, with the childless module it was in."""


@dataclass(frozen=True, slots=True, eq=False)
class Watched:
    """The parameters to watch, and how."""

    names: dict[int, str]
    """Name by identity of the parameter object."""
    owners: dict[str, tuple[str, ...]]
    """Layer groups by parameter name."""
    modules: dict[str, nn.Module]
    """Module by layer group."""
    local: Mapping[str, nn.Module]
    """Parameters whose module as a whole is differentiated, with that module."""
    scaled: bool = False
    """Whether parts say what rounding is relative to (`Source.scaled`)."""


class Recorder(TorchFunctionMode):
    """Watches a forward pass over `num_examples` examples."""

    def __init__(
        self, watched: Watched, num_examples: int, *, lengths: frozenset[int], clone: bool
    ) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.uncovered: dict[str, nn.Module | None] = {}
        self._watched = watched
        self._n = num_examples
        self._lengths = lengths
        self._clone = clone
        self._running: list[str] = []
        self._versions: list[tuple[Tensor, int]] = []
        # Keeps derived tensors alive: a freed one's identity could be another tensor's.
        self._sources: dict[int, tuple[Source, object]] = {}
        self._independent: dict[tuple[Function, tuple[int, ...]], bool] = {}

    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if not torch.is_grad_enabled():
            # No gradient flows, or a torch.autograd.Function has its own, which the audit finds.
            return func(*args, **options)
        used = [(place, s) for place, s in self._used(args, options) if not self._inside(s)]
        out = func(*args, **options)
        if not used or not _holds_tensor(out):
            return out
        source = derive(func, args, self._find)
        if source is not None and isinstance(out, Tensor):
            self._sources[id(out)] = (source, out)
            return out
        uses = self._apply_rule(func, out, args, options)
        covered = {use.source.name for use in uses}
        missing = [s.name for _, s in used if s.name not in covered]
        if missing and not self._is_independent(func, args, options, [p for p, _ in used]):
            self.uncovered.update(dict.fromkeys(missing, self._childless()))
        return self._tap_uses(out, uses) if uses else out

    def modified(self) -> bool:
        """Whether any saved tensor was changed in place since it was saved."""
        return any(tensor._version != version for tensor, version in self._versions)

    def _used(self, args: tuple[Any, ...], options: dict[str, Any]) -> list[tuple[int, Source]]:
        values = _flatten((*args, *options.values()) if options else args)
        return [(place, s) for place, v in enumerate(values) if (s := self._find(v)) is not None]

    def _find(self, value: object) -> Source | None:
        if not isinstance(value, Tensor):
            return None
        name = self._watched.names.get(id(value))
        if name is not None:
            return Source(name, value.shape, scaled=self._watched.scaled)
        known = self._sources.get(id(value))
        return known[0] if known else None

    def _inside(self, source: Source) -> bool:
        module = self._watched.local.get(source.name)
        return module is not None and module is self._childless()

    def _childless(self) -> nn.Module | None:
        if not self._running:
            return None
        module = self._watched.modules[self._running[-1]]
        return None if any(True for _ in module.children()) else module

    def _apply_rule(
        self, func: Function, out: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> list[Use]:
        rule = RULES.get(func)
        if rule is None or not isinstance(out, Tensor):
            return []
        try:
            uses = rule(self._find, out, *args, **options)
        except TypeError:  # arguments that the rule does not know, such as out=
            return []
        return [use for use in uses or [] if use.source.name not in self._watched.local]

    def _is_independent(
        self, func: Function, args: tuple[Any, ...], options: dict[str, Any], places: list[int]
    ) -> bool:
        """Whether no gradient flows from the parameters at these places, as in `x.type_as(w)`."""
        key = (func, tuple(places))
        if key not in self._independent:
            self._independent[key] = _no_gradient(func, args, options, self._find)
        return self._independent[key]

    def _tap_uses(self, out: Tensor, uses: list[Use]) -> Tensor:
        lead = min(use.lead for use in uses)
        saved = [tuple(self._keep(tensor) for tensor in use.saved) for use in uses]
        shape = out.shape
        layout = self._layout(shape[:lead])
        build = partial(_build, uses, saved, shape, layout is Layout.shared, self._n)
        held = sum(_num_bytes(tensor) for tensors in saved for tensor in tensors)
        return self._tap(out, [use.source.name for use in uses], lead, held, build)

    def tap_module(
        self,
        names: dict[str, str],
        module: nn.Module,
        args: tuple[Any, ...],
        options: dict[str, Any],
        out: Any,
    ) -> Any:
        """Record a call of a module whose parameters `names` (by own name) are local to it."""
        n = self._n
        if not isinstance(out, Tensor) or not out.dim() or (n > 1 and out.shape[0] != n):
            self.uncovered.update(dict.fromkeys(names.values()))
            return out
        inputs = tuple(self._keep(arg) if isinstance(arg, Tensor) else arg for arg in args)
        named = {k: self._keep(v) if isinstance(v, Tensor) else v for k, v in options.items()}

        def build(gradients: Tensor) -> dict[str, Part]:
            own = module_gradients(module, list(names), inputs, named, gradients, n)
            return {names[name]: part for name, part in own.items()}

        held = sum(_num_bytes(v) for v in (*inputs, *named.values()) if isinstance(v, Tensor))
        return self._tap(out, list(names.values()), 1, held, build)

    def _tap(
        self,
        out: Tensor,
        names: list[str],
        lead: int,
        held: int,
        build: Callable[[Tensor], dict[str, Part]],
    ) -> Tensor:
        shape = out.shape
        layout = self._layout(shape[:lead])
        if layout is Layout.shared:
            whole = out if shape[:1] == (1,) else out.unsqueeze(0)
            out = whole.expand(self._n, *whole.shape[1:])
        if not out.requires_grad:
            out = out.detach().requires_grad_()
        self._versions.append((out, out._version))
        groups = tuple((name, self._group(name)) for name in names)
        ambiguous = self._is_ambiguous(shape[:lead])
        size = _num_bytes(out) + held
        features = len(shape) - lead
        self.calls.append(Call(groups, shape, layout, ambiguous, out, size, build, features))
        return out.clone() if self._clone else out

    def _keep(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self._clone:
            return tensor.clone()
        self._versions.append((tensor, tensor._version))
        return tensor

    def _layout(self, lead: torch.Size) -> Layout:
        if self._n == 1 or lead[:1] == (self._n,):
            return Layout.batch
        # One value per position, such as embeddings of arange(t), is not n·t flattened tokens.
        by_position = len(lead) == 1 and lead[0] in self._lengths
        if lead[:1] == (1,) or by_position or lead.numel() % self._n:
            return Layout.shared
        return Layout.flat

    def _is_ambiguous(self, lead: torch.Size) -> bool:
        # Two-dimensional inputs may have been gathered by their content (experts, packing).
        tokens_each = lead.numel() // self._n
        return self._n > 1 and len(lead) == 1 and tokens_each not in self._lengths

    def _group(self, name: str) -> str:
        owners = self._watched.owners[name]
        return next((path for path in reversed(self._running) if path in owners), owners[0])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Switch the mode on, and follow which owning module runs."""
        handles = []
        for path, module in self._watched.modules.items():
            handles.append(module.register_forward_pre_hook(partial(self._enter, path)))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, module: nn.Module, args: object) -> None:
        self._running.append(path)

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], out: Any
    ) -> Any:
        local = {name for name, owner in self._watched.local.items() if owner is module}
        if local:
            parameters = module.named_parameters(recurse=False)
            own = {key: self._watched.names.get(id(parameter)) for key, parameter in parameters}
            names = {key: name for key, name in own.items() if name is not None and name in local}
            out = self.tap_module(names, module, args, options, out)
        self._running.pop()
        return out


def _build(
    uses: list[Use],
    saved: list[tuple[Tensor, ...]],
    shape: torch.Size,
    shared: bool,
    n: int,
    gradients: Tensor,
) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    by_token: dict[int, Tensor] = {}
    for use, tensors in zip(uses, saved, strict=True):
        rest = shape[use.lead :]
        if use.lead not in by_token:
            # In memory as (n, t, c, ...): an example's gradient of all outputs is one product.
            stacked = gradients.movedim(0, -len(rest) - 1).reshape(n, -1, len(gradients), *rest)
            by_token[use.lead] = stacked.transpose(1, 2)
        cut = [_by_example(tensor, use.lead, n, shared=shared) for tensor in tensors]
        parts[use.source.name] = use.build(cut, by_token[use.lead])
    return parts


def _by_example(tensor: Tensor, lead: int, n: int, *, shared: bool) -> Tensor:
    rest = tensor.shape[lead:]
    if shared:
        return tensor.reshape(1, -1, *rest).expand(n, *[-1] * (len(rest) + 1))
    return tensor.reshape(n, -1, *rest)


def _no_gradient(
    func: Function, args: tuple[Any, ...], options: dict[str, Any], find: Callable[[object], Any]
) -> bool:
    def copy(value: Any) -> Any:
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(copy(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        twin = value.detach().clone()
        return twin.requires_grad_() if find(value) is not None else twin

    try:
        with torch.enable_grad():
            out = func(*copy(args), **{key: copy(value) for key, value in options.items()})
    except RuntimeError:
        return False
    return not any(isinstance(v, Tensor) and v.requires_grad for v in _flatten((out,)))


def _flatten(values: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            flat.extend(_flatten(value))
        else:
            flat.append(value)
    return flat


def _holds_tensor(out: Any) -> bool:
    if isinstance(out, torch.Size):
        return False
    return any(isinstance(value, Tensor) for value in _flatten((out,)))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
