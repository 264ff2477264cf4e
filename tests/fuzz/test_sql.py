"""A query reads the tables of its store and nothing else, whatever its text is.

Functions, settings and statements are DuckDB's own lists, so that a new version's are tried, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pytest
from hypothesis import strategies as st

from raykernel.errors import InputError
from raykernel.store.blocks import Store
from raykernel.store.query import query
from tests.fuzz.readers import EFFORT, fuzz, tree
from tests.store import stores

CANARY = "canary-5d1c"
READING = ("read_", "glob", "secret", "query", "sniff")
"""In the names of functions that the quick test tries."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, and beside it files and a variable that no query may show."""
    folder = tmp_path_factory.mktemp("lab")
    stores.complete(folder / "store")
    Store(folder / "store").write_result(
        "kernels", {"fingerprint": "f", "kind": "sgd", "solver": "{}", "task": "sst2"}
    )
    (folder / "secret.csv").write_text(f"a,b\n{CANARY},1\n")
    (folder / "secret.json").write_text(f'[{{"a": "{CANARY}"}}]')
    with duckdb.connect(str(folder / "secret.db")) as connection:
        connection.execute(f"create table t as select '{CANARY}' as a")
        connection.execute(f"copy t to '{folder}/secret.parquet'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYKERNEL_CANARY", CANARY)
        patch.chdir(folder)
        yield folder


def ask(lab: Path, sql: str, parameters: Sequence[str] = ()) -> None:
    """Ask; an answer, if there is one, shows nothing from outside."""
    try:
        rows = query(sql, lab / "store", parameters=parameters)
    except InputError as error:
        shown = str(error)  # with the text of the question, which has no content of a file
    else:
        shown = repr(rows.to_pylist())
    assert CANARY not in shown, sql


def names(sql: str) -> list[str]:
    with duckdb.connect() as connection:
        return [name for (name,) in connection.execute(sql).fetchall()]


@EFFORT
def test_no_function_of_duckdb_reaches_outside(lab: Path, effort: int):
    """Every table function and pragma it lists, called with names of files."""
    kinds = "('table', 'pragma', 'table_macro')"
    listed = names(
        f"select distinct function_name from duckdb_functions() where function_type in {kinds}"
    )
    assert {"read_csv", "read_text", "glob", "duckdb_secrets", "query"} <= set(listed)
    if effort == 1:
        listed = [name for name in listed if any(word in name for word in READING)]
    files = ("secret.csv", "secret.db", "secret.json", "secret.parquet", "*")
    before = tree(lab)
    for name in sorted(listed):
        for file in files[:effort]:
            for given in (f"'{lab}/{file}'", f"['{file}']", f"'{file}', 't'")[:effort]:
                ask(lab, f'select * from "{name}"({given})')
        ask(lab, f'select * from "{name}"()')
        ask(lab, f"pragma {name}('{lab}/out.csv')")
    assert tree(lab) == before


@pytest.mark.slow
@pytest.mark.parametrize("given", ["'RAYKERNEL_CANARY'", "'secret.csv'"])
def test_no_scalar_function_of_duckdb_reads_a_file_or_a_variable(lab: Path, given: str):
    listed = names(
        "select distinct function_name from duckdb_functions() where function_type in "
        "('scalar', 'macro') and function_name similar to '[a-z_0-9]+'"
    )
    assert len(listed) > 300
    before = tree(lab)
    for name in sorted(listed):
        ask(lab, f"select {name}({given})")
    assert tree(lab) == before


@EFFORT
def test_no_setting_of_duckdb_can_be_changed(lab: Path, effort: int):
    listed = names("select name from duckdb_settings()")
    assert {"enable_external_access", "lock_configuration"} <= set(listed)
    if effort == 1:
        listed = ["enable_external_access", "lock_configuration"]
    for name in listed:
        for sql in (f"set {name} = 'true'", f"reset {name}", f"set global {name} = '{lab}/out'",
                    f"pragma {name} = 'true'"):  # fmt: skip
            with pytest.raises(InputError, match="SQL"):
                query(sql, lab / "store")


STATEMENTS = st.sampled_from(
    ["select", "copy", "attach", "detach", "install", "load", "export database", "import database",
     "create table t as", "create view v as", "create macro m() as table", "create secret",
     "insert", "insert into kernels", "update kernels set k =", "delete from kernels",
     "drop table kernels", "alter table kernels rename to x", "truncate kernels", "call", "execute",
     "prepare p as", "use", "set", "reset", "pragma", "vacuum", "checkpoint", "explain",
     "explain analyze", "begin;", "with x as (", "describe", "summarize", "show", "pivot",
     "unpivot", "values", "from", "merge into"]
)  # fmt: skip
PARTS = st.sampled_from(
    ["* from kernels", "'secret.csv'", "'secret.db'", "read_csv('secret.csv')", "to 'out.csv'",
     "from 'secret.parquet'", "httpfs", "s (type s3)", "1", "(select 1)", ")", "(", ";", "--", "/*",
     "*/", "from read_text('secret.json')", "union all", "lateral", "getenv('RAYKERNEL_CANARY')",
     "query('from read_csv(''secret.csv'')')", "query_table('secret.csv')", "'out.db' as o", "as",
     "(format csv)", "returning *", "on true", "$1", "?", "''", '"', "\x00", "é", "from kernels",
     ","]
)  # fmt: skip


@EFFORT
def test_texts_are_answered_or_refused_and_write_nothing(lab: Path, effort: int):
    spelt = st.tuples(STATEMENTS, st.lists(PARTS, max_size=5)).map(
        lambda x: " ".join([x[0], *x[1]])
    )
    inputs = spelt | st.text(max_size=20) | st.lists(spelt, min_size=2, max_size=2).map("; ".join)
    fuzz(inputs, lambda sql: ask(lab, sql), effort=effort, folder=lab, examples=25)


@pytest.mark.parametrize("name", ["kernels", "examples"])
def test_names_of_tables_are_no_names_of_files(lab: Path, name: str):
    """A file or a Python variable of a table's name in the working folder stays unread."""
    (lab / name).write_text(f"a\n{CANARY}\n")
    try:
        ask(lab, f"select * from {name}")
        ask(lab, f"select * from '{name}'")
    finally:
        Path(lab / name).unlink()
