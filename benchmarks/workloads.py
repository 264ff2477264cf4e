"""The workloads: a model, a batch of texts, and the logits that are read.

Random RoBERTas whose biases and norms are not trivial, with label words at the mask, some of
which occur in the texts too; and one real model through raykernel's own loading. Every contender
calls the same module, `model(**batch)` → logits (n, c).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM

from raykernel.compose import compose_runs
from raykernel.console import Screen
from raykernel.prepared import prepare
from raykernel.problem.batches import collate
from raykernel.problem.models import Problem, load_problem
from raykernel.problem.readout import restrict_head
from raykernel.problem.tail import one_token

PAD, MASK, VOCABULARY = 1, 4, 5000
WORDS = (11, 4321, 77, 903, 2500, 3999, 1234, 618)
"""Label words, as many as a workload has outputs."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """A function from texts to logits; parameters with `requires_grad` are the kernel's."""

    name: str
    title: str
    model: nn.Module
    """Called as model(**batch), gives logits (n, c)."""
    batch: Batch
    num_outputs: int

    @property
    def num_examples(self) -> int:
        """Texts n."""
        return len(self.batch["input_ids"])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of the kernel, by name; a tied one once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def jacobian_bytes(self) -> int:
        """Memory of all gradients in float32."""
        num_rows = self.num_examples * self.num_outputs
        return 4 * num_rows * sum(p.numel() for p in self.parameters.values())

    def on(self, batch: Batch) -> Workload:
        """The same on other texts."""
        return replace(self, batch=batch)

    def first(self, num_examples: int) -> Workload:
        """The same with its first examples only."""
        return self.on({key: value[:num_examples] for key, value in self.batch.items()})

    def after(self, num_examples: int) -> Workload:
        """The same without its first examples."""
        return self.on({key: value[num_examples:] for key, value in self.batch.items()})


def as_loaded(model: nn.Module) -> nn.Module:
    """A model as raykernel loads any: a head of the label words' rows."""
    return model.restricted() if isinstance(model, PromptLogits) else model


def read(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch as raykernel reads any model: its last block ends on the read token alone.

    The real model, W4, is read by raykernel's own readout whoever the contender is.
    """
    logits: Tensor
    if not isinstance(model, PromptLogits):
        logits = model(**batch)
        return logits
    with one_token(model.model.roberta, at_mask(batch["input_ids"])):
        logits = model(**batch)
    return logits


# ------------------------------------------------------------------ random RoBERTas


class PromptLogits(nn.Module):
    """(n, t) token ids → (n, c) label-word logits; the head runs on the mask only."""

    def __init__(self, model: RobertaForMaskedLM, words: Sequence[int]) -> None:
        """Wrap a masked language model."""
        super().__init__()
        self.model = model
        self.words = list(words)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the label words at the mask."""
        # A ready-made 4-D mask: the model's own mask code branches on data, which vmap refuses.
        dtype = self.model.lm_head.dense.weight.dtype
        hidden_from = (input_ids == PAD)[:, None, None, :].to(dtype)
        mask = hidden_from.expand(-1, 1, input_ids.shape[1], -1) * torch.finfo(dtype).min
        hidden = self.model.roberta(input_ids=input_ids, attention_mask=mask)[0]
        at = at_mask(input_ids)[:, None, None].expand(-1, 1, hidden.shape[-1])
        logits: Tensor = self.model.lm_head(hidden.gather(1, at))
        return logits[:, 0, self.words]

    def restricted(self) -> PromptLogits:
        """A copy whose head multiplies the label words' rows only; the parameters are the same."""
        own = copy.deepcopy(self)
        restrict_head(own.model, own.words)
        own.words = list(range(len(own.words)))
        return own


def at_mask(input_ids: Tensor) -> Tensor:
    """(n, t) token ids → (n,) positions of the mask."""
    return (input_ids == MASK).float().argmax(-1)


def roberta(
    name: str,
    title: str,
    *,
    width: int = 128,
    layers: int = 4,
    texts: int = 32,
    tokens: int = 32,
    outputs: int = 2,
) -> Workload:
    """A random tied RoBERTa on random texts of tokens / 2 to tokens tokens."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "max_position_embeddings": max(64, tokens + 2),
        "type_vocab_size": 1,
        "pad_token_id": PAD,
        "initializer_range": 0.05,
        "attn_implementation": "eager",
    }
    model = RobertaForMaskedLM(RobertaConfig(**sizes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    module = PromptLogits(model, WORDS[:outputs]).eval()
    return Workload(name, title, module, {"input_ids": _texts(texts, tokens)}, outputs)


def _texts(num: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (num, tokens), generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (num,), generator=generator)
    ids[::3, 2], ids[1::4, 3] = WORDS[:2]
    ids[torch.arange(tokens)[None] >= lengths[:, None]] = PAD
    ids[torch.arange(num), lengths - 2] = MASK
    return ids


# ------------------------------------------------------------------ a real model


class Read(nn.Module):
    """A problem of raykernel's as a module, `model(**batch)` → logits."""

    def __init__(self, problem: Problem) -> None:
        """Wrap a causal language model."""
        super().__init__()
        self.module = problem.module
        self._readout = problem.readout

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position: Tensor) -> Tensor:
        """Logits of the label words at the last position."""
        dtype = next(self.module.parameters()).dtype
        t = input_ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        hidden_from = ~(causal & attention_mask.bool()[:, None, None, :])
        mask = hidden_from.to(dtype) * torch.finfo(dtype).min
        batch = {"input_ids": input_ids, "attention_mask": mask, "position": position}
        return self._readout(self.module, batch)


def smollm2() -> Workload:
    """SmolLM2-135M on sixteen drug reviews; all parameters but the tied embedding."""
    arguments = ["model=smollm2_135m", "task=drug_reviews", "task.k=8", "task.max_length=64"]
    (run,) = compose_runs("kernel", [*arguments, "parameters=no_embeddings", "task.test_limit=2"])
    prepared = prepare(run.config, Screen())
    num_labels = len(prepared.data.labels)
    problem = load_problem(
        prepared.config.model,
        prepared.config.parameters,
        label_ids=prepared.encoded.label_ids,
        num_labels=num_labels,
    )
    batch = collate(prepared.encoded, range(16), "cpu")
    title = (
        "SmolLM2-135M, 16 drug reviews of at most 64 tokens, manual prompt, C=2, "
        "all parameters but the tied embedding"
    )
    return Workload("W4", title, Read(problem).eval(), batch, num_labels)


# ------------------------------------------------------------------ variants


def untied(workload: Workload) -> Workload:
    """A copy in which every module owns its parameters."""
    model = copy.deepcopy(workload.model)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # The bias that RoBERTa's head and its decoder share is used by the decoder alone.
            if id(parameter) in seen and parameter.dim() > 1:
                twin = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, twin)
            seen.add(id(parameter))
    return replace(workload, model=model)


def untied_without_rms_norm(workload: Workload) -> Workload:
    """The untied copy in which the gains of RMSNorm modules are frozen."""
    own = untied(workload)
    for module in own.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.requires_grad_(False)
    return own


def without_head_bias(workload: Workload) -> Workload:
    """A copy in which the bias of RoBERTa's head is frozen."""
    model = copy.deepcopy(workload.model)
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            parameter.requires_grad_(False)
    return replace(workload, model=model)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "W1": lambda: roberta("W1", "RoBERTa d=128, 4 layers, N=32, T=16 to 32, C=2"),
    "W2": lambda: roberta(
        "W2",
        "RoBERTa d=768, 2 layers, N=16, T=12 to 24, C=2",
        width=768,
        layers=2,
        texts=16,
        tokens=24,
    ),
    "W3": lambda: roberta("W3", "RoBERTa d=128, 4 layers, N=32, T=64 to 128, C=2", tokens=128),
    "W4": smollm2,
    "W5": lambda: roberta(
        "W5", "RoBERTa d=128, 4 layers, N=512, T=8 to 16, C=2", texts=512, tokens=16
    ),
}
"""Workloads on which all contenders are timed, by name."""
