"""The runs that a study is begun with, kept in its store for `raykernel query missing`.

So a store knows what a study lacks without its file, its data or its configuration, in the time of
a query.
"""

from __future__ import annotations

from collections.abc import Sequence

from raykernel.errors import InputError
from raykernel.runs import Run
from raykernel.space import Plan
from raykernel.store.blocks import Store
from raykernel.study import Arm


def keep_plan(plan: Plan, arm: Arm, runs: Sequence[Run]) -> None:
    """Write down the runs of an arm, unless the store has them or can only be read.

    They replace those that the same command line has planned before: a file that it names may
    have changed since, and the runs with it.

    Args:
        plan: the study.
        arm: one of its arms.
        runs: all that it has, ended or not.
    """
    key = {"study": plan.study.name, "asked": plan.asked, "arm": arm.name}
    store = Store(plan.store_path())
    known = [row["run"] for row in store.rows("plans", **key)]
    if not runs or known == [run.id for run in runs]:
        return
    try:
        store.require_writable()
    except InputError:  # what has ended can be shown all the same
        return
    store.write_results(
        "plans",
        [
            {
                **key,
                "number": number,
                "command": run.point.command.value,
                "run": run.id,
                "overrides": list(run.point.overrides),
            }
            for number, run in enumerate(runs)
        ],
    )
