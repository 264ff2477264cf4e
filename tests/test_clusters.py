"""Real clusters on this machine: a job handed in, versions compared, and SLURM's script.

Ray's processes live in a folder of their own, so that nobody else's `auto` finds them, and end
with the object or the process group that started them: `ray stop` would end everybody's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raykernel.cli import main
from raykernel.store.blocks import Store
from tests import tiny

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def ray_folder(patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this module's Ray keeps sockets, whose names must be short, and its address."""
    folder = Path(tempfile.mkdtemp(prefix="rk", dir="/tmp"))
    patch.setenv("RAY_TMPDIR", str(folder))
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def made_cluster(ray_folder: Path, patch: pytest.MonkeyPatch):
    """A head with a dashboard, which listens on loopback."""
    patch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    store = 100 * 2**20
    head = {
        "num_cpus": 2,
        "object_store_memory": store,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": 0,
        "dashboard_agent_listen_port": None,  # any; the default may be another Ray's
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def test_a_submitted_job_computes_a_kernel(made_cluster, model, here):
    """README's `ray job submit`, on a tiny model; the job joins the cluster that runs it."""
    places = {"store__path": str(here / "store"), "task__train": str(here / "reviews.tsv")}
    arguments = tiny.overrides(model, **places)
    words = [sys.executable, "-m", "raykernel", "kernel", *arguments]
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    command = [
        *(*submit, "--address", f"http://{made_cluster.webui_url}", "--", *words),
        *("compute=ray", "compute.address=auto", "compute.workers=1"),
    ]
    for _ in range(12):  # the agent that starts jobs comes up after the dashboard
        run = subprocess.run(command, capture_output=True, text=True, timeout=400)
        if "No available agent" not in run.stderr:
            break
    assert run.returncode == 0, run.stdout + run.stderr
    assert "succeeded" in run.stdout + run.stderr
    (row,) = Store(here / "store").results("kernels").to_pylist()
    assert row["num_train"] == 6
    assert f"{row['kernel_regression']:.3f}" in run.stdout


SHIMS = {
    "scontrol": "printf 'n1\\nn2\\n'",
    "srun": """while [[ $1 == --* ]]; do shift; done
if [ "$1" = hostname ]; then echo "$ADDRESS"; else exec "$@"; fi""",
    "ray": f'exec {sys.executable} -m ray.scripts.scripts "$@"',
    "raykernel": f"""ask=(ray health-check --address "${{!#/*=/}}")
"${{ask[@]}}" && echo "let in: job's token"
RAY_AUTH_TOKEN=wrong "${{ask[@]}}" && echo "let in: another token"
RAY_AUTH_MODE=disabled "${{ask[@]}}" && echo "let in: no token"
exec {sys.executable} -m raykernel "$@\"""",
}


def test_the_slurm_script_computes_a_kernel_on_two_nodes_that_ask_for_a_token(
    ray_folder, model, here, monkeypatch
):
    """All of it is real but SLURM: `srun` runs its command here, for both nodes."""
    import ray

    (here / "bin").mkdir()
    for name, text in SHIMS.items():
        (here / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (here / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ADDRESS", ray.util.get_node_ip_address())
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(here))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    arguments = tiny.overrides(model, store__path=None)
    command = ["bash", ROOT / "cluster" / "slurm.sh", "kernel", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [line for line in run.stdout.splitlines() if "let in" in line] == ["let in: job's token"]
    (row,) = Store(here / "raykernel-store").results("kernels").to_pylist()
    assert f"{row['kernel_regression']:.3f}" in run.stdout


def test_doctor_names_the_node_with_other_versions(
    made_cluster, model, here, tmp_path, patch, capsys
):
    """The added node finds another transformers; before, all nodes are as here."""
    joined = {"compute": "ray", "compute__address": made_cluster.address, "compute__workers": "1"}
    arguments = ["doctor", *tiny.overrides(model, **joined)]
    assert main(arguments) == 0
    assert "1 node, all with Ray" in " ".join(capsys.readouterr().out.split())
    other = tmp_path / "site" / "transformers-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    patch.setenv("PYTHONPATH", f"{other.parent}{os.pathsep}{ROOT}")
    node = made_cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    try:
        assert main(arguments) == 2
        read = capsys.readouterr()
        assert "has transformers 0.0.1 (here" in " ".join(read.out.split())
        assert "checks failed: cluster" in read.err
    finally:
        made_cluster.remove_node(node)
