"""Kernels of several samples of a task: what one holds of another is not computed again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from raykernel.cli import main
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle
from raykernel.store.query import query
from tests import tiny

KINDS = "[sgd,signgd,asigngd]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    tiny.save_masked_lm(folder / "model")
    tiny.write_reviews(folder / "reviews.tsv")
    return folder


def given(store: str, **changes: str | None) -> list[str]:
    """A kernel of three kinds, in blocks that no sample fills."""
    own = {"task.test_limit": "8", "kernel.block_size": "5", "kernel.kinds": KINDS} | changes
    return tiny.overrides("model", **{"store.path": store, "task.k": None}, **own)


def handle(store: str, k: object, seed: object = 13) -> KernelHandle:
    """The kernel of a sample."""
    found = Store(store)
    for name in found.fingerprints():
        task = found.open(name).identity["task"]
        assert isinstance(task, dict)
        if (task["k"], task["seed"]) == (k, seed):
            return found.open(name)
    raise AssertionError(f"no kernel of k={k}, seed={seed}")


def assert_same(one: KernelHandle, other: KernelHandle) -> None:
    """Entries, logits and names: computed in other batches, so up to rounding of float32."""
    assert one.examples().equals(other.examples())
    for kind in ("sgd", "signgd", "asigngd"):
        assert one.groups(kind) == other.groups(kind)
        pairs = zip(one.group_kernels(kind=kind), other.group_kernels(kind=kind), strict=True)
        for (_, a), (_, b) in pairs:
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    np.testing.assert_allclose(one.logits(), other.logits(), rtol=1e-5, atol=1e-6)


def blocks(store: str) -> dict[str, tuple[int, int]]:
    """By kernel: blocks computed and copied."""
    rows = query("select fingerprint, copied_from from blocks", store).to_pylist()
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        computed, copied = found.get(row["fingerprint"], (0, 0))
        is_copied = row["copied_from"] is not None
        found[row["fingerprint"]] = computed + (not is_copied), copied + is_copied
    return found


@dataclass(frozen=True)
class Alone:
    """Kernels that were computed each in a store of its own."""

    folder: Path

    def of(self, k: int, seed: int = 13) -> KernelHandle:
        return handle(str(self.folder / f"alone-{k}-{seed}"), k, seed)


@pytest.fixture(scope="module")
def alone(place: Path) -> Alone:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for k, seed in ((2, 13), (4, 13), (2, 21)):
            store, sample = f"alone-{k}-{seed}", [f"task.k={k}", f"task.seed={seed}"]
            assert main(["kernel", *given(store), *sample, "kernel.test_block=true"]) == 0
    return Alone(place)


def test_a_smaller_sample_of_a_seed_is_copied_from_a_larger_one(place, alone, monkeypatch, capsys):
    """Entries are those that its own run computes, also as mirror images; no block is computed."""
    monkeypatch.chdir(place)
    shared = [*given("shared"), "kernel.test_block=true"]
    assert main(["kernel", *shared, "task.k=4"]) == 0
    capsys.readouterr()
    assert main(["kernel", *shared, "task.k=2"]) == 0
    screen = capsys.readouterr()
    larger, smaller = handle("shared", 4), handle("shared", 2)
    total = smaller.grid.num_cells
    assert f"{total} of {total} blocks are copied from kernel {larger.fingerprint}" in screen.err
    assert blocks("shared")[smaller.fingerprint] == (0, total)
    assert_same(smaller, alone.of(2))


def test_another_sample_model_or_probe_is_computed(place, monkeypatch):
    """What differs in more than the sample shares no entry; of another seed no cell is whole."""
    monkeypatch.chdir(place)
    one = given("apart", **{"kernel.kinds": "[sgd]"})
    probe = [item for item in one if not item.startswith("prompt.")]
    assert main(["kernel", *one, "task.k=4"]) == 0
    for other in (
        [*one, "task.k=2", "task.seed=21"],
        [*one, "task.k=2", "parameters.layers_to_transform=[1]"],
        [*one, "task.k=2", "prompt.words={negative: awful, positive: great}"],
        [*probe, "prompt=none", "task.k=4"],
        [*probe, "prompt=none", "task.k=2"],
    ):
        assert main(["kernel", *other]) == 0
    assert all(copied == 0 for _, copied in blocks("apart").values())


def test_a_damaged_block_is_computed_instead(place, alone, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["kernel", *given("hurt"), "task.k=4", "kernel.test_block=true"]) == 0
    for path in handle("hurt", 4).path.glob("block-*.arrow"):
        content = bytearray(path.read_bytes())
        content[-200] ^= 1
        path.write_bytes(content)
    assert main(["kernel", *given("hurt"), "task.k=2", "kernel.test_block=true"]) == 0
    smaller = handle("hurt", 2)
    assert f"computing {smaller.grid.num_cells}." in capsys.readouterr().err
    assert_same(smaller, alone.of(2))


def test_one_pass_over_the_examples_serves_every_k_and_seed(place, alone, monkeypatch, capsys):
    """Of runs that want the kernel of test one kernel is computed; each of them copies its own."""
    monkeypatch.chdir(place)
    samples = ["task.k=2,4", "task.seed=13,21", "kernel.test_block=true"]
    assert main(["kernel", "-m", *given("union"), *samples]) == 0
    assert "one kernel for 4 samples" in capsys.readouterr().err
    whole = handle("union", [4, 2, 4, 2], [13, 13, 21, 21])
    others = [handle("union", k, seed) for k in (2, 4) for seed in (13, 21)]
    found = blocks("union")
    computed, _ = found.pop(whole.fingerprint)
    assert found == {one.fingerprint: (0, one.grid.num_cells) for one in others}
    assert computed <= whole.grid.num_cells
    for k, seed in ((2, 13), (4, 13), (2, 21)):
        assert_same(handle("union", k, seed), alone.of(k, seed))
    rows = query("select k, seed, blocks_computed, test_by from kernels", "union").to_pylist()
    assert {(row["k"], row["seed"]) for row in rows} == {(k, s) for k in (2, 4) for s in (13, 21)}
    assert {(row["blocks_computed"], row["test_by"]) for row in rows} == {(0, "block")}
