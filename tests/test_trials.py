"""`raykernel finetune` end to end: it starts where the kernel does, and is never run twice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from raykernel.analysis.regression import score
from raykernel.cli import main
from raykernel.compose import compose_runs
from raykernel.compute.loading import model_bytes
from raykernel.compute.memory import GIB, HEAP_SLACK, process_bytes
from raykernel.compute.weights import load_parameters, read_parameters, write_head
from raykernel.config import RunConfig, canonical_json, fingerprint
from raykernel.console import Screen
from raykernel.errors import BlockCorruptError, InputError
from raykernel.pipeline import kernel
from raykernel.prepared import prepare
from raykernel.problem.batches import collate
from raykernel.problem.probe import Head
from raykernel.store.blocks import Store
from raykernel.store.query import query
from raykernel.store.results import table_files
from raykernel.store.verify import verify
from raykernel.terms import Split
from raykernel.training.room import held_bytes, pass_bytes
from raykernel.training.trial import load_start
from raykernel.trials import TrialOutcome, run_trial, trial_identity, trial_spec
from tests import tiny

NO_PROMPT: dict[str, str | None] = {
    "prompt": "none", "prompt.template": None, "prompt.words": None,
}  # fmt: skip


def arguments(model: Path, **changes: str | None) -> list[str]:
    """Overrides of a small trial: 6 train, 6 dev and 6 test examples, 8 steps."""
    own = {
        "task.test_limit": "6",
        "training.learning_rate": "0.1",
        "training.steps": "8",
        "training.eval_every": "3",
    }
    return tiny.overrides(model, **(own | changes))


def config_of(model: Path, **changes: str | None) -> RunConfig:
    (run,) = compose_runs("finetune", arguments(model, **changes))
    return run.config


def run(model: Path, **changes: str | None) -> TrialOutcome:
    return run_trial(config_of(model, **changes), (), Screen())


def stored_files(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in store.rglob("*") if path.is_file()}


def test_a_trial_is_printed_stored_and_never_run_twice(model, here, capsys):
    assert main(["finetune", *arguments(model)]) == 0
    first = capsys.readouterr()
    assert "zero-shot" in first.out
    assert "fine-tuning (sgd, full)" in first.out
    assert "step 8 of 8" in first.err
    (folder,) = (here / "store" / "trials").iterdir()
    files = stored_files(here / "store")
    assert sorted(path.name for path in folder.iterdir()) == ["best.safetensors"]
    assert sorted(p.parent.name for p in files if p.suffix == ".arrow") == ["curves", "trials"]
    assert {path.stat().st_mode & 0o044 for path in files} == {0o044}
    (folder / "checkpoint.safetensors").write_bytes(b"of a run that was killed at its very end")
    assert main(["finetune", *arguments(model)]) == 0
    second = capsys.readouterr()
    assert "0 steps done now" in second.out
    assert "step 8" not in second.err
    assert second.out.splitlines()[:6] == first.out.splitlines()[:6]
    assert stored_files(here / "store") == files

    (row,) = query("select * from trials", "store").to_pylist()
    curve = query("select curves.* from trials join curves using (trial)", "store").to_pylist()
    assert row["trial"] == folder.name
    assert (row["optimizer"], row["learning_rate"], row["best_step"] > 0) == ("sgd", 0.1, True)
    assert f"{row['finetuned']:.3f}" in first.out
    assert row["dev"] == max(point["dev_score"] for point in curve[1:])
    assert [point["step"] for point in curve] == [0, 3, 6, 8]
    rates = [0.1 * left / 8 for left in (8, 6, 3, 1)]  # of the step before, from 0 on
    assert [point["learning_rate"] for point in curve] == pytest.approx(rates)
    assert main(["verify", "--store", "store"]) == 0

    assert (row["regularization"], row["lam"], row["sigma"]) == ("none", 0.0, None)


@pytest.mark.parametrize("prompt", [{}, NO_PROMPT])
def test_it_starts_where_the_kernel_does(prompt, model, here):
    outcome = run(model, **prompt)
    config = config_of(model, **prompt)
    found = kernel(config, (), Screen())
    handle = Store("store").open()
    (result,) = found.regression.results.values()
    before = outcome.row["linear_probe" if prompt else "zero_shot"]
    assert before == result.zero_shot
    assert outcome.row["zero_shot" if prompt else "linear_probe"] is None
    prepared = found.prepared
    spec = trial_spec(prepared, config.training, outcome.files)
    problem = load_start(spec)
    rows = range(len(prepared.data.examples))
    with torch.no_grad():
        logits = problem.readout(problem.module, collate(prepared.encoded, rows))
    stored = handle.logits(handle.grid.train_and_dev)
    np.testing.assert_allclose(logits[: len(stored)], stored, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", [{}, NO_PROMPT])
@pytest.mark.parametrize("parameters", ["full", "bitfit", "lora"])
def test_stored_parameters_in_a_module_score_what_the_table_says(parameters, prompt, model, here):
    outcome = run(model, parameters=parameters, **prompt)
    config, data = outcome.prepared.config, outcome.prepared.data
    problem = load_start(trial_spec(outcome.prepared, config.training, outcome.files))
    start = {name: p.detach().clone() for name, p in problem.module.named_parameters()}
    load_parameters(outcome.files, problem.module)
    for split, column in ((Split.dev, "dev"), (Split.test, "finetuned")):
        rows = data.splits[split]
        labels = np.array([data.examples[i].label for i in rows])
        with torch.no_grad():
            logits = problem.readout(problem.module, collate(outcome.prepared.encoded, rows))
        assert score(config.task.metric, labels, logits.double().numpy()) == outcome.row[column]
    values = read_parameters(outcome.files)
    assert sum(value.numel() for value in values.values()) == outcome.row["num_parameters"]
    squares = sum(float((values[n] - start[n]).double().square().sum()) for n in values)
    assert squares**0.5 == pytest.approx(outcome.row["distance"], rel=1e-6)
    changed = {n for n, p in problem.module.named_parameters() if not torch.equal(p, start[n])}
    assert changed <= set(values)
    assert outcome.files.adapter.exists() == (parameters == "lora")


@pytest.mark.parametrize("prompt", [{}, NO_PROMPT])
@pytest.mark.parametrize("method", ["lora", "peft"])
def test_peft_loads_the_adapter(method, prompt, model, here):
    """The plain model with PEFT's adapter has the hidden states of the trained module."""
    from peft import IA3Config, PeftModel

    adapter = {} if method == "lora" else {"parameters.adapter": "ia3"}
    targets = {"target_modules": ["key", "value"], "feedforward_modules": []}
    IA3Config(**targets).save_pretrained(here / "ia3")
    outcome = run(model, parameters=method, **adapter, **prompt)
    spec = trial_spec(outcome.prepared, outcome.prepared.config.training, outcome.files)
    problem = load_start(spec)
    load_parameters(outcome.files, problem.module)
    batch = collate(outcome.prepared.encoded, range(6))
    kind = AutoModel if prompt else AutoModelForMaskedLM
    base = kind.from_pretrained(model, attn_implementation="eager").eval()
    with warnings.catch_warnings():  # peft reads an attribute that transformers 5 renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = PeftModel.from_pretrained(base, outcome.files.adapter).eval()
    named = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = problem.readout(problem.module, batch)
        if prompt:
            hidden = adapted(**named).last_hidden_state[range(6), batch["position"]]
            expected = problem.module.get_submodule("classifier")(hidden)
        else:
            words = list(outcome.prepared.encoded.label_ids)
            expected = adapted(**named).logits[range(6), batch["position"]][:, words]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_other_computing_is_the_same_trial_and_other_training_is_not(model, here):
    def identity(**changes: str) -> Any:
        config = config_of(model, **changes)
        prepared = prepare(config, Screen())
        return trial_identity(prepared, config.training.resolved(k=config.task.k, num_labels=2))

    same: list[dict[str, str]] = [
        {"compute.threads": "2"},
        {"kernel.kinds": "[signgd]"},
        {"solver.ridge": "[1.0]"},
        {"store.path": "elsewhere"},
        {"training.keep_weights": "false"},
    ]
    first = identity()
    assert all(identity(**changes) == first for changes in same)
    assert identity(**{"training.steps": "null"}) == identity(**{"training.steps": str(32 * 6)})
    other = ["task.seed=21", "parameters=lora", "training.seed=1", "training.dropout=false"]
    assert all(identity(**dict([change.split("=")])) != first for change in other)
    pulled = {"regularization": "coupled"}
    same = [pulled | {"regularization.lam": "0"}, {"regularization": "none"}]
    assert all(identity(**changes) == first for changes in same)
    assert set(first) == {"task", "prompt", "model", "parameters", "metric", "training"}
    other = ["lam=2", "convention=mean", "method=selective"]
    changes = [dict([f"regularization.{change}".split("=")]) for change in other]
    names = [canonical_json(identity(**pulled, **change)) for change in [{}, *changes]]
    assert len({*names, canonical_json(first)}) == 5
    lines = (here / "reviews.tsv").read_text().replace("useless", "weak")
    (here / "reviews.tsv").write_text(lines)
    assert identity() != first


@pytest.mark.parametrize(("convention", "sigma"), [("sum", 3.0), ("mean", 18.0)])
def test_a_pulled_trial_is_stored_with_the_ridge_that_it_amounts_to(
    convention, sigma, model, here, capsys
):
    """σ = λ beside the summed loss, and n λ beside its mean over six train examples."""
    changes = {
        "training.loss": "squared",
        "regularization": "coupled",
        "regularization.lam": "3",
        "regularization.convention": convention,
    }
    assert main(["finetune", *arguments(model, **changes)]) == 0
    assert f"fine-tuning (sgd, full, coupled, λ = 3, σ = {sigma:g})" in capsys.readouterr().out
    columns = "regularization, lam, convention, sigma"
    (row,) = query(f"select {columns} from trials", "store").to_pylist()
    expected = {"regularization": "coupled", "lam": 3.0, "convention": convention, "sigma": sigma}
    assert row == expected


def test_a_pulled_head_returns_to_where_it_starts_and_not_to_zero(model, here):
    """ηλ = 1 in every step: no more than the last step of the loss, η times 1, is left."""
    changes = NO_PROMPT | {
        "parameters": "head",
        "training.schedule": "constant",
        "regularization": "decoupled",
        "regularization.lam": "60",  # n / η
    }
    prepared = prepare(config_of(model, **changes), Screen())
    trial = fingerprint(trial_identity(prepared, prepared.config.training))
    # As a killed run leaves its probe; that of this model is all but zero.
    weight = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    bias = np.ones(2, dtype=np.float32)
    write_head(Store("store").begin_trial(trial).head, Head(weight, bias))
    outcome = run(model, **changes)
    assert outcome.trial == trial
    values = read_parameters(outcome.files)
    left = np.concatenate(
        [
            (values["classifier.weight"] - torch.from_numpy(weight)).flatten(),
            values["classifier.bias"] - torch.from_numpy(bias),
        ]
    )
    assert 0 < np.linalg.norm(left) <= 0.1 * (1 + 1e-4)
    assert np.linalg.norm(left) == pytest.approx(outcome.row["distance"], rel=1e-4)


def test_a_sweep_over_learning_rates_is_a_trial_for_each(model, here, capsys):
    rates = {"training.learning_rate": "0.1,1e30,0.2", "training.max_grad_norm": "null"}
    assert main(["finetune", "-m", *arguments(model, **rates)]) == 1
    captured = capsys.readouterr()
    assert "1 of 3 runs failed" in captured.err
    assert "learning rate" in captured.err
    rows = Store("store").results("trials").to_pylist()
    assert sorted(row["learning_rate"] for row in rows) == [0.1, 0.2]
    assert len(Store("store").results("curves")) == 8


def test_a_loss_that_is_not_finite_ends_with_code_1_and_leaves_no_result(model, here, capsys):
    wild = {"training.learning_rate": "1e30", "training.max_grad_norm": "null"}
    for _ in range(2):
        assert main(["finetune", *arguments(model, **wild)]) == 1
        message = capsys.readouterr().err
        assert "at step" in message
        assert "of 8" in message
        assert "Traceback" not in message
    assert Store("store").trials() == []


def test_weights_can_be_left_out_and_asked_for_later(model, here, capsys):
    outcome = run(model, **{"training.keep_weights": "false"})
    assert not outcome.files.weights.exists()
    with pytest.raises(InputError, match="keep_weights"):
        read_parameters(outcome.files)
    again = run(model, **{"training.keep_weights": "false"})
    assert again.was_stored
    kept = run(model)
    assert kept.trial == outcome.trial
    assert not kept.was_stored
    assert kept.curve == outcome.curve
    assert kept.files.weights.exists()
    assert "training again" in " ".join(capsys.readouterr().err.split())


def test_damaged_files_of_a_trial_are_found_removed_and_made_again(model, here):
    outcome = run(model)
    content = bytearray(outcome.files.weights.read_bytes())
    outcome.files.weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (outcome.files.path / "thesis.tex").write_text("mine")
    report = verify("store")
    assert sorted(file.path.name for file in report.bad) == ["best.safetensors", "thesis.tex"]
    report = verify("store", remove=True)
    assert [file.path.name for file in report.bad if not file.removed] == ["thesis.tex"]
    assert not run(model).was_stored
    assert outcome.files.weights.read_bytes() != content[:-1]
    (outcome.files.path / "thesis.tex").unlink()
    assert verify("store").ok
    outcome.files.weights.write_bytes(content[:100])
    with pytest.raises(BlockCorruptError, match=r"best\.safetensors"):
        read_parameters(outcome.files)


def test_a_damaged_checkpoint_is_dropped(model, here, capsys):
    outcome = run(model)
    for path in table_files(Path("store"), "trials").answers:
        path.unlink()
    outcome.files.checkpoint.write_bytes(b"\x00" * 100)
    assert run(model).curve == outcome.curve
    assert "begins anew" in " ".join(capsys.readouterr().err.split())


def test_weights_of_another_module_are_refused(model, here, tmp_path_factory):
    outcome = run(model)
    wider = tiny.save_masked_lm(tmp_path_factory.mktemp("wider"), hidden_size=8)
    with pytest.raises(InputError, match="same shape"):
        load_parameters(outcome.files, AutoModelForMaskedLM.from_pretrained(wider))


@pytest.mark.parametrize(
    ("changes", "help"),
    [
        ({"training": "adm"}, "'adam'"),
        ({"training.learning_rat": "0.1"}, "training.learning_rate"),
        ({"training.optimizer": "momentum"}, "training.optimizer"),
        ({"training.steps": "0"}, "training.steps"),
        ({"training.betas": "[0.5,0.9]"}, "training.optimizer=adam"),
        ({"parameters.include": "[nothing]"}, "parameters"),
        ({"compute.device": "cuda"}, "compute.device"),
        ({"compute.memory_gb": "0.1"}, "compute.memory_gb"),
        ({"training.precision": "tf32"}, "training.precision"),
        ({"regularization": "coupled", "regularization.lam": "-1"}, "regularization.lam"),
        ({"regularization.lam": "1"}, "Set regularization=coupled"),
        ({"regularization": "l2sp"}, "coupled, decoupled, none, selective"),
        # η = 0.1 and six train examples: 2 n / η = 120 beside the sum, 2 / η = 20 beside the mean.
        ({"regularization": "decoupled", "regularization.lam": "120"}, "less than 120"),
        (
            {
                "regularization": "selective",
                "regularization.lam": "21",
                "regularization.convention": "mean",
            },
            "less than 20",
        ),
    ],
)
def test_wrong_input_ends_with_code_2_and_says_what_to_do(changes, help, model, here, capsys):
    assert main(["finetune", *arguments(model, **changes)]) == 2
    message = capsys.readouterr().err
    assert help in message
    assert "Traceback" not in message


def test_passes_are_as_large_as_the_memory_allows(model, here, capsys):
    prepared = prepare(config_of(model), Screen())
    training = prepared.config.training
    spec = trial_spec(prepared, training, Store("scratch").begin_trial("0123456789abcdef"))
    problem, ids = load_start(spec), prepared.encoded.input_ids
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    work = pass_bytes(problem, collate(prepared.encoded, [longest]), spec.compute)
    fixed = process_bytes(spec.compute) + model_bytes(problem.module)
    fixed += held_bytes(problem, training)
    limit = (fixed + HEAP_SLACK * work.of(2) + 1) / GIB
    outcome = run(model, **{"compute.memory_gb": f"{limit:.12f}"})
    assert "2 examples in a pass" in " ".join(capsys.readouterr().err.split())
    assert outcome.row["best_step"] > 0


@pytest.mark.ray
def test_on_ray_it_is_the_same_to_the_bit(model, here):
    """Also with several workers asked for: the steps of a trial are one after the other."""
    inline = run(model)
    remote = run(model, compute="ray", **{"store.path": "other", "compute.workers": "2"})
    assert remote.trial == inline.trial
    assert remote.curve == inline.curve
    assert remote.files.weights.read_bytes() == inline.files.weights.read_bytes()
