"""Checksums of JSON, safetensors and journals: a flipped bit is harmless or noticed."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from safetensors.torch import load_file

from raykernel.compute.tensorfile import read_facts, read_tensors, write_tensors
from raykernel.errors import BlockCorruptError
from raykernel.journal import open_journal
from raykernel.store.blocks import Store
from raykernel.store.sealed import SEAL, check_beside, commit_beside, seal, unseal, unseal_line
from raykernel.store.verify import verify

TREE = {"step": 3, "rate": 0.1, "names": ["a", "ü"], "none": None, "infinite": float("inf")}
POSITIONS = {"position": st.integers(0, 2**16), "bit": st.integers(0, 7)}
MANY = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position % len(content)] ^= 1 << bit
    return bytes(changed)


@MANY
@given(**POSITIONS)
def test_any_flipped_bit_of_json_is_noticed_or_harmless(position: int, bit: int) -> None:
    path = Path("file.json")
    whole = seal(TREE, indent=1)
    assert unseal(path, whole) == TREE
    for read, content in ((unseal, whole), (unseal_line, seal(TREE))):
        try:
            found = read(path, flipped(content, position, bit))
        except BlockCorruptError:
            continue
        assert found == TREE


def test_json_without_a_checksum_is_foreign_but_a_line_of_optunas_is_read() -> None:
    content = json.dumps(TREE).encode()
    with pytest.raises(BlockCorruptError, match="damaged or foreign"):
        unseal(Path("file.json"), content)
    with pytest.raises(BlockCorruptError, match="damaged or foreign"):
        unseal(Path("file.json"), b"[1]")
    assert unseal_line(Path("study.journal"), content) == TREE


@MANY
@given(**POSITIONS)
def test_any_flipped_bit_of_tensors_is_noticed(tmp_path: Path, position: int, bit: int) -> None:
    """Also in the facts, the names, the shapes and the padding of the header."""
    path = tmp_path / "checkpoint.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2, dtype=torch.int64)}
    write_tensors(path, tensors, {"step": 3})
    assert read_facts(path) == {"step": 3}
    path.write_bytes(flipped(path.read_bytes(), position, bit))
    for read in (read_tensors, read_facts):
        with pytest.raises(BlockCorruptError, match="damaged or foreign"):
            read(path)


def test_tensors_open_with_the_librarys_own_reader(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {"a": torch.randn(2, 3), "z": torch.zeros(0), "h": torch.ones(3, dtype=torch.half)}
    write_tensors(path, tensors, {SEAL: "0" * 32})  # facts that look like a checksum
    for found in (load_file(path), read_tensors(path)[0]):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, (2).to_bytes(8, "little") + b"{}"])
def test_foreign_tensors_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(BlockCorruptError, match="damaged or foreign"):
        read_tensors(path)


def test_a_file_of_another_program_has_its_checksum_beside(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    commit_beside(path, b'{"r": 8}')
    check_beside(path)
    path.write_bytes(b'{"r": 9}')
    with pytest.raises(BlockCorruptError, match="other content"):
        check_beside(path)


# ---------------------------------------------------------------- the journal of a search


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A journal with two choices, one of them with a value."""
    Store(tmp_path).create()
    path = tmp_path / "sweeps" / "rates.journal"
    study = optuna.create_study(storage=JournalStorage(open_journal(path)), study_name="s")
    for _ in range(2):
        study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    study.tell(0, 0.5)
    return path


def values(path: Path) -> list[float | None]:
    study = optuna.load_study(storage=JournalStorage(open_journal(path)), study_name="s")
    return [None if one.values is None else one.value for one in study.get_trials()]


@pytest.mark.parametrize("place", [13, 62, 97])
def test_a_flipped_bit_of_a_journal_is_noticed(journal: Path, place: int) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(flipped(whole, place * len(whole) // 100, place % 7))
    with pytest.raises(BlockCorruptError, match=r"rates.journal.*verify --remove"):
        values(journal)
    assert [file.path for file in verify(journal.parents[1], remove=True).bad] == [journal]
    assert not journal.exists()


def test_a_line_that_its_writer_could_not_end_is_dropped_by_the_next(journal: Path) -> None:
    """Killed in the middle of a line, which Optuna's own file never recovers from."""
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "trial_id"')
    assert values(journal) == [0.5, None]
    assert verify(journal.parents[1]).ok
    study = optuna.load_study(storage=JournalStorage(open_journal(journal)), study_name="s")
    study.tell(1, 0.25)
    assert values(journal) == [0.5, 0.25]


def test_optunas_own_programs_read_it_and_may_write_to_it(journal: Path) -> None:
    """Such as a note of optuna-dashboard."""
    plain = JournalStorage(JournalFileBackend(str(journal)))
    optuna.load_study(storage=plain, study_name="s").set_user_attr("note", "look here")
    assert values(journal) == [0.5, None]
    ours = JournalStorage(open_journal(journal))
    assert optuna.load_study(storage=ours, study_name="s").user_attrs == {"note": "look here"}
    assert verify(journal.parents[1]).ok
