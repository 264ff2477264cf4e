"""The input of a run, read and checked before anything expensive happens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from raykernel.compute.spec import WorkerSpec
from raykernel.config import (
    Json,
    ParametersConfig,
    PromptText,
    RunConfig,
    canonical_json,
    fingerprint,
)
from raykernel.console import Screen
from raykernel.location import location
from raykernel.problem.adapter_config import with_adapter
from raykernel.problem.architectures import check_model
from raykernel.problem.checkpoints import (
    findable,
    load_tokenizer,
    max_positions,
    model_identity,
    prepare_model,
)
from raykernel.problem.prompts import Encoded, Prompt, encode, resolve_prompt
from raykernel.problem.tasks import Data, load_data
from raykernel.store.grid import Grid
from raykernel.store.nested import TOKENS
from raykernel.terms import PromptStyle, Split


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run whose input is known to be right: nothing expensive has happened yet."""

    config: RunConfig
    data: Data
    prompt: Prompt
    encoded: Encoded
    grid: Grid
    identity: dict[str, Json]

    @property
    def fingerprint(self) -> str:
        """Name of the kernel in the store."""
        return fingerprint(self.identity)

    @property
    def trial(self) -> str | None:
        """Fine-tuning run whose weights the model has; None: θ_PT."""
        trial = self.identity.get("trial")
        return trial if isinstance(trial, str) else None


def prepare(config: RunConfig, screen: Screen) -> Prepared:
    """Examples, prompts and identity of a run; every check that needs no model weights.

    Args:
        config: the run.
        screen: where downloads are shown.

    Returns:
        The checked input of the run.

    Raises:
        InputError: if configuration, data, template or model name are wrong.
    """
    data = load_data(config.task)
    prompt = resolve_prompt(config.task, config.prompt, data.labels)
    # A branch name of the hub becomes a commit here, so that all workers load the same weights.
    config = replace(config, model=prepare_model(config.model))
    if config.needs_both_sides and not config.kernel.test_block:
        screen.note(
            "solver.c below 1 needs K(train, x) beside K(x, train): the kernel of test with "
            "train is stored, as with kernel.test_block=true."
        )
        config = replace(config, kernel=replace(config.kernel, test_block=True))
    check_model(config.model, has_prompt=config.prompt.style is not PromptStyle.none)
    tokenizer = load_tokenizer(config.model)
    encoded = encode(
        data,
        prompt,
        config.task,
        tokenizer,
        config.model.architecture,
        max_positions(config.model),
    )
    # The content of a file of PEFT's: that decides, and other machines may not see the file.
    config = replace(config, parameters=with_adapter(config.parameters))
    if config.parameters != ParametersConfig():
        # It takes PyTorch, which a run that names no parameters does without in this process.
        from raykernel.problem.models import check_parameters

        check_parameters(
            config.model,
            config.parameters,
            label_ids=encoded.label_ids,
            num_labels=len(data.labels),
        )
    for note in (*data.notes, *encoded.notes):
        screen.note(note)
    grid = Grid(
        num_cols=len(data.splits[Split.train]),
        num_rows=len(data.examples),
        block_size=config.kernel.block_size,
        num_dev=len(data.splits[Split.dev]),
    )
    return Prepared(config, data, prompt, encoded, grid, identity_of(config, data, prompt, encoded))


def worker_spec(prepared: Prepared) -> WorkerSpec:
    """What a worker needs to compute blocks of a run; it need not run in the driver's folder."""
    config = prepared.config
    return WorkerSpec(
        model=findable(config.model),
        parameters=config.parameters,
        kernel=config.kernel,
        compute=config.compute,
        encoded=prepared.encoded,
        num_labels=len(prepared.data.labels),
        store_path=str(location(config.store.path)),
        fingerprint=prepared.fingerprint,
        trial=prepared.trial,
        group_sets=tuple(map(tuple, (config.solver.groups, *config.spectrum.sets))),
    )


def identity_of(config: RunConfig, data: Data, prompt: Prompt, encoded: Encoded) -> dict[str, Json]:
    """What decides the kernel's numbers, and nothing else.

    The examples and tokens enter by hash; the few settings behind them stand in the open, so
    that two kernels can be compared field by field.

    Args:
        config: the run.
        data: its examples.
        prompt: its template and words.
        encoded: its tokens.

    Returns:
        A JSON tree whose hash names the kernel.
    """
    task = config.task
    own = task.prompts.get(config.prompt.style.value, PromptText())
    tokens = [encoded.input_ids, encoded.token_type_ids, encoded.position, encoded.label_ids]
    return {
        "task": {
            "name": task.name,
            "labels": list(data.labels),
            "k": task.k,
            "seed": task.seed,
            "max_length": task.max_length,
            "truncate": task.truncate.value,
            "num_test": len(data.splits[Split.test]),
            "examples": data.fingerprint,
        },
        "prompt": {
            "style": config.prompt.style.value,
            "template": config.prompt.template or own.template,
            "words": list(prompt.words),
            "tokens": hashlib.sha256(canonical_json(tokens).encode()).hexdigest()[:16],
        },
        "model": model_identity(config.model),
        "parameters": config.parameters.identity,
        "kernel": config.kernel.identity,
    }


def problem_columns(prepared: Prepared, start_score: float) -> dict[str, object]:
    """What the result tables `kernels` and `trials` say of a problem, alike.

    Args:
        prepared: the run.
        start_score: test score at θ_0: zero-shot, or of the linear probe.

    Returns:
        Values by column.
    """
    config, splits = prepared.config, prepared.data.splits
    probe = config.prompt.style is PromptStyle.none
    return {
        "task": config.task.name,
        "model": config.model.name,
        "prompt": config.prompt.style.value,
        "k": config.task.k,
        "seed": config.task.seed,
        "num_outputs": len(prepared.data.labels),
        "num_train": len(splits[Split.train]),
        "num_dev": len(splits[Split.dev]),
        "num_test": len(splits[Split.test]),
        "metric": config.task.metric.value,
        "zero_shot": None if probe else start_score,
        "linear_probe": start_score if probe else None,
    }


def example_table(prepared: Prepared) -> pa.Table:
    """Ids, splits, labels and hashes of the tokens of the kernel's rows, in order."""
    data, encoded = prepared.data, prepared.encoded
    split_of = {i: split.value for split, indices in data.splits.items() for i in indices}
    return pa.table(
        {
            "index": pa.array(range(len(data.examples)), pa.int64()),
            "id": [example.id for example in data.examples],
            "split": [split_of[i] for i in range(len(data.examples))],
            "label": [data.labels[example.label] for example in data.examples],
            TOKENS: [fingerprint(encoded.of(i)) for i in range(len(data.examples))],
        }
    )


def example_labels(data: Data) -> Int[np.ndarray, " num_examples"]:
    """Label index of every example."""
    return np.array([example.label for example in data.examples], dtype=np.int64)
