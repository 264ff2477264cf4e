"""A random masked LM in a folder, random texts, and an empty kernel in a store."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import RobertaConfig, RobertaForMaskedLM

from raykernel.compute.spec import WorkerSpec
from raykernel.config import ComputeConfig, KernelConfig, ModelConfig, ParametersConfig
from raykernel.problem.prompts import Encoded
from raykernel.store.blocks import Store
from raykernel.store.grid import Grid
from raykernel.store.kernels import KernelHandle
from raykernel.terms import Architecture, Precision

VOCABULARY = 60


def save_model(folder: Path, **sizes: int) -> ModelConfig:
    """A random RoBERTa."""
    torch.manual_seed(0)
    defaults = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 600,
    }
    RobertaForMaskedLM(RobertaConfig(**(defaults | sizes))).save_pretrained(folder)
    return ModelConfig(name=str(folder), architecture=Architecture.masked_lm)


def texts(num_examples: int, *, shortest: int = 5, longest: int = 12) -> Encoded:
    """Random token ids of random lengths."""
    draw = random.Random(0)
    rows = [
        tuple(draw.randrange(4, VOCABULARY) for _ in range(draw.randint(shortest, longest)))
        for _ in range(num_examples)
    ]
    return Encoded(
        input_ids=tuple(rows),
        token_type_ids=None,
        position=tuple(draw.randrange(len(row)) for row in rows),
        label_ids=(7, 9),
        pad_id=1,
        notes=(),
        truncated=0,
    )


def make_spec(
    folder: Path,
    model: ModelConfig,
    *,
    num_train: int = 6,
    num_rows: int = 11,
    block_size: int = 4,
    encoded: Encoded | None = None,
    precision: Precision = Precision.float32,
    **compute: Any,
) -> WorkerSpec:
    """A kernel begun in a store of its own."""
    grid = Grid(num_cols=num_train, num_rows=num_rows, block_size=block_size)
    table = pa.table(
        {
            "id": [f"a:{row}" for row in range(num_rows)],
            "split": ["train"] * num_train + ["test"] * (num_rows - num_train),
            "label": ["x"] * num_rows,
        }
    )
    handle = Store(folder).begin(
        {"name": "tiny", "precision": precision.value},
        grid=grid,
        num_outputs=2,
        examples=table,
        dtype="float64" if precision is Precision.float64 else "float32",
    )
    return WorkerSpec(
        model=model,
        parameters=ParametersConfig(),
        kernel=KernelConfig(block_size=block_size, precision=precision),
        compute=dataclasses.replace(ComputeConfig(), **compute),
        encoded=encoded or texts(num_rows),
        num_labels=2,
        store_path=str(folder),
        fingerprint=handle.fingerprint,
    )


def handle_of(spec: WorkerSpec) -> KernelHandle:
    return Store(spec.store_path).open(spec.fingerprint)
