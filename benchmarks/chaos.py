"""Kill a kernel and a study at random, a hundred times: `python -m benchmarks.chaos --write`.

A scenario runs `raykernel kernel` on two Ray workers and then a study of 24 fine-tuning runs on
them, with three raylets on this machine, while workers, raylets or the driver are killed with
SIGKILL at moments that its seed draws. The same commands are given again until one run is left
alone. Then everything in the store must equal, to the bit, what one process without Ray computes;
what was committed before a kill must be the same file, or row, as before; nothing may be there
twice, and no process or temporary be left. A scenario that fails leaves its folder, and the screen
says how to play it alone; the exit code is 1 then.

Results are kept seed by seed: the same command goes on where it was. On two idle cores a scenario
takes half a minute, a hundred take 55 minutes; on a loaded machine several times as long.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.tables import RESULTS, Table, write_section
from benchmarks.timing import Say
from raykernel.provenance import commit
from tests.faults.chaos.nodes import Nodes
from tests.faults.chaos.plan import make_plan
from tests.faults.chaos.scenario import ChaosError, Stage, wait_for_none
from tests.faults.problem import NUM_BLOCKS, NUM_PREDICTIONS, NUM_TRIALS

FOLDER = Path("build/chaos")
"""Of the results, and of what a failure leaves; git ignores it."""
MEASURE_EVERY = 20
"""Scenarios after which an undisturbed run is timed again."""
Line = dict[str, Any]
"""What is kept of a scenario."""
Figure = Callable[[Sequence[Line]], str]


def known(file: Path) -> dict[int, Line]:
    """What was found last with the present code, by seed."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {line["seed"]: line for line in lines if line["code"] == code()}


def code() -> str:
    """The commit and whether files differ from it; results of other code do not count."""
    return commit() or "no checkout"


def play(seeds: Sequence[int], folder: Path, say: Say) -> int:
    """Play scenarios on one cluster and keep what was found, up to the first that fails.

    Returns:
        How many were played.
    """
    file, place = folder / "scenarios.jsonl", folder / "stage"
    place.mkdir(parents=True, exist_ok=True)
    undisturbed: dict[str, float] = {}
    number = 0
    with Nodes(place) as nodes:
        stage = Stage(place, nodes)
        say("undisturbed, in one process")
        stage.prepare()
        for number, seed in enumerate(seeds, start=1):
            plan = make_plan(seed)
            if number % MEASURE_EVERY == 0:
                undisturbed.clear()  # others may have come to the machine, or gone
            if plan.engine not in undisturbed:
                undisturbed[plan.engine] = stage.undisturbed(plan.engine)
                say(f"undisturbed, {plan.engine}: {undisturbed[plan.engine]:.1f} s")
            found = stage.play(plan)
            line = asdict(found) | {"undisturbed": undisturbed[plan.engine], "code": code()}
            with file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            state = "; ".join(found.wrong) or "equal"
            say(f"seed {seed} ({number} of {len(seeds)}), {plan.engine}, {found.seconds:.1f} s")
            for text in (*found.story, state):
                say(f"    {text}")
            if found.wrong:
                say(f"    Its folder: {place / f'seed-{seed}'}. To play it alone:")
                say(f"    python -m benchmarks.chaos --seeds {seed}")
                break
    # The cluster is down: nobody may work in its folder.
    if left := wait_for_none(nodes.strays, 30.0):
        raise ChaosError(f"processes of the cluster are left: {'; '.join(left)}")
    return number


def table(lines: Sequence[Line]) -> Table:
    """The figures of many scenarios, by engine of the study and of all."""
    by_engine = [[line for line in lines if line["engine"] == name] for name in ("pool", "tune")]
    made = Table(
        f"Chaos: {NUM_BLOCKS} blocks, {NUM_PREDICTIONS} predictions and {NUM_TRIALS} runs, killed "
        "at random",
        ["", "pool", "tune", "all"],
    )
    for name, of in FIGURES.items():
        made.add(name, *(of(some) if some else "" for some in (*by_engine, lines)))
    made.note(
        "Seconds lost: all runs of a scenario until one ends, beyond one that nobody disturbs. A "
        "dead node is noticed after 2 s here, after 15 s by Ray's defaults."
    )
    made.note("Runs begun under Ray Tune are not counted.")
    return made


def _sum(column: str) -> Figure:
    return lambda lines: str(sum(line[column] for line in lines))


def _kills(victim: str) -> Figure:
    return lambda lines: str(sum(line["kills"].get(victim, 0) for line in lines))


def _lost(lines: Sequence[Line]) -> list[float]:
    return [line["seconds"] - line["undisturbed"] for line in lines]


def _per_kill(lines: Sequence[Line]) -> str:
    return f"{sum(_lost(lines)) / sum(sum(line['kills'].values()) for line in lines):.1f}"


FIGURES: dict[str, Figure] = {
    "scenarios": lambda lines: str(len(lines)),
    "exactly equal": lambda lines: str(sum(not line["wrong"] for line in lines)),
    "workers killed": _kills("worker"),
    "raylets killed": _kills("raylet"),
    "drivers killed": _kills("driver"),
    "drivers started again": _sum("restarts"),
    "blocks begun and not committed": _sum("blocks_again"),
    "runs begun and not committed": _sum("runs_again"),
    "half-written files removed": _sum("temporaries"),
    "seconds undisturbed, median": lambda lines: (
        f"{statistics.median(line['undisturbed'] for line in lines):.1f}"
    ),
    "seconds lost by a scenario, median": lambda lines: f"{statistics.median(_lost(lines)):.1f}",
    "seconds lost by a kill, mean": _per_kill,
}
"""Rows of the table: from what is kept of scenarios to text."""


def main() -> int:
    """Play what is left of the scenarios, print the figures, and write them if asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenarios", type=int, default=100, help="seeds 0 to this (default 100)")
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(seed) for seed in text.split(",")],
        help="play these, whatever is known of them",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--write", action="store_true", help=f"put the figures in {RESULTS.name}")
    options = parser.parse_args()
    screen, file = Console(soft_wrap=True), options.folder / "scenarios.jsonl"
    say = partial(screen.print, markup=False, highlight=False)
    wanted = list(range(options.scenarios)) if options.seeds is None else options.seeds
    before = {} if options.seeds else known(file)
    left = [seed for seed in wanted if seed not in before or before[seed]["wrong"]]
    say(f"{len(wanted) - len(left)} of {len(wanted)} scenarios are known to end well.")
    try:
        while left:
            left = left[play(left, options.folder, say) :]
    except KeyboardInterrupt:
        say("Interrupted: the same command plays what is left.")
        return 130
    except ChaosError as error:  # of a run that nobody disturbed, or of the cluster's own end
        say(f"Stopped, the same command plays what is left: {error}")
        return 1
    found = known(file)
    lines = [found[seed] for seed in wanted]
    figures = table(lines)
    figures.show(screen)
    if options.write:
        command = shlex.join(["python", "-m", "benchmarks.chaos", *sys.argv[1:]])
        write_section("chaos", [figures], command, RESULTS)
    failed = [str(line["seed"]) for line in lines if line["wrong"]]
    if failed:
        say(f"Failed: python -m benchmarks.chaos --seeds {','.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
