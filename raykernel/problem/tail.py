"""The end of the last block on one token: where its tokens no longer mix, the others are let go.

    block   h → h + attention(h) → … + ffn(…)      attention mixes tokens, everything after does not

The logits read one token of the last block. What follows its attention (two thirds of a block's
weights, and the activations of four widths) therefore needs that token alone: a block of an
L-block model costs about half, forward, backward and in fine-tuning, and the result is the same
function. The modules in question get their input at the read position, and what the last of them
returns is expanded to all tokens again, without memory, for whatever expects one row per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_BERT = "encoder.layer", ("attention.output", "intermediate", "output")
_LLAMA = "layers", ("post_attention_layernorm", "mlp")
_TAILS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bert": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    # The norm after the attention belongs to the attention there.
    "mpnet": ("encoder.layer", ("intermediate", "output")),
    "distilbert": ("transformer.layer", ("sa_layer_norm", "ffn", "output_layer_norm")),
    "modernbert": ("layers", ("mlp_norm", "mlp")),
    "gpt2": ("h", ("ln_2", "mlp")),
    "gpt_neox": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""By `model_type`: the list of blocks in the base model, and the modules of a block that come
after its attention, in their order, each a function of every token apart. Other architectures run
whole: OPT flattens its tokens, ALBERT runs one block many times."""


def at_position(
    hidden: Float[Tensor, "n t d"], position: Int[Tensor, " n"]
) -> Float[Tensor, "n 1 d"]:
    """The hidden states at one position per example."""
    return hidden[torch.arange(len(hidden), device=hidden.device), position].unsqueeze(1)


def cut(hidden: Float[Tensor, "n t d"], position: Int[Tensor, " n"]) -> Float[Tensor, "n 1 d"]:
    """The same of hidden states some of which are at one position already."""
    return hidden if hidden.shape[1] == 1 else at_position(hidden, position)


@contextmanager
def one_token(base_model: nn.Module, position: Int[Tensor, " n"]) -> Iterator[None]:
    """Context in which the end of a base model's last block runs on one token per example.

    Of the hidden states that the base model returns, those at the positions are as always; the
    others are not to be read. An architecture that is not known runs as it is.

    Args:
        base_model: a transformer without its head.
        position: the token that is read, per example of the batches that go through meanwhile.

    Yields:
        Nothing.
    """
    num_tokens = 0

    def cut_inputs(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal num_tokens
        num_tokens = max(num_tokens, args[0].shape[1])
        return tuple(cut(arg, position) for arg in args)

    def expand(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.expand(-1, num_tokens, -1)

    modules = _tail(base_model)
    handles = [module.register_forward_pre_hook(cut_inputs) for module in modules]
    handles += [module.register_forward_hook(expand) for module in modules[-1:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tail(base_model: nn.Module) -> list[nn.Module]:
    config: Any = base_model.config
    # Code that comes with a checkpoint may have a known name and other blocks.
    is_known = type(base_model).__module__.startswith("transformers.")
    # A feed-forward layer in chunks of tokens refuses a single one.
    in_chunks = getattr(config, "chunk_size_feed_forward", None)
    if config.model_type not in _TAILS or not is_known or in_chunks:
        return []
    blocks, names = _TAILS[config.model_type]
    last = list(base_model.get_submodule(blocks).children())[-1]
    return [last.get_submodule(name) for name in names]
