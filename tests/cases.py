"""Tiny random models with a readout and a batch: every architecture the engine is held to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Readout = Callable[[nn.Module, Batch], Tensor]

VOCAB, HIDDEN, LAYERS, HEADS, INNER, MAX_TOKENS = 61, 16, 2, 2, 24, 32
PAD, MASK = 1, 4
LABEL_IDS = (11, 17)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A function from examples to logits."""

    model: nn.Module
    readout: Readout
    batch: Batch


class Module(nn.Module):
    """A module whose forward is a function of it and its inputs."""

    def __init__(self, forward: Callable[..., Tensor], **children: object) -> None:
        super().__init__()
        self._function = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._function(self, *inputs)


def readout(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own output for `x`."""
    return model(batch["x"])


def pieces(batch: Batch, *sizes: int) -> list[Batch]:
    """The first so many examples of a batch, the next so many, and so on."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        {key: value[start : start + size] for key, value in batch.items()}
        for start, size in zip(starts, sizes, strict=True)
    ]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_direction(model: nn.Module) -> Batch:
    """A tensor of each selected parameter's shape and type, by name."""
    selected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: normal(*p.shape, seed=i).to(p) for i, (name, p) in enumerate(selected.items())}


def randomise_vectors(model: nn.Module, *, seed: int = 1) -> None:
    """Make biases and normalisation weights non-trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def token_batch(
    *, n: int = 5, lengths: tuple[int, ...] = (6, 9, 4, 9, 7), seed: int = 3, side: str = "right"
) -> Batch:
    """Token ids of unequal length with one mask token each; label words occur as inputs too."""
    generator = torch.Generator().manual_seed(seed)
    t = max(lengths[:n])
    ids = torch.full((n, t), PAD)
    attention = torch.zeros(n, t, dtype=torch.long)
    position = torch.zeros(n, dtype=torch.long)
    for i, length in enumerate(lengths[:n]):
        start = 0 if side == "right" else t - length
        own = torch.randint(5, VOCAB, (length,), generator=generator)
        own[1] = LABEL_IDS[i % 2]
        own[length - 2] = MASK
        ids[i, start : start + length] = own
        attention[i, start : start + length] = 1
        position[i] = start + length - 2
    return {"input_ids": ids, "attention_mask": attention, "position": position}


def at_position(hidden: Tensor, position: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), position]


def masked_readout(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return at_position(logits, batch["position"])[:, list(LABEL_IDS)]


def causal_readout(model: nn.Module, batch: Batch) -> Tensor:
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    names = getattr(model, "takes_positions", True)
    extra = {"position_ids": positions} if names else {}
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, **extra).logits
    return at_position(logits, batch["position"] + 1)[:, list(LABEL_IDS)]


def _bert_like(name: str, **options: object) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, "pad_token_id": PAD, **options})
    return getattr(transformers, f"{name}ForMaskedLM")(config)


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=VOCAB,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=INNER,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=PAD,
            initializer_range=0.2,
            attn_implementation="eager",
        )
    )


def _causal(name: str, **options: object) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **{**SIZES, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3, **options}
    )
    model_name = name.removesuffix("Text") if name != "Gemma3Text" else "Gemma3"
    return getattr(transformers, f"{model_name}ForCausalLM")(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=MAX_TOKENS,
            initializer_range=0.2,
            bos_token_id=2,
            eos_token_id=3,
            attn_implementation="eager",
        )
    )


MASKED: dict[str, Callable[[], nn.Module]] = {
    "roberta": partial(_bert_like, "Roberta", type_vocab_size=1),
    "bert": partial(_bert_like, "Bert"),
    "albert": partial(_bert_like, "Albert", embedding_size=8),
    "distilbert": _distilbert,
    "electra": partial(_bert_like, "Electra", embedding_size=8),
    "deberta_v2": partial(
        _bert_like,
        "DebertaV2",
        relative_attention=True,
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
    ),
    "modernbert": partial(
        _bert_like, "ModernBert", cls_token_id=2, sep_token_id=3, eos_token_id=3, bos_token_id=2
    ),
}
"""Masked language models by name."""

CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,
    "gpt_neox": partial(_causal, "GPTNeoX", rotary_pct=0.5, tie_word_embeddings=False),
    "opt": partial(_causal, "OPT", ffn_dim=INNER, word_embed_proj_dim=8),
    "llama": partial(_causal, "Llama", num_key_value_heads=1),
    "qwen2": partial(_causal, "Qwen2", num_key_value_heads=1, tie_word_embeddings=True),
    "gemma": partial(_causal, "Gemma", num_key_value_heads=1, head_dim=8),
    "gemma3": partial(_causal, "Gemma3Text", num_key_value_heads=1, head_dim=8),
}
"""Causal language models by name."""


def transformer_case(name: str, *, seed: int = 0, batch: Batch | None = None) -> Case:
    """A tiny random transformer, its padded batch and its prompt readout."""
    torch.manual_seed(seed)
    masked = name in MASKED
    model = (MASKED if masked else CAUSAL)[name]()
    randomise_vectors(model)
    return Case(
        model=model.eval(),
        readout=masked_readout if masked else causal_readout,
        batch=token_batch() if batch is None else batch,
    )


def partly_frozen_case(name: str, *varying: str) -> Case:
    """The same, of which only the parameters vary that have one of these in their name."""
    case = transformer_case(name)
    for path, parameter in case.model.named_parameters():
        parameter.requires_grad_(any(part in path for part in varying))
    return case


LORA_TARGETS = {
    "roberta": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}
"""Modules that the LoRA cases adapt."""


def _peft_model(model: nn.Module, name: str) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=LORA_TARGETS[name], fan_in_fan_out=name == "gpt2"
    )
    return peft.get_peft_model(model, config)


def lora_case(name: str, *, zero_b: bool) -> Case:
    """The same under a PEFT LoRA, with B = 0 as PEFT initialises it, or random."""
    case = transformer_case(name)
    with warnings.catch_warnings():  # peft reads an attribute that transformers 5 renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = _peft_model(case.model, name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_B" in path and not zero_b:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return Case(model.eval(), case.readout, case.batch)
