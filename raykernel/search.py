"""Which hyperparameters to try next: Optuna, on a journal beside the results.

    axes → distributions → ask → choice (overrides) → runs → mean over seeds → tell

The journal is the memory of a search: every worker reads it before it asks and writes what it
found, so that there is no process whose death loses the search. A choice whose process died is
tried first by whoever goes on.
"""

from __future__ import annotations

import inspect
import logging
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from raykernel.config import SweepConfig, require
from raykernel.errors import InputError, NonFiniteError, nearest
from raykernel.journal import open_journal
from raykernel.location import StorePath
from raykernel.space import Axis, Plan
from raykernel.store.tables import TABLES
from raykernel.study import Arm, Row
from raykernel.terms import Command, Direction, Stopping

_SHORT = {"random": "RandomSampler", "tpe": "TPESampler", "nsga2": "NSGAIISampler"}
_UNUSABLE = {"BaseSampler", "BaseGASampler", "GridSampler", "PartialFixedSampler"}
"""Not samplers by themselves; grids are ours, because Optuna's does not end with ask and tell."""
_RUNS, _SLOT, _LOST = "runs", "slot", "lost"
"""Attributes of Optuna's trials: names of runs, the job that asked, and a dead process."""


_EVALUATED = ("dev", "dev_loss", "train_loss")
"""Metrics that are known while a run trains."""


@dataclass(frozen=True, slots=True)
class Search:
    """A search for the best hyperparameters of one arm in one cell."""

    journal: StorePath
    name: str
    """Of the search in the journal: the same question has the same name."""
    axes: Mapping[str, Axis]
    sampler: str
    seed: int
    metrics: Sequence[str]
    directions: Sequence[Direction]
    trials: int
    """Choices to try."""

    # ------------------------------------------------------------ asking

    def distributions(self) -> dict[str, BaseDistribution]:
        """What Optuna may choose, by key; values are the texts of overrides."""
        return {key: _distribution(axis) for key, axis in self.axes.items()}

    def overrides(self, choice: Mapping[str, Any]) -> tuple[str, ...]:
        """A choice as overrides, in the order of the axes."""
        return tuple(axis.override(choice[key]) for key, axis in self.axes.items())

    def storage(self) -> JournalStorage:
        """The journal."""
        return JournalStorage(open_journal(self.journal))

    def sampler_object(self, *, slot: int = 0) -> optuna.samplers.BaseSampler:
        """Optuna's sampler; another slot gives a random one other numbers."""
        return make_sampler(self.sampler, self.seed + slot)

    def open(self, *, slot: int = 0) -> optuna.Study:
        """Optuna's study as the journal has it.

        Args:
            slot: another number gives a random sampler other numbers.

        Returns:
            The study.
        """
        optuna.logging.set_verbosity(logging.WARNING)
        return optuna.create_study(
            storage=self.storage(),
            study_name=self.name,
            sampler=self.sampler_object(slot=slot),
            directions=["maximize" if d is Direction.max else "minimize" for d in self.directions],
            load_if_exists=True,
        )

    def resume(self, *, retry_failed: bool) -> range:
        """Take up what processes that are gone have left.

        Args:
            retry_failed: try choices again that failed.

        Returns:
            Numbers of the jobs that are left, a choice each. What was left is tried first, so that
            a number under which something new is chosen comes once, and gives what it would have
            given without an interruption.
        """
        study = self.open()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            _give_up(study, trial)
        settled = self.settled(study)
        failed = [trial for trial in settled if trial.state is TrialState.FAIL]
        for trial in failed if retry_failed else ():
            study.enqueue_trial(trial.params, skip_if_exists=False)
        count = max(0, self.trials - len(settled) + len(failed) * retry_failed)
        return range(len(settled), len(settled) + count)

    def ask(self, study: optuna.Study, slot: int) -> optuna.Trial:
        """The next choice; that of this slot whose process died, if there is one.

        Args:
            study: of `open`.
            slot: number of the job that asks.

        Returns:
            Optuna's trial.
        """
        for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if left.user_attrs.get(_SLOT) == slot:
                _give_up(study, left)
        trial = study.ask(self.distributions())
        trial.set_user_attr(_SLOT, slot)
        return trial

    # ------------------------------------------------------------ telling

    def values(self, rows: Sequence[Sequence[Row]]) -> list[float]:
        """Every metric, as the mean over the runs of a choice.

        Args:
            rows: of each run.

        Returns:
            In the order of `metrics`.

        Raises:
            InputError: if a run has no such number, or one that is not finite.
        """
        return [statistics.fmean(_value(run, metric) for run in rows) for metric in self.metrics]

    def tell(
        self, study: optuna.Study, trial: optuna.Trial, runs: Sequence[str], values: Sequence[float]
    ) -> None:
        """Write down what a choice gave.

        Args:
            study: of `open`.
            trial: of `ask`.
            runs: names of its runs.
            values: of `values`; none if a run failed.
        """
        note_runs(trial, runs)
        if values:
            study.tell(trial, list(values))
        else:
            study.tell(trial, state=TrialState.FAIL)

    def settled(self, study: optuna.Study) -> list[FrozenTrial]:
        """Choices that were tried, well or not."""
        ended = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)
        return [
            trial
            for trial in study.get_trials(deepcopy=False, states=ended)
            if _LOST not in trial.user_attrs
        ]

    def choices(self) -> list[dict[str, Any]]:
        """Every choice that was tried, value by key, oldest first."""
        tried = self.settled(self.open())
        return [{key: trial.params[key] for key in self.axes} for trial in tried]


def note_runs(trial: optuna.Trial, runs: Sequence[str]) -> None:
    """Keep the names of a choice's runs with it."""
    trial.set_user_attr(_RUNS, list(runs))


def check_settings(plan: Plan) -> None:
    """Refuse ways to choose runs that this study cannot be run with.

    Args:
        plan: what to run.

    Raises:
        InputError: if there is nothing to search, or nothing that the metrics could be read from.
    """
    settings = plan.settings()
    searched = [arm for arm in plan.study.arms if plan.is_searched(arm, settings)]
    if settings.is_grid:
        plan.count(settings)  # which refuses intervals
    elif not searched:
        raise InputError(
            f"sweep.sampler: found {settings.sampler}, expected grid: no method of "
            f"{plan.study.name} has hyperparameters of its own to choose."
        )
    else:
        make_sampler(settings.sampler, settings.seed)
    if settings.stopping is Stopping.asha:
        _check_asha(settings)
    for arm in searched:
        columns = TABLES[_table_of(plan, arm)].schema.names
        for metric in settings.metrics:
            if metric not in columns:
                raise InputError(
                    f"sweep.metrics: found {metric!r}, which no run of {arm.name!r} reports; "
                    f"{nearest(metric, columns)}"
                )


def _check_asha(settings: SweepConfig) -> None:
    """Refuse what ASHA cannot compare while runs train."""
    require(
        settings.metrics[0] in _EVALUATED,
        "sweep.metrics",
        settings.metrics,
        f"one of {', '.join(_EVALUATED)} first with sweep.stopping=asha, which reads evaluations",
    )


def _table_of(plan: Plan, arm: Arm) -> str:
    if arm.command is Command.finetune:
        return "twins" if plan.point(arm, (), ()).compose().config.training.twin else "trials"
    return {Command.kernel: "kernels", Command.spectrum: "spectra"}.get(
        arm.command, "selections" if arm.command is Command.select else "behavior"
    )


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler of Optuna by name.

    Args:
        name: random, tpe, nsga2, or the name of a class of `optuna.samplers`.
        seed: of its random numbers.

    Returns:
        The sampler.

    Raises:
        InputError: if there is none of that name, or its package is missing.
    """
    found: Any = getattr(optuna.samplers, _SHORT.get(name, name), None)
    usable = inspect.isclass(found) and "seed" in inspect.signature(found).parameters
    if not usable or name in _UNUSABLE:
        known = [one for one in dir(optuna.samplers) if one.endswith("Sampler")]
        known = [one for one in known if one not in _UNUSABLE]
        raise InputError(
            f"sweep.sampler: found {name!r}, expected grid, random, tpe, nsga2 or a sampler of "
            f"Optuna; {nearest(name, [*_SHORT, 'grid', *known])}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            made: optuna.samplers.BaseSampler = found(seed=seed)
            return made
        except ImportError as error:
            raise InputError(f"sweep.sampler={name}: {error}") from error


def _distribution(axis: Axis) -> BaseDistribution:
    if not axis.is_interval:
        return CategoricalDistribution(axis.values)
    if axis.is_int:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.is_log)
    return FloatDistribution(axis.low, axis.high, log=axis.is_log)


def _give_up(study: optuna.Study, trial: FrozenTrial) -> None:
    """Mark a choice as lost and put it first in the queue."""
    storage = study._storage  # of another process: only the storage may end its trial
    storage.set_trial_user_attr(trial._trial_id, _LOST, True)
    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    study.enqueue_trial(trial.params)


def _value(rows: Sequence[Row], metric: str) -> float:
    """That of a run's first row which has it."""
    found = [row[metric] for row in rows if row.get(metric) is not None]
    if not found:
        raise InputError(
            f"sweep.metrics: found no {metric} in the results of a run, expected a number. Choose "
            "a column that these runs fill: `raykernel query` shows them."
        )
    value = float(found[0])
    if not math.isfinite(value):
        raise NonFiniteError(f"sweep.metrics: {metric} was {value}, expected a finite number.")
    return value
