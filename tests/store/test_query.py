from __future__ import annotations

import csv
import io
import json
import math
from datetime import datetime, timezone
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raykernel.errors import BlockCorruptError, InputError
from raykernel.store.blocks import Store, open_store
from raykernel.store.format import Format, format_table
from raykernel.store.listing import TABLES
from raykernel.store.query import query
from raykernel.store.tables import TABLES as RESULT_TABLES
from raykernel.store.verify import verify
from tests.store import stores


def row(fingerprint: str, **changes: object) -> dict[str, object]:
    return {
        "fingerprint": fingerprint,
        "kind": "sgd",
        "solver": '{"ridge":[0.0,0.1]}',
        "task": "sst2",
        "k": 16,
        "kernel_regression": 0.875,
        "f0_scaling": math.inf,
        "groups": [],
        "overrides": ["task=sst2", "task.k=16"],
        **changes,
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    handle = stores.complete(tmp_path)
    stores.predict(handle, 3)
    store = open_store(tmp_path)
    store.write_result("kernels", row(handle.fingerprint))
    store.write_result("trials", {"trial": "t", "finetuned": 0.9})
    store.write_results("curves", [{"trial": "t", "step": step} for step in (10, 0)])
    store.write_results("twins", [{"trial": "t", "split": name} for name in ("train", "test")])
    store.write_result("bounds", {"trial": "t", "quantity": "deviation", "name": "printed"})
    verdict = {"fingerprint": handle.fingerprint, "trial": "t", "solver": "{}", "criteria": "{}"}
    store.write_result("behavior", verdict | {"solves": True})
    spectra = {"fingerprint": handle.fingerprint, "kind": "sgd", "groups": [], "ridge": 1e-3}
    store.write_results("spectra", [spectra | {"layer_group": name} for name in ("a", "b")])
    chosen = {"fingerprint": handle.fingerprint, "kind": "sgd", "settings": "{}", "ridge": 1e-3}
    store.write_results("selections", [chosen | {"rank": rank} for rank in (1, 2)])
    return store


def test_result_rows_come_back_with_nulls_for_what_is_unknown(store: Store) -> None:
    table = store.results("kernels")
    assert table.schema.equals(RESULT_TABLES["kernels"].schema)
    (found,) = table.to_pylist()
    assert found["kernel_regression"] == 0.875
    assert found["linear_probe"] is None
    assert found["path"] == f"kernels/{found['fingerprint']}"
    assert abs(datetime.now(timezone.utc) - found["created"]).total_seconds() < 60


def test_the_same_question_replaces_its_answer(store: Store) -> None:
    fingerprint = store.open().fingerprint
    store.write_result("kernels", row(fingerprint, kernel_regression=0.9))
    store.write_result("kernels", row(fingerprint, solver="{}", kernel_regression=0.8))
    assert sorted(store.results("kernels")["kernel_regression"].to_pylist()) == [0.8, 0.9]


def test_rows_of_an_older_schema_read_as_null(store: Store) -> None:
    path = next(store.path.glob("results/kernels/*.parquet"))
    older = pq.read_table(path).drop_columns(["linear_probe", "created"])
    pq.write_table(older, path.with_name(f"{0:016x}-{0:024x}.parquet"))
    assert store.results("kernels")["created"].null_count == 1


def test_wrong_rows_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="did you mean 'ridge'"):
        store.write_result("kernels", row("f", ridg=1.0))
    with pytest.raises(ValueError, match="found no solver"):
        store.write_result("kernels", {"fingerprint": "f", "kind": "sgd"})
    with pytest.raises(InputError, match="did you mean 'kernels'"):
        store.write_result("kernel", {})


def test_a_damaged_result_is_named_and_removed(store: Store) -> None:
    path = next(store.path.glob("results/kernels/*.parquet"))
    content = bytearray(path.read_bytes())
    content[content.index(b"sst2")] ^= 1
    path.write_bytes(content)
    with pytest.raises(BlockCorruptError, match=path.name):
        store.results("kernels")
    assert verify(store.path, remove=True).ok
    assert store.results("kernels").num_rows == 0


def test_every_table_answers(store: Store) -> None:
    for name, listing in TABLES.items():
        found = query(f"SELECT * FROM {name}", store.path)
        assert found.num_rows > 0, name
        assert {column.name for column in listing.columns} <= set(found.column_names)


def test_a_curve_is_one_file_and_comes_back_by_step(store: Store) -> None:
    assert store.results("curves")["step"].to_pylist() == [0, 10]
    assert [row["step"] for row in store.rows("curves", trial="t")] == [10, 0]
    assert store.rows("curves", trial="u") == []
    assert store.trials() == ["t"]
    with pytest.raises(ValueError, match="several keys"):
        store.write_results("curves", [{"trial": "t"}, {"trial": "u"}])


def test_a_store_of_trials_alone_can_be_queried(tmp_path: Path) -> None:
    Store(tmp_path / "new").write_result("trials", {"trial": "t"})
    assert query("SELECT trial FROM trials", tmp_path / "new").num_rows == 1


def test_blocks_are_listed_from_their_headers(store: Store) -> None:
    sql = "SELECT i, j, col1 - col0 AS m, num_groups, kinds, dtype, seconds FROM blocks ORDER BY i"
    first = query(sql, store.path).to_pylist()[0]
    assert first["num_groups"] == len(stores.GROUPS)
    assert (first["m"], first["kinds"], first["dtype"], first["seconds"]) == (
        2, ["sgd"], "float32", 0.5,
    )  # fmt: skip
    summary = 'SELECT count(*) AS n, sum(bytes) AS bytes, min("created") AS t FROM blocks'
    (found,) = query(summary, store.path).to_pylist()
    assert found["n"] == 12
    assert found["bytes"] > 12 * 300
    assert found["t"].tzinfo is not None


def test_predictions_are_listed_by_example(store: Store) -> None:
    sql = "SELECT example, id, fitted, ridge, num_groups FROM predictions JOIN examples USING "
    found = query(sql + "(fingerprint, example) ORDER BY example", store.path).to_pylist()
    assert [entry["id"] for entry in found] == ["train:5", "train:6"]
    for entry in found:
        expected = -stores.logits(range(entry["example"], entry["example"] + 1))[0]
        assert entry["fitted"] == expected.tolist()
        assert (entry["ridge"], entry["num_groups"]) == (0.01, len(stores.GROUPS))


def test_traces_of_groups_are_the_train_kernels(store: Store) -> None:
    found = query("SELECT layer_group, trace FROM groups", store.path).to_pylist()
    kernels = dict(store.open().group_kernels(rows=range(5)))
    assert {entry["layer_group"]: entry["trace"] for entry in found} == {
        group: pytest.approx(float(kernel.reshape(10, 10).trace()))
        for group, kernel in kernels.items()
    }


def test_examples_with_other_columns_stand_side_by_side(tmp_path: Path) -> None:
    stores.begin(tmp_path)
    more = stores.examples(8).append_column("text", pa.array(["a"] * 8))
    identity = {"task": {"name": "other"}}
    grid = stores.Grid(5, 8, 2)
    Store(tmp_path).begin(identity, grid=grid, num_outputs=2, examples=more)
    found = query("SELECT count(*) AS n, count(text) AS texts FROM examples", tmp_path)
    assert found.to_pylist() == [{"n": 16, "texts": 8}]


# DuckDB 1, the newest for Python 3.10, makes a type for PIVOT and reads this PRAGMA as a SELECT.
DUCKDB_2 = pytest.mark.skipif(duckdb.__version__ < "2", reason="parsed otherwise by DuckDB 1")


@pytest.mark.parametrize(
    "sql",
    [
        "DESCRIBE kernels", "SUMMARIZE kernels", "SHOW TABLES", "EXPLAIN SELECT 1", "VALUES (1)",
        "WITH q AS (FROM kernels) FROM q",
        pytest.param("PIVOT kernels ON kind USING avg(kernel_regression)", marks=DUCKDB_2),
        "SELECT date_trunc('day', created) FROM KERNELS",
    ],
)  # fmt: skip
def test_every_reading_statement_works(store: Store, sql: str) -> None:
    assert query(sql, store.path).num_rows > 0


@pytest.mark.parametrize(
    "sql",
    [
        "COPY kernels TO '{path}/out.csv'",
        "COPY (SELECT 1) TO '{path}/out.csv'",
        "ATTACH '{path}/out.db'",
        "ATTACH ':memory:' AS m",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/etc/*')",
        "SET enable_external_access = true",
        "CREATE TABLE t AS SELECT 1",
        "DELETE FROM kernels",
        "DROP VIEW kernels",
        "EXPORT DATABASE '{path}/out'",
        "SELECT 1; COPY kernels TO '{path}/out.csv'",
        "SELECT * FROM store",
        pytest.param("PRAGMA database_list", marks=DUCKDB_2),
        "",
    ],
)
def test_everything_else_is_refused(store: Store, tmp_path: Path, sql: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="SQL: "):
        query(sql.format(path=tmp_path), store.path)
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_get_duckdbs_words_and_the_tables(store: Store) -> None:
    with pytest.raises(InputError, match=r"(?s)kernel does not exist.*Tables: kernels, blocks"):
        query("SELECT * FROM kernel", store.path)
    with pytest.raises(InputError, match="syntax error"):
        query("SELEKT 1", store.path)


def test_missing_and_empty_stores_have_nothing_to_say(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no store"):
        query("SELECT 1", tmp_path / "none")
    with pytest.raises(InputError, match="found no store"):
        query("SELECT 1", tmp_path)
    (tmp_path / "raykernel.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="empty store"):
        query("SELECT 1", tmp_path)


TABLE = pa.table(
    {
        "text": ['says "hi", twice', None, "two\nlines"],
        "score": [0.123456789, math.inf, math.nan],
        "count": [1, None, 10_000_000],
        "groups": [["a", "b"], [], None],
        "created": pa.array([datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)] * 3),
    }
)


def test_csv_is_read_back_by_any_reader() -> None:
    rows = list(csv.reader(io.StringIO(format_table(TABLE, Format.csv), newline="")))
    assert rows[0] == TABLE.column_names
    assert rows[1][:4] == ['says "hi", twice', "0.123456789", "1", '["a", "b"]']
    assert rows[2][:4] == ["", "inf", "", "[]"]
    assert rows[3][0] == "two\nlines"


def test_json_is_a_list_of_objects() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    rows = json.loads(format_table(TABLE, Format.json), parse_constant=refuse)
    assert [entry["score"] for entry in rows] == [0.123456789, "inf", None]
    assert rows[0]["groups"] == ["a", "b"]
    assert rows[0]["created"] == "2026-01-02T03:04:05+00:00"


def test_table_is_aligned_text() -> None:
    lines = format_table(TABLE.select(["score", "count", "groups"])).splitlines()
    assert lines[0].split() == ["score", "count", "groups"]
    assert lines[1].split(maxsplit=2) == ["0.1235", "1", '["a", "b"]']
    assert not any(line.endswith(" ") for line in lines)
    assert format_table(TABLE.slice(0, 0)).split() == TABLE.column_names
