"""Named queries against their definitions, and entries of a kernel as a table."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from raykernel.errors import InputError
from raykernel.store.blocks import Store
from raykernel.store.named import QUERIES, named_query
from raykernel.store.query import query
from tests.store import stores

SCORES = {  # (seed, learning rate) → (dev, test)
    (13, 0.1): (0.7, 0.50),
    (13, 0.2): (0.8, 0.60),
    (21, 0.1): (0.9, 0.90),
    (21, 0.2): (0.9, 0.40),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("named"))
    problem = {"task": "sst2", "model": "tiny", "prompt": "manual", "k": 16, "metric": "accuracy"}
    for (seed, rate), (dev, test) in SCORES.items():
        trial = {"trial": f"{seed}-{rate}", "seed": seed, "learning_rate": rate}
        found = {"dev": dev, "finetuned": test, "seconds": 10.0, "peak_memory_bytes": 2**30}
        method = {"method": "full", "optimizer": "sgd"}
        store.write_result("trials", problem | trial | found | method)
    for kind, solver in itertools.product(("sgd", "signgd"), ("{}", '{"ridge":1}')):
        key = {"fingerprint": "f", "kind": kind, "solver": solver}
        cost = {"seconds": 100.0 if solver == "{}" else 1.0, "peak_memory_bytes": 2**31}
        scores = {"seed": 13, "dev": 0.75, "kernel_regression": 0.65}
        store.write_result("kernels", problem | key | cost | scores)
    for group in ("a", "b"):
        read = {"fingerprint": "f", "kind": "sgd", "groups": [group], "ridge": 1.0, "seed": 13}
        store.write_result(
            "spectra", {name: problem[name] for name in ("task", "model")} | read | {"seconds": 3.0}
        )
    return store


def run(store: Store, name: str, *arguments: str) -> list[dict[str, object]]:
    named = named_query(name)
    rows = query(named.sql, store.path, parameters=named.parameters(name, arguments))
    return rows.to_pylist()


def test_best_is_the_mean_over_seeds_of_what_dev_selects(store: Store) -> None:
    found = {row["method"]: row for row in run(store, "best")}
    tuned = found["fine-tuning (sgd, full)"]
    selected = [0.60, 0.90]  # of seed 21 the first of equals
    assert tuned["test"] == pytest.approx(statistics.fmean(selected))
    assert tuned["deviation"] == pytest.approx(statistics.pstdev(selected))
    assert (tuned["seeds"], tuned["best_run"]) == (2, "21-0.1")
    assert found["kernel regression (signgd)"]["test"] == 0.65
    assert next(iter(found)) == "fine-tuning (sgd, full)"


def test_cost_counts_what_rows_of_one_run_share_once(store: Store) -> None:
    kernel, tuned, read = run(store, "cost")
    assert (kernel["command"], kernel["results"], kernel["seconds"]) == ("kernel", 2, 101.0)
    assert (tuned["command"], tuned["results"], tuned["seconds"]) == ("finetune", 4, 40.0)
    assert (read["command"], read["results"], read["seconds"]) == ("spectrum", 1, 3.0)
    assert (kernel["peak_gib"], tuned["peak_gib"]) == (2.0, 1.0)


def test_failed_and_missing_runs_are_told_apart(store: Store) -> None:
    rows = [("a", "ok", None), ("b", "failed", "memory"), ("c", "stopped", None)]
    for run_id, status, cause in rows:
        end = {"status": status, "cause": cause, "results": "[]", "arm": "sgd"}
        store.write_result("runs", {"study": "mine", "run": run_id, **end})
    store.write_result("runs", {"study": "other", "run": "d", "status": "ok", "results": "[]"})
    assert [(row["run"], row["cause"]) for row in run(store, "failed")] == [("b", "memory")]
    for asked, planned in (("k=1", "abcd"), ("k=1 s=2", "ef"), ("k=1,2", "de")):
        key = {"study": "mine", "asked": asked, "arm": "sgd", "command": "finetune"}
        rows = [key | {"number": number, "run": run_id} for number, run_id in enumerate(planned)]
        store.write_results("plans", rows)
    left = {  # d has ended in another study only
        "": [("b", "failed"), ("d", "not begun"), ("e", "not begun"), ("f", "not begun")],
        "k=1": [("b", "failed"), ("d", "not begun")],
        "k=1 s=2": [("e", "not begun"), ("f", "not begun")],
        "k=1,2": [("d", "not begun"), ("e", "not begun")],
    }
    sql = named_query("missing").sql
    for asked, expected in left.items():
        found = query(sql, store.path, parameters=["mine", asked]).to_pylist()
        assert [(row["run"], row["status"]) for row in found] == expected, asked
    assert query(sql, store.path, parameters=["other", ""]).num_rows == 0


def test_compare_is_the_mean_difference_over_the_cells_of_both(store: Store) -> None:
    """Of each cell the run that dev selects, in two studies that have two seeds in common."""
    solver = '{"ridge":1}'
    results = {
        "first": [["trials", {"trial": name}] for name in ("13-0.1", "13-0.2", "21-0.2")],
        "second": [["trials", {"trial": name}] for name in ("13-0.1", "21-0.1")],
    }
    for study, keys in results.items():
        for number, key in enumerate(keys):
            end = {"status": "ok", "arm": "SGD", "results": json.dumps([key])}
            store.write_result("runs", {"study": study, "run": str(number), **end})
        key = {"fingerprint": "f", "kind": "sgd", "solver": solver}
        both = json.dumps([["kernels", key], ["kernels", key | {"kind": "signgd"}]])
        end = {"status": "ok", "arm": "K", "results": both}
        store.write_result("runs", {"study": study, "run": "k", **end})
    by_method = {row["method"]: row for row in run(store, "compare", "first", "second")}
    kernel = by_method["K (sgd)"]
    assert (kernel["seeds"], kernel["difference"]) == (1, 0.0)
    assert by_method["K (signgd)"]["seeds"] == 1
    tuned = by_method["SGD"]
    first, second = [0.60, 0.40], [0.50, 0.90]  # seeds 13 and 21
    assert tuned["seeds"] == 2
    assert tuned["first"] == pytest.approx(statistics.fmean(first))
    assert tuned["second"] == pytest.approx(statistics.fmean(second))
    gains = [b - a for a, b in zip(first, second, strict=True)]
    assert tuned["difference"] == pytest.approx(statistics.fmean(gains))
    assert tuned["deviation"] == pytest.approx(statistics.pstdev(gains))


def test_every_named_query_answers_on_a_store_of_one_row(tmp_path: Path) -> None:
    store = Store(tmp_path / "one")
    store.write_result("trials", {"trial": "t"})
    for name, named in QUERIES.items():
        given = ["x"] * (len(named.arguments) + named.takes_overrides)
        assert query(named.sql, store.path, parameters=given) is not None
        assert named.about, name


def test_a_wrong_name_or_number_of_arguments_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="did you mean 'best'"):
        run(store, "bets")
    with pytest.raises(InputError, match="found 1 arguments, expected 0: raykernel query best"):
        run(store, "best", "sst2")


def test_entries_are_the_kernel_of_the_groups_chosen(tmp_path: Path) -> None:
    """K[i, a, j, b], a row each, against the array that the blocks make."""
    handle = stores.complete(tmp_path)
    rows, cols, groups = range(5, 8), range(1, 4), ["query"]
    table = handle.table(groups, rows=rows, cols=cols)
    k = handle.kernel(groups, rows=rows, cols=cols)
    found = np.full(k.shape, np.nan)
    for entry in table.to_pylist():
        at = (entry["row"] - 5, entry["row_output"], entry["col"] - 1, entry["col_output"])
        assert np.isnan(found[at])  # once
        found[at] = entry["value"]
        assert entry["kind"] == "sgd"
    assert found.tobytes() == k.tobytes()
    whole = handle.table(layers_to_transform=[1])
    trace = query(
        "SELECT sum(value) AS t FROM entries WHERE row = col AND row_output = col_output",
        tmp_path,
        tables={"entries": whole},
    )
    expected = np.einsum("iaia->", handle.kernel(["layer.1.query"], rows=range(5)))
    assert trace["t"][0].as_py() == pytest.approx(expected)
