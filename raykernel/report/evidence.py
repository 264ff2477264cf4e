"""What a report is of: the result tables of a store, or those rows of them that a study made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from raykernel.errors import InputError
from raykernel.space import values_of
from raykernel.store.blocks import Store
from raykernel.store.results import TABLES
from raykernel.study import Arm, Row, Study
from raykernel.terms import Command

TABLE_OF = {
    Command.kernel: "kernels",
    Command.spectrum: "spectra",
    Command.finetune: "trials",
    Command.behavior: "behavior",
}
"""Where a command of a study leaves its rows; `twins` of one with `training.twin=true`."""
_FREE = ("task", "prompt", "model", "store", "compute", "experiment")
"""Keys and groups that a command line may set beside those of its study."""
_BY_TRIAL = ("curves", "bounds")
"""Tables without a command line of their own."""


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
    if not any(map(found.has, TABLES)):
        raise InputError(
            f"{store.path}: found no results, expected some to report. Run `raykernel kernel "
            "experiment=quickstart` or a study (`raykernel sweep`) first."
        )
    return found


# ---------------------------------------------------------------- the rows of a study


def of_study(evidence: Evidence, study: Study) -> tuple[Evidence, list[Row]]:
    """The rows of a study, known by the command lines that made them.

    A row is of an arm if its command line sets everything that makes the arm, every key that the
    study gives or varies, and no foreign one.

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
    kept: dict[str, set[int]] = {}
    for arm in study.arms:
        table = _table_of(study, arm)
        for number, row in enumerate(evidence.tables[table].to_pylist()):
            if _is_of(row["overrides"] or [], study, arm):
                kept.setdefault(table, set()).add(number)
                rows.append({**row, "arm": arm.name})
    if not rows:
        raise InputError(
            f"{evidence.store.path}: found no results of the study {study.name}, expected some. "
            f"Run `raykernel sweep {study.name}` with this store first."
        )
    tables = {name: evidence.tables[name].take(sorted(own)) for name, own in kept.items()}
    trials = {row["trial"] for row in rows if "trial" in row}
    for name in ("trials", *_BY_TRIAL):
        if trials and name not in tables:
            tables[name] = _among(evidence.tables[name], "trial", trials)
    if "runs" in evidence.tables:
        tables["runs"] = _among(evidence.tables["runs"], "study", {study.name})
    own = replace(evidence, tables=tables)
    return own, _with_curves(rows, own)


def _table_of(study: Study, arm: Arm) -> str:
    settings = {**study.base, **arm.settings}
    twin = settings.get("training.twin") == "true"
    return "twins" if arm.command is Command.finetune and twin else TABLE_OF[arm.command]


def _is_of(overrides: Sequence[str], study: Study, arm: Arm) -> bool:
    """Whether a command line is one of an arm's."""
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    known = {*study.base, *study.space, *study.demo, *arm.settings}
    known |= {key for one in study.arms for key in (*one.space, *one.demo)}
    needed = {key for key in (*study.base, *study.space) if study.demo.get(key, "") is not None}
    settings = {f"{key}={value}" for key, value in arm.settings.items()}
    return (
        settings <= set(overrides)
        and needed <= set(given)
        and all(key in known or key.split(".")[0] in _FREE for key in given)
    )


def is_papers_setting(rows: Sequence[Row], study: Study) -> bool:
    """Whether the study's numbers may stand beside the paper's: nothing of its base is changed.

    Args:
        rows: of `of_study`.
        study: the study.

    Returns:
        Whether every command line has all of the base, and no hyperparameter beside the grids.
    """
    base = {f"{key}={value}" for key, value in study.base.items()}
    grids: dict[str, set[str]] = {}
    for arm in study.arms:
        for key, values in arm.space.items():
            grids.setdefault(key, set()).update(values_of(f"{key}={values}")[1])
    return all(
        base <= set(row["overrides"])
        and all(text in own for key, own in grids.items() for text in _settings(row, key))
        for row in rows
    )


def _settings(row: Row, key: str) -> list[str]:
    return [text for text in row["overrides"] if text.startswith(f"{key}=")]


def _among(table: pa.Table, column: str, values: set[Any]) -> pa.Table:
    return table.filter(pc.is_in(table[column], value_set=pa.array(sorted(values), pa.string())))


def _with_curves(rows: list[Row], evidence: Evidence) -> list[Row]:
    """Rows of `trials` have their evaluations beside, as in `raykernel sweep`."""
    if not evidence.has("curves"):
        return rows
    curves: dict[str, list[Row]] = {}
    for point in evidence.rows("select * from curves order by trial, step"):
        curves.setdefault(point["trial"], []).append(point)
    return [
        {**row, "curve": curves.get(row["trial"], [])} if "trial" in row else row for row in rows
    ]
