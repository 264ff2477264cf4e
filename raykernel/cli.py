"""The commands. Exit code 0: done, 1: something failed while running, 2: the input is wrong.

Commands that run something take Hydra overrides (compose.py); the others take options.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raykernel.errors import InputError, RaykernelError, nearest
from raykernel.terms import Command

if TYPE_CHECKING:
    from raykernel.compose import ComposedRun
    from raykernel.console import Screen

ABOUT = {
    "plan": "what a run would do: examples, blocks, FLOPs, memory; computes nothing",
    "doctor": "checks environment and problem before a run",
    "kernel": "completes the kernel blocks, solves kernel regression, predicts test, prints and "
    "stores the results",
    "spectrum": "completes the kernel blocks of train, prints and stores condition numbers and "
    "ranks of every layer",
    "select": "ranks choices of layers by their kernels before any training, prints and stores "
    "them, and writes the best as an adapter_config.json for PEFT",
    "finetune": "fine-tunes the same problem, keeps the parameters that are best on dev, prints "
    "and stores the results; training.twin=true compares with the linear model",
    "behavior": "fine-tunes, and says whether that behaves like its kernel",
}
"""The commands that take Hydra overrides, in the order of use."""


def _listed(name: str) -> str:
    start = f"  {name:<10}"
    return textwrap.fill(ABOUT[name], 100, initial_indent=start, subsequent_indent=" " * 12)


_COMMANDS = "\n".join(map(_listed, ABOUT))
USAGE = f"""\
usage: raykernel COMMAND [arguments]

Neural tangent kernels of language models, per layer.

commands that run a configuration (arguments are Hydra overrides; try --help, --cfg job, -m):
{_COMMANDS}

many runs, one table:
  sweep     runs a study, such as a table of the paper; alone it lists all

commands over a store (try --help):
  query     SQL over the result store
  verify    checks every checksum and manifest of a store
  report    one page of HTML with figures: of a study, or of the whole store

start here:
  raykernel kernel experiment=quickstart
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; default those of the process.

    Returns:
        The exit code; an InputError or RunError is printed, not raised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] in {"-V", "--version"}:
        print(f"raykernel {version()}")
        return 0
    command, rest = arguments[0], arguments[1:]
    # A job that a scheduler ends with SIGTERM unwinds like one that a person interrupts.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return dispatch(command, rest)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept: the same command goes on.", file=sys.stderr)
        return 130
    except RaykernelError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code


def dispatch(command: str, arguments: list[str]) -> int:
    """Call a command by name.

    Args:
        command: its name.
        arguments: what follows it.

    Returns:
        The exit code.

    Raises:
        InputError: if there is no such command.
    """
    if command in ABOUT:
        return run_all(command, arguments)
    if command in TOOLS:
        return TOOLS[command](arguments)
    raise InputError(f"Unknown command {command!r}: {nearest(command, [*ABOUT, *TOOLS])}")


def interrupt(signum: int, _frame: object) -> None:
    """Turn a signal into KeyboardInterrupt."""
    del signum
    raise KeyboardInterrupt


def version() -> str:
    """Version of raykernel, as installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("raykernel")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def run_all(command: str, arguments: list[str]) -> int:
    """Compose the configurations of a command line and run each; one failure stops no other.

    Args:
        command: a key of `ABOUT`.
        arguments: Hydra overrides and flags.

    Returns:
        0 if all went well, 1 if some of several failed.

    Raises:
        RaykernelError: from the only run.
    """
    from raykernel.compose import compose_runs
    from raykernel.console import Screen, SharedScreen

    if not {"-h", "--help"}.isdisjoint(arguments):
        print(f"raykernel {command}: {ABOUT[command]}\n")  # and Hydra prints the rest
    runs = compose_runs(command, arguments)
    if len(runs) == 1:
        run_one(command, runs[0], Screen())
        return 0
    screen = SharedScreen()
    if command in {one.value for one in Command}:
        from raykernel.sweep import run_many

        return run_many(Command(command), runs, screen)
    for number, run in enumerate(runs, start=1):
        screen.say(f"\n[{number}/{len(runs)}] {' '.join(run.overrides)}")
        run_one(command, run, screen)
    return 0


def run_one(command: str, run: ComposedRun, screen: Screen) -> None:
    """Run a command and print what it found.

    Args:
        command: a key of `ABOUT`.
        run: its configuration.
        screen: where to print.
    """
    if command == "plan":
        from raykernel.plan import make_plan, show_plan

        show_plan(make_plan(run.config, screen), screen)
    elif command == "doctor":
        from raykernel.doctor import examine

        examine(run.config, screen)
    else:
        from raykernel.commands import execute, show

        show(Command(command), execute(Command(command), run, screen), screen)


def store_option(parser: argparse.ArgumentParser) -> None:
    """Add `--store`, by default the configured path."""
    parser.add_argument(
        "--store",
        metavar="PATH",
        default=None,
        help="folder of the store (default: the configured store.path)",
    )


def store_path(given: str | None) -> str:
    """The store that an option names, or the configured one."""
    if given is not None:
        return given
    from omegaconf import OmegaConf

    from raykernel.compose import conf_dir

    return str(OmegaConf.load(conf_dir() / "store" / "local.yaml").path)


def tool_query(arguments: list[str]) -> int:
    """`raykernel query`."""
    parser = argparse.ArgumentParser(prog="raykernel query", description="SQL over the store.")
    parser.add_argument("sql", help='for example "select * from kernels"')
    parser.add_argument("--format", choices=["table", "csv", "json"], default="table")
    store_option(parser)
    options = parser.parse_args(arguments)
    from raykernel.store.format import Format, format_table
    from raykernel.store.query import query

    print(format_table(query(store_path(options.store), options.sql), Format[options.format]))
    return 0


def tool_sweep(arguments: list[str]) -> int:
    """`raykernel sweep`."""
    from raykernel.console import SharedScreen
    from raykernel.sweep import sweep

    return sweep(arguments, SharedScreen())


def tool_verify(arguments: list[str]) -> int:
    """`raykernel verify`."""
    parser = argparse.ArgumentParser(
        prog="raykernel verify", description="Checks every checksum and manifest of a store."
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="remove what is bad, so that the next run recomputes it",
    )
    store_option(parser)
    options = parser.parse_args(arguments)
    from raykernel.store.verify import verify

    report = verify(store_path(options.store), remove=options.remove)
    print(report.text())
    return 0 if report.ok else 1


def tool_report(arguments: list[str]) -> int:
    """`raykernel report`."""
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
    options = parser.parse_args(arguments)
    from raykernel.report.write import report

    out = options.out or "/".join(filter(None, ["raykernel-report", options.name]))
    page = report(
        store_path(options.store),
        Path(out),
        study=options.name,
        made_by=f"raykernel {version()}",
    )
    print(page)
    return 0


TOOLS: dict[str, Callable[[list[str]], int]] = {
    "sweep": tool_sweep,
    "query": tool_query,
    "verify": tool_verify,
    "report": tool_report,
}
