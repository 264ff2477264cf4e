"""Gradients of several outputs at watched tensors are those that autograd returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raykernel.ntk.backward import gradients_of, output_gradients


def _graph(leaf_inside: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits (3, 2) and tensors on their way; all of them below a leaf that nobody watches."""
    generator = torch.Generator().manual_seed(0)
    x, w, v = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 4, 5), (5, 6), (6, 2))
    )
    start = x.requires_grad_()
    first = (start @ w).tanh()
    second = first.sin() if leaf_inside else first.sin().detach().requires_grad_()
    aside = first.cos()  # no output depends on it
    logits = (second @ v).sum(1)
    # The second output does not depend on `only`.
    only = second.mean((1, 2)).tanh()
    logits = torch.stack([logits[:, 0] * only, logits[:, 1]], dim=1)
    return logits, [first, second, aside, only] if leaf_inside else [second, only]


@pytest.mark.parametrize("leaf_inside", [True, False])
@pytest.mark.parametrize("behind", [0, 1])
def test_they_are_autograds_whatever_their_place_in_memory(leaf_inside: bool, behind: int) -> None:
    """stacked[a] = ∂ Σ_i f_a(x_i) / ∂tensor; None where no output depends on the tensor."""
    logits, tensors = _graph(leaf_inside)
    expected = [
        torch.autograd.grad(logits[:, a].sum(), tensors, retain_graph=True, allow_unused=True)
        for a in range(2)
    ]
    features = [min(behind, tensor.dim()) for tensor in tensors]

    found = output_gradients(logits, tensors, features=features)

    for tensor, stacked, *own in zip(tensors, found, *expected, strict=True):
        if all(gradient is None for gradient in own):
            assert stacked is None
            continue
        assert stacked is not None
        zeros = torch.zeros_like(tensor)
        torch.testing.assert_close(
            stacked, torch.stack([zeros if g is None else g for g in own]), rtol=0, atol=0
        )


def test_gradients_lie_in_memory_as_they_are_read() -> None:
    """With one feature dimension behind: tokens, then outputs, then features."""
    logits, tensors = _graph(leaf_inside=True)
    (found,) = output_gradients(logits, tensors[:1], features=[1])
    assert found is not None
    assert found.movedim(0, -2).is_contiguous()


def test_it_goes_on_from_gradients_further_up() -> None:
    """The chain rule: from the upstream gradients of a tensor to what is before it."""
    logits, (first, second, *_) = _graph(leaf_inside=True)
    whole = output_gradients(logits, [first, second], keep=True)
    assert whole[1] is not None
    (found,) = gradients_of([second] * 2, [first], whole[1])
    torch.testing.assert_close(found, whole[0], rtol=1e-12, atol=0)


def test_outputs_that_depend_on_nothing_have_no_gradients() -> None:
    """A constant readout."""
    assert output_gradients(torch.ones(3, 2), [torch.ones(3).requires_grad_()]) == [None]
