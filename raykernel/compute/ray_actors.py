"""The actors of one run: Ray carries what the scheduler decides.

Ray places processes, carries integers and tells us when a process is gone. Everything else is
ours (`scheduler`), because Ray's own retries do not survive a lost node: every failed call eats one
retry while an actor restarts, so that 2 or 5 retries are gone before the node is even noticed as
dead (about 15 s; ray #44719). So an actor never restarts: when it is lost it is written off, its
jobs go back into the backlog and a new actor takes its place. Jobs are idempotent: what was half
done, or done and not reported, is simply done again.

Ray does not notice a process that stands still. So a thread of every actor writes signs of life
into the cluster's key-value store, where the driver looks for those of actors that are silent. The
jobs stay in the process's main thread, which an actor with a second concurrency group would not
use: in any other, glibc gives freed pages back at once (see `process.keep_heap_ready`).
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, cast

import ray
from ray import exceptions as ray_errors
from ray.experimental import internal_kv

from raykernel.compute import trouble
from raykernel.compute.backlog import Task
from raykernel.compute.executor import Failure, JobT, Outcome, ResultT, Success
from raykernel.compute.scheduler import Member, Scheduler, gathered
from raykernel.compute.shell import Shell
from raykernel.config import ComputeConfig
from raykernel.errors import InputError, RunError, WorkerLostError
from raykernel.provenance import versions

POLL_SECONDS = 1.0
SAY_SECONDS = 30.0
"""Silence of all workers after which the screen says what is pending."""

PLACE_SECONDS = 300.0
"""How long resources that no node of a joined cluster has may be awaited: an autoscaler's time."""

STALL_SECONDS = 10.0
"""What the driver's clock counts at the most between two looks: if the driver itself stood still,
nobody else is late."""

_BEATS = 10
"""Signs of life that must be missed in a row; the driver looks after a quarter of them."""
_SIGNS = b"raykernel"
"""Where the cluster keeps them."""


@dataclass(slots=True, eq=False)
class Actor:
    """An actor as the driver sees it."""

    handle: Any
    greeting: Any
    """Reference of `hello`, then of `load`."""
    key: bytes
    """Of its signs of life."""
    sign: bytes | None = None
    """The last one that was seen."""
    placed: bool = False
    kept: bool = False
    """Whether it comes from a run before; then its death may be as old."""


@dataclass(slots=True)
class Pool(Generic[JobT, ResultT]):
    """The actors of one run."""

    compute: ComputeConfig
    say: Callable[[str], None]
    make: Any
    scheduler: Scheduler[Actor, JobT]
    idle: list[Actor]
    """Actors of the runs before; those of this run join them."""
    local: bool
    owed: dict[Any, tuple[Member[Actor, JobT], Task[JobT] | None]] = field(default_factory=dict)
    """Reference → whose it is, and of which job; None: its greeting."""
    lost_starts: int = 0
    """Actors lost in a row before any was ready."""
    now: float = 0.0
    """Seconds of this run in which the driver was awake."""
    looked: float = field(default_factory=time.monotonic)
    watched: float = 0.0
    heard: float = 0.0
    """When an actor was last heard of."""
    said: float = 0.0
    told_versions: set[str] = field(default_factory=set)

    def outcomes(self) -> Iterator[Outcome[JobT, ResultT]]:
        """Outcomes until no job is left."""
        self._check_resources()
        while self.scheduler.num_open:
            for _ in range(self.scheduler.num_wanted):
                self._hire()
            for member, task in self.scheduler.give(self._time()):
                self.owed[member.handle.handle.do.remote(task.job)] = (member, task)
            arrived = _arrived(list(self.owed))
            now = self._time()
            for reference in arrived:
                self.heard = self.said = now
                if reference in self.owed:  # else lost with its actor
                    yield from self._settle(reference, now)
            if now - self.watched >= POLL_SECONDS:
                self.watched = now
                yield from self._watch(now)

    def dismiss(self) -> None:
        """End the actors that still work; the others wait for the next run, ready ones on top."""
        for member in sorted(self.scheduler.members, key=lambda member: member.ready):
            if member.tasks:
                kill(member.handle)
            else:
                self.idle.append(member.handle)

    def _time(self) -> float:
        """Seconds of this run, but few while the driver itself stood still."""
        before, self.looked = self.looked, time.monotonic()
        self.now += min(self.looked - before, STALL_SECONDS)
        return self.now

    # -------------------------------------------------------- hiring

    def _hire(self) -> None:
        """Have one more actor: one of a run before, wherever that left it, or a new one."""
        actor = self.idle.pop() if self.idle else self._started()
        member = self.scheduler.hire(actor)
        actor.kept = actor.placed
        if actor.placed:
            self._load(member)
        self.owed[actor.greeting] = (member, None)

    def _started(self) -> Actor:
        """A new actor."""
        made: Any = ray.remote(Shell)
        handle = made.options(
            num_cpus=self.compute.num_cpus,
            num_gpus=self.compute.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        ).remote()
        key, silence = secrets.token_bytes(16), self.compute.heartbeat_seconds
        every = None if silence is None else silence / _BEATS
        return Actor(handle, handle.hello.remote(partial(_give_sign, key), every), key)

    def _load(self, member: Member[Actor, JobT]) -> None:
        """Have an actor load the model; from now on its silence counts."""
        actor = member.handle
        actor.greeting = actor.handle.load.remote(self.make)
        self.owed[actor.greeting] = (member, None)
        member.heard = self.now

    # -------------------------------------------------------- taking

    def _settle(self, reference: Any, now: float) -> Iterator[Outcome[JobT, ResultT]]:
        """Take what a reference holds: a greeting, a result, or news of a loss."""
        member, task = self.owed[reference]
        try:
            value = ray.get(reference)
        except ray_errors.RayTaskError as error:
            # Not our code, which turns exceptions into data: arguments or results that do not
            # unpickle, because the package is missing or another one on the node.
            value = trouble.transport_error(error)
            if task is None:
                raise value from error
        except ray_errors.LocalRayletDiedError as error:
            raise RunError(
                "Ray's process on this machine died, and with it the way to the workers. "
                "Finished blocks are stored: run the command again."
            ) from error
        except ray_errors.ActorUnschedulableError as error:
            raise InputError(f"Ray cannot place a worker: {error}") from error
        except ray_errors.RayError as error:
            yield from self._lose(member, error)
            return
        del self.owed[reference]
        if task is None:
            self._greet(member, value)
        elif self.scheduler.answered(member, task, now):
            yield _outcome(task, value)

    def _greet(self, member: Member[Actor, JobT], value: Any) -> None:
        """Move an actor on: placed → loading → ready."""
        if not member.handle.placed:
            member.handle.placed = True
            self._compare_versions(value)
            self._load(member)
        elif isinstance(value, Failure):
            raise value.error()
        else:
            self.scheduler.ready(member)
            self.lost_starts = 0

    def _lose(
        self, member: Member[Actor, JobT], cause: Exception | str
    ) -> Iterator[Outcome[JobT, ResultT]]:
        """Write an actor off that died, or that hangs; a text says why it counts as hung."""
        actor, starting = member.handle, not member.ready
        kill(actor)
        for reference in [ref for ref, (owner, _) in self.owed.items() if owner is member]:
            _, task = self.owed.pop(reference)
            value = None if task is None else _value_if_finished(reference)
            if task and value is not None and self.scheduler.answered(member, task, self.now):
                yield _outcome(task, value)
        charge = self.scheduler.lost(member)
        if starting and not actor.kept:
            self._count_lost_start(cause)
        if isinstance(cause, Exception):
            what, advice = f"died ({trouble.cause_of(cause)})", " " + trouble.advice(self.compute)
        else:
            what, advice = f"hung ({cause})", ""
        if charge is None:
            self.say(f"A worker {what}; another one takes its place.")
        elif charge.given_up:
            job, times = charge.task.job, charge.task.attempts
            text = f"{job} was tried {times} times, each time its worker {what}.{advice}"
            yield _outcome(charge.task, WorkerLostError(text))
        else:
            self.say(f"A worker {what}; its job is given to another one.")

    def _count_lost_start(self, cause: Exception | str) -> None:
        """End the run when actors die one after the other before they can do anything."""
        self.lost_starts += 1
        error = cause if isinstance(cause, Exception) else None
        if error is not None and (unpacked := trouble.missing_module(error)):
            raise unpacked from error
        if self.lost_starts >= self.compute.max_attempts:
            why = trouble.cause_of(error) if error is not None else cause
            raise WorkerLostError(
                f"{self.lost_starts} workers in a row died before they had loaded the model "
                f"({why}). {trouble.advice(self.compute)}"
            ) from error

    # -------------------------------------------------------- watching

    def _watch(self, now: float) -> Iterator[Outcome[JobT, ResultT]]:
        """Replace actors that hang; after a while without news, say what is pending."""
        for member in self.scheduler.members:
            if now - member.heard > (self.compute.heartbeat_seconds or math.inf) / 4:
                actor = member.handle
                before, actor.sign = actor.sign, _last_sign(actor.key)
                member.heard = member.heard if actor.sign == before else now
        for member, why in self.scheduler.overdue(now):
            yield from self._lose(member, why)
        self._check_silence(now)

    def _compare_versions(self, there: dict[str, str]) -> None:
        """Say once where a node runs other versions than the driver; refuse another raykernel."""
        text = trouble.version_note(versions(), there)
        if text and text not in self.told_versions:
            self.told_versions.add(text)
            self.say(text)

    def _check_silence(self, now: float) -> None:
        """While nobody works, say what is pending."""
        members = self.scheduler.members
        if now - self.said < SAY_SECONDS or any(member.tasks for member in members):
            return
        self.said = now
        self._check_resources(waited=now - self.heard)
        loading = sum(member.handle.placed for member in members)
        waiting = len(members) - loading
        if waiting:
            free = cast(Any, ray).available_resources()
            self.say(
                f"{waiting} workers wait for {trouble.asked(self.compute)} each; free in the "
                f"cluster: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU."
            )
        if loading:
            self.say(f"{loading} workers are loading the model.")

    def _check_resources(self, *, waited: float = 0.0) -> None:
        """Refuse resources that no node has, at once locally, else after an autoscaler's time."""
        if any(member.handle.placed for member in self.scheduler.members):
            return
        nodes = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
        problem = trouble.unplaceable(self.compute, nodes)
        if problem is None:
            return
        if self.local or waited >= PLACE_SECONDS:
            raise InputError(f"{problem}, or use a larger machine.")
        self.say(f"{problem}, or wait for an autoscaler ({PLACE_SECONDS - waited:.0f} s more).")


def _arrived(owed: list[Any]) -> list[Any]:
    """Wait for some of what is owed, and take all that is there."""
    done, _ = ray.wait(owed, num_returns=gathered(len(owed)), timeout=POLL_SECONDS)
    if done and len(owed) > 1:
        done, _ = ray.wait(owed, num_returns=len(owed), timeout=0)
    return done


def _outcome(task: Task[JobT], value: Any) -> Outcome[JobT, Any]:
    """The outcome that a job's answer, or its error, amounts to."""
    if isinstance(value, Success):
        return Outcome(task.job, task.attempts, result=value.value)
    error = value.error() if isinstance(value, Failure) else value
    return Outcome(task.job, task.attempts, error=error)


def _value_if_finished(reference: Any) -> Any:
    """The answer of a lost actor that had arrived before the loss, else None."""
    done, _ = ray.wait([reference], timeout=0)
    with contextlib.suppress(ray_errors.RayError):
        return ray.get(done[0]) if done else None
    return None


def kill(actor: Actor) -> None:
    """End an actor that may be dead already; Ray takes some seconds for one that stands still."""
    with contextlib.suppress(ray_errors.RayError, RuntimeError, ValueError):
        ray.kill(actor.handle, no_restart=True)
        internal_kv._internal_kv_del(actor.key, namespace=_SIGNS)


def _give_sign(key: bytes) -> None:
    """In an actor's process: say that it lives."""
    sign = str(time.monotonic_ns()).encode()
    internal_kv._internal_kv_put(key, sign, overwrite=True, namespace=_SIGNS)


def _last_sign(key: bytes) -> bytes | None:
    """What an actor said last; None if nothing yet, or while the store cannot be asked."""
    with contextlib.suppress(ray_errors.RayError, RuntimeError):
        return cast("bytes | None", internal_kv._internal_kv_get(key, namespace=_SIGNS))
    return None
