"""A run of a study: a point with its configuration, done by a worker and written down.

    Point → Run (named by the hash of its configuration) → command → Ended → row of `runs`

The row is written by the process that ran it, after the rows of its results: a driver that dies
loses nothing that has ended. A run whose row and results are stored is never run again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from raykernel.commands import Key, execute, keys_of, read_rows, show
from raykernel.compose import ComposedRun
from raykernel.compute.trouble import of_memory
from raykernel.config import Json, RunConfig, fingerprint, plain
from raykernel.console import Screen
from raykernel.errors import (
    DivergedError,
    InputError,
    NonFiniteError,
    OutOfMemoryError,
    RaykernelError,
    WorkerLostError,
    storage_full,
)
from raykernel.location import is_remote, location
from raykernel.problem.adapter_config import with_adapter
from raykernel.space import Point
from raykernel.store.blocks import Store
from raykernel.store.results import to_json
from raykernel.store.trials import checksum
from raykernel.study import Row
from raykernel.terms import Cause, Command, ExecutorName, PromptStyle, RunStatus
from raykernel.training.spec import Watch

_NOT_OF_A_RUN = ("compute", "store", "sweep")
"""Groups that say how and where it is run."""


@dataclass(frozen=True, slots=True)
class Run:
    """A point that can be run anywhere that sees the store."""

    study: str
    point: Point
    composed: ComposedRun
    id: str
    """Hash of the command, its configuration and the content of the files that this names."""

    @property
    def kernel(self) -> str:
        """The same for runs that share a kernel."""
        config = self.composed.config
        shared = (config.task, config.prompt, config.model, config.parameters, config.kernel)
        return fingerprint([plain(part) for part in shared])

    @property
    def nest(self) -> str:
        """The same for runs whose kernels differ in k alone, so that the largest holds the others.

        A linear probe is fitted to the sample: without a prompt no kernel holds another.
        """
        config = self.composed.config
        if config.prompt.style is PromptStyle.none:
            return self.kernel
        task = replace(config.task, k=1)
        shared = (task, config.prompt, config.model, config.parameters, config.kernel)
        return fingerprint([plain(part) for part in shared])

    @property
    def wants_test(self) -> bool:
        """Whether it wants the kernel of test with train, and may have it with other samples."""
        config, command = self.composed.config, self.point.command
        if config.prompt.style is PromptStyle.none or config.store.kernel is not None:
            return False
        stores = not config.kernel.predicts or config.needs_both_sides
        return command is Command.behavior or (command is Command.kernel and stores)

    def inline(self) -> Run:
        """The same in one process: a worker of ours computes itself, on the device it was given."""
        config = self.composed.config
        compute = replace(config.compute, executor=ExecutorName.inline, workers=1, address=None)
        store = replace(config.store, path=str(location(config.store.path)))
        config = replace(config, compute=compute, store=store)
        return replace(self, composed=replace(self.composed, config=config))


def make_run(study: str, point: Point, composed: ComposedRun | None = None) -> Run:
    """Name a point.

    Args:
        study: whose it is.
        point: what to run.
        composed: its configuration, if that is known.

    Returns:
        The run.
    """
    composed = composed or point.compose()
    config = composed.config
    tree = plain(config)
    assert isinstance(tree, dict), "a dataclass"
    identity: dict[str, Json] = {k: v for k, v in tree.items() if k not in _NOT_OF_A_RUN}
    # The settings of a trial are in its name with their meaning, not only with their spelling:
    # a file that has changed is another run.
    identity |= {"command": point.command.value, "files": _contents(config)}
    return Run(study, point, composed, fingerprint(identity))


def _contents(config: RunConfig) -> list[Json]:
    """Hashes of the local files that a configuration names; a remote adapter as it is."""
    task = config.task
    lmbff = str(Path(task.data_dir, task.lmbff_folder or "")) if task.data_dir else None
    adapter = config.parameters.adapter
    named = [task.train, task.test, lmbff, adapter, config.model.name]
    found: list[Json] = []
    if adapter is not None and is_remote(adapter):
        named.remove(adapter)
        found.append(with_adapter(config.parameters).adapter)
    for path in (Path(name).expanduser() for name in named if name):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                about = file.stat()
                found.append([file.name, _checksum(file, about.st_size, about.st_mtime_ns)])
    return found


@lru_cache(maxsize=4096)
def _checksum(path: Path, size: int, changed: int) -> str:
    """Of a file as it is: read once per process, whatever number of runs names it."""
    del size, changed
    return checksum(path)


# ------------------------------------------------------------------ how it ended


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended, now or before."""

    run: Run
    status: RunStatus
    cause: Cause | None = None
    error: str = ""
    """What was said of a failure."""
    keys: Sequence[Key] = ()
    """Where its results lie."""
    seconds: float = 0.0
    was_stored: bool = False
    """It had ended before."""
    printed: str = ""
    """What its command prints, if that was asked for."""
    notes: Sequence[str] = ()
    trace: str = ""
    """Of an unforeseen error."""

    @property
    def text(self) -> str:
        """One line of what went wrong."""
        return (self.error.splitlines() or [""])[0]


def store_of(run: Run) -> Store:
    """The store that a run writes to."""
    return Store(run.composed.config.store.path)


def write_down(ended: Ended) -> None:
    """Commit the row of a run."""
    run = ended.run
    store_of(run).write_result(
        "runs",
        {
            "study": run.study,
            "run": run.id,
            "arm": run.point.arm,
            "command": run.point.command.value,
            "status": ended.status.value,
            "cause": None if ended.cause is None else ended.cause.value,
            "error": ended.error or None,
            "results": to_json(list(map(list, ended.keys))),
            "seconds": ended.seconds,
            "overrides": list(run.point.overrides),
        },
    )


def stored(run: Run, *, retry_failed: bool) -> Ended | None:
    """How a run ended before.

    Args:
        run: which.
        retry_failed: failures do not count.

    Returns:
        None if it has to be run: never ended, its results are gone, or its failure was none of
        its own.
    """
    ended = recalled(run)
    if ended is None:
        return None
    if ended.status is RunStatus.failed:
        own = ended.cause is not None and ended.cause.is_of_the_run
        return ended if own and not retry_failed else None
    gone = ended.status is RunStatus.ok and read_rows(store_of(run), ended.keys) is None
    return None if gone else ended


def recalled(run: Run) -> Ended | None:
    """What the store says of a run.

    Args:
        run: which.

    Returns:
        How it ended; None if it never did.
    """
    rows = store_of(run).rows("runs", study=run.study, run=run.id)
    if not rows:
        return None
    (row,) = rows
    return Ended(
        run,
        RunStatus(row["status"]),
        None if row["cause"] is None else Cause(row["cause"]),
        row["error"] or "",
        [(table, key) for table, key in json.loads(row["results"])],
        row["seconds"],
        was_stored=True,
    )


def rows_of(ended: Ended) -> list[Row]:
    """Its rows in the result tables, with `arm` beside; none of a failure."""
    rows = read_rows(store_of(ended.run), ended.keys) or []
    return [{**row, "arm": ended.run.point.arm} for row in rows]


# ------------------------------------------------------------------ doing it


class Recorder(Screen):
    """The screen of a process that nobody looks at: it keeps results and notes for another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out.file = io.StringIO()
        self.out.width = width
        self.err.file = io.StringIO()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)

    def aside(self, text: str) -> None:
        """Nothing."""

    @property
    def printed(self) -> str:
        """What was printed as a result."""
        file = self.out.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()


@dataclass(slots=True)
class Runner:
    """Does runs in this process: what a worker of a study is."""

    screen: Screen | None = None
    """None: nobody looks at this process."""
    shows: bool = False
    """Print what the command prints."""
    width: int = 100
    deadline: float | None = None
    """Time (s since the epoch) after which none begins."""
    retry_failed: bool = False
    """Do what failed before by itself again."""
    watch: Watch | None = None
    """Told of every evaluation of a run that trains."""
    begin: Callable[[Run], None] | None = None
    """Told of a run that begins, where a person looks at this process."""
    folder: str = field(default_factory=os.getcwd)
    """That relative paths begin in."""

    def __call__(self, runs: tuple[Run, ...]) -> list[Ended]:
        """Do runs, one after the other.

        Args:
            runs: which; one that another worker has ended in the meantime is not done again.

        Returns:
            How they ended; those that the deadline has left out are not there.
        """
        return list(self.each(runs))

    def each(self, runs: tuple[Run, ...]) -> Iterator[Ended]:
        """The same, one by one."""
        for run in runs:
            if not self.is_late:
                yield self.do(run)

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.time() > self.deadline

    def do(self, run: Run) -> Ended:
        """Do one run and write down how it ended.

        Args:
            run: which.

        Returns:
            How it ended; now, or in a process that died before it could say so.
        """
        with contextlib.suppress(OSError):  # a node may lack the folder, and need none
            os.chdir(self.folder)
        if not self.shows and (before := stored(run, retry_failed=self.retry_failed)):
            return before
        screen = self.screen or Recorder(self.width)
        if self.begin is not None:
            self.begin(run)
        run = run if self.screen is not None else run.inline()
        start = time.monotonic()
        ended = self._ended(run, screen)
        ended = replace(
            ended,
            seconds=time.monotonic() - start,
            printed=screen.printed if isinstance(screen, Recorder) else "",
            notes=tuple(screen.notes) if isinstance(screen, Recorder) else (),
        )
        write_down(ended)
        return ended

    def _ended(self, run: Run, screen: Screen) -> Ended:
        command = run.point.command
        try:
            outcome = execute(command, run.composed, screen, self.watch)
            keys = keys_of(command, outcome, run.composed)
            if self.shows:
                show(command, outcome, screen)
        except Exception as error:
            # Not of this run: there is none that could write down what it finds.
            if full := storage_full(error):
                raise full from error
            return failure(run, error)
        return Ended(run, RunStatus.ok, keys=keys)


def failure(run: Run, error: Exception) -> Ended:
    """How a run ended that raised.

    Args:
        run: which.
        error: what it raised.

    Returns:
        Its end; of an unforeseen error with the traceback.
    """
    cause = cause_of(error)
    if isinstance(error, RaykernelError):
        return Ended(run, RunStatus.failed, cause, str(error) or type(error).__name__)
    trace = "".join(traceback.format_exception(error))
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Ended(run, RunStatus.failed, cause, text, trace=trace)


def cause_of(error: Exception) -> Cause:
    """The kind of a failure."""
    kinds: list[tuple[type[Exception] | tuple[type[Exception], ...], Cause]] = [
        ((DivergedError, NonFiniteError), Cause.diverged),
        ((OutOfMemoryError, MemoryError), Cause.memory),
        (WorkerLostError, Cause.memory if of_memory(error) else Cause.lost),
        (InputError, Cause.input),
    ]
    for classes, cause in kinds:
        if isinstance(error, classes):
            return cause
    return Cause.memory if type(error).__name__ == "OutOfMemoryError" else Cause.error
