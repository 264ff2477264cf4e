"""Names that come from a command line, a study or a store never become places elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from raykernel.cli import main
from raykernel.errors import InputError
from raykernel.location import location
from raykernel.store.blocks import Store
from raykernel.store.verify import verify
from raykernel.sweep import load_study, study_files
from tests.fuzz.readers import tree
from tests.store import stores

ELSEWHERE = ["../x", "../../x", "/x", "a/../../x", "..", ".", "", "x/../y", "..\\x", "~", "\x00"]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a store, and a study and a kernel outside that a name could lead to."""
    outside = tmp_path / "x.py"
    outside.write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\n")
    lab = tmp_path / "lab"
    (lab / "sweeps").mkdir(parents=True)
    stores.complete(lab / "store")
    stores.complete(tmp_path / "x")
    monkeypatch.chdir(lab)
    return lab


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_study_is_looked_for_in_two_folders_only(lab: Path, name: str):
    """Its file is code: those that come with raykernel, and `./sweeps`."""
    for spelt in (name, f"{name}.py", f"sweeps/{name}"):
        with pytest.raises(InputError, match="Unknown study"):
            load_study(spelt)
    assert not (lab.parent / "it-ran").exists()
    assert {path.parent.name for path in study_files().values()} == {"sweeps"}


def test_no_list_runs_the_file_of_a_study(lab: Path, capsys: pytest.CaptureFixture[str]):
    (lab / "sweeps" / "mine.py").write_text((lab.parent / "x.py").read_text() + "f(question='Me?')")
    for command in (["list", "sweeps"], ["sweep"], ["completion", "words", "raykernel sweep "]):
        assert main(command) == 0
    assert "Me?" in capsys.readouterr().out
    assert not (lab.parent / "it-ran").exists()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_report_of_such_a_name_writes_nothing(lab: Path, name: str):
    before = tree(lab.parent)
    if name:
        assert main(["report", name, "--store", "store"]) == 2
    assert tree(lab.parent) == before


@pytest.mark.parametrize("name", ELSEWHERE[:-1])
def test_a_fingerprint_names_a_kernel_of_the_store(lab: Path, name: str):
    store, own = Store(lab / "store"), Store(lab / "store").fingerprints()
    for spelt in (name, f"{name}/kernels/{own[0]}", f"../kernels/{own[0]}"):
        if not spelt:  # the only one
            continue
        with pytest.raises(InputError, match="found no kernel"):
            store.resolve(spelt)
        assert main(["query", "--kernel", spelt, "select 1 from entries", "--store", "store"]) == 2


def test_rows_with_such_names_lead_nowhere(lab: Path):
    """A row's study is a value, never a place; `verify` removes nothing outside."""
    store = Store(lab / "store")
    for name in ELSEWHERE:
        store.write_result("runs", {"study": name, "run": name, "status": "ok", "results": "[]"})
    before = tree(lab.parent / "x")
    assert verify(store.path, remove=True).ok
    assert store.results("runs").num_rows == len(ELSEWHERE)
    assert tree(lab.parent / "x") == before


def test_a_store_in_a_relative_place_is_where_it_says(lab: Path):
    """The user's own choice; what is stored of it is absolute."""
    assert location("../x") == lab / ".." / "x"
    assert Store("../x").fingerprints()
