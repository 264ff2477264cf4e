"""Numbers that cannot be trusted end a worker's first block, with the layer and the example."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raykernel.compute import kept
from raykernel.compute.spec import WorkerSpec
from raykernel.compute.worker import Worker
from raykernel.config import ModelConfig
from raykernel.errors import ExampleError, InconsistentError, NonFiniteError
from raykernel.problem.prompts import Encoded
from raykernel.terms import Precision
from tests.compute.tiny_problem import handle_of, make_spec, save_model, texts

LAYER = "roberta.encoder.layer.0.output"
Change = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def changed() -> Iterator[Callable[[WorkerSpec, Change | None], Worker]]:
    """A worker whose model has another output of one layer."""
    handles = []

    def make(spec: WorkerSpec, change: Change | None) -> Worker:
        worker = Worker(spec)
        if change is not None:
            module: nn.Module = worker._problem.module.get_submodule(LAYER)
            handles.append(module.register_forward_hook(lambda m, a, output: change(output)))
        worker.prepare()
        return worker

    yield make
    for handle in handles:
        handle.remove()
    kept.forget()


def of_lengths(*lengths: int) -> Encoded:
    """As many texts, the readout at their first token."""
    found = texts(len(lengths), longest=max(lengths), shortest=max(lengths))
    rows = tuple(row[:length] for row, length in zip(found.input_ids, lengths, strict=True))
    return dataclasses.replace(found, input_ids=rows, position=(0,) * len(rows))


def first_block(worker: Worker, spec: WorkerSpec) -> None:
    worker.compute(handle_of(spec).missing()[0])


def chance(output: Tensor) -> Tensor:
    """Dropout that is left on; the engine meets it as soon as it traces the longest example."""
    return F.dropout(output, 0.1, training=True)


def chance_of_some(output: Tensor) -> Tensor:
    """Noise on short texts only, which the engine's own check at the start does not meet."""
    return output + 0.1 * torch.randn_like(output) if output.shape[1] < 6 else output


def neighbours(output: Tensor) -> Tensor:
    """What batch norm in train mode, or attention across examples, does."""
    return output + output.mean(0, keepdim=True)


def padding(output: Tensor) -> Tensor:
    """A mean over tokens that no mask takes padding out of."""
    return output + output.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("change", "lengths", "batch_size", "text", "example"),
    [
        (chance, (12, 5, 9, 7), 4, "gave different outputs", 0),
        (chance, (12, 5, 9, 7), 1, "gave different outputs", 0),
        (chance_of_some, (12, 5, 9, 7), 1, "gave different outputs", 1),
        (neighbours, (12, 12, 9, 5), 4, "alone and beside others", 3),
        (neighbours, (9, 9, 9, 9), 4, "alone and beside others", 3),
        (padding, (12, 12, 9, 5), 4, "alone and beside others", 3),
    ],
    ids=["chance", "chance one by one", "chance of some", "neighbours", "as long", "padding"],
)
def test_what_is_no_function_of_the_example_is_refused(
    tmp_path: Path,
    model: ModelConfig,
    changed: Callable[..., Worker],
    change: Change,
    lengths: tuple[int, ...],
    batch_size: int,
    text: str,
    example: int,
) -> None:
    """By its first layer that differs; nothing is stored, though a kernel was computed."""
    encoded = of_lengths(*lengths)
    spec = make_spec(
        tmp_path, model, num_train=4, num_rows=4, encoded=encoded, batch_size=batch_size
    )
    with pytest.raises(InconsistentError, match=text) as raised:
        first_block(changed(spec, change), spec)
    assert str(raised.value).startswith(f"{LAYER}:")
    assert str(raised.value).endswith(f"(in the table `examples`: a:{example})")
    assert len(handle_of(spec).missing()) == 1


@pytest.mark.parametrize(
    ("change", "batch_size", "precision"),
    [
        (None, 4, Precision.float32),
        (None, 1, Precision.float32),
        (None, 4, Precision.float64),
        (None, 4, Precision.bfloat16),
        (neighbours, 1, Precision.float32),
    ],
)
def test_functions_of_the_example_are_not(
    tmp_path: Path,
    model: ModelConfig,
    changed: Callable[..., Worker],
    change: Change | None,
    batch_size: int,
    precision: Precision,
) -> None:
    """In any precision; and what depends on company, where there is none."""
    encoded = of_lengths(12, 12, 9, 5)
    sizes = {"num_train": 4, "num_rows": 4, "batch_size": batch_size}
    spec = make_spec(tmp_path, model, encoded=encoded, precision=precision, **sizes)
    first_block(changed(spec, change), spec)
    assert handle_of(spec).missing() == []


def test_only_the_first_block_of_a_worker_is_passed_twice(
    tmp_path: Path, model: ModelConfig, changed: Callable[..., Worker]
) -> None:
    spec = make_spec(tmp_path, model, num_train=4, num_rows=12)
    worker, passes = changed(spec, None), []
    worker._problem.module.register_forward_pre_hook(lambda m, a: passes.append(1))
    counts = []
    for cell in handle_of(spec).missing()[:3]:
        worker.compute(cell)
        counts.append(len(passes))
        passes.clear()
    alone = counts[0] - 2 * (counts[1] - counts[2]) - counts[2]
    assert counts[2] <= counts[1] < counts[0]
    assert alone <= 1


# ------------------------------------------------------------------ NaN and infinity


def broken(folder: Path, model: ModelConfig, name: str, row: int, value: float) -> ModelConfig:
    """A copy of the model on disk with one row of a parameter changed, its signs in turn."""
    from transformers import RobertaForMaskedLM

    own = RobertaForMaskedLM.from_pretrained(model.name)
    with torch.no_grad():
        parameter = own.get_parameter(name)
        parameter[row] = value
        parameter[row, ::2] *= -1
    own.save_pretrained(folder)
    return dataclasses.replace(model, name=str(folder))


def failure(spec: WorkerSpec) -> str:
    """What the first block, or loading the model for it, says."""
    cell = handle_of(spec).missing()[0]
    with pytest.raises(NonFiniteError) as raised:
        spec.blocks()(cell)
    assert isinstance(raised.value, ExampleError)
    return str(raised.value)


WORDS = "roberta.embeddings.word_embeddings.weight"


def test_a_weight_that_no_text_uses_is_refused_if_it_is_nan(
    tmp_path: Path, model: ModelConfig
) -> None:
    own = broken(tmp_path / "model", model, WORDS, 3, float("nan"))
    spec = make_spec(tmp_path / "store", own)
    assert all(3 not in row for row in spec.encoded.input_ids)
    assert failure(spec).startswith(f"roberta.embeddings.word_embeddings: parameter '{WORDS}'")


@pytest.mark.parametrize(
    ("precision", "cure"),
    [(Precision.float32, "=float64"), (Precision.bfloat16, "=float32, or float64")],
)
def test_an_overflow_names_layer_example_and_the_precision_to_use(
    tmp_path: Path, model: ModelConfig, precision: Precision, cure: str
) -> None:
    """Word 3, in the shortest text alone, is near the end of the range; its norm is beyond."""
    own = broken(tmp_path / "model", model, WORDS, 3, 3e38)
    encoded = of_lengths(12, 12, 9, 5)
    rows = (*encoded.input_ids[:3], (3, *encoded.input_ids[3][1:]))
    encoded = dataclasses.replace(encoded, input_ids=rows)
    sizes = {"num_train": 4, "num_rows": 4}
    said = failure(
        make_spec(tmp_path / "store", own, encoded=encoded, precision=precision, **sizes)
    )
    assert said.startswith("roberta.embeddings.LayerNorm: its output is NaN")
    assert f"Use kernel.precision{cure}" in said
    assert said.endswith("(in the table `examples`: a:3)")
