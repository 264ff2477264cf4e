"""The commands that run nothing and take options: what they are given, and what they print."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raykernel.errors import InputError
from raykernel.location import StorePath

if TYPE_CHECKING:
    import pyarrow as pa

    from raykernel.store.format import Format


def version() -> str:
    """Version of raykernel, as installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("raykernel")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def store_option(parser: argparse.ArgumentParser) -> None:
    """Add `--store`, by default the configured path."""
    parser.add_argument(
        "--store",
        metavar="PATH",
        default=None,
        help="folder of the store, or s3://BUCKET/NAME (default: the configured store.path)",
    )


def store_path(given: str | None) -> str:
    """The store that an option names, or the configured one."""
    if given is not None:
        return given
    from omegaconf import OmegaConf

    from raykernel.compose import conf_dir

    return str(OmegaConf.load(conf_dir() / "store" / "local.yaml").path)


# ---------------------------------------------------------------- query


def query_parser() -> argparse.ArgumentParser:
    """Options of `raykernel query`."""
    from raykernel.store.named import QUERIES

    named = [
        textwrap.fill(
            f"  {query.usage(name):<25} {query.about}",
            100,
            subsequent_indent=" " * 28,
        )
        for name, query in QUERIES.items()
    ]
    parser = argparse.ArgumentParser(
        prog="raykernel query",
        description="SQL over the store: reads its tables, writes nothing, sees no other file.",
        epilog="named queries:\n" + "\n".join(named),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "question", nargs="*", metavar="SQL", help='"select * from kernels", or a named query'
    )
    parser.add_argument(
        "--schema",
        nargs="?",
        const="",
        metavar="TABLE",
        help="print the columns of a table, or of all, with types and meanings",
    )
    parser.add_argument(
        "--format",
        choices=["table", "csv", "json", "parquet"],
        help="how rows are printed (default: by the ending of --output, else table)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the rows there instead")
    parser.add_argument(
        "--kernel",
        metavar="FINGERPRINT",
        help="also offer the entries of this kernel, as the table `entries`; its beginning will do",
    )
    parser.add_argument(
        "--groups",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="layer groups summed in `entries`: names or expressions (default: all)",
    )
    parser.add_argument("--kind", help="kind of kernel in `entries` (default: sgd)")
    store_option(parser)
    return parser


def tool_query(arguments: list[str]) -> int:
    """`raykernel query`.

    Returns:
        The exit code.

    Raises:
        InputError: if there is no question.
    """
    options = query_parser().parse_intermixed_args(arguments)  # overrides may follow options
    if options.schema is not None:
        print(schema_text(options.schema), end="")
        return 0
    if not options.question:
        raise InputError(
            'found no question, expected SQL, as in `raykernel query "select * from kernels"`, or '
            "the name of a query. `raykernel query --help` lists these."
        )
    write_rows(answer(options), options.format, options.output)
    return 0


def answer(options: argparse.Namespace) -> pa.Table:
    """The rows that `raykernel query` was asked for.

    Args:
        options: of `query_parser`.

    Returns:
        The rows.

    Raises:
        InputError: if there are words that belong to nothing.
    """
    from raykernel.store.blocks import open_store
    from raykernel.store.named import QUERIES, named_query
    from raykernel.store.query import query

    first, *rest = options.question
    path = store_path(options.store)
    tables = {}
    if options.kernel is not None:
        kernel = open_store(path).open(options.kernel)
        tables["entries"] = kernel.table(options.groups, kind=options.kind or "sgd")
    elif options.groups is not None or options.kind is not None:
        raise InputError("found --groups or --kind, expected --kernel FINGERPRINT beside it.")
    if first in QUERIES or " " not in first.strip():
        named = named_query(first)
        parameters = named.parameters(first, rest)
        if named.studies_in is not None:
            parameters = _studies_in(path, named.studies_in, parameters)
        if named.takes_overrides:
            parameters.append(_begun_with(path, parameters[0], rest[len(parameters) :]))
        return query(named.sql, path, parameters=parameters, tables=tables)
    if rest:
        raise InputError(
            f"found {' '.join(rest)!r} after the SQL, expected nothing. Quote the whole question."
        )
    return query(first, path, tables=tables)


def _studies_in(path: str, table: str, names: list[str]) -> list[str]:
    """The studies of a store that names stand for."""
    from raykernel.store.query import query
    from raykernel.sweep import full_name

    known = query(f"SELECT DISTINCT study FROM {table}", path)["study"].to_pylist()
    unplanned = " A search knows none before." if table == "plans" else ""
    where = f"It has no {table} in {path}.{unplanned}"
    return [full_name(name, known, where) for name in names]


def _begun_with(path: str, study: str, overrides: list[str]) -> str:
    """Overrides as the table of plans has them; none: the text that stands for all."""
    if not overrides:
        return ""
    from raykernel.space import asked
    from raykernel.store.query import query

    text = asked(overrides)
    sql = "SELECT DISTINCT asked FROM plans WHERE study = $1 ORDER BY 1"
    known = query(sql, path, parameters=[study])["asked"].to_pylist()
    if text not in known:
        listed = "".join(f"\n  {one or '(no override that decides results)'}" for one in known)
        raise InputError(
            f"{study}: found {text or 'nothing that decides results'!r}, expected what it was "
            f"begun with in {path}:{listed}\nLeave all overrides out for the runs of every one."
        )
    return text


def write_rows(rows: pa.Table, fmt: str | None, output: str | None) -> None:
    """Print rows, or write them to a file.

    Args:
        rows: what to write.
        fmt: name of a format; None: the ending of the file, else a table.
        output: the file; None: standard output.

    Raises:
        InputError: if Parquet would go to a terminal.
    """
    from raykernel.console import visible
    from raykernel.store.commit import commit
    from raykernel.store.format import format_bytes, format_table

    chosen = _format(fmt, output)
    if output is not None:
        commit(Path(output).absolute(), format_bytes(rows, chosen))
        print(f"{rows.num_rows} rows in {output}", file=sys.stderr)
    elif chosen.is_text:
        text = format_table(rows, chosen)
        print(visible(text) if sys.stdout.isatty() else text, end="")
    elif sys.stdout.isatty():
        raise InputError(
            "--format parquet: found a terminal, expected a file. Add --output FILE.parquet, or "
            "pipe it somewhere."
        )
    else:
        sys.stdout.buffer.write(format_bytes(rows, chosen))


def _format(name: str | None, output: str | None) -> Format:
    from raykernel.store.format import Format

    if name is None and output is not None:
        name = Path(output).suffix.removeprefix(".")
        if name not in Format.__members__:
            raise InputError(
                f"--output {output}: found no --format and the ending {name!r}, expected one of "
                f"{', '.join(Format.__members__)}."
            )
    return Format[name or "table"]


def schema_text(name: str) -> str:
    """Tables with their columns, types and meanings.

    Args:
        name: of one table; empty: all.

    Returns:
        The text, with a line end at its end.

    Raises:
        InputError: if there is no such table.
    """
    from raykernel.errors import nearest
    from raykernel.store.listing import ENTRIES, TABLES

    known = {**TABLES, "entries": ENTRIES}
    if name and name not in known:
        raise InputError(f"--schema: found {name!r}, expected a table; {nearest(name, known)}")
    lines = []
    for table, listing in known.items():
        if name not in ("", table):
            continue
        lines += [f"{table}: {listing.about}"]
        for column in listing.columns:
            start = f"  {column.name:<28} {_type(column.type):<10} "
            lines += textwrap.wrap(start + column.meaning, 120, subsequent_indent=" " * 42)
        lines += [""]
    return "\n".join(lines[:-1]) + "\n"


def _type(kind: pa.DataType) -> str:
    """A type in a word."""
    names = {"string": "text", "int64": "integer", "double": "number", "bool": "flag"}
    text = str(kind)
    if text.startswith("list<"):
        return names[text.removeprefix("list<").removesuffix(">").split(": ")[1]] + "s"
    return "time" if text.startswith("timestamp") else names[text]


# ---------------------------------------------------------------- the store


def compact_parser() -> argparse.ArgumentParser:
    """Options of `raykernel compact`."""
    parser = argparse.ArgumentParser(
        prog="raykernel compact",
        description="Merges the small result files of a store into one per table, so that queries "
        "are quick. Safe at any time, also beside runs; a study does it at its end.",
    )
    store_option(parser)
    return parser


def tool_compact(arguments: list[str]) -> int:
    """`raykernel compact`."""
    options = compact_parser().parse_args(arguments)
    from raykernel.console import visible
    from raykernel.store.compaction import compact

    done = compact(store_path(options.store))
    for table in done:
        print(f"{table.table}: {table.num_rows} rows in 1 file instead of {table.num_files}")
        for path in table.damaged:
            left = f"  {path}: damaged, left alone; see `raykernel verify`"
            print(visible(left), file=sys.stderr)
    if not done:
        print("Every table is compact.")
    return 0


def verify_parser() -> argparse.ArgumentParser:
    """Options of `raykernel verify`."""
    parser = argparse.ArgumentParser(
        prog="raykernel verify", description="Checks every checksum and manifest of a store."
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="remove what is bad, so that the next run recomputes it",
    )
    store_option(parser)
    return parser


def tool_verify(arguments: list[str]) -> int:
    """`raykernel verify`."""
    options = verify_parser().parse_args(arguments)
    from raykernel.console import visible
    from raykernel.store.verify import verify

    report = verify(store_path(options.store), remove=options.remove)
    print(visible(report.text()))
    return 0 if report.ok else 1


# ---------------------------------------------------------------- what there is


def report_parser() -> argparse.ArgumentParser:
    """Options of `raykernel report`."""
    parser = argparse.ArgumentParser(
        prog="raykernel report",
        description="One page of HTML, with its figures (SVG, PNG) and data (CSV) beside it.",
    )
    parser.add_argument("name", nargs="?", help="a study; default: the whole store")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default=None,
        help="folder of the page (default: raykernel-report, or raykernel-report/NAME)",
    )
    store_option(parser)
    return parser


def tool_report(arguments: list[str]) -> int:
    """`raykernel report`."""
    options = report_parser().parse_args(arguments)
    print(write_report(store_path(options.store), options.name, options.out))
    return 0


def write_report(store: str | StorePath, study: str | None, out: str | None = None) -> Path:
    """Write the page of a store or a study.

    Args:
        store: its folder.
        study: name; None: the whole store.
        out: folder of the page; None: below `raykernel-report`.

    Returns:
        The page.
    """
    from raykernel.report.write import report

    folder = Path(out) if out else Path("raykernel-report", *filter(None, [study]))
    return report(store, folder, study=study, made_by=f"raykernel {version()}")


def list_parser() -> argparse.ArgumentParser:
    """Options of `raykernel list`."""
    parser = argparse.ArgumentParser(
        prog="raykernel list", description="What can be chosen, with a sentence each."
    )
    parser.add_argument("what", help="tasks, models, sweeps, experiments or criteria")
    return parser


def tool_list(arguments: list[str]) -> int:
    """`raykernel list`."""
    options = list_parser().parse_args(arguments)
    from raykernel.catalog import listed
    from raykernel.console import Screen

    entries, command = listed(options.what)
    screen = Screen()
    screen.table([options.what, ""], [[name, about] for name, about in entries.items()])
    screen.out.print(f"Next: {command}", markup=False)
    return 0


def completion_parser() -> argparse.ArgumentParser:
    """Options of `raykernel completion`."""
    parser = argparse.ArgumentParser(
        prog="raykernel completion",
        description="Prints the script that completes commands, options and overrides at Tab; its "
        "first line says where it goes.",
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish", "words"])
    parser.add_argument("line", nargs="?", default="", help="of words: what is typed so far")
    return parser


TOOL_PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "query": query_parser,
    "compact": compact_parser,
    "verify": verify_parser,
    "report": report_parser,
    "list": list_parser,
    "completion": completion_parser,
}
"""Of these commands, for completion."""
