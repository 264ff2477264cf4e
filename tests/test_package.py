"""The wheel carries conf/ and sweeps/ and works from any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's content in a folder of its own, as an installation lays it out."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_conf_and_sweeps_are_in_the_wheel(installed):
    for folder, pattern in [("conf", "*.yaml"), ("sweeps", "*")]:
        inside = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob(pattern)}
        packed = {
            p.relative_to(installed / "raykernel" / folder)
            for p in (installed / "raykernel" / folder).rglob(pattern)
        }
        assert {p for p in inside if "__pycache__" not in p.parts} == packed


def test_an_installed_wheel_composes_from_another_folder(installed, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "raykernel", "kernel", "--cfg", "job", "task.k=3"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "k: 3" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_commands_that_find_everything_stored_wait_for_no_heavy_library():
    """Ray, scikit-learn, models: imported where they are used, since they take seconds.

    PyTorch itself comes with the configurations of transformers.
    """
    code = """
import sys
import raykernel.behavior, raykernel.pipeline, raykernel.trials
heavy = "ray", "sklearn", "peft", "transformers.modeling_utils", "raykernel.ntk"
print([name for name in heavy if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "[]\n", run.stderr


def test_an_installed_wheel_has_the_studies(installed, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "raykernel", "sweep", "table2", "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "3500 runs" in run.stdout  # as README says
    assert list(tmp_path.iterdir()) == []
    assert not list((installed / "raykernel" / "sweeps").glob("__pycache__"))
