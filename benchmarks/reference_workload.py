"""Seconds and error of three exact NTK computations on one workload, side by side in one run.

A tied RoBERTa prompt model with random weights: d = 128, 4 layers, vocabulary 5000, 32 texts of
16 to 32 tokens, 2 label-word logits at the mask; every parameter enters; one torch thread,
float32. Errors are relative Frobenius norms against a float64 autograd loop.

    python benchmarks/reference_workload.py [--texts 32] [--tokens 32] [--width 128] [--layers 4]

- loop: one backward pass per (text, output), all gradients kept, one matrix product;
- torch.func: vmap(jacrev) over texts, then one contraction per parameter;
- raykernel: `empirical_kernel`, which also keeps the layers apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from transformers import RobertaConfig, RobertaForMaskedLM

from raykernel.ntk.empirical import empirical_kernel

PAD, MASK, WORDS = 1, 4, [11, 4321]
Batch = dict[str, Tensor]


class PromptLogits(nn.Module):
    """(n, t) token ids → (n, 2) label-word logits; the head runs on the mask only."""

    def __init__(self, model: RobertaForMaskedLM) -> None:
        """Wrap a masked language model."""
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the label words at the mask."""
        # A ready-made 4-D mask: the model's own mask code branches on data, which vmap refuses.
        visible = (input_ids != PAD)[:, None, None, :].to(self.model.lm_head.dense.weight.dtype)
        mask = (1 - visible) * torch.finfo(visible.dtype).min
        mask = mask.expand(-1, 1, input_ids.shape[1], -1)
        hidden = self.model.roberta(input_ids=input_ids, attention_mask=mask)[0]
        at = (input_ids == MASK).float().argmax(-1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self.model.lm_head(hidden.gather(1, at)[:, 0])[:, WORDS]


def make_model(width: int, layers: int, tokens: int, dtype: torch.dtype) -> PromptLogits:
    """The random model, the same for every dtype."""
    torch.manual_seed(0)
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=5000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=max(64, tokens + 2),
            type_vocab_size=1,
            pad_token_id=PAD,
            attn_implementation="eager",
            initializer_range=0.05,
        )
    )
    return PromptLogits(model).to(dtype).eval()


def make_texts(num: int, tokens: int) -> Tensor:
    """Random texts of different lengths; some contain the label words."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 5000, (num, tokens), generator=generator)
    lengths = torch.randint(tokens // 2, tokens + 1, (num,), generator=generator)
    ids[::3, 2], ids[1::4, 3] = WORDS
    ids[torch.arange(tokens)[None] >= lengths[:, None]] = PAD
    ids[torch.arange(num), lengths - 2] = MASK
    return ids


def loop(model: PromptLogits, ids: Tensor) -> Tensor:
    """Kernel (nc, nc) by one backward pass per (text, output)."""
    parameters = list(model.parameters())
    rows = []
    for text in ids:
        logits = model(text[None])[0]
        for a in range(len(logits)):
            found = torch.autograd.grad(logits[a], parameters, retain_graph=True, allow_unused=True)
            pieces = zip(found, parameters, strict=True)
            rows.append(torch.cat([(g if g is not None else 0 * p).flatten() for g, p in pieces]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def torch_func(model: PromptLogits, ids: Tensor) -> Tensor:
    """Kernel (nc, nc) by vmap(jacrev)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, Tensor], text: Tensor) -> Tensor:
        # Tied parameters: functional_call replaces every name that shares the tensor.
        return functional_call(model, values, (text[None],))[0]

    jacobians = vmap(jacrev(outputs), (None, 0))(parameters, ids)
    total = torch.zeros(())
    for jacobian in jacobians.values():
        rows = jacobian.flatten(2).flatten(0, 1)
        total = total + rows @ rows.T
    return total


def raykernel(model: PromptLogits, ids: Tensor) -> Tensor:
    """Kernel (nc, nc) as the sum of raykernel's layer groups."""
    blocks = empirical_kernel(model, lambda m, batch: m(batch["ids"]), {"ids": ids})["sgd"]
    return torch.stack(list(blocks.values())).sum(0).flatten(2).flatten(0, 1)


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """The result and the best time of several runs."""
    best, result = float("inf"), torch.zeros(())
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        best = min(best, time.perf_counter() - start)
    return result, best


def main() -> None:
    """Run the three and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    for name, default in [("texts", 32), ("tokens", 32), ("width", 128), ("layers", 4)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = make_texts(options.texts, options.tokens)
    shape = (options.width, options.layers, options.tokens)
    reference = loop(make_model(*shape, torch.float64), ids)
    model = make_model(*shape, torch.float32)
    baseline = None
    for name, run in [("loop", loop), ("torch.func", torch_func), ("raykernel", raykernel)]:
        kernel, seconds = timed(lambda run=run: run(model, ids).detach(), options.repeats)
        error = ((kernel.double() - reference).norm() / reference.norm()).item()
        baseline = baseline or seconds
        print(f"{name:12s} {seconds:7.3f} s   {baseline / seconds:5.2f} x loop   error {error:.1e}")


if __name__ == "__main__":
    main()
