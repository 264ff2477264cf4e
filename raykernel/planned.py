"""The runs that a study would do, to find those that are missing."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from raykernel.conduct import Done, arm_points
from raykernel.runs import make_run, rows_of, stored
from raykernel.space import make_plan
from raykernel.store.columns import integer, schema_of, text, texts
from raykernel.sweep import load_study

_PLANNED = schema_of(
    (
        integer("number", "Place in the study's order."),
        text("arm", "Method of the study."),
        text("command", "Command to run."),
        text("run", "Hash of the command and its configuration."),
        texts("overrides", "Its command line."),
    )
)


def planned_runs(name: str, overrides: Sequence[str] = ()) -> pa.Table:
    """The runs of a study, ended or not.

    An arm that takes the hyperparameters of another has as many as can be known from stored
    results; one that a sampler searches has none before it is run.

    Args:
        name: of the study.
        overrides: as for `raykernel sweep`.

    Returns:
        The table that `raykernel query missing` calls `planned`.
    """
    plan = make_plan(load_study(name), overrides)
    settings = plan.settings()
    found: list[Done] = []
    rows: list[dict[str, object]] = []
    for arm in plan.study.arms:
        if plan.is_searched(arm, settings):
            continue
        for point in arm_points(plan, arm, found):
            run = make_run(plan.study.name, point)
            ended = stored(run, retry_failed=False)
            if ended is not None:
                found.append(Done(ended, rows_of(ended)))
            rows.append(
                {
                    "number": len(rows),
                    "arm": arm.name,
                    "command": arm.command.value,
                    "run": run.id,
                    "overrides": list(point.overrides),
                }
            )
    return pa.Table.from_pylist(rows, schema=_PLANNED)
