"""`raykernel spectrum` end to end: its rows are the spectra of the stored kernels."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raykernel.analysis.outputs import Outputs
from raykernel.analysis.spectrum import spectrum
from raykernel.cli import main
from raykernel.compose import compose_runs
from raykernel.config import RunConfig
from raykernel.console import Screen
from raykernel.errors import InputError
from raykernel.spectra import Spectra, measure_one, show_spectra, spectra
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle
from raykernel.store.verify import verify
from raykernel.terms import Kind
from tests import tiny

CHOICE = ["layer.1.attention.self"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a model and reviews."""
    folder, before = tmp_path_factory.mktemp("spectra"), Path.cwd()
    tiny.save_masked_lm(folder / "model", num_hidden_layers=2)
    tiny.write_reviews(folder / "reviews.tsv")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def arguments(**changes: str) -> list[str]:
    """Overrides of 8 train examples, cut into threes."""
    chosen = {
        "task": "file",
        "task.train": "reviews.tsv",
        "task.text": "[review]",
        "task.label": "rating",
        "task.k": "4",
        "task.test_limit": "4",
        "model": "hf",
        "model.name": "model",
        "prompt.template": '"{review} It was {label}."',
        "prompt.words": "{negative: terrible, positive: great}",
        "kernel.block_size": "3",
        "kernel.kinds": "[sgd,signgd,asigngd]",
        "solver.groups": f"[{CHOICE[0]}]",
        "store.path": "store",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in chosen.items()]


def config_of(**changes: str) -> RunConfig:
    (run,) = compose_runs("spectrum", arguments(**changes))
    return run.config


@pytest.fixture(scope="module")
def found(place: Path) -> Spectra:
    """One run for all tests."""
    return spectra(config_of(), ("task=file",), Screen())


@pytest.fixture
def handle(found: Spectra) -> KernelHandle:
    return Store("store").open(found.prepared.fingerprint)


def rows() -> list[dict[str, object]]:
    listed: list[dict[str, object]] = Store("store").results("spectra").to_pylist()
    return listed


def test_only_blocks_of_train_are_computed(found: Spectra, handle: KernelHandle) -> None:
    grid = handle.grid
    assert found.completion.blocks_computed == len(grid.cells(grid.train)) == 6
    assert not handle.missing(grid.train)
    assert len(handle.missing()) == grid.num_cells - 6
    assert verify("store").ok


def test_there_is_a_row_for_every_layer_group_for_all_and_for_the_choice(
    found: Spectra, handle: KernelHandle
) -> None:
    assert list(found.by_kind) == [Kind.sgd, Kind.signgd]
    for kind in found.by_kind:
        plain = [name for name in handle.groups(kind.value) if not name.startswith("cross(")]
        own = [row for row in rows() if row["kind"] == kind.value]
        names = [(row["groups"], row["layer_group"]) for row in own]
        expected = [([], None), *(([], name) for name in plain), (CHOICE, None)]
        assert sorted(map(str, names)) == sorted(map(str, expected))
        counts = {str(row["groups"]): row["num_groups"] for row in own if not row["layer_group"]}
        chosen = [name for name in plain if CHOICE[0] in name]
        assert counts == {"[]": len(plain), str(CHOICE): len(chosen)}
    layers = {row["layer"] for row in rows() if CHOICE[0] in str(row["layer_group"])}
    assert layers == {1}


def test_rows_are_the_readings_of_the_stored_kernels(found: Spectra, handle: KernelHandle) -> None:
    """K(train, train) of the two labels' margin, out of the stored blocks, by numpy."""
    train = handle.grid.train
    resolution = float(np.finfo(np.float32).eps) * 16
    for row in rows():
        groups = row["groups"] or ([row["layer_group"]] if row["layer_group"] else None)
        kernel = handle.kernel(groups, kind=str(row["kind"]), rows=train)  # type: ignore[arg-type]
        margin = np.array([1, -1]) / math.sqrt(2)
        values = np.linalg.eigvalsh(np.einsum("iajb,a,b->ij", kernel, margin, margin))
        top = np.linalg.norm(kernel.reshape(16, 16), 2)
        floor = row["floor"]
        assert isinstance(floor, float)
        assert floor >= resolution * top * (1 - 1e-9)
        kept = values[values > floor]
        assert row["num_unresolved"] == 8 - len(kept)
        assert (row["outputs"], row["num_rows"], row["num_train"]) == ("contrast", 8, 8)
        if not len(kept):
            assert row["truncated"] is row["condition_number"] is None
            continue
        assert row["top"] == pytest.approx(values[-1])
        assert row["truncated"] == pytest.approx(values[-1] / kept[0], rel=1e-5)
        raw = row["condition_number"]
        assert (raw is None) == (len(kept) < 8)
        if raw is not None:
            assert raw == pytest.approx(values[-1] / values[0], rel=1e-5)
        full = spectrum(kernel, outputs=Outputs.full, resolution=resolution)
        if row["kind"] == "sgd":
            assert row["lipschitz"] == pytest.approx(math.sqrt(full.top))
        else:
            assert row["lipschitz"] is None


def test_shares_of_the_trace_add_up(found: Spectra, handle: KernelHandle) -> None:
    """Layer groups and the cross groups of tied weights make all of the kernel."""
    assert any(name.startswith("cross(") for name in handle.groups())  # embeddings are tied
    _, *groups = found.by_kind[Kind.sgd]
    shares = {each.layer_group: each.share for each in groups if each.layer_group}
    train = handle.grid.train
    whole = spectrum(handle.kernel(rows=train)).mean
    crossed = 0.0
    for name, kernel in handle.group_kernels(rows=train):
        if name.startswith("cross("):
            margin = np.einsum("iajb,a,b->ij", kernel, [1, -1], [1, -1]) / 2
            crossed += np.trace(margin) / 8 / whole
    assert sum(shares.values()) + crossed == pytest.approx(1, rel=1e-5)


def test_what_rounding_left_of_a_layer_has_no_reading() -> None:
    """Neither symmetric nor positive, or far below the others: no kernel of gradients."""
    tiny_one = np.eye(6).reshape(3, 2, 3, 2) * 1e-12
    assert all(each and math.isnan(each.regularised) for each in measure_one(tiny_one, 1e-6, 1e-10))
    noise = np.random.default_rng(0).normal(size=(3, 2, 3, 2))
    seen, full, centred = measure_one(noise, 1e-6, 0.0)
    assert centred is not None
    assert all(each.num_unresolved == each.size for each in (seen, full, centred))


def test_a_second_run_computes_nothing_and_keeps_other_choices(
    found: Spectra, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows()
    assert main(["spectrum", *arguments(solver__groups="[]")]) == 0
    said = capsys.readouterr()
    assert "computing 0 blocks" in said.err
    assert "asigngd is not symmetric" in said.err
    assert len(rows()) == len(before)
    sql = "select kind, regularised from spectra where len(groups) > 0 order by kind"
    assert main(["query", sql, "--store", "store", "--format", "json"]) == 0
    kept = json.loads(capsys.readouterr().out)
    chosen = {kind.value: layers[1].seen.regularised for kind, layers in found.by_kind.items()}
    assert {row["kind"]: row["regularised"] for row in kept} == chosen


def test_layer_groups_that_are_alike_share_a_line(
    found: Spectra, capsys: pytest.CaptureFixture[str]
) -> None:
    show_spectra(found, Screen())
    out = capsys.readouterr().out
    assert "layer.*.attention.self.query" in out
    assert "layer.0" not in out
    assert "solver.groups" in out
    assert "condition numbers of signgd, contrast of 2 outputs of 8 train examples" in out


def test_a_damaged_row_is_named_and_removed(found: Spectra) -> None:
    path = next(Path("store").glob("kernels/*/spectra-*.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    try:
        assert not verify("store").ok
        assert verify("store", remove=True).ok
        assert not path.exists()
    finally:
        path.write_bytes(content)


def test_an_asymmetric_kernel_alone_has_no_spectrum(place: Path) -> None:
    with pytest.raises(InputError, match="sgd or signgd"):
        spectra(config_of(kernel__kinds="[asigngd]"), (), Screen())


@pytest.mark.packaged
def test_the_tiny_experiment_runs_on_the_packaged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A linear head with six outputs: contrasts have five."""
    monkeypatch.chdir(tmp_path)
    assert main(["spectrum", "experiment=tiny"]) == 0
    out = capsys.readouterr().out
    assert "contrast of 6 outputs of 6 train examples" in out
    assert "of 30 eigenvalues" in out
    assert "encoder.layer.*.attention.self.query" in out
