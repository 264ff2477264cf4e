"""Named queries against their definitions, and entries of a kernel as a table."""

from __future__ import annotations

import itertools
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
    assert list(found)[0] == "fine-tuning (sgd, full)"


def test_cost_counts_what_kinds_share_once(store: Store) -> None:
    kernel, tuned = run(store, "cost")
    assert (kernel["command"], kernel["results"], kernel["seconds"]) == ("kernel", 2, 101.0)
    assert (tuned["command"], tuned["results"], tuned["seconds"]) == ("finetune", 4, 40.0)
    assert (kernel["peak_gib"], tuned["peak_gib"]) == (2.0, 1.0)


def test_every_named_query_answers_on_a_store_of_one_row(tmp_path: Path) -> None:
    store = Store(tmp_path / "one")
    store.write_result("trials", {"trial": "t"})
    for name, named in QUERIES.items():
        assert query(named.sql, store.path, parameters=["x"] * len(named.arguments)) is not None
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
