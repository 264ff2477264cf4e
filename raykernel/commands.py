"""The commands that leave rows in the result tables: how each runs, is shown and is found again.

    configuration → run → outcome → show | keys of its rows → rows

Modules are imported when a command runs: an inline run needs no Ray, a stored one no PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raykernel.compose import ComposedRun
from raykernel.console import Screen
from raykernel.store.blocks import Store
from raykernel.study import Row
from raykernel.terms import Command
from raykernel.training.spec import Watch

Key = tuple[str, dict[str, Any]]
"""A result table and the values of its key columns: rows of one file."""


def execute(
    command: Command, run: ComposedRun, screen: Screen, watch: Watch | None = None
) -> object:
    """Run a command; what is stored of it is not computed again.

    Args:
        command: which.
        run: its configuration.
        screen: where progress is shown.
        watch: told of every evaluation of `finetune`; what it raises ends the run.

    Returns:
        What it found, for `show` and `keys_of`.
    """
    given = run.config, run.overrides, screen
    if command is Command.kernel:
        from raykernel.pipeline import kernel

        return kernel(*given)
    if command is Command.spectrum:
        from raykernel.spectra import spectra

        return spectra(*given)
    if command is Command.select:
        from raykernel.selections import selections

        return selections(*given)
    if command is Command.behavior:
        from raykernel.behavior import behavior

        return behavior(*given)
    if run.config.training.twin:
        from raykernel.twins import run_twin

        return run_twin(*given)
    from raykernel.trials import run_trial

    return run_trial(*given, watch=watch)


def show(command: Command, outcome: Any, screen: Screen) -> None:
    """Print what a command found.

    Args:
        command: which.
        outcome: of `execute`.
        screen: where to print.
    """
    if command is Command.kernel:
        from raykernel.pipeline import show_outcome

        show_outcome(outcome, screen)
    elif command is Command.spectrum:
        from raykernel.spectrum_table import show_spectra

        show_spectra(outcome, screen)
    elif command is Command.select:
        from raykernel.selection_table import show_selections

        show_selections(outcome, screen)
    elif command is Command.behavior:
        from raykernel.behavior import show_behavior

        show_behavior(outcome, screen)
    else:
        from raykernel.trials import TrialOutcome, show_trial
        from raykernel.twins import show_twin

        (show_trial if isinstance(outcome, TrialOutcome) else show_twin)(outcome, screen)


def keys_of(command: Command, outcome: Any, run: ComposedRun) -> list[Key]:
    """Where the rows of an outcome lie.

    Args:
        command: which.
        outcome: of `execute`.
        run: its configuration.

    Returns:
        A key per file of rows: of the command kernel one per kind, of spectrum one per set of
        layers, of finetune the trial's or its twin's.
    """
    kinds = run.config.kernel.kinds
    if command is Command.kernel:
        from raykernel.pipeline import result_key

        return [("kernels", result_key(outcome.prepared, kind)) for kind in kinds]
    if command is Command.spectrum:
        from raykernel.spectra import result_rows as spectrum_rows

        return [_key("spectra", rows[0]) for rows in spectrum_rows(outcome, run.overrides)]
    if command is Command.select:
        from raykernel.selections import result_key as selection_key

        prepared, found = outcome.prepared, outcome.by_kind
        return [("selections", selection_key(prepared, one.kind)) for one in found]
    if command is Command.behavior:
        from raykernel.behavior import result_row

        return [_key("behavior", result_row(outcome, run.overrides))]
    if run.config.training.twin:
        return [_key("twins", outcome.rows[0])]
    return [_key("trials", outcome.row)]


def read_rows(store: Store, keys: Sequence[Key]) -> list[Row] | None:
    """Stored rows; a trial has those of its curve beside.

    Args:
        store: where.
        keys: of `keys_of`.

    Returns:
        The rows; None if some are gone.
    """
    found: list[Row] = []
    for table, key in keys:
        rows = store.rows(table, **key)
        if not rows:
            return None
        if table == "trials":
            rows = [{**row, "curve": store.rows("curves", trial=row["trial"])} for row in rows]
        found += rows
    return found


def _key(table: str, row: Row) -> Key:
    from raykernel.store.tables import TABLES

    return table, {name: row[name] for name in TABLES[table].key}
