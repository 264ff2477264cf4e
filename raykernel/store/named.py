"""Questions that everybody asks a store, as SQL by name: `raykernel query best`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raykernel.errors import InputError, nearest


@dataclass(frozen=True, slots=True)
class NamedQuery:
    """A question with its SQL."""

    about: str
    """What it answers, for the list of them."""
    sql: str
    arguments: tuple[str, ...] = ()
    """What follows its name on a command line, as `$1`, `$2` of the SQL."""
    studies_in: str | None = None
    """Table that names the studies which its arguments are; None: they are none."""
    takes_overrides: bool = False
    """Overrides may follow; the SQL's last parameter is their text (`space.asked`)."""

    def parameters(self, name: str, given: Sequence[str]) -> list[str]:
        """Values of the SQL's parameters.

        Args:
            name: of the query, for messages.
            given: what follows its name.

        Returns:
            As many as it has arguments; what follows these are overrides.

        Raises:
            InputError: if there are more or fewer.
        """
        expected = len(self.arguments)
        if len(given) < expected or (len(given) > expected and not self.takes_overrides):
            raise InputError(
                f"{name}: found {len(given)} arguments, expected {expected}: raykernel query "
                f"{self.usage(name)}"
            )
        return list(given[:expected])

    def usage(self, name: str) -> str:
        """It as it is typed, under its name."""
        return " ".join([name, *self.arguments, *(["[overrides]"] * self.takes_overrides)])


_SCORED = """
    WITH scored AS (
        SELECT task, model, prompt, k, seed, metric, created, dev, kernel_regression AS test,
            'kernel regression (' || kind || ')' AS method, fingerprint AS run
        FROM kernels
        UNION ALL
        SELECT task, model, prompt, k, seed, metric, created, dev, finetuned,
            'fine-tuning (' || optimizer || ', ' || method || ')', trial
        FROM trials
    )
"""
"""Every result that has a test score, under its method."""

_RESULTS = """
    found AS (
        SELECT study, run, arm, overrides, result ->> '$[0]' AS source, result -> '$[1]' AS key
        FROM (
            SELECT *, unnest(from_json(results, '["JSON"]')) AS result
            FROM runs WHERE status = 'ok' AND study IN ($1, $2)
        )
    ),
    scores AS (
        SELECT study, run, arm || ' (' || kind || ')' AS method, task, model, prompt, k, seed,
            metric, dev, kernel_regression AS test
        FROM found JOIN kernels ON source = 'kernels' AND fingerprint = key ->> 'fingerprint'
            AND kind = key ->> 'kind' AND solver = key ->> 'solver'
        UNION ALL
        SELECT study, run, arm, task, model, prompt, k, seed, metric, dev, finetuned
        FROM found JOIN trials ON source = 'trials' AND trial = key ->> 'trial'
        UNION ALL
        SELECT study, run, arm, task, model, prompt, k, seed, metric, NULL, score
        FROM found JOIN twins ON source = 'twins' AND trial = key ->> 'trial' AND split = 'test'
    ),
    chosen AS (
        SELECT * FROM scores
        QUALIFY row_number() OVER (
            PARTITION BY study, method, task, model, prompt, k, seed
            ORDER BY dev DESC NULLS LAST, run
        ) = 1
    )
"""
"""Test scores of the runs of two studies, of each cell those that dev selects."""

QUERIES = {
    "best": NamedQuery(
        "the best method of every problem: test scores in mean and deviation over seeds, of the "
        "hyperparameters that dev selects on each",
        f"""{_SCORED},
    selected AS (
        SELECT * FROM scored
        QUALIFY row_number() OVER (
            PARTITION BY task, model, prompt, k, seed, method ORDER BY dev DESC NULLS LAST, created
        ) = 1
    )
    SELECT task, model, prompt, k, method, metric, avg(test) AS test, stddev_pop(test) AS deviation,
        avg(dev) AS dev, count(*) AS seeds, arg_max(run, test) AS best_run
    FROM selected
    GROUP BY ALL
    ORDER BY task, model, prompt, k, test DESC NULLS LAST, method
    """,
    ),
    "cost": NamedQuery(
        "what was spent: results, seconds and the largest memory by command, task and model",
        """
    WITH spent AS (
        -- Kinds of one run share its seconds; solvers after the first found the blocks stored.
        SELECT 'kernel' AS command, task, model, max(seconds) AS seconds,
            max(peak_memory_bytes) AS peak, max(created) AS created
        FROM kernels GROUP BY fingerprint, solver, task, model
        UNION ALL
        SELECT 'finetune', task, model, seconds, peak_memory_bytes, created FROM trials
        UNION ALL
        SELECT 'twin', task, model, max(seconds), max(peak_memory_bytes), max(created)
        FROM twins GROUP BY trial, task, model
        UNION ALL
        -- A command's rows share its seconds.
        SELECT 'spectrum', task, model, max(seconds), max(peak_memory_bytes), max(created)
        FROM spectra GROUP BY fingerprint, ridge, task, model
        UNION ALL
        SELECT 'select', task, model, max(seconds), max(peak_memory_bytes), max(created)
        FROM selections GROUP BY fingerprint, settings, ridge, task, model
        UNION ALL
        SELECT 'behavior', task, model, seconds, peak_memory_bytes, created FROM behavior
    )
    SELECT command, task, model, count(*) AS results, sum(seconds) AS seconds,
        avg(seconds) AS mean_seconds, max(peak) / 1024 ** 3 AS peak_gib, max(created) AS last
    FROM spent GROUP BY ALL ORDER BY seconds DESC NULLS LAST, command, task, model
    """,
    ),
    "failed": NamedQuery(
        "runs of studies that failed, by what was the matter",
        """
    SELECT study, arm, command, cause, error, seconds, host, created, overrides, run
    FROM runs WHERE status = 'failed' ORDER BY study, cause, created
    """,
    ),
    "missing": NamedQuery(
        "runs of a study, as it was begun (with these overrides, if some follow), that have not "
        "ended well",
        """
    SELECT plans.arm, plans.command, coalesce(status, 'not begun') AS status, cause, error,
        plans.overrides, plans.run
    FROM plans LEFT JOIN runs USING (study, run)
    WHERE study = $1 AND $2 IN ('', asked) AND coalesce(status, 'failed') = 'failed'
    QUALIFY row_number() OVER (PARTITION BY plans.run ORDER BY plans.created) = 1
    ORDER BY plans.created, plans.number
    """,
        ("NAME",),
        studies_in="plans",
        takes_overrides=True,
    ),
    "compare": NamedQuery(
        "two studies side by side: mean test scores of what dev selects, where both have the "
        "same method, task, model, prompt, k and seeds",
        f"""
    WITH {_RESULTS}
    SELECT method, task, model, prompt, k, metric, count(*) AS seeds, avg(a.test) AS first,
        avg(b.test) AS second, avg(b.test - a.test) AS difference,
        stddev_pop(b.test - a.test) AS deviation
    FROM (SELECT * FROM chosen WHERE study = $1) AS a
    JOIN (SELECT * FROM chosen WHERE study = $2) AS b
        USING (method, task, model, prompt, k, seed, metric)
    GROUP BY ALL ORDER BY method, task, model, prompt, k
    """,
        ("A", "B"),
        studies_in="runs",
    ),
}


def named_query(name: str) -> NamedQuery:
    """A named query.

    Args:
        name: a key of `QUERIES`.

    Returns:
        The query.

    Raises:
        InputError: if there is none of this name.
    """
    if name not in QUERIES:
        raise InputError(
            f"found {name!r}, expected SQL or the name of a query; {nearest(name, QUERIES)} "
            "`raykernel query --help` lists all."
        )
    return QUERIES[name]
