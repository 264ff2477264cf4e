"""The commands. Exit code 0: done, 1: something failed while running, 2: the input is wrong.

2 is also that of a store that is full or cannot be written to; 130 and 143 are those of a command
that Ctrl-C or SIGTERM ended.

Commands that run something take Hydra overrides (compose.py); the others take options.
"""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raykernel.errors import InputError, RaykernelError, nearest, storage_full
from raykernel.interruption import interruptible
from raykernel.terms import Command
from raykernel.tools import (
    completion_parser,
    tool_compact,
    tool_list,
    tool_query,
    tool_report,
    tool_verify,
    version,
    write_report,
)

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
    "show": "the composed configuration, what it names and where its data lie; computes nothing",
}
"""The commands that take Hydra overrides, in the order of use."""


_HELP = {"-h", "--help"}


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
  query     SQL over the result store: best, cost and others by name, --schema
  compact   merges result files, so that queries are quick; studies do it themselves
  verify    checks every checksum and manifest of a store
  report    one page of HTML with figures: of a study, or of the whole store

what there is:
  list      tasks, models, sweeps, experiments or criteria
  completion
            bash, zsh or fish: the script that completes all of this at Tab

start here:
  raykernel sweep quickstart
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
    with interruptible(lasts=argv is None) as interruption:
        try:
            return dispatch(command, rest)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except BaseException as error:
            # What was interrupted may have made something else of it, such as an ImportError.
            if interruption.code is not None:
                print(interrupted_text(command, arguments), file=sys.stderr)
                return interruption.code
            shown = storage_full(error) or error
            if not isinstance(shown, RaykernelError):
                raise
            from raykernel.console import visible

            print(f"Error: {visible(str(shown))}", file=sys.stderr)
            return shown.exit_code


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


def interrupted_text(command: str, arguments: Sequence[str]) -> str:
    """What to say of a command that was interrupted.

    Args:
        command: its name.
        arguments: the command line.

    Returns:
        A line; of a command that keeps what it has finished, also the one that goes on.
    """
    if command not in {*(one.value for one in Command), "sweep"}:
        return "Interrupted."
    again = shlex.join(["raykernel", *arguments])
    return f"Interrupted. What is finished is kept; to go on:\n  {again}"


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

    if not _HELP.isdisjoint(arguments):
        show_help(command, arguments)
        return 0
    runs = compose_runs(command, arguments)
    if not runs:  # `--cfg job` has printed what it composed
        return 0
    if len(runs) == 1:
        run_one(command, runs[0], Screen())
        return 0
    screen = SharedScreen()
    if command in {one.value for one in Command}:
        from raykernel.conduct import run_many

        return run_many(Command(command), runs, screen)
    for number, run in enumerate(runs, start=1):
        screen.say(f"\n[{number}/{len(runs)}] {' '.join(run.overrides)}")
        run_one(command, run, screen)
    return 0


def show_help(command: str, arguments: list[str]) -> None:
    """Print what a command does and can be given, with the values of a command line.

    Args:
        command: a key of `ABOUT`.
        arguments: Hydra overrides; wrong or incomplete ones are left out of account.
    """
    from raykernel.compose import compose_runs
    from raykernel.helptext import help_text

    overrides = [each for each in arguments if not each.startswith("-")]
    try:
        (run, *_) = compose_runs(command, overrides)
    except InputError:
        (run,) = compose_runs(command, [])
    print(help_text(command, ABOUT[command], run.config), end="")


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
    elif command == "show":
        from raykernel.shown import show_config

        show_config(run.config, screen)
    else:
        from raykernel.commands import execute, show

        show(Command(command), execute(Command(command), run, screen), screen)


def tool_sweep(arguments: list[str]) -> int:
    """`raykernel sweep`."""
    from raykernel.console import SharedScreen
    from raykernel.sweep import sweep

    return sweep(arguments, SharedScreen(), write_report)


def tool_completion(arguments: list[str]) -> int:
    """`raykernel completion`."""
    options = completion_parser().parse_args(arguments)
    from raykernel.completion import SCRIPTS, candidates

    if options.shell == "words":
        print("\n".join(candidates(options.line, list(ABOUT), list(TOOLS))))
    else:
        print(SCRIPTS[options.shell], end="")
    return 0


TOOLS: dict[str, Callable[[list[str]], int]] = {
    "sweep": tool_sweep,
    "query": tool_query,
    "compact": tool_compact,
    "verify": tool_verify,
    "report": tool_report,
    "list": tool_list,
    "completion": tool_completion,
}
