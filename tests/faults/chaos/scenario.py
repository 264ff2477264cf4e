"""A scenario: disturbed runs, one that is not, and what must be true at the end.

    plan → run, killed → everything of it is gone, what was committed stays → … → run → equal

Seconds are those in which this process was at work: where all are suspended, none pass.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.faults.chaos import job
from tests.faults.chaos.evidence import (
    Snapshot,
    check_counts,
    differences,
    numbers,
    steps,
    sweep_up,
)
from tests.faults.chaos.nodes import Nodes
from tests.faults.chaos.plan import Plan, Strike, Victim
from tests.faults.problem import prepare

PATIENCE_SECONDS = 900.0
"""Of a run; one that takes longer hangs."""
GONE_SECONDS = 120.0
"""Until the last process of a run has ended."""
_POLL_SECONDS = 0.02
_SUSPENDED_SECONDS = 10.0
"""A poll that takes longer was no work of ours."""


class ChaosError(AssertionError):
    """A promise that was not kept."""


@dataclass
class Found:
    """What a scenario came to."""

    seed: int
    engine: str
    kills: dict[str, int] = field(default_factory=dict)
    """By victim."""
    restarts: int = 0
    """Drivers started again, until one was left to end."""
    blocks_again: int = 0
    """Blocks that were begun and not committed, so that they were begun again."""
    runs_again: int = 0
    """The same of the study's runs; unknown under Tune, 0."""
    temporaries: int = 0
    """Files that writers left half written."""
    seconds: float = 0.0
    """Of all runs together, up to the first that ended by itself."""
    story: list[str] = field(default_factory=list)
    """What happened, one line each."""
    wrong: list[str] = field(default_factory=list)
    """Promises that were not kept."""


class Clock:
    """Seconds of work."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def tick(self) -> None:
        """Go on."""
        now = time.monotonic()
        passed = now - self._last
        self.seconds += _POLL_SECONDS if passed > _SUSPENDED_SECONDS else passed
        self._last = now


class Stage:
    """Where scenarios play: a folder, the nodes, and what an undisturbed run finds.

    Args:
        folder: for the problem, stores and screens.
        nodes: the cluster.
    """

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder = folder.resolve()
        self.nodes = nodes
        self.problem = self.folder / "problem"
        self.expected: dict[str, Any] = {}

    def prepare(self) -> None:
        """Write the problem, and solve it in one process without Ray."""
        if not self.problem.exists():
            # Blocks and runs that take long enough to die in.
            prepare(self.problem, hidden_size=128, num_hidden_layers=6)
        alone = Scene(self, "alone", "pool", address=None)
        alone.play(())
        self.expected = numbers(alone.store)

    def undisturbed(self, engine: str) -> float:
        """Seconds of a run on the cluster that nobody disturbs; it is checked like all others."""
        scene = Scene(self, f"undisturbed-{engine}", engine)
        scene.play(())
        if wrong := scene.wrong():
            raise ChaosError(f"undisturbed, {engine}: {'; '.join(wrong)}")
        return scene.found.seconds

    def play(self, plan: Plan) -> Found:
        """Play a scenario; its folder stays if something is wrong."""
        scene = Scene(self, f"seed-{plan.seed}", plan.engine, seed=plan.seed)
        try:
            for strikes in plan.runs:
                scene.play(strikes)
            scene.play(())
            scene.found.wrong += scene.wrong()
        except ChaosError as error:
            scene.found.wrong.append(str(error))
        finally:
            self.nodes.replace()
        if not scene.found.wrong:
            shutil.rmtree(scene.folder)
        return scene.found


class Scene:
    """One store, and the runs on it.

    Args:
        stage: where.
        name: of its folder.
        engine: of the study.
        seed: of its plan.
        address: of the cluster; None: one process, without Ray.
    """

    def __init__(
        self, stage: Stage, name: str, engine: str, *, seed: int = -1, address: str | None = ""
    ) -> None:
        self._stage = stage
        self._engine = engine
        self._address = stage.nodes.address if address == "" else address
        self.folder = stage.folder / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.store = self.folder / "store"
        self.screen = self.folder / "screen.txt"
        self._begun = self.folder / "begun.txt"
        self._begun.touch()
        self._starts = 0
        self._is_whole = False
        self.found = Found(seed, engine)

    def play(self, strikes: Sequence[Strike]) -> None:
        """One run of both commands, struck as planned; then what was committed is as it was."""
        self._starts += 1
        before = Snapshot.of(self.store)
        seen = _Struck(self, strikes)
        seconds = seen.run()
        if not self._is_whole:  # else it had nothing left to do
            self.found.seconds += seconds
            self.found.restarts += self._starts > 1
        self._is_whole = not seen.is_killed
        for snapshot in (before, *seen.snapshots):
            if lost := snapshot.lost(Snapshot.of(self.store)):
                raise ChaosError(f"committed and not as it was: {', '.join(lost[:5])}")

    def start(self) -> BaseProcess:
        """The driver."""
        # Relative, as people write it: workers run in other folders.
        store = os.path.relpath(self.store, self._stage.problem)
        lines = job.commands(store, self._engine, self._address)
        return job.start(self._stage.problem, lines, self.screen, self._begun)

    @property
    def nodes(self) -> Nodes:
        """The cluster."""
        return self._stage.nodes

    def say(self, text: str) -> None:
        """Tell what happened."""
        self.found.story.append(f"run {self._starts}: {text}")

    def wrong(self) -> list[str]:
        """What is not as an undisturbed run leaves it; `verify` clears up on the way."""
        begun = Counter(self._begun.read_text().splitlines())
        again = Counter({name.split()[0]: 0 for name in begun})
        for name, times in begun.items():
            again[name.split()[0]] += times - 1
        self.found.blocks_again, self.found.runs_again = again["block"], again["run"]
        self.found.temporaries, wrong = sweep_up(self.store)
        wrong += check_counts(self.store)
        wrong += [
            f"{name} differs from an undisturbed run's"
            for name in differences(numbers(self.store), self._stage.expected)
        ]
        return wrong


class _Struck:
    """A run while it lasts.

    Args:
        scene: whose.
        strikes: planned; one follows the other.
    """

    def __init__(self, scene: Scene, strikes: Sequence[Strike]) -> None:
        self._scene = scene
        self._waiting = deque(strikes)
        self._clock = Clock()
        self._done = steps(scene.store)
        self._due: float | None = None
        self.snapshots: list[Snapshot] = []
        """Of what was committed at every strike."""
        self.is_killed = False
        """Whether the driver was."""

    def run(self) -> float:
        """Play it to the end of its last process; seconds until the driver's end."""
        driver = self._scene.start()
        try:
            while driver.is_alive():
                self._clock.tick()
                self._scene.nodes.replace(self._clock.seconds)
                if self._waiting and self._is_due(self._waiting[0]):
                    self._strike(driver)
                if self._clock.seconds > PATIENCE_SECONDS:
                    self._give_up(driver)
                time.sleep(_POLL_SECONDS)
        finally:
            driver.kill()  # alive only if we are interrupted
            driver.join()
        seconds = self._clock.seconds
        self._scene.nodes.replace()
        self._wait_until_gone()
        if driver.exitcode != (-signal.SIGKILL if self.is_killed else 0):
            raise ChaosError(f"the driver ended with {driver.exitcode}; see {self._scene.screen}")
        return seconds

    # ------------------------------------------------------------ striking

    def _is_due(self, strike: Strike) -> bool:
        if self._due is None:
            left = job.NUM_STEPS - self._done
            if strike.share is None:
                self._due = strike.delay
            elif steps(self._scene.store) >= self._done + strike.share * left:
                self._due = self._clock.seconds + strike.delay
        return self._due is not None and self._clock.seconds >= self._due

    def _strike(self, driver: BaseProcess) -> None:
        """Kill; a worker that is not there yet is waited for."""
        strike, scene = self._waiting[0], self._scene
        done, snapshot = steps(scene.store), Snapshot.of(scene.store)
        if strike.victim is Victim.driver:
            driver.kill()
            struck: str | None = "driver"
        elif strike.victim is Victim.raylet:
            struck = None
            if scene.nodes.has_raylets:
                back_at = self._clock.seconds + strike.absence
                struck = scene.nodes.kill_raylet(strike.choice, back_at)
        else:
            struck = scene.nodes.kill_worker(strike.choice)
        if struck is None:
            return
        self._waiting.popleft()
        self._due = None
        self.snapshots.append(snapshot)
        kills = scene.found.kills
        kills[strike.victim.value] = kills.get(strike.victim.value, 0) + 1
        at = f"{self._clock.seconds:.1f} s, {done} of {job.NUM_STEPS} commits"
        scene.say(f"{strike.victim.value} killed at {at}: {struck}")
        if strike.victim is Victim.driver:
            self.is_killed = True
            driver.join()

    # ------------------------------------------------------------ ending

    def _give_up(self, driver: BaseProcess) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver.pid or 0, signal.SIGUSR1)  # its threads go to the screen
            time.sleep(1.0)
        raise ChaosError(
            f"no end after {PATIENCE_SECONDS:.0f} s, {steps(self._scene.store)} commits; see "
            f"{self._scene.screen}"
        )

    def _wait_until_gone(self) -> None:
        left = self._scene.nodes.strays
        if found := wait_for_none(left, GONE_SECONDS):
            raise ChaosError(f"processes are left: {'; '.join(found)}")


def wait_for_none(look: Callable[[], list[str]], seconds: float) -> list[str]:
    """Look until nothing is there any more; what still is after so many seconds."""
    clock = Clock()
    while (found := look()) and clock.seconds < seconds:
        time.sleep(5 * _POLL_SECONDS)
        clock.tick()
    return found
