"""Runs of a study as trials of Ray Tune: the only file that imports Tune.

    job → trial of a grid, or OptunaSearch on the study's journal → trainable → Ended in its report

Tune places trials, reuses their actors, and ends those that ASHA finds behind. What a trial found
is in the store before Tune hears of it: our rows are the memory of a study, not Tune's snapshots,
which are up to ten seconds old and rerun what has ended (measured: Ray 2.60).
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

# Tune reads these when it is imported or started; what the user has set stands.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is the command's
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a failed trial has none
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")  # nobody reads its snapshots
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other one prints at verbose=0, too

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from raykernel.compute import trouble
from raykernel.config import ComputeConfig
from raykernel.engines import (
    Heard,
    Job,
    PoolEngine,
    Searcher,
    by_resources,
    clear_scratch,
    first_run,
    lost,
    scratch_folder,
)
from raykernel.errors import WorkerLostError
from raykernel.location import StorePath
from raykernel.runs import Ended, Runner, store_of, write_down
from raykernel.search import Search, note_runs
from raykernel.terms import RunStatus, Stopping
from raykernel.training.spec import Point as Evaluation

_ENDED = "ended"
"""Key of a trial's last report."""
_JOB = "job"
"""Key of a grid's trials: number of the job."""
_NEVER = 10**6
"""Evaluations after which ASHA would end any run."""


class TuneEngine(PoolEngine):
    """Ray Tune; kernels whose blocks Ray workers share are computed before, by the driver."""

    @property
    def is_here(self) -> bool:
        """Trials never run in the process of the user."""
        return False

    def share(self, jobs: Sequence[Job], runner: Runner, heard: Heard) -> None:
        """See `PoolEngine.share`.

        Args:
            jobs: which.
            runner: what every trial is.
            heard: told of every run that has ended.
        """
        for compute, same in by_resources(jobs):

            def job_of(config: dict[str, Any], same: Sequence[Job] = same) -> Job:
                return same[int(config[_JOB])]

            self._fit(
                tune.with_parameters(_do, jobs=same, runner=runner, watches=self._stops),
                compute,
                news=_News(job_of, heard),
                store=store_of(same[0][0]).path,
                space={_JOB: tune.grid_search(list(range(len(same))))},
            )

    def search(self, searcher: Searcher, slots: range, heard: Heard) -> None:
        """See `Engine.search`.

        Args:
            searcher: what every trial is.
            slots: numbers of the jobs, a choice each.
            heard: told of every run that has ended.
        """
        run = first_run(searcher)
        if run.point.command.needs_kernel:
            # The first choice computes the blocks for all others.
            super().search(searcher, slots[:1], heard)
            slots = slots[1:]
        if slots:
            self._fit(
                tune.with_parameters(_try, searcher=searcher, watches=self._stops),
                run.composed.config.compute,
                news=_News(searcher.runs, heard),
                store=store_of(run).path,
                asking=_Asking.of(searcher.search, slots.start),
                count=len(slots),
            )

    # ------------------------------------------------------------ inside

    @property
    def _stops(self) -> bool:
        return self.settings.stopping is Stopping.asha

    def _fit(
        self,
        trainable: Callable[..., Any],
        compute: ComputeConfig,
        *,
        news: _News,
        store: StorePath,
        space: dict[str, Any] | None = None,
        asking: _Asking | None = None,
        count: int = 1,
    ) -> None:
        trouble.check_device(compute)
        self.start(compute)
        for name in ("ray.tune", "ray.train", "ray._private"):
            logging.getLogger(name).setLevel(logging.ERROR)
        scratch = scratch_folder(store) / f"{platform.node()}-{os.getpid()}"
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": compute.num_cpus, "gpu": compute.num_gpus}),
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=count,
                search_alg=asking,
                scheduler=self._scheduler(),
                max_concurrent_trials=self.settings.workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[news],
                failure_config=tune.FailureConfig(max_failures=compute.max_attempts - 1),
            ),
        )
        try:
            tuner.fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            clear_scratch(store)

    def _scheduler(self) -> TrialScheduler | None:
        if not self._stops:
            return None
        settings = self.settings
        return ASHAScheduler(
            metric=settings.metrics[0],
            mode=settings.directions[0].value,
            max_t=_NEVER,
            grace_period=settings.grace,
            reduction_factor=settings.reduction,
        )


# ------------------------------------------------------------------ in the actors


def _do(config: dict[str, Any], jobs: Sequence[Job], runner: Runner, watches: bool) -> None:
    """A trial of a grid."""
    if watches:
        runner = replace(runner, watch=_report)
    tune.report({_ENDED: runner(jobs[config[_JOB]])})


def _try(config: dict[str, Any], searcher: Searcher, watches: bool) -> None:
    """A trial of a search."""
    if searcher.runner.is_late:
        tune.report({_ENDED: []})
        return
    if watches:
        searcher = replace(searcher, runner=replace(searcher.runner, watch=_report))
    ended, values = searcher.evaluate(config)
    # Without numbers where a run failed: Optuna takes none that is not finite.
    tune.report({_ENDED: ended} | dict(zip(searcher.search.metrics, values, strict=False)))


def _report(point: Evaluation) -> None:
    """Tell ASHA of an evaluation; if it ends the trial, this does not return."""
    curve = {"dev": point.dev_score, "dev_loss": point.dev_loss, "train_loss": point.train_loss}
    tune.report(curve)


# ------------------------------------------------------------------ in the driver


class _Asking(OptunaSearch):
    """OptunaSearch that takes a trial without its metrics for failed.

    Else Optuna would wait for it for ever (a NaN), or count it as ended early (nothing).
    """

    @classmethod
    def of(cls, search: Search, slot: int) -> _Asking:
        several = len(search.metrics) > 1
        modes = [direction.value for direction in search.directions]
        return cls(
            search.distributions(),
            metric=list(search.metrics) if several else search.metrics[0],
            mode=modes if several else modes[0],
            sampler=search.sampler_object(slot=slot),
            study_name=search.name,
            storage=search.storage(),
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: ASHA reads evaluations, Optuna only ends."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna, and keep the names of the runs with its trial."""
        metrics = self.metric if isinstance(self.metric, list) else [self.metric]
        result = result or {}
        if trial_id in self._ot_trials:
            runs = [ended.run.id for ended in result.get(_ENDED, [])]
            note_runs(self._ot_trials[trial_id], runs)
        lacks = any(result.get(metric) is None for metric in metrics)
        super().on_trial_complete(trial_id, None if lacks else result, error or lacks)


class _News(tune.Callback):
    """Passes on how runs ended."""

    def __init__(self, runs_of: Callable[[dict[str, Any]], Job], heard: Heard) -> None:
        self._runs_of = runs_of
        self._heard = heard

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune's snapshot has it, from which nobody goes on."""
        return {}

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial has reported its end, or was ended by ASHA."""
        del iteration, trials, info
        if _ENDED in trial.last_result:
            for ended in trial.last_result[_ENDED]:
                self._heard(ended)
            return
        for run in self._runs_of(trial.config):
            ended = Ended(run, RunStatus.stopped)
            write_down(ended)
            self._heard(ended)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Its process died as often as it may."""
        del iteration, trials, info
        error = WorkerLostError(
            f"{trial.num_failures} times the process of this run died. See `raykernel doctor`."
        )
        for ended in lost(self._runs_of(trial.config), error):
            self._heard(ended)
