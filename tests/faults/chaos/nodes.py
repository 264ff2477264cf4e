"""A Ray cluster on this machine whose nodes die and are replaced.

A head without CPUs and some raylets of one CPU. All their processes, and those of drivers, work
below one folder, and are told from everybody else's by that: titles that Ray gives to its
processes take the place of their environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

_MEMORY = 100 * 2**20
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_IDLE = ("ray::IDLE", "default_worker.py")

HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 4,
}
"""A dead node is noticed after 2 s; Ray's default takes 15 s."""


class Nodes:
    """The cluster; a context, whose end leaves no process.

    Args:
        folder: that its processes work below; nobody else's may.
        count: raylets beside the head's.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self._folder = folder.resolve()
        self._count = count
        self._absent: list[float] = []
        """When a raylet will take the place of one that died."""

    def __enter__(self) -> Nodes:
        with contextlib.ExitStack() as stack:
            # Sockets lie there: their names must be short, and nobody's `auto` may find them.
            self._scratch = tempfile.mkdtemp(prefix="rk", dir="/tmp")
            stack.callback(shutil.rmtree, self._scratch, ignore_errors=True)
            root = str(Path(__file__).resolve().parents[3])
            stack.enter_context(
                _environment(
                    RAY_TMPDIR=self._scratch,
                    RAY_AUTH_MODE="disabled",
                    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
                    RAY_USAGE_STATS_ENABLED="0",
                    RAY_worker_niceness="0",  # else a loaded machine starves the workers alone
                    PYTHONPATH=root,
                    OMP_NUM_THREADS="1",
                )
            )
            from ray.cluster_utils import Cluster

            head = {"num_cpus": 0, "object_store_memory": _MEMORY, "_system_config": HEALTH}
            quiet = {"include_dashboard": False, "include_log_monitor": False}
            with _inside(self._folder):
                self._cluster = Cluster(initialize_head=True, head_node_args=head | quiet)
            stack.callback(self._cluster.shutdown)
            self._nodes = [self._add() for _ in range(self._count)]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """Where drivers join."""
        return str(self._cluster.address)

    # ------------------------------------------------------------ dying

    def kill_worker(self, choice: float) -> str | None:
        """SIGKILL to an actor; a worker that starts if there is none. None: there is neither."""
        found = [one for node in self._nodes for one in _children(node) if not _is(one, _AGENTS)]
        found = [one for one in found if not _is(one, _IDLE)] or found
        if not found:
            return None
        chosen = found[int(choice * len(found))]
        with contextlib.suppress(psutil.NoSuchProcess):
            title = _title(chosen)
            chosen.send_signal(signal.SIGKILL)
            return title
        return None

    def kill_raylet(self, choice: float, back_at: float) -> str:
        """SIGKILL to a node's raylet, on which its workers end; another one comes later."""
        node = self._nodes.pop(int(choice * len(self._nodes)))
        doomed = len(_children(node)) - len(_AGENTS)
        self._cluster.remove_node(node, allow_graceful=False)
        self._absent.append(back_at)
        return f"raylet with {max(doomed, 0)} workers"

    @property
    def has_raylets(self) -> bool:
        """Whether one is there to be killed."""
        return bool(self._nodes)

    def replace(self, now: float = float("inf")) -> None:
        """Start raylets whose time has come."""
        for due in [due for due in self._absent if due <= now]:
            self._absent.remove(due)
            self._nodes.append(self._add())

    def _add(self) -> Any:
        with _inside(self._folder):
            # Whoever wants to run on it waits for it; here a loaded machine would be an error.
            return self._cluster.add_node(
                wait=False, num_cpus=1, object_store_memory=_MEMORY, include_log_monitor=False
            )

    # ------------------------------------------------------------ who is left

    def strays(self) -> list[str]:
        """Processes below the folder that are neither the cluster's own nor idle in it."""
        own = {
            info.process.pid
            for node in self._cluster.list_all_nodes()
            for infos in node.all_processes.values()
            for info in infos
        }
        found = []
        for process in processes_below(self._folder):
            with contextlib.suppress(psutil.Error):
                is_service = process.ppid() in own and _is(process, (*_AGENTS, *_IDLE))
                if process.pid not in own and not is_service:
                    found.append(f"{process.pid} {_title(process)}")
        return found


def processes_below(folder: Path) -> Iterator[psutil.Process]:
    """Processes other than this one whose working folder is a folder, or below it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            here = Path(process.cwd())
            if folder in [here, *here.parents] and process.pid != os.getpid():
                yield process


def _children(node: Any) -> list[psutil.Process]:
    (info,) = node.all_processes["raylet"]
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(info.process.pid).children()
    return []


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline()).strip()[-200:]


def _is(process: psutil.Process, titles: tuple[str, ...]) -> bool:
    with contextlib.suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return any(title in line for title in titles)
    return False


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
