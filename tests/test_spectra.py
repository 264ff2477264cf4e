"""`raykernel spectrum` end to end: its rows are the spectra of the stored kernels."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import RobertaForMaskedLM

from raykernel.analysis.outputs import Outputs
from raykernel.analysis.spectrum import spectrum
from raykernel.cli import main
from raykernel.compose import compose_runs
from raykernel.config import RunConfig
from raykernel.console import Screen
from raykernel.errors import InputError, NotPositiveSemidefiniteError
from raykernel.spectra import Spectra, measure, measure_one, spectra
from raykernel.spectrum_table import show_spectra
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle
from raykernel.store.results import table_files
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
        "spectrum.sets": f"[[{CHOICE[0]}]]",
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


def rows(store: str = "store") -> list[dict[str, object]]:
    """Rows of layers, and not of changes, with the default ridge."""
    return [row for row in every_row(store) if row["change"] is None and row["ridge"] == 1e-3]


def every_row(store: str = "store") -> list[dict[str, object]]:
    listed: list[dict[str, object]] = Store(store).results("spectra").to_pylist()
    return listed


def margin(kernel: np.ndarray) -> np.ndarray:
    """Qᵀ K Q of two outputs."""
    basis = np.array([1, -1]) / math.sqrt(2)
    return np.einsum("iajb,a,b->ij", kernel, basis, basis)


def with_ridge(kernel: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
    """K + ε (tr K / m) I of the margin."""
    seen = margin(kernel)
    return seen + ridge * np.trace(seen) / len(seen) * np.eye(len(seen))


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
        values = np.linalg.eigvalsh(margin(kernel))
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


def test_train_examples_are_left_out_with_the_same_kernel_and_ridge(
    found: Spectra, handle: KernelHandle
) -> None:
    """One after the other: the margin's regression on seven examples, at the eighth, by numpy."""
    train, basis = handle.grid.train, np.array([1, -1]) / math.sqrt(2)
    labels = handle.examples()["label"].to_pylist()[:8]
    sides = np.array([basis[found.prepared.data.labels.index(label)] for label in labels])
    missing = sides - handle.logits(train) @ basis
    checked = 0
    for row in rows():
        groups = row["groups"] or ([row["layer_group"]] if row["layer_group"] else None)
        kernel = handle.kernel(groups, kind=str(row["kind"]), rows=train)  # type: ignore[arg-type]
        if row["num_unresolved"] == 8:
            assert row["loo_accuracy"] is row["loo_error"] is None
            continue
        solved, errors = with_ridge(kernel), []
        for i in range(8):
            others = np.delete(np.arange(8), i)
            alpha = np.linalg.solve(solved[np.ix_(others, others)], missing[others])
            errors.append(missing[i] - margin(kernel)[i, others] @ alpha)
        hits = sides * (sides - errors) > 0  # the prediction is on the label's side
        if row["num_unresolved"] == 0:
            assert row["loo_error"] == pytest.approx(np.mean(np.square(errors)), rel=1e-6)
            assert row["loo_accuracy"] == np.mean(hits)
            checked += 1
    assert checked > 20
    assert {row["loo_accuracy"] for row in every_row() if row["change"]} == {None}


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
            crossed += np.trace(margin(kernel)) / 8 / whole
    assert sum(shares.values()) + crossed == pytest.approx(1, rel=1e-5)


def test_a_layer_more_is_foretold_and_is_what_the_stored_blocks_sum_to(
    found: Spectra, handle: KernelHandle
) -> None:
    """Layer 1's attention, with all of layer 0, and with the rest of layer 1."""
    train = handle.grid.train
    own = [row for row in every_row() if row["change"] and row["groups"] == CHOICE]
    assert [(row["kind"], row["change"], row["layer"]) for row in own] == [
        (kind, "add", layer) for kind in ("sgd", "signgd") for layer in (0, 1)
    ]
    for row in own:
        kind = str(row["kind"])
        names = [name for name in handle.groups(kind) if not name.startswith("cross(")]
        inside = [name for name in names if CHOICE[0] in name]
        moved = [name for name in names if f"layer.{row['layer']}." in name and name not in inside]
        a, b, both = (
            with_ridge(handle.kernel(chosen, kind=kind, rows=train))
            for chosen in (inside, moved, inside + moved)
        )
        np.testing.assert_allclose(both, a + b, rtol=1e-6, atol=1e-6 * np.linalg.norm(both))
        values, vectors = np.linalg.eigh(a)
        bottom, top = vectors[:, 0], vectors[:, -1]
        after = np.linalg.eigvalsh(both)
        assert row["num_groups"] == len(inside) + len(moved)
        assert row["kappa_before"] == pytest.approx(values[-1] / values[0], rel=1e-3)
        assert row["regularised"] == pytest.approx(after[-1] / after[0], rel=1e-3)
        assert row["top"] + row["sigma"] == pytest.approx(after[-1])  # type: ignore[operator]
        for name, value in (("kappa", after[-1] / after[0]), ("top", after[-1])):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            assert low * (1 - 1e-3) <= value <= high * (1 + 1e-3)  # type: ignore[operator]
        assert row["is_necessary"] == (bottom @ b @ bottom / values[0] > top @ b @ top / values[-1])
        ends = np.linalg.eigvalsh(b)
        assert row["is_sufficient"] == (ends[-1] / ends[0] < values[-1] / values[0])


def test_without_sets_every_layer_is_taken_from_all_of_them(
    found: Spectra, handle: KernelHandle, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a ridge of its own, whose rows stand beside those of another ridge."""
    before = len(every_row())
    changes = {"spectrum__sets": "[]", "spectrum__ridge": "0.1"}
    assert main(["spectrum", *arguments(**changes)]) == 0
    printed = capsys.readouterr().out
    assert "- layer 0" in printed
    assert "plus 0.1 of the mean eigenvalue" in printed
    assert len(every_row()) > before
    gone = [row for row in every_row() if row["change"] == "remove" and row["ridge"] == 0.1]
    assert [(row["kind"], row["layer"]) for row in gone] == [
        (kind, layer) for kind in ("sgd", "signgd") for layer in (0, 1)
    ]
    for row in gone:
        kind, train = str(row["kind"]), handle.grid.train
        stay = [name for name in handle.groups(kind) if f"layer.{row['layer']}." not in name]
        kernel = handle.kernel([n for n in stay if "cross(" not in n], kind=kind, rows=train)
        after = np.linalg.eigvalsh(with_ridge(kernel, 0.1))
        assert row["regularised"] == pytest.approx(after[-1] / after[0], rel=1e-3)
        assert row["kappa_low"] <= row["regularised"] <= row["kappa_high"]  # type: ignore[operator]
        assert row["is_necessary"] is None


def test_features_are_the_numbers_of_a_gradient(found: Spectra) -> None:
    """Counted on the model itself; tied matrices count where they are used."""
    model = RobertaForMaskedLM.from_pretrained("model")
    counts = {
        f"{path}": sum(p.numel() for p in module.parameters(recurse=False))
        for path, module in model.named_modules()
    }
    checked = 0
    for row in rows():
        name = str(row["layer_group"])
        if ".layer." in name:
            # Signs of attention's key bias, whose gradient is rounding noise, are 0.
            assert row["num_features"] in ({counts[name], 0} if ".key" in name else {counts[name]})
            checked += 1
    assert checked > 20
    (chosen,) = (row for row in rows() if row["groups"] and row["kind"] == "sgd")
    assert chosen["num_features"] == sum(n for name, n in counts.items() if CHOICE[0] in name)


def of_repeated(**changes: str) -> Spectra:
    """Spectra of LoRA of rank 1 on queries, 16 features of B each, and 20 train examples."""
    own = {
        "task__train": "repeated.tsv",
        "task__k": "10",
        "kernel__kinds": "[sgd]",
        "kernel__block_size": "20",
        "parameters": "lora",
        "parameters__r": "1",
        "parameters__target_modules": "[query]",
        "parameters__layers_to_transform": "[0,1]",
        "spectrum__sets": "[[layer.0.],[layer.0.,layer.1.]]",
        "store__path": "repeated",
    }
    return spectra(config_of(**own | changes), (), Screen())


@pytest.fixture(scope="module")
def repeated(place: Path) -> Spectra:
    """The same texts again and again."""
    lines = [
        f"{tiny.PLAIN[n % 7]} it was\t{label}" for n, (_, label) in enumerate(tiny.reviews(100))
    ]
    Path("repeated.tsv").write_text("\n".join(["review\trating", *lines]) + "\n", "utf-8")
    return of_repeated()


def test_no_example_can_be_left_out_of_a_singular_kernel_without_a_ridge(
    repeated: Spectra, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a ridge duplicates are no trouble; without one there is nothing to solve."""
    (ridged, *_), (bare, *_) = (
        found.by_kind[Kind.sgd] for found in (repeated, of_repeated(spectrum__ridge="0"))
    )
    assert ridged.seen.num_unresolved == bare.seen.num_unresolved > 0
    assert ridged.left_out is not None
    assert bare.left_out is None
    show_spectra(repeated, Screen())
    assert "leave-one-out accuracy" in " ".join(capsys.readouterr().out.split())


def test_few_features_are_said_to_make_the_condition_number_infinite(
    repeated: Spectra, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {tuple(each.patterns): each for each in repeated.by_kind[Kind.sgd] if each.patterns}
    assert [each.num_features for each in found.values()] == [16, 32]  # A has gradient 0
    assert [each.layers for each in found.values()] == [(0,), (0, 1)]
    stored = {tuple(row["groups"]): row for row in rows("repeated") if row["groups"]}  # type: ignore[arg-type]
    assert stored["layer.0.",]["condition_number"] == math.inf
    assert stored["layer.0.", "layer.1."]["condition_number"] is None  # duplicates: not resolved
    assert json.loads(str(stored["layer.0.",]["parameters"]))["r"] == 1
    show_spectra(repeated, Screen())
    out = " ".join(capsys.readouterr().out.split())
    assert "Infinite: layer.0. has 16 features for 20 eigenvalues" in out
    assert "∞" in out


def test_duplicates_are_named(repeated: Spectra, capsys: pytest.CaptureFixture[str]) -> None:
    """Those train examples that have the same text and no others."""
    prepared = repeated.prepared
    train = [prepared.data.examples[i] for i in prepared.grid.train]
    same = {(a.id, b.id) for i, a in enumerate(train) for b in train[i + 1 :] if a.texts == b.texts}
    assert same
    whole = repeated.by_kind[Kind.sgd][0]
    assert set(whole.duplicates) == same
    stored = next(row for row in rows("repeated") if row["num_groups"] == whole.num_groups)
    assert stored["duplicates"] == [f"{a} = {b}" for a, b in whole.duplicates]
    show_spectra(repeated, Screen())
    out = " ".join(capsys.readouterr().out.split())
    first, second = whole.duplicates[0]
    assert f"Duplicates: {len(same)} pair" in out
    assert f"{first} = {second}" in out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("spectrum.sets=[[layer.0],[]]", "sets that are not empty and differ"),
        ("spectrum.sets=[[layer.7]]", "'layer.7' matches none"),
        ("spectrum.sets=[layer.0]", "spectrum.sets"),
        ("spectrum.ridge=-1", "a number ≥ 0"),
        ("spectrum.duplicate=2", "0 to 1"),
        ("spectrum.rigde=0.1", "did you mean"),
    ],
)
def test_wrong_settings_are_said_before_anything_is_computed(
    place: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    changes = {"store__path": "empty", "kernel__kinds": "[sgd]"}
    chosen = [text for text in arguments(**changes) if not text.startswith("spectrum")]
    assert main(["spectrum", *chosen, override]) == 2
    assert said in capsys.readouterr().err
    assert not list(Path().glob("empty/kernels/*/block-*"))


def test_what_rounding_left_of_a_layer_has_no_reading() -> None:
    """Neither symmetric nor positive, or far below the others: no kernel of gradients."""
    tiny_one = np.eye(6).reshape(3, 2, 3, 2) * 1e-12
    read = partial(measure, resolution=1e-6, ridge=1e-3)
    found = measure_one("a", tiny_one, read, floor=1e-10, noise=0.0)
    assert all(each and math.isnan(each.regularised) for each in found)
    noise = np.random.default_rng(0).normal(size=(3, 2, 3, 2))
    seen, full, centred = measure_one("a", noise, read, floor=0.0, noise=10.0)
    assert centred is not None
    assert all(each.num_unresolved == each.size for each in (seen, full, centred))
    with pytest.raises(
        NotPositiveSemidefiniteError, match="layer group a: The train kernel differs"
    ):
        measure_one("a", noise, read, floor=0.0, noise=1.0)


def test_a_second_run_computes_nothing_and_keeps_other_choices(
    found: Spectra, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows()
    assert main(["spectrum", *arguments(spectrum__sets="[]")]) == 0
    said = capsys.readouterr()
    assert "computing 0 blocks" in said.err
    assert "asigngd is not symmetric" in said.err
    assert len(rows()) == len(before)
    sql = "select kind, regularised from spectra where len(groups) > 0 and change is null"
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
    assert CHOICE[0] in out
    assert "condition numbers of signgd, contrast of 2 outputs of 8 train examples" in out


def test_a_damaged_row_is_named_and_removed(found: Spectra) -> None:
    path = table_files(Path("store"), "spectra").answers[0]
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
    assert {row["loo_error"] for row in rows("raykernel-store")} == {None}  # the probe knows labels
