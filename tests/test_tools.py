"""Commands over a store and over what there is, as a user types them; completion in real shells."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from raykernel.catalog import LISTS, listed
from raykernel.cli import ABOUT, TOOLS, main
from raykernel.completion import SCRIPTS, candidates
from raykernel.conduct import arm_runs
from raykernel.config import RunConfig, plain
from raykernel.helptext import GROUPS
from raykernel.runs import Ended, write_down
from raykernel.space import make_plan
from raykernel.store.blocks import Store
from raykernel.store.listing import TABLES
from raykernel.store.named import QUERIES
from raykernel.sweep import load_study
from raykernel.terms import Cause, RunStatus
from tests import tiny
from tests.faults import places
from tests.store import stores


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a kernel and two trials."""
    folder = tmp_path_factory.mktemp("tools")
    stores.complete(folder / "store")
    store = Store(folder / "store")
    for trial, score in (("a", 0.5), ("b", None)):
        store.write_result("trials", {"trial": trial, "finetuned": score, "task": "x, y"})
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("RAYKERNEL_STORE", "store")
    return place


SQL = "select trial, finetuned, task from trials order by trial"


def test_rows_come_in_every_format_and_to_a_file(here, capfdbinary):
    assert main(["query", SQL, "--format", "json"]) == 0
    rows = json.loads(capfdbinary.readouterr().out)
    assert rows[0] == {"trial": "a", "finetuned": 0.5, "task": "x, y"}
    assert main(["query", SQL, "--format", "csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capfdbinary.readouterr().out.decode())))
    assert found[0] == {"trial": "a", "finetuned": "0.5", "task": "x, y"}
    assert main(["query", SQL, "--format", "parquet"]) == 0
    piped = pq.read_table(io.BytesIO(capfdbinary.readouterr().out)).to_pylist()
    assert piped == rows
    for name in ("out.parquet", "out.json"):
        assert main(["query", SQL, "--output", name]) == 0
        assert f"2 rows in {name}" in capfdbinary.readouterr().err.decode()
    assert pq.read_table("out.parquet").to_pylist() == rows
    assert json.loads(Path("out.json").read_text()) == rows
    assert main(["query", SQL]) == 0
    assert capfdbinary.readouterr().out.decode().split()[:3] == ["trial", "finetuned", "task"]


@pytest.mark.parametrize(
    ("arguments", "helps"),
    [
        ([], ["found no question", "--help"]),
        (["bets"], ["did you mean 'best'"]),
        (["best", "more"], ["raykernel query best"]),
        (["compare", "a"], ["raykernel query compare A B"]),
        ([SQL, "more"], ["Quote the whole question"]),
        ([SQL, "--output", "rows.xlsx"], ["'xlsx'", "parquet"]),
        (["--schema", "kernel"], ["did you mean 'kernels'"]),
        ([SQL, "--groups", "query"], ["--kernel"]),
        ([SQL, "--kernel", "ffff"], ["found no kernel 'ffff'"]),
        (["missing", "no_such_study"], ["Unknown study"]),
        (["compare", "no_such_study", "b"], ["Unknown study 'no_such_study'", "no runs in"]),
    ],
)
def test_wrong_questions_end_with_code_2_and_say_what_to_do(arguments, helps, here, capsys):
    assert main(["query", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for text in helps:
        assert text in error


def test_schema_prints_every_column_with_its_meaning(here, capsys):
    assert main(["query", "--schema"]) == 0
    text = capsys.readouterr().out
    for name, listing in TABLES.items():
        assert f"\n{name}: " in f"\n{text}"
        for column in listing.columns:
            assert f"  {column.name} " in text
    assert main(["query", "--schema", "curves"]) == 0
    one = " ".join(capsys.readouterr().out.split())
    assert "step integer Steps done; 0 is the start." in one
    assert "finetuned" not in one


def test_entries_of_a_kernel_are_a_table(here, capsys):
    name = Store("store").open().fingerprint[:6]
    sql = "select sum(value) as t from entries where row = col and row_output = col_output"
    command = ["query", sql, "--kernel", name, "--groups", "layer.1.query", "--format", "json"]
    assert main(command) == 0
    kernel = Store("store").kernel(groups=["layer.1.query"], rows=range(5))
    expected = kernel.reshape(10, 10).trace()
    assert json.loads(capsys.readouterr().out) == [{"t": pytest.approx(expected)}]


def test_compact_says_what_it_did(here, capsys):
    assert main(["compact"]) == 0
    assert capsys.readouterr().out == "trials: 2 rows in 1 file instead of 2\n"
    assert main(["compact"]) == 0
    assert "compact" in capsys.readouterr().out


STUDY = """
from raykernel.study import Arm, Study
from raykernel.terms import Command
study = Study(
    question="Does it matter?",
    space={"task.seed": "13,21"},
    arms=[Arm("SGD", Command.finetune, {"training": "sgd"}, {"training.learning_rate": "0.1,0.2"})],
    table=lambda rows, compare: [],
)
"""


def test_missing_names_the_runs_of_a_study_that_have_not_ended_well(tmp_path, monkeypatch, capsys):
    """Four runs of which one has ended, and one failed, are three with what was the matter."""
    monkeypatch.chdir(tmp_path)
    Path("sweeps").mkdir()
    Path("sweeps/mine.py").write_text(STUDY)
    tiny.write_reviews(Path("reviews.tsv"))
    overrides = [
        text for text in tiny.overrides("model") if not text.startswith(("store.", "task.seed"))
    ]
    plan = make_plan(load_study("mine"), [*overrides, "store.path=store"])
    done, failed, *left = arm_runs(plan, plan.study.arms[0], [])
    Store("store").write_result("trials", {"trial": "t"})
    write_down(Ended(done, RunStatus.ok, keys=[("trials", {"trial": "t"})]))
    write_down(Ended(failed, RunStatus.failed, Cause.memory, "no room"))
    command = ["query", "missing", "mine", "--store", "store", "--format", "json"]
    backwards = [*reversed(overrides), "sweep.workers=3"]  # the same runs, done by others
    for begun in ([], overrides, backwards):
        assert main([*command, *begun]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["run"], row["status"], row["cause"]) for row in rows] == [
            (failed.id, "failed", "memory"),
            *((run.id, "not begun", None) for run in left),
        ]
        assert "training.learning_rate=0.1" in rows[1]["overrides"]
    assert main([*command, "task.k=64"]) == 2
    error = capsys.readouterr().err
    assert "mine: found 'task.k=64', expected what it was begun with in store:" in error
    assert f"\n  {plan.asked}\n" in error
    assert main(["query", "failed", "--store", "store", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["error"]) == (failed.id, "no room")


def test_a_plan_is_replaced_by_one_of_the_same_command_line_alone(tmp_path, monkeypatch):
    """Of changed data: other runs. What is the same is not written twice, or where it cannot be."""
    monkeypatch.chdir(tmp_path)
    Path("sweeps").mkdir()
    Path("sweeps/mine.py").write_text(STUDY)
    tiny.write_reviews(Path("reviews.tsv"))
    overrides = [text for text in tiny.overrides("model") if not text.startswith("task.seed")]
    monkeypatch.setenv("RAYKERNEL_STORE", "store")

    def begin(*more: str) -> set[str]:
        plan = make_plan(load_study("mine"), [*overrides, *more])
        return {run.id for run in arm_runs(plan, plan.study.arms[0], [])}

    def planned() -> set[str]:
        return set(Store("store").results("plans")["run"].to_pylist())

    first = begin()
    files = set(Path("store/results").rglob("*.arrow"))
    assert planned() == begin() == first
    assert set(Path("store/results").rglob("*.arrow")) == files
    with Path("reviews.tsv").open("a") as reviews:
        reviews.write("pos\tanother one\n")
    second = begin()
    assert second.isdisjoint(first)
    assert planned() == second
    other = begin("task.k=1")
    assert planned() == second | other
    with places.read_only(Path("store")):
        begin("task.k=2")
    assert planned() == second | other


def test_studies_in_a_store_are_compared_by_their_first_words(tmp_path, capsys):
    store = Store(tmp_path / "store")
    scores = {"task": "t", "model": "m", "prompt": "manual", "k": 1, "seed": 13}
    store.write_result("trials", {"trial": "a", "metric": "accuracy", "finetuned": 0.5} | scores)
    results = json.dumps([["trials", {"trial": "a"}]])
    for study in ("one_of_them", "other_one"):
        end = {"status": "ok", "arm": "SGD", "results": results}
        store.write_result("runs", {"study": study, "run": "r", **end})
    command = ["query", "compare", "one", "other_one", "--store", str(store.path)]
    assert main([*command, "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["first"], row["second"], row["seeds"]) == (0.5, 0.5, 1)


# ---------------------------------------------------------------- what there is


@pytest.mark.parametrize("kind", LISTS)
def test_everything_that_is_listed_has_a_sentence(kind, capsys):
    entries, command = listed(kind.removesuffix("s"))
    assert entries
    for name, about in entries.items():
        assert len(about) > 2, name
    assert main(["list", kind]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in entries)
    assert command in printed


def test_an_unknown_list_is_refused(capsys):
    assert main(["list", "taks"]) == 2
    assert "'tasks'" in capsys.readouterr().err


def test_show_prints_configuration_names_and_places_and_computes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = tiny.save_masked_lm(tmp_path / "model")
    tiny.write_reviews(Path("reviews.tsv"))
    own = {"task.test_limit": "6", "kernel.block_size": "4", "training.steps": "2"}
    arguments = tiny.overrides(model, **own)
    assert main(["show", *arguments]) == 0
    before = capsys.readouterr().out
    text, _, facts = before.partition("What it is")
    assert OmegaConf.to_container(OmegaConf.create(text))["task"]["k"] == 3
    assert "none of" in facts
    assert "not begun" in facts
    assert not Path("store").exists()
    assert main(["kernel", *arguments]) == 0
    assert main(["finetune", *arguments]) == 0
    capsys.readouterr()
    assert main(["show", *arguments]) == 0
    facts = capsys.readouterr().out.partition("What it is")[2]
    store = Store("store")
    assert f"kernels/{store.open().fingerprint}" in facts
    assert f"trials/{store.trials()[0]}" in facts
    assert "ended" in facts
    assert "1 row in kernels" in facts
    assert "1 row in trials" in facts


@pytest.mark.parametrize("command", ABOUT)
def test_help_says_what_every_key_that_a_command_reads_means(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"raykernel {command}: ")
    tree = plain(RunConfig())
    for group in GROUPS[command]:
        for key, value in tree[group].items():
            if not (isinstance(value, dict) and key == "projection"):
                line = next(line for line in text.splitlines() if f"  {group}.{key} " in line)
                assert len(line.split()) > 3, key
    assert max(map(len, text.splitlines())) <= 120


def test_help_has_the_values_of_the_command_line_even_of_an_incomplete_one(capsys):
    assert main(["kernel", "task.k=77", "--help"]) == 0
    assert "77" in capsys.readouterr().out
    assert main(["kernel", "model=hf", "--help"]) == 0
    assert "model.name" in capsys.readouterr().out


# ---------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("raykernel sp", ["spectrum"]),
        ("raykernel query be", ["best"]),
        ("raykernel query --sch", ["--schema"]),
        ("raykernel list mo", ["models"]),
        ("raykernel kernel task=drug_c", ["task=drug_conditions"]),
        ("raykernel kernel task.test_b", ["task.test_balanced="]),
        ("raykernel kernel model=gpt2 solver=lo", ["solver=logistic"]),
        ("raykernel kernel --c", ["--cfg"]),
        ("raykernel sweep lambda", ["lambda_path"]),
        ("raykernel sweep lambda_path experiment=q", ["experiment=quickstart"]),
        ("raykernel kernel nothing=1 task.test_b", []),
        ("raykernel nothing ", []),
    ],
)
def test_candidates_complete_the_last_word(line, expected):
    assert candidates(line, list(ABOUT), list(TOOLS)) == expected


def test_an_empty_word_has_everything_as_candidate():
    assert candidates("raykernel ", list(ABOUT), list(TOOLS)) == sorted([*ABOUT, *TOOLS])
    assert candidates("raykernel query ", list(ABOUT), list(TOOLS)) == sorted(QUERIES)
    assert {"task=", "kernel=", "experiment="} <= set(
        candidates("raykernel kernel ", list(ABOUT), list(TOOLS))
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which `raykernel` is this checkout's."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "raykernel"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m raykernel "$@"\n')
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


TYPED = {
    "bash": """
        eval "$(raykernel completion bash)"
        # As readline does: the words of the line are cut at = and :, the line is not.
        press() {
            COMP_LINE="$1" COMP_POINT=${#1} COMPREPLY=()
            _raykernel 2>/dev/null
            echo "${COMPREPLY[*]}"
        }
        press "raykernel sp"
        press "raykernel kernel task=drug_c"
        press "raykernel kernel task.test_b"
        complete -p raykernel
        """,
    "fish": """
        raykernel completion fish | source
        complete -C "raykernel sp"
        complete -C "raykernel kernel task=drug_c"
        complete -C "raykernel kernel task.test_b"
        complete -c raykernel
        """,
}


@pytest.mark.parametrize("shell", TYPED)
def test_a_real_shell_completes(shell, path):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} on this machine")
    command = [shell, "-c", TYPED[shell]]
    environment = os.environ | {"PATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second, third, *rest = run.stdout.splitlines()
    assert first == "spectrum"
    assert second in ("drug_conditions", "task=drug_conditions")  # bash: what follows the =
    assert third == "task.test_balanced="
    assert "raykernel" in " ".join(rest)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_have_the_shells_own_grammar(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} on this machine")
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell])
    subprocess.run([shell, "-n", str(script)], check=True)
