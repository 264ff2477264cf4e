"""`raykernel finetune training.twin=true` end to end, against what its stored parameters say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raykernel.cli import main
from raykernel.compose import compose_runs
from raykernel.compute.tensorfile import read_tensors
from raykernel.compute.weights import assign
from raykernel.config import RunConfig
from raykernel.console import Screen
from raykernel.ntk.empirical import empirical_kernel
from raykernel.ntk.product import tangents
from raykernel.problem.batches import collate
from raykernel.store.blocks import Store
from raykernel.store.query import query
from raykernel.store.verify import verify
from raykernel.terms import Split
from raykernel.training.trial import load_start
from raykernel.trials import run_trial, trial_spec
from raykernel.twins import TwinOutcome, run_twin
from tests import tiny

FLOW: dict[str, str | None] = {
    "training.loss": "squared",
    "training.batch_size": "12",
    "training.max_grad_norm": "null",
    "training.schedule": "constant",
}
PULLED: dict[str, str | None] = {"regularization": "coupled", "regularization.lam": "0.5"}
LORA: dict[str, str | None] = {
    "parameters": "lora", "prompt": "none", "prompt.template": None, "prompt.words": None,
    "parameters.include": "[lora_,classifier]", "training": "adam",
    "training.learning_rate": "0.01",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_masked_lm(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


def arguments(model: Path, **changes: str | None) -> list[str]:
    """Overrides of a small twin: 6 train, 6 dev and 6 test examples, 8 steps."""
    own = {
        "task.test_limit": "6",
        "training.learning_rate": "0.02",
        "training.steps": "8",
        "training.eval_every": "4",
        "training.dropout": "false",
        "training.twin": "true",
    }
    return tiny.overrides(model, **(own | changes))


def config_of(model: Path, **changes: str | None) -> RunConfig:
    (run,) = compose_runs("finetune", arguments(model, **changes))
    return run.config


def run(model: Path, **changes: str | None) -> TwinOutcome:
    return run_twin(config_of(model, **changes), (), Screen())


class Again:
    """f_0, f, f̄_A and f̄_B once more, from the files of a trial."""

    def __init__(self, outcome: TwinOutcome) -> None:
        trial = outcome.trial
        prepared = trial.prepared
        training = prepared.config.training.resolved(k=3, num_labels=2)
        self.problem = load_start(trial_spec(prepared, training, trial.files))
        self.module, self.readout = self.problem.module, self.problem.readout
        named = dict(self.module.named_parameters())
        self.last, self.twin = (
            read_tensors(path)[0] for path in (trial.files.last, trial.files.twin)
        )
        self.start = {name: named[name].detach().clone() for name in self.last}
        self.splits = dict(prepared.data.splits)
        self.encoded = prepared.encoded
        self.labels = np.array([e.label for e in prepared.data.examples])

    def batch(self, split: Split) -> dict[str, Tensor]:
        return collate(self.encoded, self.splits[split])

    def logits(self, split: Split) -> list[np.ndarray]:
        """f_0, f, f̄_A, f̄_B."""
        batch = self.batch(split)
        found = []
        for own in (self.twin, self.last):
            direction = {name: own[name] - self.start[name] for name in own}
            f0, change = tangents(self.module, self.readout, [batch], direction)
            found.append(f0 + change)
        assign(self.module, self.last)
        with torch.no_grad():
            f = self.readout(self.module, batch)
        assign(self.module, self.start)
        return [own.double().numpy() for own in (f0, f, *found)]


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TwinOutcome:
    folder = tmp_path_factory.mktemp("lora")
    tiny.write_reviews(folder / "reviews.tsv")
    changes = {
        "task.train": str(folder / "reviews.tsv"),
        "store.path": str(folder / "store"),
    }
    return run(model, **(LORA | PULLED | changes))


def test_the_numbers_are_those_of_the_stored_parameters(lora):
    again = Again(lora)
    for row in lora.rows:
        split = Split(row["split"])
        f0, f, a, b = again.logits(split)
        labels = again.labels[list(again.splits[split])]
        change = np.linalg.norm(f - f0, axis=1).mean()
        assert row["num_examples"] == len(labels) == 6
        assert row["change"] == pytest.approx(change, rel=1e-4)
        assert row["score"] == (f.argmax(1) == labels).mean()
        assert row["start_score"] == (f0.argmax(1) == labels).mean()
        for name, own in (("a", a), ("b", b)):
            apart = np.linalg.norm(f - own, axis=1).mean()
            assert row[f"distance_{name}"] == pytest.approx(apart, rel=1e-3, abs=1e-6)
            assert row[f"relative_{name}"] == pytest.approx(apart / change, rel=1e-3, abs=1e-6)
            p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (f, own))
            kl = (p * np.log(p / q)).sum(1).mean()
            assert row[f"kl_{name}"] == pytest.approx(kl, rel=1e-2, abs=1e-8)
            reverse = (q * np.log(q / p)).sum(1).mean()
            assert row[f"kl_reverse_{name}"] == pytest.approx(reverse, rel=1e-2, abs=1e-8)
            assert row[f"score_{name}"] == (own.argmax(1) == labels).mean()
            assert row[f"agreement_{name}"] == (own.argmax(1) == f.argmax(1)).mean()
    assert lora.rows[0]["distance_a"] > 0


def test_deviations_are_those_of_the_stored_parameters(lora):
    again, row = Again(lora), lora.rows[0]

    def norm(one: dict[str, Tensor], two: dict[str, Tensor] | None = None) -> float:
        pairs = [(v, 0 * v if two is None else two[n]) for n, v in one.items()]
        return sum(float((v - w).double().square().sum()) for v, w in pairs) ** 0.5

    assert row["deviation"] == pytest.approx(norm(again.last, again.start), rel=1e-6)
    assert row["twin_deviation"] == pytest.approx(norm(again.twin, again.start), rel=1e-6)
    assert row["apart"] == pytest.approx(norm(again.last, again.twin), rel=1e-6)
    expected = norm(again.last, again.start) / norm(again.start)
    assert row["deviation_relative"] == pytest.approx(expected, rel=1e-6)
    assert any("classifier" in name for name in again.last)
    end = lora.trial.curve[-1]
    assert lora.trial.row["best_step"] < end["step"] == row["steps"], (
        "the case must tell them apart"
    )
    assert row["deviation"] == pytest.approx(end["distance"], rel=1e-6)


def test_an_adapted_matrix_moves_by_s_b_a(lora):
    """||s B A||_F of the matrices that PEFT itself says are added."""
    again, row = Again(lora), lora.rows[0]
    assign(again.module, again.last)
    modules = json.loads(row["modules"])
    adapted = {p: m for p, m in again.module.named_modules() if hasattr(m, "lora_A")}
    assert set(modules) == set(adapted)
    for path, layer in adapted.items():
        delta = layer.get_delta_weight("default").detach()
        whole = float(layer.base_layer.weight.norm())
        assert modules[path] == pytest.approx([float(delta.norm()), float(delta.norm()) / whole])
    changes = [own[0] for own in modules.values()]
    assert min(changes) > 0
    assert row["adapter_change"] == pytest.approx(np.mean(changes))
    assert row["adapter_relative"] == pytest.approx(np.mean([own[1] for own in modules.values()]))


def test_without_a_flow_the_energy_bound_is_left_and_the_others_say_why(lora):
    by_name = {(row["quantity"], row["name"]): row for row in lora.bounds}
    energy = by_name.pop(("deviation", "energy"))
    again = Again(lora)
    f0, *_ = again.logits(Split.train)
    labels = again.labels[list(again.splits[Split.train])]
    risk = (np.log(np.exp(f0).sum(1)) - f0[range(6), labels]).sum()
    assert energy["bound"] == pytest.approx((2 * risk / 0.5) ** 0.5, rel=1e-5)  # λ of a sum
    assert energy["holds"]
    assert energy["slack"] == pytest.approx(energy["bound"] / lora.rows[0]["deviation"])
    for row in by_name.values():
        assert row["bound"] is row["holds"] is row["lipschitz"] is None
        assert "of sgd, not of adam" in row["assumes"]
        assert "full batches" in row["assumes"]


@pytest.mark.parametrize("pulled", [{}, PULLED])
def test_every_bound_holds_of_small_full_batch_steps(pulled, model, here):
    outcome = run(model, **(FLOW | pulled))
    known = [row for row in outcome.bounds if row["bound"] is not None]
    assert len(outcome.bounds) == 6
    assert [row["name"] for row in outcome.bounds if row["bound"] is None] == (
        [] if pulled else ["energy"]
    )
    assert all(row["holds"] and row["slack"] >= 1 for row in known)
    again = Again(outcome)
    f0, f, a, _ = again.logits(Split.train)
    kernel = sum(
        empirical_kernel(again.module, again.readout, again.batch(Split.train))["sgd"].values()
    )
    top = float(torch.linalg.eigvalsh(kernel.double().reshape(12, 12))[-1]) ** 0.5
    lipschitz = known[0]["lipschitz"]
    assert top * (1 - 2e-3) <= lipschitz <= 1.5 * top  # the largest that was seen
    assert known[0]["lipschitz_start"] == pytest.approx(top, rel=2e-3)
    assert known[0]["lipschitz_end"] <= lipschitz
    assert known[0]["lipschitz_mean"] <= lipschitz
    assert known[0]["lipschitz_samples"] == 4
    deviation = outcome.rows[0]["deviation"]
    # Of the ends' norms alone: ‖J_T‖ - ‖J_0‖ is no more than ‖J_T - J_0‖.
    apart = abs(known[0]["lipschitz_end"] - known[0]["lipschitz_start"])
    assert known[0]["curvature"] * deviation >= apart * (1 - 5e-3)
    (printed,) = [r for r in known if (r["quantity"], r["name"]) == ("deviation", "printed")]
    labels = np.eye(2)[again.labels[list(again.splits[Split.train])]]
    time, lam = 8 * 0.02 / 12, 1.0 if pulled else 0.0  # Σ η / 2n, and 2n λ/n
    grown = -np.expm1(-lam * time) / lam if lam else time
    expected = 2 * lipschitz * np.linalg.norm(f0 - labels) * grown
    assert printed["bound"] == pytest.approx(expected, rel=1e-5)
    distance = [r for r in known if r["quantity"] == "distance"]
    assert distance[0]["measured"] == pytest.approx(np.linalg.norm(f - a), rel=1e-2)


def test_clipped_gradients_and_cross_entropy_have_fewer_bounds(model, here):
    outcome = run(model, **(FLOW | {"training.loss": "cross_entropy"}))
    without = [row for row in outcome.bounds if row["bound"] is None]
    assert {row["quantity"] for row in without if row["name"] != "energy"} == {"distance"}
    assert all("not of cross-entropy" in r["assumes"] for r in without if r["name"] != "energy")
    assert all(row["holds"] for row in outcome.bounds if row["bound"] is not None)
    clipped = run(model, **(FLOW | {"training.max_grad_norm": "0.1"}))
    without = [row for row in clipped.bounds if row["quantity"] == "distance"]
    assert all("not clipped" in row["assumes"] for row in without)


def test_a_twin_is_printed_stored_and_never_run_twice(model, here, capsys):
    plain = run_trial(config_of(model, **{"training.twin": "false"}), (), Screen())
    before = plain.files.weights.read_bytes()
    capsys.readouterr()
    assert main(["finetune", *arguments(model)]) == 0
    first = capsys.readouterr()
    said = " ".join(first.err.split())
    assert "parameters of the last step are not: training again" in said
    assert "Linear twin" in said
    assert "A: trained itself" in first.out
    (trial,) = Store("store").trials()
    assert trial == plain.trial  # a twin does not change the trial, nor its name
    assert plain.files.weights.read_bytes() == before
    names = sorted(path.name.partition("-")[0] for path in plain.files.path.iterdir())
    assert names == [
        "best.safetensors", "last.safetensors", "twin.safetensors",
    ]  # fmt: skip
    written = {path: path.stat().st_mtime_ns for path in plain.files.path.iterdir()}
    plain.files.twin_checkpoint.write_bytes(b"of a run that was killed at its very end")
    assert main(["finetune", *arguments(model)]) == 0
    second = capsys.readouterr()
    assert "step 8" not in second.err
    tables = [
        out.out.partition("Fine-tuning f beside")[2].partition("Twin:")[0]
        for out in (first, second)
    ]
    assert tables[0] == tables[1] != ""
    assert {path: path.stat().st_mtime_ns for path in plain.files.path.iterdir()} == written
    rows = query(
        "select * from twins join trials using (trial) order by split", "store"
    ).to_pylist()
    assert [row["split"] for row in rows] == ["dev", "test", "train"]
    assert query("select count(*) as n from bounds", "store").to_pylist() == [{"n": 6}]
    assert main(["verify", "--store", "store"]) == 0


def test_damaged_parameters_are_found(model, here):
    files = run(model).trial.files
    for path in (files.last, files.twin):
        content = bytearray(path.read_bytes())
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    bad = {file.path.name for file in verify("store").bad}
    assert bad == {"last.safetensors", "twin.safetensors"}


def test_parameters_are_kept_only_if_they_are_to_be(model, here):
    outcome = run(model, **{"training.keep_weights": "false"})
    assert not list(outcome.trial.files.path.iterdir())
    tables = {path.name for path in Path("store/results").iterdir()}
    assert tables == {"bounds", "curves", "trials", "twins"}
    assert run(model, **{"training.keep_weights": "false"}).was_stored


def test_a_twin_does_not_change_the_identity(model, here):
    training = config_of(model).training
    assert dataclasses.replace(training, twin=False).identity == training.identity


def test_a_run_confined_to_random_directions_has_a_twin_there(model, here):
    outcome = run(model, **{"training.intrinsic_dimension": "5"})
    assert outcome.rows[0]["apart"] > 0
    assert all("random directions" in row["assumes"] for row in outcome.bounds)


@pytest.mark.parametrize(
    ("command", "changes", "help"),
    [
        ("finetune", {"training.dropout": "true"}, "training.dropout=false"),
        ("finetune", {"training.precision": "bfloat16"}, "training.precision=float32"),
        ("behavior", {}, "training.twin"),
    ],
)
def test_wrong_input_ends_with_code_2_and_says_what_to_do(
    command: str, changes: dict[str, Any], help: str, model, here, capsys
):
    assert main([command, *arguments(model, **changes)]) == 2
    message = capsys.readouterr().err
    assert help in message
    assert "Traceback" not in message
    assert not Path("store").exists()


def test_a_twin_that_diverges_ends_with_code_1_and_leaves_the_trial(model, here, capsys):
    """Softmax saturates and holds the run; a quadratic has nothing that would hold its twin."""
    wild: dict[str, str | None] = {
        "training.learning_rate": "1e9", "parameters.include": "[query]",
    }  # fmt: skip
    for _ in range(2):
        assert main(["finetune", *arguments(model, **(FLOW | wild))]) == 1
        message = " ".join(capsys.readouterr().err.split())
        assert "The linear twin has left the numbers" in message
        assert "Traceback" not in message
    store = Store("store")
    assert len(store.trials()) == 1
    assert len(store.results("twins")) == 0


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_it_is_the_same_to_the_bit(model, here):
    inline = run(model)
    remote = run(model, compute="ray", **{"store.path": "other"})
    assert remote.trial.files.twin.read_bytes() == inline.trial.files.twin.read_bytes()
    assert remote.trial.files.last.read_bytes() == inline.trial.files.last.read_bytes()
    for one, two in zip(inline.rows, remote.rows, strict=True):
        assert one["distance_a"] == two["distance_a"]
        assert one["kl_b"] == two["kl_b"]
