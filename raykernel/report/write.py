"""`raykernel report`: from a store, or a study's part of it, to a folder with a page.

The page is written last, and every file by rename, so that a page that is there is whole and has
its figures and data beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa

from raykernel.choice_table import ChoiceTable
from raykernel.console import counted
from raykernel.convergence import ConvergenceTable
from raykernel.lambda_table import LambdaTable
from raykernel.report.chart import Chart, listed
from raykernel.report.correlations import choices_chart, convergence_chart
from raykernel.report.costs import cost_charts
from raykernel.report.evidence import Evidence, is_papers_setting, of_study, read_evidence, runs_of
from raykernel.report.ink import to_png, to_svg
from raykernel.report.kernels import kernel_charts
from raykernel.report.methods import linearized_chart, methods_chart
from raykernel.report.page import Page, render
from raykernel.report.paths import lambda_charts
from raykernel.report.tables import PageTable, sheet_tables, store_tables
from raykernel.store.blocks import open_store
from raykernel.store.commit import commit, make_folder
from raykernel.store.format import Format, format_table
from raykernel.study import Row, Study
from raykernel.sweep import load_study

PAGE = "index.html"
_RESULTS = {
    "kernels": ("kernel regression", "count(*)"),
    "trials": ("fine-tuning run", "count(*)"),
    "behavior": ("verdict", "count(*)"),
    "spectra": ("decomposed kernel", "count(distinct (fingerprint, kind))"),
    "selections": ("ranking of layers", "count(distinct (fingerprint, kind, settings, ridge))"),
}
"""What a table holds, and how to count it."""


def report(store: str | Path, out: Path, *, study: str | None = None, made_by: str) -> Path:
    """Write a report.

    Args:
        store: folder of the store.
        out: folder of the report, made if it is new.
        study: name of a study; None: of the whole store.
        made_by: name and version of the program.

    Returns:
        The page.
    """
    chosen = None if study is None else load_study(study)
    evidence = read_evidence(open_store(store))
    make_folder(out)  # before figures are drawn: a folder that cannot be written to is said first
    page = (
        _store_page(evidence, made_by) if chosen is None else _study_page(evidence, chosen, made_by)
    )
    for chart in page.charts:
        commit(out / f"{chart.name}.svg", to_svg(chart))
        commit(out / f"{chart.name}.png", to_png(chart))
        commit(out / f"{chart.name}.csv", _csv(chart.data))
    for table in page.tables:
        commit(out / f"table-{table.name}.csv", _csv(table.data))
    commit(out / PAGE, render(page).encode())
    return out / PAGE


def _csv(data: pa.Table) -> bytes:
    return format_table(data, Format.csv).encode()


def all_charts(evidence: Evidence) -> list[Chart]:
    """Every figure that there are data for, in the order of the page.

    Args:
        evidence: of a store or a study.

    Returns:
        The figures.
    """
    makers = (methods_chart, linearized_chart, convergence_chart)
    tuned = [chart for make in makers if (chart := make(evidence)) is not None]
    return [
        *kernel_charts(evidence),
        *tuned,
        *lambda_charts(evidence),
        *cost_charts(evidence),
    ]


def _store_page(evidence: Evidence, made_by: str) -> Page:
    charts, tables = all_charts(evidence), store_tables(evidence)
    counts = [
        counted(evidence.rows(f"select {count} as count from {name}")[0]["count"], thing)
        for name, (thing, count) in _RESULTS.items()
        if evidence.has(name)
    ]
    findings = {chart.name: chart.finding for chart in charts}
    order = ("kernel-and-finetuning", "lambda-path", "kappa-and-training", "pareto", "eigenvalues")
    first = next((findings[name] for name in order if name in findings), "")
    return _page(
        f"raykernel · {evidence.store.path.name}",
        "What has been found so far?",
        f"{listed(counts)}. {first}".strip(),
        evidence, charts, tables, made_by,
    )  # fmt: skip


def _study_page(evidence: Evidence, study: Study, made_by: str) -> Page:
    own, rows = of_study(evidence, study)
    sheets = study.table(rows, compare=is_papers_setting(runs_of(evidence, study), study))
    made = f"rows of the study {study.name} in tables {', '.join(sorted(own.tables))}, by its table"
    charts = [
        replace(chart, made=f"{chart.made}\n-- of these, the rows of the study {study.name}")
        for chart in all_charts(own)
    ]
    if isinstance(study.table, ChoiceTable) and (own_chart := choices_chart(study.table, rows)):
        charts = [own_chart, *charts]
    tables = sheet_tables(sheets, made)
    # The figure that answers the question comes first, below its sentence.
    lead = next((c for name in _leads(study) for c in charts if c.name == name), None)
    answer = " ".join(table.note for table in tables).strip() or f"See {tables[0].title}."
    if lead is not None:
        answer = lead.finding
        charts = [replace(lead, finding=""), *(chart for chart in charts if chart is not lead)]
    return _page(
        f"raykernel · {study.name}",
        study.question,
        answer,
        own, charts, tables, made_by,
    )  # fmt: skip


def _page(
    title: str,
    question: str,
    answer: str,
    evidence: Evidence,
    charts: Sequence[Chart],
    tables: Sequence[PageTable],
    made_by: str,
) -> Page:
    facts = _facts(evidence)
    now = datetime.now(timezone.utc)
    return Page(title, question, answer, facts, charts, tables, made_by, now)


def _leads(study: Study) -> Sequence[str]:
    """Names of the figures that answer a study's question, the best first."""
    if isinstance(study.table, LambdaTable):
        return ["lambda-path"]
    if isinstance(study.table, ConvergenceTable | ChoiceTable):
        return ["kappa-and-training"]
    return ["kernel-and-finetuning", "linearized"]


def _facts(evidence: Evidence) -> list[tuple[str, str]]:
    """Tasks, models, seeds, sizes and dates of what is reported."""
    tables = [name for name in (*_RESULTS, "twins") if evidence.has(name)]
    parts = [f"select task, model, k, seed, created from {name}" for name in tables]
    rows = evidence.rows(" union all ".join(parts)) if parts else []
    if not rows:
        return []
    days = sorted({row["created"].strftime("%Y-%m-%d") for row in rows})
    facts = [
        ("Task", _values(rows, "task")),
        ("Model", _values(rows, "model")),
        ("Examples per label", _values(rows, "k")),
        ("Seeds", _values(rows, "seed")),
        ("Computed", days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"),
    ]
    return [(name, value) for name, value in facts if value]


def _values(rows: Sequence[Row], column: str) -> str:
    values = sorted({row[column] for row in rows if row[column] is not None})
    texts = [str(value) for value in values]
    return ", ".join(texts[:6]) + (f" and {len(texts) - 6} more" if len(texts) > 6 else "")
