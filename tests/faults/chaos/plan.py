"""Which processes die when: everything about a scenario that chance decides, from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum


class Victim(Enum):
    """Whom SIGKILL reaches."""

    worker = "worker"
    """A Ray actor."""
    raylet = "raylet"
    """A node: its raylet, and with it all its workers; not the head's."""
    driver = "driver"
    """The command itself."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One SIGKILL."""

    victim: Victim
    share: float | None
    """Share of the work left at the start of the run that is committed when it falls; None: by the
    clock alone, to reach what happens before the first commit."""
    delay: float
    """Seconds after that share, or after the start of the run."""
    choice: float
    """In [0, 1): which of the workers or raylets."""
    absence: float
    """Seconds until another raylet takes the place of a killed one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A scenario: runs of the same commands that are disturbed, before one that is not."""

    seed: int
    engine: str
    """Of the study."""
    runs: tuple[tuple[Strike, ...], ...]


def make_plan(seed: int) -> Plan:
    """Draw a scenario.

    Every run but the last disturbed one ends with the death of its driver; the last one may live.
    """
    generator = random.Random(seed)
    num_runs = generator.choices([1, 2], weights=[3, 1])[0]
    runs = tuple(_strikes(generator, last=n == num_runs - 1) for n in range(num_runs))
    return Plan(seed, "tune" if seed % 4 == 3 else "pool", runs)


def _strikes(generator: random.Random, *, last: bool) -> tuple[Strike, ...]:
    """Up to two workers or raylets, then the driver."""
    count = generator.choices([0, 1, 2], weights=[2, 4, 1])[0]
    victims = generator.choices([Victim.worker, Victim.raylet], weights=[3, 2], k=count)
    if not last or not victims or generator.random() < 0.6:
        victims.append(Victim.driver)
    early = generator.random() < 0.2
    shares: list[float | None] = [*sorted(generator.random() * 0.9 for _ in victims)]
    if early:
        shares[0] = None
    return tuple(
        Strike(
            victim,
            share,
            delay=generator.random() * (6.0 if share is None else 0.15),
            choice=generator.random(),
            absence=generator.random() * 2,
        )
        for victim, share in zip(victims, shares, strict=True)
    )
