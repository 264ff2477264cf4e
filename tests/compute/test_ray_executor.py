"""Real faults: processes that exit, are killed, never start, or lose their driver."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from raykernel.compute.address import check_address
from raykernel.config import ComputeConfig
from raykernel.errors import InputError, RunError, WorkerLostError
from tests.compute.toy_workers import Toy

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_instance")]

ROOT = Path(__file__).parents[2]


Executors = Callable[..., Any]


@pytest.fixture
def executor() -> Iterator[Executors]:
    """Makes executors on the one Ray instance, whose actors end with the test."""
    from raykernel.compute.ray_executor import RayExecutor

    with contextlib.ExitStack() as stack:

        def make(
            compute: ComputeConfig, say: Callable[[str], None] = print, *, alike: bool = True
        ) -> RayExecutor:
            made = RayExecutor(compute, say=say, alike=alike)
            return stack.enter_context(contextlib.closing(made))

        yield make


def test_a_job_whose_worker_exits_is_done_by_another(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    toy, said = Toy(str(tmp_path)), []
    outcomes = {o.job: o for o in executor(ray_compute, said.append).run(toy.die_once, range(12))}
    assert {job: outcome.value() for job, outcome in outcomes.items()} == {
        job: job**2 for job in range(12)
    }
    assert toy.count("ran-3") == 2
    # One job is charged with the death; those that waited behind it are not.
    assert sorted(outcome.attempts for outcome in outcomes.values()) == [1] * 11 + [2]
    assert len(said) == 1
    assert said[0].startswith("A worker died (ActorDiedError: Worker unexpectedly exits")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_kills_every_worker_is_given_up(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path, workers: int
) -> None:
    toy = Toy(str(tmp_path))
    compute = dataclasses.replace(ray_compute, workers=workers)
    outcomes = {o.job: o for o in executor(compute).run(toy.die_always, range(8))}
    assert outcomes[3].attempts == compute.max_attempts
    # Once more, if the first death was laid to the job before it, whose answer was lost.
    assert toy.count("ran-3") - compute.max_attempts in {0, 1}
    with pytest.raises(WorkerLostError, match=r"3 was tried 3 times.*lower compute\.memory_gb"):
        outcomes.pop(3).value()
    assert {job: outcome.value() for job, outcome in outcomes.items()} == {
        job: job**2 for job in range(8) if job != 3
    }


def test_a_worker_killed_from_outside_is_replaced(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    toy = Toy(str(tmp_path))
    outcomes = executor(ray_compute).run(toy.slow, range(8))
    values = [next(outcomes).value()]
    running = next(iter(tmp_path.glob("ran-*"))).read_text().split()[0]
    os.kill(int(running), signal.SIGKILL)
    values += [outcome.value() for outcome in outcomes]
    assert sorted(values) == [job**2 for job in range(8)]


# ------------------------------------------------------------------ hanging and slow


def test_a_worker_that_stands_still_is_replaced(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    """Ray itself never notices. Jobs that are not alike have no limit but the signs of life."""
    toy, said = Toy(str(tmp_path)), []
    compute = dataclasses.replace(ray_compute, heartbeat_seconds=8.0)
    made = executor(compute, said.append, alike=False)
    outcomes = {o.job: o for o in made.run(toy.freeze_once, range(6))}
    assert {job: outcome.value() for job, outcome in outcomes.items()} == {
        job: job**2 for job in range(6)
    }
    frozen, other = Path(tmp_path, "ran-3").read_text().split()
    assert frozen != other
    # One job is charged with the loss; those that waited behind it are not.
    assert sorted(outcome.attempts for outcome in outcomes.values()) == [1] * 5 + [2]
    (text,) = [text for text in said if "hung" in text]
    assert text.startswith("A worker hung (no sign of life for ")
    assert "raise compute.heartbeat_seconds" in text
    wait_for(lambda: not psutil.pid_exists(int(frozen)), seconds=60)


def test_a_job_that_never_ends_is_done_by_another(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    toy, said = Toy(str(tmp_path)), []
    compute = dataclasses.replace(ray_compute, job_seconds=6.0)
    made = executor(compute, said.append, alike=False)
    outcomes = {o.job: o for o in made.run(toy.sleep_once, range(6))}
    assert {job: outcome.value() for job, outcome in outcomes.items()} == {
        job: job**2 for job in range(6)
    }
    assert toy.count("ran-3") == outcomes[3].attempts == 2
    (text,) = [text for text in said if "hung" in text]
    assert "no answer for" in text
    assert "raise compute.job_seconds if one job may take as long" in text


def test_a_job_that_hangs_every_worker_is_given_up(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    compute = dataclasses.replace(ray_compute, job_seconds=4.0, max_attempts=2)
    made = executor(compute, alike=False)
    outcomes = {o.job: o for o in made.run(Toy(str(tmp_path)).sleep_always, range(6))}
    with pytest.raises(WorkerLostError, match=r"3 was tried 2 times, each time its worker hung"):
        outcomes.pop(3).value()
    assert {job: outcome.value() for job, outcome in outcomes.items()} == {
        job: job**2 for job in (0, 1, 2, 4, 5)
    }


def test_a_slow_workers_jobs_are_done_by_an_idle_one(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    """It would finish none before the other one has done all six."""
    toy = Toy(str(tmp_path))
    outcomes = list(executor(ray_compute).run(toy.one_slow, range(6)))
    assert sorted(outcome.value() for outcome in outcomes) == [job**2 for job in range(6)]
    assert 1 <= sum(toy.count(f"ran-{job}") == 2 for job in range(6)) <= 2


def test_workers_that_die_while_they_start_end_the_run(
    executor: Executors, ray_compute: ComputeConfig
) -> None:
    with pytest.raises(WorkerLostError, match="3 workers in a row died before they had loaded"):
        list(executor(ray_compute).run(Toy().die_at_start, range(4)))


def test_no_worker_gets_two_jobs_while_another_starts(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    outcomes = list(executor(ray_compute).run(Toy(str(tmp_path)).uneven, range(2)))
    assert len({outcome.value() for outcome in outcomes}) == 2


def test_a_result_that_cannot_travel_fails_its_job_alone(
    executor: Executors, ray_compute: ComputeConfig
) -> None:
    outcomes = {o.job: o for o in executor(ray_compute).run(Toy().unpicklable, range(5))}
    with pytest.raises(RunError, match="cannot pickle"):
        outcomes.pop(3).value()
    assert outcomes[4].value() == 16


def test_a_worker_in_a_ring_of_references_is_gone_before_the_next_one_is_made(
    executor: Executors, ray_compute: ComputeConfig
) -> None:
    made = executor(dataclasses.replace(ray_compute, workers=1))
    runs = [{o.value() for o in made.run(Toy().hold_in_a_ring, range(3))} for _ in range(2)]
    assert runs[0] == runs[1]
    assert {held for _, held in runs[0]} == {1}


def test_actors_that_die_between_two_runs_are_replaced(
    executor: Executors, ray_compute: ComputeConfig
) -> None:
    """They count as no failed start, which `max_attempts=1` would not forgive."""
    made = executor(dataclasses.replace(ray_compute, max_attempts=1))
    first = {outcome.value()[0] for outcome in made.run(Toy().hold, range(8))}
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    again = {outcome.value()[0] for outcome in made.run(Toy().hold, range(8))}
    assert again.isdisjoint(first)


def test_actors_that_still_work_end_with_their_run_and_idle_ones_with_the_executor(
    executor: Executors, ray_compute: ComputeConfig, tmp_path: Path
) -> None:
    made, toy = executor(ray_compute), Toy(str(tmp_path))
    idle = {outcome.value() for outcome in made.run(toy.meet, range(8))}
    outcomes = made.run(toy.slow, range(50))
    next(outcomes)
    outcomes.close()
    working = {int(pid) for path in tmp_path.glob("ran-*") for pid in path.read_text().split()}
    assert working <= idle
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in working), seconds=20)
    last = {outcome.value()[0] for outcome in made.run(toy.hold, range(8))}
    assert last.isdisjoint(working)
    made.close()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in last), seconds=20)


def test_resources_that_no_node_has_are_refused(
    executor: Executors, ray_compute: ComputeConfig
) -> None:
    compute = dataclasses.replace(ray_compute, num_gpus=1.0)
    made = executor(compute)
    made._local = True
    with pytest.raises(InputError, match=r"asks for 1 CPU and 1 GPU, and no node .* 0 GPU"):
        next(made.run(Toy().start, range(3)))


@pytest.mark.parametrize(("device", "num_gpus"), [("cuda:1", 1.0), ("cuda", 0.0)])
def test_devices_that_ray_hides_are_refused(
    executor: Executors, ray_compute: ComputeConfig, device: str, num_gpus: float
) -> None:
    compute = dataclasses.replace(ray_compute, device=device, num_gpus=num_gpus)
    with pytest.raises(InputError, match=r"compute.device.*Set compute\."):
        executor(compute)


def test_the_callers_instance_is_left_running(
    executor: Executors, ray_compute: ComputeConfig
) -> None:
    import ray

    executor(ray_compute).close()
    assert ray.is_initialized()


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head", "head:x"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"expected auto or HOST:PORT.*ray job submit"):
        check_address(address)


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match="nothing listens there"):
        check_address("127.0.0.1:1")
    assert time.monotonic() - start < 10


def test_a_listener_that_is_no_cluster_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raykernel.compute.address.ANSWER_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        with pytest.raises(InputError, match="no Ray cluster answered in 3 s"):
            check_address(f"{host}:{port}")


def test_a_cluster_that_answers_is_accepted() -> None:
    import ray

    check_address(ray.get_runtime_context().gcs_address)


# ------------------------------------------------------------------ drivers of their own


@contextlib.contextmanager
def driver(code: str, folder: Path, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """A process that starts a cluster of its own, and does not outlive what fails around it."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    path = os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=environ | {"PYTHONPATH": path, "HOME": str(folder)} | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


ENDLESS = """
import os
import ray
import sys
from pathlib import Path
from tests.compute.toy_workers import Toy
from raykernel.compute.ray_executor import RayExecutor
from raykernel.config import ComputeConfig
from raykernel.terms import ExecutorName
executor = RayExecutor(ComputeConfig(executor=ExecutorName.ray))
place = ray.get_runtime_context().gcs_address
Path(sys.argv[1], "cluster").write_text(f"{place} {os.environ['RAY_AUTH_TOKEN']}")
try:
    list(executor.run(Toy(sys.argv[1]).endless, range(2)))
finally:
    executor.close()
    print("closed", flush=True)
"""


@pytest.mark.parametrize(
    "name",
    [
        "SIGKILL",
        pytest.param("SIGINT", marks=pytest.mark.slow),
        pytest.param("SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_no_process_outlives_its_driver(tmp_path: Path, name: str) -> None:
    with driver(ENDLESS, tmp_path) as process:
        wait_for(lambda: (tmp_path / "running").exists(), seconds=60)
        others = psutil.Process(process.pid).children(recursive=True)
        worker = int((tmp_path / "running").read_text().split()[0])
        assert worker in {other.pid for other in others}
        if name == "SIGKILL":
            check_nobody_gets_in([psutil.Process(process.pid), *others], tmp_path)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
        assert process.returncode != 0
    if name != "SIGKILL":
        assert "closed" in out
    if name == "SIGINT":
        assert "KeyboardInterrupt" in err
    # Ray's own agents notice the loss of a killed driver after a minute; what computes, at once.
    wait_for(lambda: not any(alive(other) for other in others if other.pid == worker), seconds=20)
    if name != "SIGKILL":
        wait_for(lambda: not any(alive(other) for other in others), seconds=20)
    # Authentication was on, and Ray has left no token in the home directory.
    assert not (tmp_path / ".ray").exists()


def check_nobody_gets_in(processes: list[psutil.Process], folder: Path) -> None:
    """Ray listens on loopback, where the token keeps other users of the machine out.

    A client without it is refused, no dashboard listens, and no port that speaks HTTP takes a job
    or a runtime environment, which are commands to run.
    """
    address, token = (folder / "cluster").read_text().split()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(folder),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else it looks for 127.0.0.1 elsewhere
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    clients = [
        subprocess.Popen(
            command, env=clean | own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for own in (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * len(token)},
            {"RAY_AUTH_MODE": "disabled"},
        )
    ]
    said = [client.communicate(timeout=120)[1].decode() for client in clients]
    assert [client.returncode == 0 for client in clients] == [True, False, False], said
    assert all("token" in text for text in said[1:])
    wait_for(lambda: any("Agent" in process.name() for process in processes), seconds=120)
    listening = {
        one.laddr
        for process in processes
        if alive(process)
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }
    assert {place.ip.removeprefix("::ffff:") for place in listening} == {"127.0.0.1"}
    ports = {place.port for place in listening}
    assert len(ports) > 3
    assert 8265 not in ports
    for port in ports:
        for path in ("/api/jobs/", "/api/job_agent/jobs/", "/get_or_create_runtime_env"):
            status = posted(f"http://127.0.0.1:{port}{path}")
            assert status in (None, 401, 404, 405)


def posted(url: str) -> int | None:
    """What a server answers to a request without a token; None if it speaks no HTTP."""
    try:
        with urlopen(Request(url, data=b"{}"), timeout=20) as answer:
            return int(answer.status)
    except HTTPError as refusal:
        # Holds the connection open until it is closed itself.
        with refusal:
            return refusal.code
    except (OSError, HTTPException):
        return None


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


LOST_NODE = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from tests.compute.toy_workers import Toy
from raykernel.compute.ray_executor import RayExecutor
from raykernel.config import ComputeConfig
from raykernel.terms import ExecutorName
fast = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200,
        "health_check_timeout_ms": 500, "health_check_failure_threshold": 3}
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 0, "object_store_memory": 100 * 2**20, "_system_config": fast})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
compute = ComputeConfig(executor=ExecutorName.ray, workers=2, address=cluster.address)
executor = RayExecutor(compute, say=lambda text: print("said", text))
outcomes = executor.run(Toy(sys.argv[1]).slow, range(16))
values = [next(outcomes).value() for _ in range(4)]
cluster.remove_node(nodes[0], allow_graceful=False)
print("said", "killed")
values += [outcome.value() for outcome in outcomes]
assert sorted(values) == [job**2 for job in range(16)], values
executor.close()
cluster.shutdown()
print("complete", flush=True)
"""


@pytest.mark.slow
def test_a_lost_node_costs_time_only(tmp_path: Path) -> None:
    with driver(LOST_NODE, tmp_path, RAY_AUTH_MODE="disabled") as process:
        out, err = process.communicate(timeout=120)
    assert "complete" in out, err[-3000:]
    assert "A worker died" in out
