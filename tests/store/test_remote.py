"""A store in an object store does what a folder does, against a real S3 server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from raykernel.cli import main
from raykernel.compute.tensorfile import read_facts, read_tensors, write_tensors
from raykernel.errors import InputError
from raykernel.location import RemotePath, fetch, folders, location, names, sizes
from raykernel.runs import make_run
from raykernel.space import Point
from raykernel.store.blocks import Store
from raykernel.store.commit import commit, commit_first
from raykernel.store.compaction import compact
from raykernel.store.grid import Grid
from raykernel.store.query import query
from raykernel.store.verify import verify
from raykernel.terms import Command, TrackerName
from raykernel.trackers import TensorBoardTracker, open_trackers
from tests import s3, tiny
from tests.store import stores

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with (
        s3.serve(tmp_path_factory.mktemp("s3")) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        from s3fs import S3FileSystem

        S3FileSystem().mkdir(s3.BUCKET)
        yield server


@pytest.fixture
def place(server: s3.Server, request: pytest.FixtureRequest) -> RemotePath:
    """A place of its own for every test."""
    found = location(f"s3://{s3.BUCKET}/{request.node.name}")
    assert isinstance(found, RemotePath)
    return found


@pytest.fixture(params=["s3", "memory"])
def anywhere(request: pytest.FixtureRequest) -> RemotePath:
    """S3, and the object store that is a dictionary of this process."""
    if request.param == "s3":
        request.getfixturevalue("server")
    name = request.node.name.partition("[")[0]
    found = location(f"{request.param}://{s3.BUCKET}/{name}")
    assert isinstance(found, RemotePath)
    return found


def start(*command: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("text", ["s3://lab/a/b", "s3://lab//a/b/", "memory://lab/a/b"])
def test_an_address_keeps_its_slashes(text: str) -> None:
    found = location(text)
    assert str(found) == f"{text.partition(':')[0]}://lab/a/b"
    assert (found.name, str(found.parent / "c.x")) == ("b", str(found)[:-1] + "c.x")
    assert location(found) is found


def test_a_folder_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert location("store") == tmp_path / "store"
    assert location(f"file://{tmp_path}/store") == tmp_path / "store"
    assert location(Path("~/store")) == Path("~/store").expanduser()


@pytest.mark.parametrize("text", ["s3://KEY:hush@lab/a", "az://lab/a?sig=hush", "s3://lab#hush"])
def test_credentials_in_an_address_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InputError, match="come from the environment") as caught:
        Store(text)
    assert "hush" not in str(caught.value)


def test_what_lies_at_a_place(anywhere: RemotePath) -> None:
    for name in ("x.bin", "y.bin", "below/z.bin"):
        commit(anywhere / name, b"12345")
    (anywhere / "x.bin").write(b"123")
    assert sizes(anywhere) == {"x.bin": 3, "y.bin": 5}
    assert sorted(names(anywhere)) == ["below", "x.bin", "y.bin"]
    assert names(anywhere, "x") == ["x.bin"]
    assert folders(anywhere) == [anywhere / "below"]
    assert list(anywhere.glob("*/z*")) == [anywhere / "below" / "z.bin"]
    absent = anywhere / "absent"
    assert fetch([anywhere / "x.bin", absent]) == {anywhere / "x.bin": b"123"}
    assert (absent.exists(), absent.is_dir(), sizes(absent), names(absent, "a")) == (
        False,
        False,
        {},
        [],
    )
    absent.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        absent.read_bytes()
    assert commit_first(anywhere / "x.bin", b"9") == 0
    assert (anywhere / "x.bin").read_bytes() == b"123"
    (anywhere / "x.bin").unlink()
    assert not (anywhere / "x.bin").exists()


def test_what_others_write_is_seen_at_once(place: RemotePath) -> None:
    from s3fs import S3FileSystem

    commit(place / "own", b"1")
    assert names(place) == ["own"]
    assert not (place / "other").exists()
    S3FileSystem(skip_instance_cache=True).pipe_file(f"{place.key}/other", b"22")
    assert sizes(place) == {"other": 2, "own": 1}
    assert (place / "other").exists()


# ---------------------------------------------------------------- kernels and rows


def test_a_kernel_is_the_same_as_in_a_folder(anywhere: RemotePath, tmp_path: Path) -> None:
    here = stores.complete(tmp_path)
    there = stores.complete(anywhere)
    assert there.missing() == []
    np.testing.assert_array_equal(there.kernel(), here.kernel())
    np.testing.assert_array_equal(there.logits(), here.logits())
    stores.predict(there, 3)
    again = Store(anywhere).open()
    assert again.examples() == here.examples()
    for sql in (
        "select i, j, row0, col1, bytes > 1000 from blocks order by i, j",
        "select layer_group, trace from groups order by all",
        "select count(*) from predictions",
    ):
        if "predictions" not in sql:
            assert query(sql, anywhere) == query(sql, tmp_path)
        assert query(sql, anywhere).num_rows
    assert verify(anywhere).ok


def test_rows_are_those_of_a_folder(anywhere: RemotePath, tmp_path: Path) -> None:
    def fill(store: Store) -> None:
        for number in range(5):
            store.write_results("curves", [{"trial": f"t{number}", "step": s} for s in (2, 1)])
            store.write_result("trials", {"trial": f"t{number}", "lam": float(number)})
        store.write_result("trials", {"trial": "t1", "lam": 10.0})

    def content(store: Store) -> list[object]:
        sums = "select trial, lam from trials order by trial"
        return [
            query(sums, store.path).to_pylist(),
            [(row["trial"], row["step"]) for row in store.rows("curves", trial="t2")],
            store.trials(),
            store.rows("trials", trial="t9"),
        ]

    here, there = Store(tmp_path / "store"), Store(anywhere)
    fill(here)
    fill(there)
    assert content(there) == content(here)
    assert {table.table: table.num_rows for table in compact(anywhere)} == {
        "trials": 5,
        "curves": 10,
    }
    assert len(names(anywhere / "results" / "trials")) == 1
    assert content(there) == content(here)
    for path in list((anywhere / "trials" / "t3").iterdir()):  # who removes a run, removes its row
        path.unlink()
    assert content(there)[2] == ["t0", "t1", "t2", "t4"]
    assert verify(anywhere).ok


def test_tensors_and_facts_come_back(anywhere: RemotePath) -> None:
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    path = anywhere / "checkpoint.safetensors"
    with pytest.raises(FileNotFoundError):
        read_facts(path)
    assert write_tensors(path, tensors, {"step": 4}) == sizes(anywhere)[path.name]
    found, facts = read_tensors(path)
    assert facts == {"step": 4} == read_facts(path)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in tensors.items()
    }


def test_a_flipped_byte_is_named_removed_and_written_again(anywhere: RemotePath) -> None:
    handle = stores.complete(anywhere)
    wanted = handle.kernel()
    path = anywhere / "kernels" / handle.fingerprint / "block-0001-0001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write(bytes(content))
    (anywhere / "kernels" / handle.fingerprint / "logits-0002.arrow").write(b"")
    report = verify(anywhere, remove=True)
    assert [file.path.name for file in report.bad] == ["block-0001-0001.arrow", "logits-0002.arrow"]
    again = stores.complete(anywhere)
    np.testing.assert_array_equal(again.kernel(), wanted)
    assert verify(anywhere).bad == ()


WRITER = """
import sys
from raykernel.journal import open_journal
from raykernel.location import location
from raykernel.store.blocks import Store
from raykernel.store.compaction import compact
from raykernel.store.grid import Grid
from tests.store import stores

address, own = sys.argv[1], sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
store, journal = Store(address), open_journal(location(address) / "sweeps" / "x.journal")
for number in range(6):
    store.write_result("trials", {"trial": f"{own}-{number}", "lam": float(number)})
    store.write_result("trials", {"trial": "shared", "lam": float(own)})
    journal.append_logs([{"writer": own, "number": number}, {"second": own}])
    if number == 3:
        compact(address)
handle = stores.complete(address, grid=Grid(num_cols=4, num_rows=6, block_size=2))
print(handle.pin("rates", {"first": own})["first"], flush=True)
"""


def test_four_writers_at_once_lose_and_double_nothing(place: RemotePath) -> None:
    writers = [start("-c", WRITER, str(place), str(own), cwd=ROOT) for own in range(4)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    pinned = {writer.communicate("go\n")[0].strip() for writer in writers}
    assert all(writer.returncode == 0 for writer in writers), pinned
    assert len(pinned) == 1
    every = {f"{own}-{number}" for own in range(4) for number in range(6)} | {"shared"}
    store = Store(place)
    assert store.trials() == sorted(every)
    handle = stores.complete(place, grid=Grid(num_cols=4, num_rows=6, block_size=2))
    for name, kernel in handle.group_kernels():
        np.testing.assert_array_equal(kernel, stores.truth(handle)[name])
    assert verify(place).ok

    from raykernel.journal import open_journal

    logs = list(open_journal(place / "sweeps" / "x.journal").read_logs(0))
    firsts = [(log["writer"], log["number"]) for log in logs[::2]]
    assert sorted(firsts) == [(str(own), number) for own in range(4) for number in range(6)]
    assert [log["second"] for log in logs[1::2]] == [writer for writer, _ in firsts]


def test_requests_grow_with_what_is_read_and_written(place: RemotePath, server: s3.Server) -> None:
    def requests(act: Callable[[], object]) -> int:
        before = server.num_requests
        act()
        return server.num_requests - before

    handle = stores.begin(place)
    cell = handle.missing()[0]
    assert requests(lambda: handle.write_block(cell, stores.block(handle, cell))) == 1
    assert requests(lambda: handle.read_block(cell)) == 1
    assert requests(lambda: handle.read_block(cell)) == 0
    store = Store(place)
    write = partial(store.write_result, "trials")
    # Two write it, the others look for a version that it has to sort after.
    assert requests(lambda: write({"trial": "t", "lam": 1.0})) <= 5
    for number in range(20):
        write({"trial": f"t{number}", "lam": 1.0})
    ask = partial(query, "select count(*) from trials", place)
    assert requests(ask) <= 21 + 7
    compact(place)
    assert requests(ask) <= 1 + 7


# ---------------------------------------------------------------- commands


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(model)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "rates.py").write_text(tiny.study("1,2", steps=2), encoding="utf-8")
    tiny.write_reviews(tmp_path / "reviews.tsv")
    return tmp_path


def test_a_kernel_command_writes_goes_on_answers_and_is_verified(
    here: Path, place: RemotePath, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, local = (
        tiny.overrides("tiny", compute="inline", store__path=path) for path in (str(place), "store")
    )
    assert main(["kernel", *remote]) == 0
    assert main(["kernel", *local]) == 0
    known = Store("store").open().grid.train_and_dev
    np.testing.assert_array_equal(
        Store(place).kernel(rows=known), Store("store").kernel(rows=known)
    )
    capsys.readouterr()
    assert main(["kernel", *remote]) == 0
    assert "0 of 2 blocks computed now" in capsys.readouterr().out
    sql = "select kernel_regression, path from kernels"
    assert main(["query", sql, "--store", str(place), "--format", "csv"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert query(sql, place) == query(sql, "store")
    assert main(["verify", "--store", str(place)]) == 0
    assert main(["doctor", *remote]) == 0
    assert "can be read and written" in capsys.readouterr().out
    assert not [name for name in names(place) if "doctor" in name]
    for name, value in (("select", "parameters=lora"), ("spectrum", "parameters=full")):
        assert main([name, *remote, value]) == 0
    (choice,) = folders(place / "selections")
    assert main(["plan", *remote, "parameters=peft", f"parameters.adapter={choice}"]) == 0


def test_the_content_of_a_remote_adapter_is_in_the_name_of_its_runs(here: Path) -> None:
    place = location("memory://lab/adapters/one")
    assert isinstance(place, RemotePath)
    settings = {"parameters": "peft", "parameters__adapter": str(place)}
    overrides = tuple(tiny.overrides("tiny", **settings))
    point = Point("LoRA", Command.finetune, overrides, (), ())

    def named(rank: int) -> str:
        content = {"peft_type": "LORA", "r": rank, "target_modules": ["query"]}
        (place / "adapter_config.json").write(json.dumps(content).encode())
        return make_run("ranks", point).id

    assert named(2) == named(2) != named(4)


def test_trackers_write_to_a_folder(here: Path) -> None:
    (tracker,) = open_trackers([TrackerName.tensorboard], location("memory://lab/store"))
    assert isinstance(tracker, TensorBoardTracker)
    assert tracker._folder == here / "raykernel-trackers" / "tensorboard"


# A driver that dies with SIGKILL before its n-th object.
KILLED = """
import os, signal, sys
from raykernel import location
from raykernel.cli import main

left, write = int(sys.argv[1]), location.RemotePath.write

def dying(self, payload, *, replaces=True):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, payload, replaces=replaces)

location.RemotePath.write = dying
sys.exit(main(["sweep", "rates", *sys.argv[2:]]))
"""


def test_a_killed_study_goes_on_to_the_same_results(
    here: Path, place: RemotePath, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = start("-c", KILLED, "11", f"store.path={place}", cwd=here)
    output, _ = driver.communicate()
    assert driver.returncode == -9, output
    done = Store(place).results("runs").to_pylist()
    assert 0 < len(done) < 4
    assert main(["sweep", "rates", f"store.path={place}"]) == 0
    again = Store(place).results("runs").to_pylist()
    assert len(again) == 4
    assert all(row in again for row in done)  # what had ended was not done again
    assert main(["sweep", "rates"]) == 0
    sql = "select trial, lam, best_step, dev, finetuned from trials order by trial"
    assert query(sql, place) == query(sql, "store")
    assert main(["query", "best", "--store", str(place)]) == 0
    assert main(["query", "missing", "rates", "--store", str(place)]) == 0
    assert verify(place).ok


@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_journal(
    here: Path, place: RemotePath, capsys: pytest.CaptureFixture[str]
) -> None:
    interval = "training.learning_rate=tag(log,interval(1e-3,1e-1))"
    settings = (f"store.path={place}", "sweep=tpe", "sweep.trials=2", interval)
    driver = start("-c", KILLED, "21", *settings, cwd=here)
    output, _ = driver.communicate()
    assert driver.returncode == -9, output
    journal = place / "sweeps" / "rates.journal"
    before = fetch(sorted(journal.iterdir()))
    done = {row["run"] for row in Store(place).results("runs").to_pylist()}
    assert before
    assert done
    assert main(["sweep", "rates", *settings]) == 0
    after = fetch(sorted(journal.iterdir()))
    assert before.items() <= after.items()  # nobody writes what is written anew
    runs = {row["run"] for row in Store(place).results("runs").to_pylist()}
    assert done < runs
    assert len(runs) == 4  # two choices on two seeds: none was asked for anew
    capsys.readouterr()
    assert main(["sweep", "rates", *settings]) == 0
    assert "4 of 4 runs are complete" in capsys.readouterr().out
    assert {row["run"] for row in Store(place).results("runs").to_pylist()} == runs


# ---------------------------------------------------------------- what a user can get wrong


def said(here: Path, address: str, **environment: str) -> str:
    process = start("-m", "raykernel", "verify", "--store", address, cwd=here, **environment)
    output, _ = process.communicate()
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "secret-of-the-test" not in output
    assert "AKIAOFTHETEST" not in output
    return output


def test_what_is_missing_is_said_in_plain_words(server: s3.Server, tmp_path: Path) -> None:
    place = f"s3://{s3.BUCKET}/nothing"
    assert "found no store" in said(tmp_path, place)
    assert "no bucket 'nobodys'" in said(tmp_path, "s3://nobodys/store")
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    assert "Expected credentials in the environment" in said(tmp_path, place, **nobody)
    dead = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    assert "cannot be reached" in said(tmp_path, place, **dead)


def test_an_unknown_protocol_and_a_missing_package_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"protocol 's4'.*did you mean 's3'"):
        Store("s4://lab/store")
    with pytest.raises(InputError, match="protocol"):
        Store("simplecache::s3://lab/store")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"pip install 'raykernel\[gs\]'"):
        Store("gs://lab/store")
