"""`raykernel sweep` end to end: every study of the package at its smallest, in one store."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from raykernel.cli import main
from raykernel.convergence import layer_choices, summed_layers, trained_layers
from raykernel.errors import InputError
from raykernel.space import Point, axis_of, check, make_plan
from raykernel.store.blocks import Store
from raykernel.study import TaskTable
from raykernel.sweep import load_study, question_of, study_files
from raykernel.terms import Command
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "sweeps").glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = "words: {negative: terrible, positive: great}"
PROMPTS = (
    f'{{manual: {{template: "{{review}} It was {{label}}.", {WORDS}}}, '
    f'searched: {{template: "A {{label}} one: {{review}}", {WORDS}}}}}'
)
TINY = {
    "task": "file",
    "task.train": "reviews.tsv",
    "task.text": "[review]",
    "task.label": "rating",
    "task.prompts": PROMPTS,
    "task.k": "2",
    "task.test_limit": "6",
    "model": "hf",
    "model.name": "model",
    "kernel.block_size": "4",
    "solver": "tiny",
    "store.path": "store",
}
TRAINING = {
    "task.seed": "13",
    "training.steps": "2",
    "training.eval_every": "1",
    "training.batch_size": "2",
    "training.learning_rate": "0.05",
}
LAYERS = {"model.name": "two_layers", "select.max_size": "1"}
HERE = {"sweep.engine": "pool", "sweep.workers": "1"}
OTHERS = {
    "quickstart": TRAINING | LAYERS | HERE | {"compute": "inline", "compute.workers": "1"},
    "layer_selection": TRAINING | LAYERS,
    "lora_grid": {**TRAINING, "parameters.r": "2", "parameters.target_modules": "[query],[value]"}
    | {"training.learning_rate": "tag(log,interval(1e-3,1e-1))", "sweep.trials": "2"},
    "optimizer_grid": TRAINING | HERE | {"sweep.trials": "1"},
    "table8_output_derivative": {"task.seed": "13"},
    "drug_reviews": {key: TRAINING[key] for key in TRAINING if key != "training.learning_rate"}
    | {"parameters.layers_to_transform": "null", "task.seed": "7"},
    "table9_prompts": TRAINING | {"prompt": "manual,searched"},
    "condition_number": TRAINING
    | {
        "model.name": "two_layers",
        "parameters.target_modules": "[query,value]",
        "parameters.layers_to_transform": trained_layers((0, 1)),
        "spectrum.sets": summed_layers((0, 1), [["query", "value"]]),
    },
    "lambda_path": TRAINING | {"regularization.lam": "1,0"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a model and reviews, and one store for all studies."""
    folder, before = tmp_path_factory.mktemp("sweep"), Path.cwd()
    tiny.save_masked_lm(folder / "model", num_hidden_layers=1)
    tiny.save_masked_lm(folder / "two_layers", num_hidden_layers=2)
    tiny.save_masked_lm(folder / "wide", num_hidden_layers=1, hidden_size=32)
    tiny.write_reviews(folder / "reviews.tsv")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def arguments(name: str, **changes: str) -> list[str]:
    """Overrides of a study with one learning rate and 4 train, 4 dev and 6 test examples."""
    chosen = TINY | OTHERS.get(name, TRAINING)
    chosen |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in chosen.items()]


def files_of(store: Path) -> dict[Path, int]:
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_study_of_the_package_runs_and_prints_its_table(place, name, capsys):
    assert len((ROOT / "sweeps" / f"{name}.py").read_text("utf-8").splitlines()) <= 40
    assert main(["sweep", name, *arguments(name)]) == 0
    printed = capsys.readouterr()
    of_study = {
        table: {
            row["run"] for row in Store("store").results(table).to_pylist() if row["study"] == name
        }
        for table in ("plans", "runs")
    }
    searches = name in ("lora_grid", "optimizer_grid")  # which do not know before what they run
    assert of_study["plans"] < of_study["runs"] if searches else of_study["plans"]
    assert searches or of_study["plans"] == of_study["runs"]
    if of_study["plans"]:
        assert main(["query", "missing", name, "--store", "store", "--format", "csv"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1
    assert load_study(name).question in printed.out
    table = load_study(name).table
    for line in table.lines if isinstance(table, TaskTable) else []:
        assert line.label in printed.out
    assert "runs are complete. " in printed.out
    compared = isinstance(table, TaskTable) and table.paper is not None
    assert ("not the paper's" in printed.err) == compared
    notes = [line for line in printed.err.splitlines() if line.startswith("Note: ")]
    assert len(notes) == len(set(notes))
    assert "a new kernel" not in printed.err  # of every seed and prompt: no news
    assert "Traceback" not in printed.err


def test_a_study_that_has_run_computes_nothing(place, capsys):
    name = "table2_kernels_and_finetuning"
    assert main(["sweep", name, *arguments(name)]) == 0
    first, before = capsys.readouterr().out, files_of(place / "store")
    assert main(["sweep", name, *arguments(name)]) == 0
    second = capsys.readouterr()
    assert second.out == first
    assert second.err.startswith("Note: the setting is not")
    assert second.err.count("\n") == 1
    assert files_of(place / "store") == before


def test_the_table_is_that_of_the_stored_rows(place, capsys):
    name = "table11_lora"
    assert main(["sweep", name, *arguments(name, task__seed="13,21", store__path="own")]) == 0
    out = capsys.readouterr().out
    trials = Store("own").results("trials").to_pylist()
    values = [100 * row["finetuned"] for row in trials if row["method"] == "lora"]
    assert len(values) == 2
    mean, half = sum(values) / 2, abs(values[0] - values[1]) / 2
    (line,) = [line for line in out.splitlines() if "SGD-LoRA FT" in line]
    assert f"{mean:.1f} ({half:.1f})" in line


def test_behavior_is_measured_at_the_learning_rate_that_dev_selects(place, capsys):
    name = "table5_linearized"
    changes = {"training__learning_rate": "1e-6,1e30,0.05", "task__seed": "42"}
    assert main(["sweep", name, *arguments(name, **changes)]) == 1
    trials = [row for row in Store("store").results("trials").to_pylist() if row["seed"] == 42]
    assert len(trials) == 2
    best = max(trials, key=lambda row: (row["dev"], -row["learning_rate"]))  # the first of equals
    (verdict,) = [r for r in Store("store").results("behavior").to_pylist() if r["seed"] == 42]
    assert verdict["trial"] == best["trial"]
    printed = capsys.readouterr()
    assert "[4/4] Adam: task=file" in printed.err
    # One that diverges leaves no result, is said, and stops no other.
    assert "3 of 4 runs are complete, 1 failed" in printed.out
    assert re.search(r"learning_rate=1e\+30: training: at step \d of 2, .* was nan", printed.err)


def test_one_kernel_serves_all_choices_of_layers(place, capsys):
    """Three trials and their sums of blocks; layers and modules of trials and sums are the same."""
    name = "condition_number"
    assert main(["sweep", name, *arguments(name)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 of 4 runs are complete" in out
    assert "left out" not in out
    assert "3 points resolve little: nothing is significant" in out
    found = Store("store").results("spectra").to_pylist()
    assert len({row["fingerprint"] for row in found}) == 1
    sums = {tuple(row["layers"]): row for row in found if row["groups"] and not row["change"]}
    assert set(sums) == set(layer_choices((0, 1)))
    traces = {layers: row["mean"] for layers, row in sums.items()}
    for layers, trace in traces.items():
        assert trace == pytest.approx(sum(traces[(layer,)] for layer in layers), rel=1e-5)


def test_choices_of_equal_scale_have_kernels_of_one_trace(place, capsys):
    """By kernels of the LoRAs that were trained: each with its own lora_alpha."""
    name = "layer_selection"
    assert main(["sweep", name, *arguments(name)]) == 0
    capsys.readouterr()
    runs = [row for row in Store("store").results("runs").to_pylist() if row["study"] == name]
    for arm, column in (("equal trace", "trace"), ("equal top", "top")):
        scales = {}
        for run in runs:
            if run["arm"] == arm:
                assert main(["select", *run["overrides"]]) == 0
                rows = Store("store").results("selections").to_pylist()
                newest = max(rows, key=lambda row: row["created"])
                scales[newest["parameters"]] = newest[column]
        first, second = scales.values()
        assert first == pytest.approx(second, rel=2e-3)  # alpha has four digits


def test_a_failing_point_stops_no_other(place, capsys):
    """k = 50 is more than there are reviews of a label."""
    name = "table11_lora"
    assert main(["sweep", name, *arguments(name, task__k="50,2")]) == 1
    printed = capsys.readouterr()
    assert "4 of 8 runs are complete, 4 failed" in printed.out
    assert "  SGD-FT: task=file task.k=50 task.seed=13" in printed.err
    assert "K_LoRA(SGD)" in printed.out


def test_the_output_derivative_is_one_minus_the_probability_of_the_label(place):
    """χ of two outputs: |softmax(f)_a - [a = y]| is 1 - p_y for both (Definition 3.1)."""
    name = "table8_output_derivative"
    for model in ("model", "wide"):
        changes = {"model.name": model, "store.path": "derivatives"}
        assert main(["sweep", name, *arguments(name, **changes)]) == 0
    rows = Store("derivatives").results("kernels").to_pylist()
    assert [row["model"] for row in rows] == ["model", "wide"]
    for row in rows:
        handle = Store("derivatives").open(row["fingerprint"])
        test = handle.grid.test
        labels = handle.examples()["label"].to_pylist()[test.start :]
        order = ["negative", "positive"]  # of the outputs
        missed = [
            1 - math.exp(f[order.index(y)]) / sum(map(math.exp, f))
            for f, y in zip(handle.logits(test).tolist(), labels, strict=True)
        ]
        assert row["output_derivative"] == pytest.approx(sum(missed) / len(missed), rel=1e-6)
    (sheet,) = load_study(name).table([{**row, "arm": "χ"} for row in rows], compare=False)
    assert [line[0] for line in sheet.rows] == ["model", "wide"]
    assert "differ in width only" in sheet.note


@pytest.mark.packaged
def test_the_demo_of_table_8_compares_packaged_models_of_two_widths(place, capsys):
    name = "table8_output_derivative"
    small = {"task.k": "1", "task.seed": "13", "task.test_limit": "6", "task.max_length": "8"}
    small |= {"store.path": "demo", "solver": "tiny"}
    chosen = [f"{key}={value}" for key, value in small.items()]
    assert main(["sweep", name, "experiment=demo", *chosen]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 runs are complete" in printed
    rows = Store("demo").results("kernels").to_pylist()
    assert {row["model"] for row in rows} == {"minilm_l6", "smollm2_135m"}
    # Six labels: χ is a probability off the label, and 1 minus one on it.
    assert all(0 < row["output_derivative"] < 2 / 6 for row in rows)


# ---------------------------------------------------------------- what is asked for


def test_the_list_names_every_study_with_its_question(capsys):
    assert main(["sweep"]) == 0
    out = capsys.readouterr().out
    for name in NAMES:
        assert name in out
        assert load_study(name).question in out
    assert out.index("table2_") < out.index("table11_")


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_setting_and_the_demo_compose(name):
    study = load_study(name)
    assert make_plan(study, []).compare
    check(make_plan(study, ["task=sst2", "task.k=16", "task.seed=13"]))
    demo = make_plan(study, ["experiment=demo"])
    assert not demo.compare
    check(demo)


def test_every_task_of_the_paper_composes():
    check(make_plan(load_study("table1"), ["task.k=16", "task.seed=13"]))


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"raykernel sweep (table[^`\n|]+)", README)))
)
def test_commands_of_the_readme_are_understood(command):
    name, *overrides = shlex.split(command)
    plan = make_plan(load_study(name), [text for text in overrides if text != "--help"])
    assert plan.count(plan.settings()) >= 1


def test_help_says_what_would_run_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "table2", "--help", "task=sst2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "250 runs" in out  # 2 k x 5 seeds x (15 of SGD + 9 of Adam + 1 of kernels)
    assert "task=sst2 task.k=16,64 task.seed=13,21,42,87,100" in out
    assert "training=sgd training.batch_size=2,4,8" in out
    assert "kernel.kinds=[sgd,signgd,asigngd]" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "helps"),
    [
        (["tabel2_kernels_and_finetunin"], "did you mean 'table2_kernels_and_finetuning'"),
        (["tabel2"], "did you mean 'table2'"),
        (["../table2"], "Unknown study '../table2'"),
        (["table2", "training=adam"], "its method 'SGD-FT'"),
        (["table2", "task.max_length=16,32"], "found 2 values, expected one"),
        (["table2", "experiment=quickstart"], "expected experiment=demo"),
        (["table2", "task=sst2", "task.kk=3"], "Unknown key 'task.kk'"),
        (["table2", "task=sst2,sst3"], "Unknown task 'sst3'"),
        (["table2", "task.k=interval(1,3)"], "found an interval"),
        (["table2", "task=sst2,,mr"], "cannot be read"),
        (["table2", "lambda=1"], "`lam`"),
    ],
)
def test_a_wrong_command_says_what_is_right(command, helps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *command]) == 2
    error = capsys.readouterr().err
    assert helps in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ones_own_extends_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "sweeps"
    own.mkdir()
    text = (ROOT / "sweeps" / "table11_lora.py").read_text("utf-8")
    (own / "mine.py").write_text(text.replace("Does LoRA", "And does LoRA"), "utf-8")
    (own / "wrong.py").write_text("study = 1\n", "utf-8")
    (own / "broken.py").write_text("1 / 0\n", "utf-8")
    (own / "program.py").write_text("raise SystemExit('was run')\n", "utf-8")
    assert {*NAMES, "mine"} <= set(study_files())
    assert load_study("mine").question == question_of(own / "mine.py")
    with pytest.raises(InputError, match="found no `study`"):
        load_study("wrong")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        load_study("broken")
    assert main(["sweep"]) == 0  # which runs none of them
    out = capsys.readouterr().out
    assert "And does LoRA" in out
    assert "program" not in out
    assert {path.name for path in own.iterdir()} == {f"{n}.py" for n in study_files()} - {
        f"{n}.py" for n in NAMES
    }


def test_a_point_is_shown_by_what_tells_it_from_others():
    own = ("training.learning_rate=1e-2",)
    assert (
        Point("SGD-FT", Command.finetune, (), ("task=cr",), own).text == f"SGD-FT: task=cr {own[0]}"
    )
    assert Point("χ", Command.kernel, (), (), ()).text == "χ"


def test_an_override_is_read_in_hydras_sweep_grammar():
    assert axis_of("task=sst2,mr").overrides == ["task=sst2", "task=mr"]
    assert axis_of("task.k=range(1,4)").overrides == ["task.k=1", "task.k=2", "task.k=3"]
    assert axis_of("task.text=[a,b]").overrides == ["task.text=[a,b]"]
    assert axis_of("prompt=manual,null").overrides == ["prompt=manual", "prompt='null'"]
    rate = axis_of("training.learning_rate=tag(log,interval(1e-5,1e-2))")
    assert (rate.low, rate.high, rate.is_log, rate.is_int) == (1e-5, 1e-2, True, False)
    assert axis_of("parameters.r=int(interval(1,8))").is_int
    for text in ("a=interval(2,1)", "a=interval(1,1)", "a=tag(log,interval(0,1))"):
        with pytest.raises(InputError, match="two different numbers"):
            axis_of(text)
