"""A simulated cluster: exactly one outcome for every block, whatever dies; and it stays busy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.simulation import Case, Costs, Simulation
from benchmarks.tables import Table, write_results, write_section

SMALL = Case(blocks=2000, workers=50, seconds=10.0)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_every_block_has_one_outcome_though_every_node_dies_several_times(
    seed: int, in_flight: int
) -> None:
    """A node lives for two minutes on average, and a block takes ten seconds."""
    case = replace(SMALL, loss_per_hour=30.0, in_flight=in_flight)
    report = Simulation(case, Costs(), seed).run()
    assert report.outcomes == b"\x01" * case.blocks
    assert report.lost_workers > case.workers
    assert report.recomputed > 0


def test_a_block_whose_workers_die_every_time_is_given_up_once() -> None:
    """Nodes live for four blocks: with one attempt, many are given up, none twice."""
    case = replace(SMALL, loss_per_hour=90.0, max_attempts=1)
    report = Simulation(case, Costs(), 0).run()
    assert report.outcomes == b"\x01" * case.blocks
    assert report.given_up > 0


@pytest.mark.parametrize("seed", range(3))
def test_workers_are_busy_where_few_nodes_die(seed: int) -> None:
    """40 blocks a worker of 10 s each: the end, where some wait, is a tenth of a run at most."""
    report = Simulation(SMALL, Costs(), seed).run()
    assert report.utilisation(SMALL.workers, started=True) > 0.9
    assert report.utilisation(SMALL.workers) > 0.8


def test_a_slow_node_costs_what_it_does_not_do() -> None:
    """8 of 50 workers ten times slower: 42.8 workers' worth, and less than a block more."""
    fast = Simulation(SMALL, Costs(), 1).run()
    slow = Simulation(replace(SMALL, slow_nodes=1), Costs(), 1).run()
    assert slow.outcomes == fast.outcomes
    assert slow.seconds - slow.began < (fast.seconds - fast.began) * 50 / 42.8 + 5 * 10
    assert slow.recomputed > 0, "its last blocks are done by others"


def test_a_driver_that_is_too_slow_shows() -> None:
    """A call of 10 ms carries 100 blocks a second, which keeps 50 workers busy with 1 s each
    half of the time at the most."""
    case = replace(SMALL, seconds=0.25)
    report = Simulation(case, Costs(submit=0.01), 0).run()
    assert report.utilisation(case.workers, started=True) < 0.55
    assert report.driver / (report.seconds - report.began) > 0.9


def test_a_section_of_the_results_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    write_results([Table("one", ["a"])], "python", path)
    for title in ("first", "second"):
        write_section("simulation", [Table(title, ["b"])], "python", path)
        write_section("chaos", [Table("third", ["c"])], "python", path)
    text = path.read_text()
    assert [text.count(f"## {title}\n") for title in ("one", "first", "second", "third")] == [
        1, 0, 1, 1,
    ]  # fmt: skip
    write_results([Table("two", ["a"])], "python", path)
    text = path.read_text()
    assert [text.count(f"## {title}\n") for title in ("one", "two", "second", "third")] == [
        0, 1, 1, 1,
    ]  # fmt: skip
