"""`raykernel show`: a configuration as it is composed, what it names, and where its data lie."""

from __future__ import annotations

from omegaconf import OmegaConf

from raykernel.config import RunConfig, fingerprint
from raykernel.console import Screen, counted
from raykernel.prepared import Prepared, prepare
from raykernel.store.blocks import Store
from raykernel.store.tables import TABLES
from raykernel.trials import trial_identity


def show_config(config: RunConfig, screen: Screen) -> None:
    """Print a configuration, its kernel, its fine-tuning run, and what of both is stored.

    Data and tokenizer are read, for their content is part of the names; nothing is computed.

    Args:
        config: the run.
        screen: where to print.
    """
    prepared = prepare(config, screen)
    screen.out.print(OmegaConf.to_yaml(OmegaConf.structured(config)), markup=False, end="")
    screen.facts(facts(prepared), title="What it is, and where its data lie")
    screen.out.print("Next: raykernel plan with the same arguments says what computing it takes.")


def facts(prepared: Prepared) -> list[tuple[str, str]]:
    """Names of a run and what is stored under them.

    Args:
        prepared: the run.

    Returns:
        Pairs of text.
    """
    store = Store(prepared.config.store.path)
    trial = trial_name(prepared)
    kernel = prepared.fingerprint
    return [
        ("store", str(store.path)),
        ("kernel", kernel),
        ("its folder", f"kernels/{kernel}"),
        ("its blocks", _blocks(prepared, store)),
        ("its results", _results(store, "fingerprint", kernel)),
        ("fine-tuning run", trial),
        ("its folder", f"trials/{trial}"),
        ("its state", _state(store, trial)),
        ("its results", _results(store, "trial", trial)),
    ]


def trial_name(prepared: Prepared) -> str:
    """Name of the fine-tuning run that the configuration describes."""
    config = prepared.config
    training = config.training.resolved(k=config.task.k, num_labels=len(prepared.data.labels))
    return fingerprint(trial_identity(prepared, training))


def _blocks(prepared: Prepared, store: Store) -> str:
    total = prepared.grid.num_cells
    known = len(prepared.grid.cells(prepared.grid.train_and_dev))
    if not store.has(prepared.identity):
        return f"none of {total}, {known} of them of train and dev"
    handle = store.open(prepared.fingerprint)
    missing = len(handle.missing(prepared.grid.train_and_dev))
    return (
        f"{total - len(handle.missing())} of {total}, {known - missing} of the {known} of train "
        "and dev"
    )


def _state(store: Store, trial: str) -> str:
    if store.rows("trials", trial=trial):
        return "ended: `raykernel finetune` prints it"
    return "begun" if store.trial(trial).checkpoint.exists() else "not begun"


def _results(store: Store, column: str, name: str) -> str:
    """Rows of the tables that are about a kernel or a run."""
    counts = {
        table: sum(row == name for row in store.results(table)[column].to_pylist())
        for table, spec in TABLES.items()
        if column in spec.key
    }
    found = [f"{counted(count, 'row')} in {table}" for table, count in counts.items() if count]
    return ", ".join(found) or "none"
