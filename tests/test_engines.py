"""Runs of a study: named, done once, failed with a cause, searched, on every engine."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import optuna
import pytest

from raykernel import commands
from raykernel.cli import main
from raykernel.compute.trouble import cause_of as cause_of_loss
from raykernel.conduct import arm_points, make_searcher
from raykernel.console import Screen
from raykernel.engines import by_kernel, waves
from raykernel.errors import DivergedError, InputError, OutOfMemoryError, RunError, WorkerLostError
from raykernel.runs import Runner, cause_of, make_run, rows_of, stored
from raykernel.search import Search, make_sampler
from raykernel.space import Point, axis_of, make_plan
from raykernel.store.blocks import Store
from raykernel.study import Row
from raykernel.sweep import load_study
from raykernel.terms import Cause, Command, Direction, RunStatus
from tests import tiny

RATES = "training.learning_rate=tag(log,interval(1e-3,1e-1))"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Path:
    """A working folder with a study of fine-tuning runs that take a tenth of a second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(model)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "rates.py").write_text(tiny.study("1,2", steps=2), encoding="utf-8")
    tiny.write_reviews(tmp_path / "reviews.tsv")
    return tmp_path


def runs() -> list[Row]:
    return list(Store("store").results("runs").to_pylist())


def sweep(*arguments: str) -> int:
    return main(["sweep", "rates", *arguments])


# ---------------------------------------------------------------- runs


def test_a_run_is_done_once_and_its_row_names_its_results(place, capsys):
    assert sweep() == 0
    first = runs()
    assert [row["status"] for row in first] == ["ok"] * 4
    trials = {row["trial"] for row in Store("store").results("trials").to_pylist()}
    named = [json.loads(row["results"]) for row in first]
    assert {key["trial"] for ((table, key),) in named if table == "trials"} == trials
    made_by = json.loads(first[0]["versions"])
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert head.startswith(made_by["commit"].removesuffix("-dirty"))
    (place / "store" / ".tune" / f"{platform.node()}-{2**22 + 1}" / "tune").mkdir(parents=True)
    assert sweep() == 0
    assert runs() == first
    assert not list(place.rglob(".tune"))  # no process has such a number: its driver is dead
    assert "4 of 4 runs are complete" in capsys.readouterr().out


def test_where_and_how_it_runs_is_not_in_its_name_and_what_it_reads_is(place):
    plan = make_plan(load_study("rates"), [])
    (point, *_) = arm_points(plan, plan.study.arms[0], [])
    name = make_run("rates", point).id

    def named(*more: str) -> str:
        changed = make_plan(load_study("rates"), more)
        return make_run("rates", arm_points(changed, changed.study.arms[0], [])[0]).id

    assert named("compute=ray", "store.path=other", "sweep.workers=3", "sweep=tpe") == name
    assert named("task.k=3") != name
    tiny.write_reviews(place / "reviews.tsv", seed=1)
    assert named() != name


def test_a_run_whose_result_is_gone_is_done_again(place):
    assert sweep() == 0
    (lost, *_) = (place / "store" / "trials").iterdir()
    shutil.rmtree(lost)
    before = {row["run"]: row["created"] for row in runs()}
    assert sweep() == 0
    after = {row["run"]: row["created"] for row in runs()}
    assert sum(after[run] != before[run] for run in before) == 1
    assert lost.exists()


def test_a_failure_is_said_with_its_cause_and_retried_on_request(place, capsys):
    rates = "training.learning_rate=1,1e30"
    assert sweep(rates) == 1
    said = capsys.readouterr().err
    assert said.count("Failed (diverged): SGD: task.seed=13 training.learning_rate=1e+30") == 1
    assert {row["cause"] for row in runs()} == {None, "diverged"}
    before = runs()
    assert sweep(rates) == 1
    assert runs() == before
    said = capsys.readouterr().err
    assert "Failed (diverged, before)" in said
    assert "sweep.retry_failed=true" in said
    assert sweep(rates, "sweep.retry_failed=true") == 1
    again = [row for row in runs() if row not in before]
    assert [row["status"] for row in again] == ["failed"] * 2


def test_input_that_was_wrong_is_tried_again_without_a_request(place, capsys):
    assert sweep("task.k=50") == 1  # more than there are
    assert {row["cause"] for row in runs()} == {"input"}
    tiny.write_reviews(place / "reviews.tsv", num=600)
    assert sweep("task.k=50", "training.steps=1", "task.seed=13", "training.learning_rate=1") == 0


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (DivergedError("x"), Cause.diverged),
        (OutOfMemoryError("x"), Cause.memory),
        (MemoryError(), Cause.memory),
        (WorkerLostError("x"), Cause.lost),
        (WorkerLostError(cause_of_loss(RuntimeError("running low on memory"))), Cause.memory),
        (InputError("x"), Cause.input),
        (RunError("x"), Cause.error),
        (ZeroDivisionError(), Cause.error),
    ],
)
def test_causes(error, cause):
    assert cause_of(error) is cause


def test_an_unforeseen_error_stops_no_other_run(place, monkeypatch, capsys):
    execute = commands.execute

    def failing(command, run, screen, watch=None):
        if "task.seed=21" in run.overrides:
            raise ZeroDivisionError("unforeseen")
        return execute(command, run, screen, watch)

    monkeypatch.setattr("raykernel.runs.execute", failing)
    assert sweep() == 1
    printed = capsys.readouterr()
    assert "2 of 4 runs are complete, 2 failed" in printed.out
    assert "ZeroDivisionError: unforeseen" in printed.err
    assert "Traceback" in printed.err
    assert {row["error"] for row in runs()} == {None, "ZeroDivisionError: unforeseen"}


def test_runs_that_share_a_kernel_are_one_job(place):
    """By kernel: two ridges of one seed; runs that train are jobs of their own."""
    ridges = make_plan(load_study("rates"), [])
    (arm,) = ridges.study.arms
    points = [
        Point("K", Command.kernel, (*ridges.point(arm, cell, ()).overrides, own), cell, (own,))
        for cell in ridges.cells()
        for own in ("solver.ridge=[1]", "solver.ridge=[2]")
    ]
    jobs = by_kernel([make_run("rates", point) for point in points])
    assert [[run.point.own for run in job] for job in jobs] == [[p.own for p in points[:2]]] * 2
    trained = [make_run("rates", point) for point in arm_points(ridges, arm, [])]
    assert [len(job) for job in by_kernel(trained)] == [1] * 4


def test_of_runs_that_train_and_share_a_kernel_one_goes_ahead(place):
    """The others find its blocks; of commands of the kernel alone one job does them in a row."""
    plan = make_plan(load_study("rates"), [])
    (arm,) = plan.study.arms
    by_command = {
        command: [
            make_run(
                "rates",
                Point("B", command, (*plan.point(arm, cell, ()).overrides, own), cell, (own,)),
            )
            for cell in plan.cells()
            for own in ("training.learning_rate=0.1", "training.learning_rate=0.2")
        ]
        for command in (Command.behavior, Command.kernel, Command.finetune)
    }
    first, second, third, fourth = by_command[Command.behavior]
    assert waves(by_command[Command.behavior]) == [[first, third], [second, fourth]]
    for command in (Command.kernel, Command.finetune):
        assert waves(by_command[command]) == [by_command[command]]


def test_no_run_begins_after_the_deadline(place, capsys):
    assert sweep("sweep.minutes=1e-9") == 0
    assert "0 of 4 runs are complete, 4 could not begin" in capsys.readouterr().out
    assert not runs()


# ---------------------------------------------------------------- searches


def test_a_search_averages_over_seeds_and_goes_on_where_it_was(place, capsys):
    tpe = ["sweep=tpe", "sweep.metrics=[dev,finetuned]", "sweep.directions=[max,max]", RATES]
    assert sweep(*tpe, "sweep.trials=2") == 0
    plan = make_plan(load_study("rates"), [*tpe, "sweep.trials=3"])
    arm = plan.study.arms[0]
    (cells,) = plan.cells_to_average(plan.settings())
    searcher = make_searcher(plan, arm, cells, Runner())
    tried = searcher.search.settled(searcher.search.open())
    assert len(tried) == 2
    trials = Store("store").results("trials").to_pylist()
    for choice in tried:
        (override,) = searcher.search.overrides(choice.params)
        rate = float(override.split("=")[1])
        assert rate == pytest.approx(choice.params["training.learning_rate"], rel=1e-3)
        same = [row for row in trials if row["learning_rate"] == rate]
        assert len(same) == 2  # seeds
        means = [statistics.fmean(row[name] for row in same) for name in ("dev", "finetuned")]
        assert choice.values == pytest.approx(means)
    # A third choice was asked for by a process that died: the next one takes it up.
    lost = searcher.search.ask(searcher.search.open(slot=2), slot=2)
    assert sweep(*tpe, "sweep.trials=3") == 0
    done = searcher.search.settled(searcher.search.open())
    assert [one.params for one in done[:2]] == [one.params for one in tried]
    assert done[2].params == lost.params
    assert len(runs()) == 6
    assert "SGD: 3 choices, none of which is better in all" in capsys.readouterr().out


def test_a_choice_of_which_a_run_fails_has_failed(place):
    tpe = ["sweep=random", "sweep.trials=2", "training.learning_rate=1e30,1e31"]
    assert sweep(*tpe) == 1
    plan = make_plan(load_study("rates"), tpe)
    (cells,) = plan.cells_to_average(plan.settings())
    search = make_searcher(plan, plan.study.arms[0], cells, Runner()).search
    states = {trial.state for trial in search.open().get_trials()}
    assert states == {optuna.trial.TrialState.FAIL}
    assert len(search.resume(retry_failed=False)) == 0
    assert len(search.resume(retry_failed=True)) == 2


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "expected a finite number"), (None, "found no dev")]
)
def test_a_metric_that_is_no_number_fails_the_choice(place, monkeypatch, value, said, capsys):
    monkeypatch.setattr("raykernel.engines.rows_of", lambda ended: [{"dev": value}])
    assert sweep("sweep=random", "sweep.trials=1") == 1
    assert said in capsys.readouterr().err
    assert "failed" in {row["status"] for row in runs()}


def test_an_integer_interval_gives_integers(tmp_path):
    axes = {axis.key: axis for axis in [axis_of("a=int(interval(1,8))"), axis_of("b=x,y")]}
    both = {"metrics": ["m"], "directions": [Direction.min], "trials": 9}
    search = Search(tmp_path / "j", "s", axes, "random", 0, **both)
    found = [search.ask(search.open(slot=n), n).params for n in range(9)]
    assert {type(one["a"]) for one in found} == {int}
    assert len({one["a"] for one in found}) > 2  # every slot has other random numbers
    assert {one["b"] for one in found} == {"x", "y"}
    assert search.overrides({"a": 3, "b": "x"}) == ("a=3", "b=x")


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2", "QMCSampler"])
def test_samplers_by_name(name):
    assert isinstance(make_sampler(name, 0), optuna.samplers.BaseSampler)


@pytest.mark.parametrize(
    ("settings", "helps"),
    [
        (["sweep=tpo"], "did you mean 'tpe'"),
        (["sweep=tpe", "sweep.sampler=TPESample"], "did you mean 'TPESampler'"),
        (["sweep=tpe", "sweep.sampler=GridSampler"], "expected grid"),
        (["sweep=tpe", "sweep.trials=0"], "sweep.trials: found 0"),
        (["sweep=tpe", "sweep.trials=null"], "has no end of its own"),
        (["sweep=tpe", "sweep.metrics=[devv]"], "did you mean 'dev'"),
        (["sweep.directions=[max,min]"], "for each of sweep.metrics"),
        (["sweep.stopping=asha"], "Set sweep.engine=tune"),
        (["sweep.stopping=asha", "sweep.engine=tune", "sweep.metrics=[finetuned]"], "one of dev"),
        ([RATES], "found an interval"),
        (["sweep.engine=tone"], "tone"),
        (["training.learning_rte=1,2"], "did you mean"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_before_anything_runs(
    place, settings, helps, capsys
):
    assert sweep(*settings) == 2
    assert helps in capsys.readouterr().err
    assert not (place / "store").exists()


def test_minus_m_prints_every_run_and_fails_one_by_one(place, capsys):
    plan = make_plan(load_study("rates"), ["task.seed=13"])
    texts = arm_points(plan, plan.study.arms[0], [])[0].overrides
    texts = [text for text in texts if not text.startswith("training.learning_rate")]
    many = ["finetune", "-m", *texts, "training.learning_rate=1,1e30"]
    assert main(many) == 1
    printed = capsys.readouterr()
    assert printed.out.count("fine-tuning (sgd, full)") == 1
    assert "1 of 2 runs failed" in printed.err
    assert main(many) == 1
    printed = capsys.readouterr()
    assert "Failed (diverged, before)" in printed.err
    assert printed.out.count("fine-tuning (sgd, full)") == 1  # from the store
    assert main([*many, "sweep=tpe"]) == 2


# ---------------------------------------------------------------- Ray


def same_results(one: str, other: str) -> bool:
    """Trials of two stores have the same names and the same numbers."""
    found = []
    for path in (one, other):
        rows = Store(path).results("trials").to_pylist()
        found.append(
            {row["trial"]: (row["dev"], row["finetuned"], row["distance"]) for row in rows}
        )
    return found[0].keys() == found[1].keys() and all(
        np.array_equal(found[0][trial], found[1][trial]) for trial in found[0]
    )


@pytest.mark.ray
def test_ray_tune_and_actors_find_what_one_process_finds(place, ray_instance, capsys):
    """The same grid, a search that goes on on another engine, and ASHA.

    Grids on actors: those that tests of faults kill, and that of `-m`.
    """
    assert sweep() == 0
    pool = ["sweep.workers=2", "store.path=pool"]
    tuned = ["sweep.engine=tune", "sweep.workers=2", "store.path=tuned"]
    assert sweep(*tuned) == 0
    assert same_results("store", "tuned")
    found = ["sweep=tpe", RATES]
    assert sweep(*pool, *found, "sweep.trials=2") == 0
    searched = len(Store("pool").results("runs").to_pylist())
    assert sweep(*found, "sweep.engine=tune", *pool, "sweep.trials=3") == 0
    assert len(Store("pool").results("runs").to_pylist()) == searched + 2
    capsys.readouterr()
    asha = ["sweep.stopping=asha", "sweep.average=[]", "sweep.reduction=2", "training.steps=6"]
    rates = "training.learning_rate=1e-9,1e-8,1e-2,2e-2,3e-2,5e-2"
    assert sweep(*tuned, *asha, rates, "task.seed=13") == 0
    assert "stopped early" in capsys.readouterr().out
    assert not list(place.rglob(".tune"))


@pytest.mark.ray
def test_minus_m_on_actors_prints_what_a_run_prints(place, ray_instance, capsys):
    plan = make_plan(load_study("rates"), ["task.seed=13"])
    texts = arm_points(plan, plan.study.arms[0], [])[0].overrides
    texts = [text for text in texts if not text.startswith("training.learning_rate")]
    assert main(["finetune", "-m", *texts, "training.learning_rate=1,2", "sweep.workers=2"]) == 0
    assert capsys.readouterr().out.count("fine-tuning (sgd, full)") == 2


def test_a_worker_does_not_do_again_what_another_has_done(place):
    plan = make_plan(load_study("rates"), [])
    run = make_run("rates", arm_points(plan, plan.study.arms[0], [])[0])
    first = Runner(screen=Screen()).do(run)
    assert first.status is RunStatus.ok
    again = Runner(screen=Screen()).do(run)
    assert again.was_stored
    assert rows_of(again) == rows_of(first)
    assert stored(run, retry_failed=True) is not None
