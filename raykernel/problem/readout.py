"""Where a model's logits are read: one position, and only the label words' rows of the head.

The full head of a language model multiplies every position by every word of the vocabulary; the
kernel needs one position and c words. The hidden states are cut to the readout position as they
leave the base model, so the head's own layers (RoBERTa's dense and LayerNorm, say) run on one
position too, and `LabelRows` then multiplies c rows of the weight. Within the last block they are
cut as soon as its tokens no longer mix (`tail.one_token`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from raykernel.errors import InputError
from raykernel.problem.batches import Batch
from raykernel.problem.probe import Head
from raykernel.problem.tail import at_position, cut, one_token
from raykernel.terms import Pooling


class LabelRows(nn.Linear):
    """An output embedding that computes the logits of some words only.

    It keeps the whole weight (tied to the input embedding or not) and bias as parameters.
    """

    rows: Tensor
    """Token ids of the label words, in label order."""

    def __init__(self, head: nn.Linear, rows: Sequence[int]) -> None:
        super().__init__(
            head.in_features, head.out_features, bias=head.bias is not None, device="meta"
        )
        self.weight = head.weight
        self.bias = head.bias
        ids = torch.tensor(list(rows), dtype=torch.long, device=head.weight.device)
        self.register_buffer("rows", ids, persistent=False)

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """Logits of the label words."""
        bias = None if self.bias is None else self.bias[self.rows]
        return F.linear(input, self.weight[self.rows], bias)


class Probed(nn.Module):
    """An encoder and the linear head of standard fine-tuning on its hidden states."""

    def __init__(self, model: PreTrainedModel, pooling: Pooling, *, num_labels: int) -> None:
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(model.config.hidden_size, num_labels)
        self.pooling = pooling
        self.config = model.config

    def forward(self, batch: Batch) -> Float[Tensor, "n c"]:
        """Logits of the head."""
        logits: Tensor = self.classifier(self.features(batch))
        return logits

    def features(self, batch: Batch) -> Float[Tensor, "n d"]:
        """Hidden state at the readout position, or the mean over the text's tokens."""
        if self.pooling is Pooling.cls:
            with one_token(self.model, batch["position"]):
                read: Tensor = self.model(**model_inputs(batch)).last_hidden_state
            return at_position(read, batch["position"]).squeeze(1)
        hidden: Tensor = self.model(**model_inputs(batch)).last_hidden_state
        mask = batch["attention_mask"].to(hidden.dtype).unsqueeze(-1)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    @torch.no_grad()
    def set_head(self, head: Head | None) -> None:
        """Start from a fitted head, or from zeros.

        Args:
            head: weight (c, d) and bias (c).

        Raises:
            ValueError: if its shape is not this head's.
        """
        if head is None:
            self.classifier.weight.zero_()
            self.classifier.bias.zero_()
            return
        if head.weight.shape != self.classifier.weight.shape:
            raise ValueError(
                f"Found a head of shape {head.weight.shape}, "
                f"expected {tuple(self.classifier.weight.shape)}."
            )
        self.classifier.weight.copy_(torch.from_numpy(head.weight))
        self.classifier.bias.copy_(torch.from_numpy(head.bias))


def read_label_words(module: nn.Module, batch: Batch) -> Float[Tensor, "n c"]:
    """Raw logits of the label words at each example's readout position.

    Args:
        module: a language model whose head is a `LabelRows`.
        batch: right-padded token ids.

    Returns:
        Logits in label order, neither normalised nor centred.
    """
    with _one_position(module, batch["position"]):
        logits: Tensor = module(**model_inputs(batch)).logits
    return logits.squeeze(1)


def read_head(module: nn.Module, batch: Batch) -> Float[Tensor, "n c"]:
    """Logits of the linear head of standard fine-tuning.

    Args:
        module: a `Probed` encoder.
        batch: right-padded token ids.

    Returns:
        Logits in label order.
    """
    logits: Tensor = module(batch)
    return logits


def model_inputs(batch: Batch) -> Batch:
    """What of a batch goes into the model's forward."""
    return {name: value for name, value in batch.items() if name != "position"}


def restrict_head(module: PreTrainedModel, rows: Sequence[int]) -> None:
    """Replace a language model's output embedding by its label-word rows, in place.

    Args:
        module: the language model.
        rows: token ids of the label words.

    Raises:
        InputError: if the head is not a linear layer from hidden states to the vocabulary.
        ValueError: if a row is not in the vocabulary.
    """
    head, vocabulary = embeddings(module)
    is_linear = isinstance(head, nn.Linear) and head.out_features >= len(vocabulary.weight)
    if not is_linear or module.base_model is module:
        raise InputError(
            f"model.name: {type(module).__name__} does not end in one linear layer over the "
            "vocabulary, expected a head that can be cut to the label words. Choose another "
            "model, or prompt=none for a linear head."
        )
    if min(rows) < 0 or max(rows) >= head.out_features:
        raise ValueError(f"Label words {list(rows)} are not all below {head.out_features}.")
    restricted = LabelRows(head, rows)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child is head:
                setattr(parent, name, restricted)
        # RoBERTa's, BERT's and ALBERT's head lists the decoder's bias a second time and never
        # reads it there; the parameter belongs to the layer that uses it.
        for name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter is head.bias and parent is not restricted and parent is not head:
                del parent._parameters[name]


def embeddings(module: PreTrainedModel) -> tuple[Any, Any]:
    """A language model's output head and input embedding, of whatever types they are."""
    return module.get_output_embeddings(), module.get_input_embeddings()  # type: ignore[no-untyped-call]


@contextmanager
def _one_position(module: nn.Module, position: Int[Tensor, " n"]) -> Iterator[None]:
    """Let only the readout position pass from the base model to the head, during one forward."""

    def cut_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (at_position(output[0], position), *output[1:])
        output["last_hidden_state"] = at_position(output.last_hidden_state, position)
        return output

    def cut_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # For models whose head passes the base model by (OPT calls the decoder inside it): there
        # every position is still present.
        return (cut(args[0], position),)

    head = next(layer for layer in module.modules() if isinstance(layer, LabelRows))
    base_model: Any = module.base_model
    handles = [
        base_model.register_forward_hook(cut_output),
        # First of all hooks: whoever records the head's input sees what is multiplied.
        head.register_forward_pre_hook(cut_input, prepend=True),
    ]
    try:
        with one_token(base_model, position):
            yield
    finally:
        for handle in handles:
            handle.remove()
