"""`raykernel behavior` end to end: its measurements by their definitions, one run for all."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raykernel.analysis.behavior import kernel_distance
from raykernel.behavior import Behavior, behavior, compared_cells, settled, show_behavior
from raykernel.cli import main
from raykernel.compose import compose_runs
from raykernel.compute.executor import Executor
from raykernel.compute.loading import load
from raykernel.compute.weights import assign, read_parameters
from raykernel.config import RunConfig
from raykernel.console import Screen
from raykernel.errors import BlockCorruptError, InputError
from raykernel.jobs import open_executor
from raykernel.pipeline import kernel
from raykernel.prepared import worker_spec
from raykernel.problem.batches import collate
from raykernel.problem.models import Problem
from raykernel.problem.probe import Head
from raykernel.store.blocks import Store
from raykernel.store.grid import Grid
from raykernel.store.kernels import KernelHandle
from raykernel.store.linearized import linearized_changes, linearized_name
from raykernel.store.results import table_files
from raykernel.store.verify import verify
from raykernel.terms import Kind
from tests import oracles, tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a model and reviews."""
    folder, before = tmp_path_factory.mktemp("behavior"), Path.cwd()
    tiny.save_masked_lm(folder / "model", num_hidden_layers=1)
    tiny.write_reviews(folder / "reviews.tsv")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def arguments(**changes: str | None) -> list[str]:
    """Overrides of 6 train, 6 dev and 7 test examples, cut into threes, in float64."""
    own = {
        "task.test_limit": "7",
        "kernel.block_size": "3",
        "kernel.precision": "float64",
        "training.precision": "float64",
        "training.steps": "6",
        "training.eval_every": "3",
        "training.learning_rate": "0.05",
    }
    return tiny.overrides("model", **(own | changes))


def config_of(**changes: str | None) -> RunConfig:
    (run,) = compose_runs("behavior", arguments(**changes))
    return run.config


NO_PROMPT: dict[str, str | None] = {
    "prompt": "none",
    "prompt.template": None,
    "prompt.words": None,
}
CHANGES = {"manual": {}, "none": NO_PROMPT}


@pytest.fixture(scope="module", params=list(CHANGES))
def found(request: pytest.FixtureRequest, place: Path) -> Behavior:
    """One run with a prompt, one with a linear head."""
    return behavior(config_of(**CHANGES[request.param]), ("task=file",), Screen())


def handles(found: Behavior) -> tuple[KernelHandle, KernelHandle]:
    """Kernels at θ_PT and θ_FT."""
    store = Store("store")
    return store.open(found.prepared.fingerprint), store.open(found.tuned_fingerprint)


def problem_of(found: Behavior) -> Problem:
    """The problem at θ_PT."""
    head = handles(found)[0].read_head()
    return load(worker_spec(found.prepared), None if head is None else Head(*head))


def batch_of(found: Behavior, examples: range) -> dict[str, Tensor]:
    return collate(found.prepared.encoded, examples)


def change_of(found: Behavior, module: nn.Module) -> dict[str, Tensor]:
    """θ_FT − θ_PT."""
    parameters = dict(module.named_parameters())
    weights = read_parameters(Store("store").trial(found.trial))
    return {name: value - parameters[name].detach() for name, value in weights.items()}


# ---------------------------------------------------------------- measurements


def test_linearised_outputs_are_the_taylor_expansion_at_the_pretrained_weights(
    found: Behavior,
) -> None:
    problem, test = problem_of(found), handles(found)[0].grid.test
    batch, w = batch_of(found, test), change_of(found, problem.module)
    jacobian = oracles.jacobian(problem.module, problem.readout, batch)
    assert set(w) == set(jacobian)
    assert any(float(value.abs().max()) > 0 for value in w.values())
    f0 = problem.readout(problem.module, batch).detach()
    expected = f0 + oracles.along(jacobian, w)
    np.testing.assert_allclose(found.outputs.pretrained, f0, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.outputs.linearized, expected, rtol=1e-9, atol=1e-9)


def test_fine_tuned_outputs_and_kernel_are_those_of_the_trials_weights(found: Behavior) -> None:
    problem, (before, after) = problem_of(found), handles(found)
    grid = before.grid
    train, test = batch_of(found, range(grid.num_cols)), batch_of(found, grid.test)
    assign(problem.module, read_parameters(Store("store").trial(found.trial)))
    logits = problem.readout(problem.module, test).detach()
    np.testing.assert_allclose(found.outputs.finetuned, logits, rtol=1e-9, atol=1e-12)
    parts = oracles.kernel_by_parameter(problem.module, problem.readout, test, train)
    expected = torch.stack(list(parts.values())).sum(0).numpy()
    k = after.kernel(rows=grid.test)
    np.testing.assert_allclose(k, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    assert found.distance == kernel_distance(before.kernel(rows=grid.test), k)


def test_linearised_model_is_right_to_first_order(found: Behavior) -> None:
    """Along θ_PT + ε w the error of the expansion falls as ε²."""
    problem, test = problem_of(found), handles(found)[0].grid.test
    batch, w = batch_of(found, test), change_of(found, problem.module)
    start = {n: p.detach().clone() for n, p in problem.module.named_parameters() if n in w}
    change = found.outputs.linearized - found.outputs.pretrained
    errors = []
    for epsilon in (1e-2, 1e-3):
        assign(problem.module, {name: start[name] + epsilon * w[name] for name in w})
        moved = problem.readout(problem.module, batch).detach().numpy()
        errors.append(np.abs(moved - found.outputs.pretrained - epsilon * change).max())
    assert errors[1] < errors[0] / 30


def test_scores_and_verdict_are_of_these_outputs(found: Behavior) -> None:
    outputs, labels = found.outputs, found.outputs.labels
    by = (outputs.pretrained, outputs.linearized, outputs.finetuned)
    scores = [float((logits.argmax(1) == labels).mean()) for logits in by]
    (row,) = Store("store").rows("trials", trial=found.trial)
    assert row["finetuned"] == scores[2] == found.finetuned_score
    assert (row["zero_shot"] or row["linear_probe"]) == scores[0]
    gain = scores[2] - scores[0]
    expected = None if gain <= 0 else scores[1] - scores[0] >= 0.5 * gain - 1e-9
    assert found.verdict.linearization.holds == expected
    p = torch.softmax(torch.from_numpy(outputs.pretrained), 1)[range(len(labels)), labels]
    assert found.chi[0] == pytest.approx(float((1 - p).mean()))  # of two outputs


# ---------------------------------------------------------------- the store


def test_the_row_says_what_was_found_and_can_be_asked_for(
    found: Behavior, capsys: pytest.CaptureFixture[str]
) -> None:
    sql = f"select * from behavior where trial = '{found.trial}'"
    assert main(["query", sql, "--store", "store", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    for name in ("solves", "linearization", "fixed_features", "kernel_behavior"):
        criterion = getattr(found.verdict, name)
        assert row[name] == criterion.holds
        assert json.loads(row["reasons"])[name] == criterion.reason
    assert row["mean_relative_distance"] == found.distance.mean_relative
    assert (row["fingerprint"], row["kind"], row["num_compared"]) == (
        found.prepared.fingerprint,
        "sgd",
        7,
    )
    assert (row["optimizer"], row["linearization_metric"]) == ("sgd", "accuracy")
    assert row["overrides"] == ["task=file"]


def test_the_kernel_of_fine_tuned_weights_has_an_identity_of_its_own(found: Behavior) -> None:
    before, after = handles(found)
    assert after.identity == before.identity | {"trial": found.trial}
    assert "trial" not in before.identity
    cells = {(cell.i, cell.j) for cell in after.grid.cells(after.grid.test)}
    missing = {(cell.i, cell.j) for cell in after.missing()}
    assert missing == {(cell.i, cell.j) for cell in after.grid.cells()} - cells
    report = verify("store")
    assert (report.ok, report.num_missing) == (True, 0)


def test_a_second_run_computes_nothing_and_says_the_same(
    found: Behavior, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {file: file.stat().st_ino for file in Path("store").rglob("*.*")}
    own = CHANGES[found.prepared.config.prompt.style.value]
    assert main(["behavior", *arguments(**own)]) == 0
    said = capsys.readouterr()
    assert said.err.count("computing 0") == 4
    assert "step 0" not in said.err
    again = {file: file.stat().st_ino for file in Path("store").rglob("*.*")}
    assert files.items() <= again.items()
    assert {file.parent.name for file in again if file not in files} == {"behavior"}
    show_behavior(found, Screen())
    assert capsys.readouterr().out == said.out


def test_what_was_lost_is_computed_again_to_the_bit(
    found: Behavior, capsys: pytest.CaptureFixture[str]
) -> None:
    _, after = handles(found)
    lost = [after.path / linearized_name(5), after.path / "block-0004-0001.arrow"]
    kept = [file.read_bytes() for file in lost]
    changes = linearized_changes(after, after.grid.test)
    lost[0].write_bytes(kept[0][:-60])
    with pytest.raises(BlockCorruptError):
        after.read_own(lost[0].name, 5, after.grid.row_block(5))
    lost[1].unlink()
    again = behavior(found.prepared.config, (), Screen())
    assert "linearised test outputs: 3/3" in capsys.readouterr().err
    assert linearized_changes(after, after.grid.test).tobytes() == changes.tobytes()
    assert again.distance == found.distance


def test_damaged_files_are_named_and_removed(found: Behavior) -> None:
    _, after = handles(found)
    *_, row = (
        path
        for path in table_files(Path("store"), "behavior").answers
        if found.trial.encode() in path.read_bytes()
    )
    names = [row, Path("store/kernels") / after.fingerprint / linearized_name(4)]
    content = [path.read_bytes() for path in names]
    for path, whole in zip(names, content, strict=True):
        path.write_bytes(whole[: len(whole) // 2])
    report = verify("store", remove=True)
    assert {file.path.name for file in report.bad} == {path.name for path in names}
    assert report.ok
    assert not any(path.exists() for path in names)
    for path, whole in zip(names, content, strict=True):
        path.write_bytes(whole)
    assert verify("store").bad == ()


def test_one_executor_serves_all_stages(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel, fine-tuning, linearised model and the kernel after it."""
    opened = []

    def counted(*arguments: Any) -> Executor:
        opened.append(open_executor(*arguments))
        return opened[-1]

    monkeypatch.setattr("raykernel.jobs.open_executor", counted)
    behavior(config_of(store__path="once"), (), Screen())
    assert len(opened) == 1


# ---------------------------------------------------------------- choices


def test_kernel_of_the_same_problem_is_shared(found: Behavior) -> None:
    """The kernel before fine-tuning is `raykernel kernel`'s, whatever is trained with it."""
    outcome = kernel(found.prepared.config, (), Screen())
    assert outcome.completion.blocks_computed == 0


def test_signs_describe_adam_and_a_sample_is_spread_over_test(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"training": "adam", "training.learning_rate": "0.01", "behavior.test_limit": "6"}
    changes["kernel.kinds"] = "[sgd,signgd]"
    found = behavior(config_of(**changes, kernel__precision=None), (), Screen())
    assert found.compared is Kind.signgd
    assert set(found.kernels) == {Kind.signgd}  # sgd was computed, but says nothing of Adam
    _, after = handles(found)
    assert after.kinds() == ["signgd"]
    assert found.num_compared == 4  # two of three row blocks, the last of one example
    show_behavior(found, Screen())
    text = " ".join(capsys.readouterr().out.split())
    for words in ("fine-tuned (adam)", "kernel regression (signgd)", "linearised", "centred"):
        assert words in text
    assert "4 test x 6 train examples" in text


def test_kinds_that_the_user_chose_stay_if_one_describes_the_optimizer() -> None:
    chosen = settled(config_of(training="adam", kernel__kinds="[sgd,signgd]"))
    assert chosen.kernel.kinds == [Kind.sgd, Kind.signgd]
    replaced = settled(config_of(training="sgd", kernel__kinds="[signgd]"))
    assert replaced.kernel.kinds == [Kind.sgd]
    assert settled(config_of(training="adam")).kernel.kinds == [Kind.signgd, Kind.asigngd]
    assert settled(config_of(training__keep_weights="false")).training.keep_weights


@pytest.mark.parametrize(
    ("limit", "blocks"), [(None, [3, 4, 5, 6]), (4, [4, 6]), (1, [5]), (100, [3, 4, 5, 6])]
)
def test_compared_row_blocks_are_spread_evenly(limit: int | None, blocks: list[int]) -> None:
    grid = Grid(num_cols=4, num_rows=13, block_size=2, num_dev=2)
    cells = compared_cells(grid, limit)
    assert sorted({cell.i for cell in cells}) == blocks
    assert all(cell.rows.start in grid.test for cell in cells)
    assert len(cells) == len(blocks) * grid.num_col_blocks


@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({"solver.groups": "[layer]"}, "parameters.layers_to_transform"),
        ({"behavior.solves": "0"}, "behavior.solves"),
        ({"behavior.test_limit": "0"}, "behavior.test_limit"),
        ({"behavior.metric": "f2"}, "f1"),
        ({"training.precision": "tf32"}, "training.precision"),
    ],
)
def test_wrong_input_is_said_before_anything_is_computed(
    changes: dict[str, str], helps: str
) -> None:
    with pytest.raises(InputError, match=helps):
        settled(config_of(**changes))


def test_a_pull_that_overshoots_is_refused_before_the_kernel(place: Path) -> None:
    """η λ / n = 0.05 · 240 / 6 = 2."""
    strong = {"regularization": "decoupled", "regularization.lam": "240", "store.path": "unused"}
    with pytest.raises(InputError, match=r"regularization\.lam: found 240, expected less than 240"):
        behavior(config_of(**strong), (), Screen())
    assert not Path("unused").exists()


def test_kinds_that_do_not_describe_the_optimizer_are_replaced_and_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strong = {"regularization": "decoupled", "regularization.lam": "240", "store.path": "unused"}
    for training, said in (("adam", "adam is signgd and asigngd, in place of"), ("sgd", "")):
        with pytest.raises(InputError, match=r"regularization\.lam"):  # before any kernel
            behavior(config_of(training=training, **strong), (), Screen())
        message = " ".join(capsys.readouterr().err.split())
        assert said in message
        assert ("kernel.kinds=[sgd]" in message) == bool(said)


def test_weights_of_another_model_are_refused(place: Path, found: Behavior) -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(InputError, match="weights: found"):
        assign(module, read_parameters(Store("store").trial(found.trial)))
    with pytest.raises(InputError, match="keep_weights=true"):
        read_parameters(Store("store").trial("0123456789abcdef"))
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    replaced = assign(module, {"weight": torch.zeros(2, 2)})
    assert torch.equal(replaced["weight"], before["weight"])
    assert not module.weight.any()


def test_identities_without_a_trial_are_as_before(found: Behavior) -> None:
    prepared = found.prepared
    assert (prepared.trial, worker_spec(prepared).trial) == (None, None)
    tuned = dataclasses.replace(prepared, identity=prepared.identity | {"trial": "x"})
    assert (tuned.trial, worker_spec(tuned).trial) == ("x", "x")
    assert tuned.fingerprint != prepared.fingerprint
