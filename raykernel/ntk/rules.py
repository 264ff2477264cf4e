"""How ∂f/∂θ follows from a torch function's input and the gradient of its output.

Rules belong to functions, not to module classes: `nn.Linear`, any subclass of it, a LoRA layer
and a module that multiplies only some rows, `F.linear(x, weight[rows])`, all call `F.linear`, and
its input is the true factor wherever positions were gathered before. What no rule covers is left
to the fallbacks of the tracer, so a missing rule costs time and never exactness.

A rule is called with the function's output and arguments. It returns the parameters' uses, or
None where it does not cover the call. The leading `lead` dimensions of the output are tokens; the
tracer reads them as (n, t) and hands `build` the saved tensors as (n, t, ...) and the gradients of
the outputs as (n, c, t, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykernel.ntk.factors import Lookup, Part, Product, Rows, accumulator


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A tensor that is a parameter, or rows, the transpose, a cast or an offset of one."""

    name: str
    shape: torch.Size
    """Of the parameter."""
    rows: Tensor | None = None
    """Rows of the parameter that the tensor holds; None: all."""
    transposed: bool = False
    scaled: bool = False
    """Whether parts say what rounding is relative to, for the dead zone of signs."""


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One parameter in one call."""

    source: Source
    lead: int
    """Leading dimensions of the output that are tokens."""
    saved: tuple[Tensor, ...]
    """Tensors with the same leading dimensions."""
    build: Callable[[Sequence[Tensor], Tensor], Part]
    """From the saved tensors (n, t, ...) and the output's gradients (n, c, t, ...)."""


Find = Callable[[object], Source | None]
Rule = Callable[..., list[Use] | None]
Function = Callable[..., Any]


def derive(function: Function, args: Sequence[Any], find: Find) -> Source | None:
    """What the result is of the parameter, where ∂result/∂θ only copies entries.

    Args:
        function: the torch function.
        args: its positional arguments.
        find: the source that an argument is.

    Returns:
        The result as a source, or None if it is something else.
    """
    source = find(args[0]) if args else None
    if source is None:
        return None
    if function in _CASTS and not any(find(arg) for arg in args[1:]):
        return source
    if function in _OFFSETS and not isinstance(args[1], Tensor):
        return source
    if function in _TRANSPOSES and len(source.shape) == 2 and source.rows is None:
        return replace(source, transposed=not source.transposed)
    if function in _SELECTIONS and source.rows is None and not source.transposed:
        index = args[-1]
        whole = isinstance(index, Tensor) and index.dtype == torch.long and index.dim() == 1
        along_rows = function not in _INDEX_SELECTS or args[1] == 0
        if whole and along_rows:
            return replace(source, rows=index % source.shape[0])
    return None


def _matrix(source: Source, inputs: Tensor, *, turned: bool) -> Use | None:
    """Use of a matrix: output = input Wᵀ, or input W where `turned`."""
    transposed = source.transposed != turned
    if source.rows is not None and transposed:
        return None

    def build(saved: Sequence[Tensor], gradients: Tensor) -> Part:
        rows, gradients = _distinct(source.rows, gradients)
        return Product(saved[0], gradients, rows, transposed)

    return Use(source, inputs.dim() - 1, (inputs,), build)


def _distinct(rows: Tensor | None, gradients: Tensor) -> tuple[Tensor | None, Tensor]:
    """The rows ascending and once each, with the gradients of equal rows added."""
    if rows is None:
        return None, gradients
    distinct, place = torch.unique(rows, return_inverse=True)
    incidence = F.one_hot(place, len(distinct)).to(gradients.dtype)
    return distinct, gradients @ incidence


def _broadcast(source: Source, factor: Tensor | None, out: Tensor) -> Use | None:
    """Use of a parameter that is added to (`factor` None) or multiplied with a tensor."""
    shape = source.shape if source.rows is None else torch.Size([len(source.rows)])
    if source.transposed or (source.rows is not None and len(source.shape) > 1):
        return None
    lead = out.dim() - len(shape)
    if lead == 0:
        # A table with a leading 1 for the batch, such as learned positions (1, t, d).
        lead = 1
        if not shape or shape[0] != 1:
            return None
    saved = () if factor is None else (factor.expand(out.shape),)

    def build(saved: Sequence[Tensor], gradients: Tensor) -> Part:
        gradients = gradients.to(accumulator(gradients.dtype))
        if saved:
            gradients = gradients * saved[0].unsqueeze(1)
        return _vector(source, gradients, shape)

    return Use(source, lead, saved, build)


def _sum_to(gradients: Tensor, shape: torch.Size) -> Float[Tensor, "n c p"]:
    """Undo the broadcasting of a parameter against (n, c, *rest)."""
    rest = shape[len(shape) - gradients.dim() + 2 :]
    for dim, size in enumerate(rest, start=2):
        if size == 1:
            gradients = gradients.sum(dim, keepdim=True)
    return gradients.flatten(2) if gradients.dim() > 2 else gradients.unsqueeze(2)


def _vector(source: Source, by_token: Float[Tensor, "n c t ..."], shape: torch.Size) -> Part:
    """Gradient of a parameter, or of some entries of a vector, as a part: a sum over tokens."""
    gradients = _sum_to(by_token.sum(2), shape)
    if source.rows is None:
        scale = None
        if source.scaled:
            lengths = by_token.flatten(3).norm(dim=3) if by_token.dim() > 3 else by_token.abs()
            scale = lengths.sum(2) / max(shape.numel(), 1) ** 0.5
        return Rows(gradients, max(source.shape[0], 1) if source.shape else 1, scale)
    rows, gradients = _distinct(source.rows, gradients)
    ones = gradients.new_ones((len(gradients), 1, 1))
    return Product(ones, gradients.unsqueeze(2), rows, transposed=False)


def _linear(
    find: Find, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> list[Use] | None:
    matrix, vector = find(weight), find(bias)
    if find(input) or weight.dim() != 2:
        return None
    return _both(
        _matrix(matrix, input, turned=False) if matrix else None,
        _broadcast(vector, None, out) if vector else None,
    )


def _both(*uses: Use | None) -> list[Use]:
    return [use for use in uses if use is not None]


def _matmul(find: Find, out: Tensor, input: Tensor, other: Tensor) -> list[Use] | None:
    matrix = find(other)
    if matrix is None or find(input) or other.dim() != 2 or input.dim() < 2:
        return None
    return _both(_matrix(matrix, input, turned=True))


def _addmm(
    find: Find,
    out: Tensor,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> list[Use] | None:
    matrix, vector = find(mat2), find(input)
    if find(mat1) or beta != 1 or alpha != 1:
        return None
    return _both(
        _matrix(matrix, mat1, turned=True) if matrix else None,
        _broadcast(vector, None, out) if vector else None,
    )


def _embedding(
    find: Find,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Use] | None:
    source = find(weight)
    changed = max_norm is not None or scale_grad_by_freq
    if source is None or changed or source.rows is not None or source.transposed:
        return None
    padding = None if padding_idx is None else padding_idx % weight.shape[0]

    def build(saved: Sequence[Tensor], gradients: Tensor) -> Part:
        ids = saved[0].long()
        if padding is not None:
            # Whole tokens by one flat index; masked_fill would take three times as long.
            by_token = gradients.transpose(1, 2).clone(memory_format=torch.contiguous_format)
            places = (ids == padding).flatten().nonzero().squeeze(1)
            by_token.flatten(0, 1).index_fill_(0, places, 0)
            gradients = by_token.transpose(1, 2)
        return Lookup(ids, gradients)

    return [Use(source, input.dim(), (input,), build)]


def _normalised(
    find: Find,
    out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Sequence[int],
    normalise: Callable[[Tensor], Tensor],
) -> list[Use] | None:
    scale, shift = find(weight), find(bias)
    if find(input) or (scale and (scale.rows is not None or scale.transposed)):
        return None
    lead = input.dim() - len(shape)

    def build(saved: Sequence[Tensor], gradients: Tensor) -> Part:
        # x̂ comes from the input: (output - bias) / weight would divide by zero weights.
        x = normalise(saved[0].to(accumulator(saved[0].dtype)))
        assert scale is not None
        return _vector(scale, gradients * x.unsqueeze(1), scale.shape)

    return _both(
        Use(scale, lead, (input,), build) if scale else None,
        _broadcast(shift, None, out) if shift else None,
    )


def _layer_norm(
    find: Find,
    out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Use] | None:
    shape = tuple(normalized_shape)
    return _normalised(
        find, out, input, weight, bias, shape, lambda x: F.layer_norm(x, shape, eps=eps)
    )


def _rms_norm(
    find: Find,
    out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> list[Use] | None:
    shape = tuple(normalized_shape)
    own = torch.finfo(input.dtype).eps if eps is None else eps
    return _normalised(
        find, out, input, weight, None, shape, lambda x: F.rms_norm(x, shape, eps=own)
    )


def _mul(find: Find, out: Tensor, input: object, other: object) -> list[Use] | None:
    if find(input) and find(other):
        return None
    parameter, factor = (input, other) if find(input) else (other, input)
    source = find(parameter)
    assert source is not None
    if not isinstance(factor, Tensor):
        return None
    return _both(_broadcast(source, factor, out))


def _add(
    find: Find, out: Tensor, input: object, other: object, *, alpha: float = 1
) -> list[Use] | None:
    source = find(input) or find(other)
    if alpha != 1 or (find(input) and find(other)):
        return None
    return _both(_broadcast(source, None, out)) if source else None


_METHODS: Any = torch.Tensor

RULES: dict[Function, Rule] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.addmm: _addmm,
    torch.mm: _matmul,
    torch.matmul: _matmul,
    _METHODS.mm: _matmul,
    _METHODS.matmul: _matmul,
    torch.mul: _mul,
    _METHODS.mul: _mul,
    torch.add: _add,
    _METHODS.add: _add,
}
"""Rule by torch function."""

_CASTS = {
    _METHODS.float,
    _METHODS.double,
    _METHODS.half,
    _METHODS.bfloat16,
    _METHODS.to,
    _METHODS.type_as,
    _METHODS.contiguous,
}
_OFFSETS = {torch.add, _METHODS.add, torch.sub, _METHODS.sub}
_TRANSPOSES = {torch.t, _METHODS.t, _METHODS.T.__get__, _METHODS.mT.__get__}
_INDEX_SELECTS = {torch.index_select, _METHODS.index_select}
_SELECTIONS = {_METHODS.__getitem__, *_INDEX_SELECTS}
