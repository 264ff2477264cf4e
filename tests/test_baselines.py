"""Baselines of `raykernel select` against autograd over a whole batch, and against PEFT's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from raykernel.baselines import summed
from raykernel.cli import main
from raykernel.compose import compose_runs
from raykernel.compute.baselines import Measurer, _Sums, plain_layer
from raykernel.compute.spec import BaselineSpec
from raykernel.console import Screen
from raykernel.prepared import Prepared, example_labels, prepare, worker_spec
from raykernel.problem.batches import collate
from raykernel.problem.models import Problem, load_problem
from raykernel.store.baselines import Measured, read_baselines
from raykernel.store.blocks import Store
from raykernel.store.verify import verify
from tests import tiny

PATHS = [
    f"roberta.encoder.layer.{layer}.attention.self.{name}"
    for layer in (0, 1)
    for name in ("query", "value")
]
CASES = {"store": [], "lora": ["parameters=lora", "parameters.r=2"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a model, reviews, and a selection by a baseline in two stores."""
    folder, before = tmp_path_factory.mktemp("baselines"), Path.cwd()
    tiny.save_masked_lm(folder / "model")
    tiny.write_reviews(folder / "reviews.tsv")
    os.chdir(folder)
    for store in CASES:
        assert main(["select", *arguments(store)]) == 0
    yield folder
    os.chdir(before)


def arguments(store: str, *more: str) -> list[str]:
    criterion = "select.criterion=relative_gradient_norm"
    return [*tiny.overrides("model", store__path=store), *CASES[store], criterion, *more]


def run_of(store: str) -> tuple[Prepared, Problem, dict[str, Measured]]:
    (run,) = compose_runs("select", arguments(store))
    prepared = prepare(run.config, Screen())
    problem = load_problem(
        prepared.config.model,
        prepared.config.parameters,
        label_ids=prepared.encoded.label_ids,
        num_labels=2,
    )
    return prepared, problem, read_baselines(Store(store).open(prepared.fingerprint))


def train_of(prepared: Prepared) -> tuple[list[int], Tensor]:
    train = list(prepared.grid.train)
    return train, torch.from_numpy(example_labels(prepared.data)[train])


@pytest.mark.parametrize("store", CASES)
def test_gradients_are_those_of_the_mean_loss_over_train(place: Path, store: str) -> None:
    """Also of the weights that a LoRA adapts: at B = 0 it changes nothing."""
    prepared, problem, found = run_of(store)
    train, labels = train_of(prepared)
    assert set(found) == set(PATHS)
    layers = {path: plain_layer(problem.module, path) for path in PATHS}
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    logits = problem.readout(problem.module, collate(prepared.encoded, train))
    gradients = torch.autograd.grad(cross_entropy(logits, labels), weights)
    for path, weight, gradient in zip(PATHS, weights, gradients, strict=True):
        assert found[path].gradient == pytest.approx(float(gradient.norm()) ** 2, rel=1e-4)
        assert found[path].weights == pytest.approx(float(weight.detach().norm()) ** 2, rel=1e-5)


def test_importance_is_that_of_adalora_with_means_for_moving_averages(place: Path) -> None:
    """PEFT's RankAllocator, β = 1 - 1/i at example i."""
    prepared, problem, found = run_of("store")
    train, labels = train_of(prepared)
    for path in PATHS:
        weight = plain_layer(problem.module, path).weight
        weight.requires_grad_()
        holder = nn.Module()
        holder.register_parameter("lora_default", weight)
        allocator = RankAllocator.__new__(RankAllocator)
        allocator.adapter_name, allocator.ipt = "default", {}
        allocator.exp_avg_ipt, allocator.exp_avg_unc = {}, {}
        for number, i in enumerate(train, start=1):
            weight.grad = None
            logits = problem.readout(problem.module, collate(prepared.encoded, [i]))
            cross_entropy(logits, labels[number - 1 : number]).backward()
            allocator.beta1 = allocator.beta2 = 1 - 1 / number
            allocator.update_ipt(holder)
        score = allocator._element_score("lora_default").double().mean()
        assert found[path].importance == pytest.approx(float(score), rel=1e-4)


def test_shares_are_the_explained_variance_of_peft(place: Path) -> None:
    """EVA's own PCA over the tokens of a padded batch of all of train."""
    prepared, problem, found = run_of("store")
    train, _ = train_of(prepared)
    batch = collate(prepared.encoded, train)
    for path in PATHS:
        seen: list[Tensor] = []
        hook = plain_layer(problem.module, path).register_forward_pre_hook(
            lambda layer, inputs, seen=seen: seen.append(inputs[0].detach())
        )
        problem.readout(problem.module, batch)
        hook.remove()
        tokens = seen[0][batch["attention_mask"].bool()]
        pca = IncrementalPCA(n_components=8, lowrank=False)
        pca.partial_fit(tokens)
        ratio = pca.explained_variance_ratio_.numpy()
        assert found[path].shares[:8] == pytest.approx(ratio, rel=1e-3, abs=1e-5)
        assert found[path].shares.sum() == pytest.approx(1)
        own = summed([found[path], found[PATHS[0]]], r=3)
        both = found[path].shares[:3].sum() + found[PATHS[0]].shares[:3].sum()
        assert own.explained == pytest.approx(both)
        assert own.gradient == found[path].gradient + found[PATHS[0]].gradient


def test_scores_of_choices_are_sums_over_modules(place: Path) -> None:
    _, _, found = run_of("store")
    listed = Store("store").results("selections").to_pylist()
    assert len(listed) == 4  # three choices of two layers, and all
    for row in listed:
        own = [found[path] for path in row["target_modules"]]
        ratio = sum(one.gradient for one in own) / sum(one.weights for one in own)
        assert row["relative_gradient_norm"] == pytest.approx(ratio**0.5)
        assert row["importance"] == pytest.approx(sum(one.importance for one in own))
        explained = sum(one.shares[:8].sum() for one in own)
        assert row["explained_variance"] == pytest.approx(explained)
        assert row["half_first"] is None  # of the weights: a half of train has no other
    best = max(listed, key=lambda row: row["relative_gradient_norm"])
    assert best["rank"] == 1


def test_what_is_stored_is_not_measured_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, before = run_of("store")
    assert main(["select", *arguments("store", "select.top=1")]) == 0
    assert "Measuring" not in capsys.readouterr().err
    assert main(["select", *arguments("store", "select.modules=[query,key]")]) == 0
    assert "Measuring the weights of 2 modules on train" in capsys.readouterr().err
    _, _, after = run_of("store")
    assert len(after) == 6
    assert all(after[path].importance == before[path].importance for path in PATHS)
    # Without them neither measures nor shows any.
    assert (
        main(["select", *tiny.overrides("model", store__path="store"), "select.baselines=false"])
        == 0
    )
    printed = capsys.readouterr()
    assert "rgn" not in printed.out
    assert "what people choose by today" not in printed.out


def test_a_damaged_file_is_found_and_measured_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared, _, before = run_of("lora")
    file = Path("lora", "kernels", prepared.fingerprint, "baselines.arrow")
    assert verify("lora").ok
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert [bad.path.name for bad in verify("lora").bad] == [file.name]
    assert main(["select", *arguments("lora")]) == 0
    assert "Measuring the weights of 4 modules" in capsys.readouterr().err
    assert verify("lora").ok
    _, _, after = run_of("lora")
    assert {p: m.importance for p, m in after.items()} == {
        p: m.importance for p, m in before.items()
    }


def test_layers_in_parts_that_fit_the_memory_are_the_same(place: Path) -> None:
    prepared, _, before = run_of("store")
    worker = worker_spec(prepared)
    small = replace(worker, compute=replace(worker.compute, memory_gb=0.01))
    _, labels = train_of(prepared)
    measurer = Measurer(BaselineSpec(small, tuple(labels.tolist())))
    layers = {path: plain_layer(measurer._problem.module, path) for path in PATHS}
    assert [len(part) for part in measurer._parts(layers)] == [1] * 4
    assert measurer.measure(tuple(PATHS)).num_modules == 4
    _, _, after = run_of("store")
    for path in PATHS:
        assert after[path].importance == before[path].importance
        assert after[path].shares == pytest.approx(before[path].shares)


def test_a_transposed_weight_is_the_same_layer() -> None:
    """GPT-2's Conv1D is a linear layer whose weight is (d_in, d_out)."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(5, 3), Conv1D(3, 5)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
    one, two = _Sums(linear), _Sums(conv)
    for _ in range(4):
        x, g = torch.randn(1, 7, 5), torch.randn(3, 5)
        one.see(linear, (x,))
        two.see(conv, (x,))
        one.add(g)
        two.add(g.T)
    one.add(None)
    two.add(None)  # as of a layer that one example does not use
    a, b = one.result(), two.result()
    assert a.shares == pytest.approx(b.shares)
    assert (a.gradient, a.weights) == pytest.approx((b.gradient, b.weights))
    assert a.importance == pytest.approx(b.importance)
    assert np.sum(a.shares) == pytest.approx(1)
