"""Kill a kernel and a study at random, a hundred times: `python -m benchmarks.chaos --write`.

A scenario runs `raykernel kernel` on two Ray workers and then a study of 24 fine-tuning runs on
them, with three raylets on this machine, while workers, raylets or the driver are killed with
SIGKILL at moments that its seed draws. The same commands are given again until one run is left
alone. Then everything in the store must equal, to the bit, what one process without Ray computes;
what was committed before a kill must be the same file, or row, as before; nothing may be there
twice, and no process or temporary be left. The first scenario that fails ends it all with exit
code 1, says how to play it alone, and leaves its folder.

Results are kept seed by seed: the same command goes on where it was. A hundred take HOURS.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.tables import RESULTS, Table, write_section
from raykernel.compute.executor import provenance
from tests.faults.chaos.nodes import Nodes
from tests.faults.chaos.plan import make_plan
from tests.faults.chaos.scenario import Stage, wait_for_none
from tests.faults.problem import NUM_BLOCKS, NUM_PREDICTIONS, NUM_TRIALS

FOLDER = Path("build/chaos")
"""Of the results, and of what a failure leaves; git ignores it."""
MEASURE_EVERY = 20
"""Scenarios after which an undisturbed run is timed again."""
Line = dict[str, Any]
"""What is kept of a scenario."""
Figure = Callable[[Sequence[Line]], str]


def known(file: Path) -> dict[int, Line]:
    """Scenarios that were played with the present code and went well, by seed."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {line["seed"]: line for line in lines if line["code"] == code() and not line["wrong"]}


def code() -> str:
    """The commit and whether files differ from it; results of other code do not count."""
    return provenance().get("commit", "no checkout")


def play(seeds: Sequence[int], folder: Path, screen: Console) -> int:
    """Play scenarios and keep what was found.

    Returns:
        The exit code.
    """
    file, stage_folder = folder / "scenarios.jsonl", folder / "stage"
    stage_folder.mkdir(parents=True, exist_ok=True)
    print_ = lambda text: screen.print(text, markup=False, highlight=False)  # noqa: E731
    with Nodes(stage_folder) as nodes:
        stage = Stage(stage_folder, nodes)
        print_("undisturbed, in one process")
        stage.prepare()
        undisturbed: dict[str, float] = {}
        for number, seed in enumerate(seeds):
            plan = make_plan(seed)
            if number % MEASURE_EVERY == 0:
                undisturbed.clear()  # others may have come to the machine, or gone
            if plan.engine not in undisturbed:
                undisturbed[plan.engine] = stage.undisturbed(plan.engine)
                print_(f"undisturbed, {plan.engine}: {undisturbed[plan.engine]:.1f} s")
            found = stage.play(plan)
            line = asdict(found) | {"undisturbed": undisturbed[plan.engine], "code": code()}
            with file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            state = "; ".join(found.wrong) or "equal"
            print_(f"{number + 1}/{len(seeds)} seed {seed}, {plan.engine}, {found.seconds:.1f} s:")
            for text in (*found.story, state):
                print_(f"    {text}")
            if found.wrong:
                print_(f"Its folder: {stage_folder / f'seed-{seed}'}. To play it alone:")
                print_(f"    python -m benchmarks.chaos --seeds {seed}")
                return 1
    # The cluster is down: nobody may work in its folder.
    left = wait_for_none(nodes.strays, 30.0)
    print_(f"processes are left: {'; '.join(left)}" if left else "no process is left")
    return 1 if left else 0


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
        "Seconds lost: all runs of a scenario together, beyond one that nobody disturbs. A dead "
        "node is noticed after 2 s here, after 15 s by Ray's defaults."
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
    wanted = list(range(options.scenarios)) if options.seeds is None else options.seeds
    left = [seed for seed in wanted if options.seeds or seed not in known(file)]
    screen.print(f"{len(wanted) - len(left)} of {len(wanted)} scenarios are known.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = play(left, options.folder, screen) if left else 0
    except KeyboardInterrupt:
        screen.print("Interrupted: the same command plays what is left.")
        return 130
    done = known(file)
    lines = [done[seed] for seed in wanted if seed in done]
    if lines:
        found = table(lines)
        found.show(screen)
        command = shlex.join(["python", "-m", "benchmarks.chaos", *sys.argv[1:]])
        if options.write and not status:
            write_section("chaos", [found], command, RESULTS)
    return status


if __name__ == "__main__":
    sys.exit(main())
