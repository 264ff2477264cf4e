"""Files for clusters against the schemas of those who read them, and against each other.

Ray ships the schema of `ray up`. KubeRay's is in no Python package: its fields stand below as
https://docs.ray.io/en/master/cluster/kubernetes/references/api.html lists them (KubeRay 1.6).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from raykernel.cli import main

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "cluster"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
KUBERAY = {
    "RayCluster": {
        "rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list,
        "enableInTreeAutoscaling": bool, "autoscalerOptions": dict, "suspend": bool,
        "headServiceAnnotations": dict, "gcsFaultToleranceOptions": dict, "managedBy": str,
    },
    "RayJob": {
        "entrypoint": str, "rayClusterSpec": dict, "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int, "backoffLimit": int, "activeDeadlineSeconds": int,
        "submissionMode": str, "submitterPodTemplate": dict, "submitterConfig": dict,
        "clusterSelector": dict, "runtimeEnvYAML": str, "jobId": str, "metadata": dict,
        "entrypointNumCpus": float, "entrypointNumGpus": float, "entrypointResources": str,
        "suspend": bool, "managedBy": str, "deletionStrategy": dict,
    },
    "authOptions": {"mode": str, "secretName": str, "enableK8sTokenAuth": bool},
    "headGroupSpec": {
        "rayStartParams": dict, "template": dict, "serviceType": str, "headService": dict,
        "enableIngress": bool, "resources": dict, "labels": dict,
    },
    "workerGroupSpecs": {
        "groupName": str, "rayStartParams": dict, "template": dict, "replicas": int,
        "minReplicas": int, "maxReplicas": int, "numOfHosts": int, "suspend": bool,
        "scaleStrategy": dict, "idleTimeoutSeconds": int, "resources": dict, "labels": dict,
    },
}  # fmt: skip


def loaded(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def check_fields(kind: str, found: dict[str, Any]) -> None:
    """Every key is one of KubeRay's, and its value has that field's type."""
    for name, value in found.items():
        assert name in KUBERAY[kind], f"{kind} has no field {name}"
        assert type(value) is KUBERAY[kind][name], f"{kind}.{name}: {value!r}"


def kuberay_cluster(name: str) -> dict[str, Any]:
    spec = loaded(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def containers(name: str) -> Iterable[dict[str, Any]]:
    spec = kuberay_cluster(name)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield from group["template"]["spec"]["containers"]


def base_versions() -> tuple[str, str]:
    """Ray and Python of the image that ours is made from."""
    found = re.search(r"^ARG BASE=rayproject/ray:([\d.]+)-py(\d)(\d+)-cpu$", DOCKERFILE, re.M)
    assert found is not None
    return found[1], f"{found[2]}.{found[3]}"


KUBERAY_FILES = ["kuberay-cluster.yaml", "kuberay-job.yaml"]

# ------------------------------------------------------------------ versions and images


def test_every_file_has_the_ray_python_and_image_of_the_dockerfile():
    ray, python = base_versions()
    (needed,) = [Requirement(t) for t in re.findall(r'"(ray\[.*?)"', PYPROJECT) if "tune" in t]
    assert ray in needed.specifier
    supported = re.search(r'requires-python = "(.*)"', PYPROJECT)
    assert supported is not None
    assert python in SpecifierSet(supported[1])
    version = re.search(r'^version = "(.*)"', PYPROJECT, re.M)
    assert version is not None
    image = f"registry.example.com/raykernel:{version[1]}"
    assert f"docker build -t {image} .\n" in DOCKERFILE
    assert loaded("ray-cluster.yaml")["docker"]["image"] == image
    for name in KUBERAY_FILES:
        assert kuberay_cluster(name)["rayVersion"] == ray
        assert {container["image"] for container in containers(name)} == {image}


# ------------------------------------------------------------------ ray up


def test_ray_up_accepts_its_file():
    """Ray's own reading: its schema, no key besides, defaults of the provider filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(loaded("ray-cluster.yaml")))
    with pytest.raises(Exception, match="another"):
        validate_config(prepare_config({**loaded("ray-cluster.yaml"), "another": 1}))


def test_ray_up_gives_all_nodes_token_store_and_a_dashboard_on_loopback():
    config = loaded("ray-cluster.yaml")
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAYKERNEL_STORE=/shared/store" in options
    assert any(option.endswith(":/shared") for option in options)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert config["head_node_type"] in config["available_node_types"]


# ------------------------------------------------------------------ KubeRay


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_knows_every_field(name):
    top = loaded(name)
    assert top["apiVersion"] == "ray.io/v1"
    check_fields(top["kind"], top["spec"])
    spec = kuberay_cluster(name)
    check_fields("RayCluster", spec)
    check_fields("authOptions", spec["authOptions"])
    for kind in ("headGroupSpec", "workerGroupSpecs"):
        groups = spec[kind] if kind.endswith("s") else [spec[kind]]
        for group in groups:
            check_fields(kind, group)
            assert all(type(value) is str for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_pods_have_a_token_no_root_and_one_folder(name):
    spec = kuberay_cluster(name)
    assert spec["authOptions"] == {"mode": "token"}
    claim = loaded("kuberay-volume.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 100}
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for container in containers(name):
        (mount,) = container["volumeMounts"]
        places = {one["name"]: one["value"] for one in container["env"]}
        assert mount["name"] == volume["name"]
        assert all(place.startswith(mount["mountPath"] + "/") for place in places.values())
        assert set(places) == {"RAYKERNEL_STORE", "XDG_CACHE_HOME"}
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_kuberay_job_runs_a_study_that_exists_and_ends_its_cluster(capsys):
    job = loaded("kuberay-job.yaml")["spec"]
    program, *words = shlex.split(job["entrypoint"])
    assert program == "raykernel"
    assert main([*words, "--help"]) == 0
    assert "compute=ray compute.address=auto" in " ".join(capsys.readouterr().out.split())
    assert job["shutdownAfterJobFinishes"] is True
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert f"compute.workers={group['replicas'] * cpus}" in words


# ------------------------------------------------------------------ SLURM

RECORDER = """#!/usr/bin/env bash
echo "$(basename "$0") ${RAY_AUTH_MODE:-} ${#RAY_AUTH_TOKEN} $*" >> "$RECORD"
"""
# The script ends its steps when raykernel ends: it has to last until they have been called.
LASTING = RECORDER + 'until [ "$(grep -c "ray start" "$RECORD")" = 3 ]; do sleep 0.1; done\n'
SCONTROL = "#!/usr/bin/env bash\nprintf 'n1\\nn2\\nn3\\n'\n"
SRUN = '#!/usr/bin/env bash\n[[ "$*" == *hostname* ]] && echo 10.0.0.1 fe80::1 && exit\n'


def test_the_slurm_script_starts_a_head_and_workers_that_share_a_token(tmp_path):
    """SLURM's commands are replaced by ones that write down how they were called."""
    programs = {
        "scontrol": SCONTROL,
        "srun": SRUN + RECORDER.partition("\n")[2],
        "ray": RECORDER,
        "raykernel": LASTING,
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    record = tmp_path / "record"
    path = os.pathsep.join([f"{tmp_path}/bin", str(Path(sys.executable).parent), "/usr/bin:/bin"])
    slurm = {
        "SLURM_JOB_ID": "70012", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path), "RECORD": str(record), "PATH": path,
    }  # fmt: skip
    command = ["bash", CLUSTER / "slurm.sh", "sweep", "table2", "compute.workers=24"]
    subprocess.run(command, check=True, env=slurm, timeout=120)
    calls = record.read_text().splitlines()
    assert all(re.match(r"\w+ token 64 ", call) for call in calls), calls
    starts = {call for call in calls if call.startswith("srun")}
    heads = {call for call in starts if "--head" in call}
    (head,) = heads
    assert "--nodelist=n1 ray start" in head
    assert "--node-ip-address=10.0.0.1 --port=20012" in head
    for node in ("n2", "n3"):
        (start,) = [call for call in starts - heads if f"--nodelist={node} " in call]
        assert start.endswith("--address=10.0.0.1:20012")
    own = "sweep table2 compute.workers=24 compute=ray compute.address=10.0.0.1:20012"
    assert f"raykernel token 64 {own}" in calls


# ------------------------------------------------------------------ linters


def linter(name: str) -> str:
    found = shutil.which(
        name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    return found or pytest.skip(f"needs {name} on PATH")


def test_shellcheck_finds_nothing_in_the_slurm_script():
    subprocess.run([linter("shellcheck"), CLUSTER / "slurm.sh"], check=True)


def test_hadolint_finds_nothing_in_the_dockerfile():
    subprocess.run([linter("hadolint"), ROOT / "Dockerfile"], check=True)


# ------------------------------------------------------------------ Dockerfile


def test_the_image_is_as_kuberay_needs_it():
    """User by number, no ENTRYPOINT, wget kept, Ray kept: our wheel comes without dependencies."""
    lines = re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    instructions = [line for line in lines if line and not line.startswith("#")]
    names = [line.split()[0] for line in instructions]
    assert set(names) <= {"ARG", "FROM", "USER", "COPY", "RUN", "ENV", "WORKDIR", "CMD"}
    assert [line for line in instructions if line.startswith("USER")] == ["USER 1000:100"]
    runs = [line for line in instructions if line.startswith("RUN")]
    assert not any(re.search(r"apt|remove|purge|sudo", line) for line in runs)
    installs = [line for line in runs if "pip install" in line]
    assert len(installs) == 2
    assert re.search(r"pip install .* -c /tmp/needed/constraints\.txt$", installs[0])
    assert "--no-deps" in installs[1]
    for folder in re.findall(r"COPY --chown=1000:100 (\w+) /tmp/source/", DOCKERFILE):
        assert (ROOT / folder).is_dir()
    packed = re.findall(r'^"(\w+)" = "raykernel/', PYPROJECT, re.M)
    assert all(f"COPY --chown=1000:100 {folder} /tmp/source/" in DOCKERFILE for folder in packed)
