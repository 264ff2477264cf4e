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
import xxhash

import raykernel
from raykernel.errors import BlockCorruptError, InputError
from raykernel.store.blocks import Store, open_store
from raykernel.store.compaction import compact
from raykernel.store.format import Format, format_bytes, format_table
from raykernel.store.listing import ENTRIES, TABLES
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
    return full_store(tmp_path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One that is only read."""
    return full_store(tmp_path_factory.mktemp("asked"))


def full_store(tmp_path: Path) -> Store:
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
    store.write_result("runs", {"study": "s", "run": "r", "status": "ok", "results": "[]"})
    store.write_result("plans", {"study": "s", "asked": "", "arm": "a", "run": "r"})
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
    (path,) = store.path.glob("results/kernels/*.arrow")
    older = pa.ipc.open_file(path).read_all().drop_columns(["linear_probe", "created"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, older.schema) as writer:
        writer.write_table(older)
    content = sink.getvalue().to_pybytes()
    name = f"{0:016x}-{0:024x}-{xxhash.xxh3_64_hexdigest(content)}.arrow"
    path.with_name(name).write_bytes(content)
    for _ in range(2):
        assert store.results("kernels")["created"].null_count == 1
        compact(store.path)


def test_wrong_rows_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="did you mean 'ridge'"):
        store.write_result("kernels", row("f", ridg=1.0))
    with pytest.raises(ValueError, match="found no solver"):
        store.write_result("kernels", {"fingerprint": "f", "kind": "sgd"})
    with pytest.raises(InputError, match="did you mean 'kernels'"):
        store.write_result("kernel", {})


def test_a_damaged_result_is_named_and_removed(store: Store) -> None:
    path = next(store.path.glob("results/kernels/*.arrow"))
    content = bytearray(path.read_bytes())
    content[content.index(b"sst2")] ^= 1
    path.write_bytes(content)
    with pytest.raises(BlockCorruptError, match=path.name):
        store.results("kernels")
    assert verify(store.path, remove=True).ok
    assert store.results("kernels").num_rows == 0


def test_every_table_answers(asked: Store) -> None:
    for name, listing in TABLES.items():
        found = query(f"SELECT * FROM {name}", asked.path)
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
def test_every_reading_statement_works(asked: Store, sql: str) -> None:
    assert query(sql, asked.path).num_rows > 0


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
        "EXPLAIN ANALYZE COPY kernels TO '{path}/out.csv'",
        "WITH q AS (COPY kernels TO '{path}/out.csv') SELECT * FROM q",
        "PIVOT (SELECT * FROM read_csv('/etc/passwd')) ON x",
        "DESCRIBE SELECT * FROM read_json('/etc/passwd')",
        "SELECT * FROM read_parquet('{path}/**/*.parquet')",
        "SELECT * FROM parquet_metadata('{path}/**/*.parquet')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM query('FROM read_csv(''/etc/passwd'')')",
        "SELECT * FROM 'https://example.com/x.parquet'",
        "SELECT * FROM duckdb_secrets()",
        "SELECT getenv('HOME')",
        "INSTALL '{path}/x.duckdb_extension'",
        "FORCE INSTALL httpfs FROM community",
        "UPDATE EXTENSIONS",
        "ATTACH '{path}/out.db' (READ_ONLY)",
        "IMPORT DATABASE '{path}'",
        "RESET enable_external_access",
        "SET lock_configuration = false",
        "PRAGMA enable_profiling",
        "CALL enable_logging()",
        "CREATE SECRET s (TYPE s3)",
        "CREATE MACRO m() AS 1",
        "INSERT INTO kernels SELECT * FROM kernels",
        "UPDATE kernels SET k = 1",
        "PREPARE p AS SELECT 1",
        "CHECKPOINT",
        "SELECT 1; SELECT 2",
        "SELECT 1; ATTACH ':memory:' AS m",
    ],
)
def test_everything_else_is_refused(asked: Store, sql: str) -> None:
    before = sorted(asked.path.parent.rglob("*"))
    with pytest.raises(InputError, match="SQL: "):
        query(sql.format(path=asked.path.parent), asked.path)
    assert sorted(asked.path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("COPY kernels TO 'out.csv'", "found COPY, expected one SELECT"),
        ("SELECT 1; SELECT 2", "found SELECT, SELECT, expected one SELECT"),
        ("SELECT * FROM read_csv('/etc/passwd')", "reads the tables of its store and nothing else"),
        ("SELECT * FROM '/etc/passwd.parquet'", "reads the tables of its store and nothing else"),
    ],
)
def test_a_refusal_says_what_a_query_may_do(asked: Store, sql: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        query(sql, asked.path)


def test_a_large_answer_is_not_spilled_to_the_working_folder(asked: Store) -> None:
    (found,) = query("SELECT current_setting('temp_directory') AS folder", asked.path).to_pylist()
    assert found["folder"] == ""


def test_parameters_and_further_tables_are_part_of_a_question(asked: Store) -> None:
    more = pa.table({"task": ["sst2", "mr"], "year": [2013, 2005]})
    sql = "SELECT year FROM kernels JOIN more USING (task) WHERE kind = $1"
    found = query(sql, asked.path, parameters=["sgd"], tables={"more": more})
    assert found.to_pylist() == [{"year": 2013}]
    assert query(sql, asked.path, parameters=["it's"], tables={"more": more}).num_rows == 0


def test_raykernel_query_asks_the_configured_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYKERNEL_STORE", str(store.path))
    assert raykernel.query("SELECT k FROM kernels").to_pylist() == [{"k": 16}]


@pytest.mark.parametrize("name", [*TABLES, "entries"])
def test_every_column_has_a_meaning(name: str) -> None:
    listing = {**TABLES, "entries": ENTRIES}[name]
    assert listing.about.endswith(".")
    names = [column.name for column in listing.columns]
    assert len(names) == len(set(names))
    for column in listing.columns:
        assert column.meaning.endswith("."), column.name
        assert len(column.meaning.split()) >= 2, column.name


def test_keys_and_orders_are_columns() -> None:
    for name, table in RESULT_TABLES.items():
        assert {*table.key, *table.order} <= set(table.schema.names), name


def test_mistakes_get_duckdbs_words_and_the_tables(asked: Store) -> None:
    with pytest.raises(InputError, match=r"(?s)kernel does not exist.*Tables: kernels, blocks"):
        query("SELECT * FROM kernel", asked.path)
    with pytest.raises(InputError, match="syntax error"):
        query("SELEKT 1", asked.path)


def test_missing_and_empty_stores_have_nothing_to_say(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no store"):
        query("SELECT 1", tmp_path / "none")
    with pytest.raises(InputError, match="found no store"):
        query("SELECT 1", tmp_path)
    Store(tmp_path).create()
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


def test_parquet_keeps_every_type() -> None:
    found = pq.read_table(pa.BufferReader(format_bytes(TABLE, Format.parquet)))
    assert found.schema.equals(TABLE.schema)
    assert found.drop_columns("score").equals(TABLE.drop_columns("score"))  # NaN is not NaN
    assert format_bytes(TABLE, Format.csv).decode() == format_table(TABLE, Format.csv)


def test_table_is_aligned_text() -> None:
    lines = format_table(TABLE.select(["score", "count", "groups"])).splitlines()
    assert lines[0].split() == ["score", "count", "groups"]
    assert lines[1].split(maxsplit=2) == ["0.1235", "1", '["a", "b"]']
    assert not any(line.endswith(" ") for line in lines)
    assert format_table(TABLE.slice(0, 0)).split() == TABLE.column_names


@pytest.mark.parametrize("fmt", [Format.table, Format.json, Format.csv])
def test_a_time_that_python_does_not_know_is_shown(asked: Store, fmt: Format) -> None:
    rows = query(
        "SELECT timestamp '200000-01-01' AS late, 1 AS one, DATE '12026-01-01' AS day", asked.path
    )
    assert "out of range" in format_table(rows, fmt)
