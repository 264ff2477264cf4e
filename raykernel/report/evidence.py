"""What a report is of: the result tables of a store, or those rows of them that a study made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from raykernel.commands import read_rows
from raykernel.errors import InputError
from raykernel.space import keeps_setting, make_plan
from raykernel.store.blocks import Store
from raykernel.store.results import to_json
from raykernel.store.tables import TABLES
from raykernel.study import Row, Study

_BY_TRIAL = ("trials", "curves", "bounds")
"""Tables that belong to the rows of others, by their trial."""


@dataclass(frozen=True)
class Evidence:
    """Result tables, as the report sees them."""

    store: Store
    tables: Mapping[str, pa.Table]

    def has(self, table: str) -> bool:
        """Whether a table is there and has rows."""
        return table in self.tables and self.tables[table].num_rows > 0

    def ask(self, sql: str) -> pa.Table:
        """The answer to a question over the tables, as `raykernel query` would give it.

        Args:
            sql: a SELECT of the report's own.

        Returns:
            The rows.
        """
        with duckdb.connect(":memory:") as connection:
            for name, table in self.tables.items():
                connection.register(name, table)
            return connection.sql(sql).to_arrow_table()

    def rows(self, sql: str) -> list[Row]:
        """The same, value by column."""
        rows: list[Row] = self.ask(sql).to_pylist()
        return rows


def read_evidence(store: Store) -> Evidence:
    """All result tables of a store.

    Args:
        store: an open store.

    Returns:
        Its tables.

    Raises:
        InputError: if none of them has rows.
    """
    found = Evidence(store, {name: store.results(name) for name in TABLES})
    if not any(found.has(name) for name in TABLES if name != "plans"):
        raise InputError(
            f"{store.path}: found no results, expected some to report. Run `raykernel kernel "
            "experiment=quickstart` or a study (`raykernel sweep`) first."
        )
    return found


# ---------------------------------------------------------------- the rows of a study


def of_study(evidence: Evidence, study: Study) -> tuple[Evidence, list[Row]]:
    """What the runs of a study have found.

    Args:
        evidence: of the whole store.
        study: as its file has it.

    Returns:
        The tables with the study's rows alone, and these rows with `arm` beside, as its table
        takes them.

    Raises:
        InputError: if there are none.
    """
    rows: list[Row] = []
    kept: dict[str, set[str]] = {}
    for run in runs_of(evidence, study):
        keys = [(table, key) for table, key in json.loads(run["results"] or "[]")]
        rows += [{**row, "arm": run["arm"]} for row in read_rows(evidence.store, keys) or []]
        for table, key in keys:
            kept.setdefault(table, set()).add(_name(table, key))
    if not rows:
        raise InputError(
            f"{evidence.store.path}: found no results of the study {study.name}, expected some. "
            f"Run `raykernel sweep {study.name}` with this store first."
        )
    tables = {
        table: evidence.tables[table].filter(
            pa.array([_name(table, row) in own for row in evidence.tables[table].to_pylist()])
        )
        for table, own in kept.items()
    }
    trials = {row["trial"] for row in rows if "trial" in row}
    for name in _BY_TRIAL:
        if trials and name not in tables:
            tables[name] = _among(evidence.tables[name], "trial", trials)
    tables["runs"] = _among(evidence.tables["runs"], "study", {study.name})
    return replace(evidence, tables=tables), rows


def runs_of(evidence: Evidence, study: Study) -> list[Row]:
    """Rows of the table `runs` that are of a study, the oldest first."""
    runs = evidence.rows("select * from runs order by created, run") if evidence.has("runs") else []
    return [run for run in runs if run["study"] == study.name]


def _name(table: str, row: Mapping[str, Any]) -> str:
    """The key of a row as text."""
    return to_json([row[name] for name in TABLES[table].key])


def is_papers_setting(runs: Sequence[Row], study: Study) -> bool:
    """Whether a study's numbers may stand beside the paper's, as in `raykernel sweep`.

    Args:
        runs: of `runs_of`.
        study: the study.

    Returns:
        Whether every run has all of the base, and beside it nothing but the study's own values
        and keys that do not matter.
    """
    plan = make_plan(study, [])
    settings = {f"{key}={value}" for arm in study.arms for key, value in arm.settings.items()}
    axes = [axis for own in plan.own.values() for axis in own.values()]
    known = {*plan.fixed.values(), *settings, *(text for axis in axes for text in axis.overrides)}
    return all(
        plan.fixed.keys() <= given.keys()
        and all(
            text in known or key in study.space or keeps_setting(key) for key, text in given.items()
        )
        for given in ({text.split("=", 1)[0]: text for text in run["overrides"]} for run in runs)
    )


def _among(table: pa.Table, column: str, values: set[Any]) -> pa.Table:
    return table.filter(pc.is_in(table[column], value_set=pa.array(sorted(values), pa.string())))
