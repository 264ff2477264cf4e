"""`raykernel select` end to end: its rows are of the stored kernels, and PEFT takes the best."""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
from torch import nn
from transformers import RobertaForMaskedLM, RobertaModel

from raykernel.analysis.leave_one_out import leave_one_out
from raykernel.analysis.stability import halves
from raykernel.analysis.targets import one_hot
from raykernel.candidates import Member, _check_ties
from raykernel.cli import main
from raykernel.compose import compose_runs
from raykernel.config import RunConfig
from raykernel.console import Screen
from raykernel.errors import InputError
from raykernel.prepared import example_labels
from raykernel.problem.skeleton import layer_linears
from raykernel.selection_table import show_selections
from raykernel.selections import Selections, selections
from raykernel.spectra import spectra
from raykernel.store.baselines import read_baselines
from raykernel.store.blocks import Store
from raykernel.store.kernels import KernelHandle
from raykernel.store.verify import verify
from raykernel.terms import Criterion
from raykernel.training.adapter import write_adapter_config
from tests import tiny

ROBERTA = "roberta.encoder.layer.{}.attention.self.{}"
LAYERS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a model and reviews."""
    folder, before = tmp_path_factory.mktemp("selections"), Path.cwd()
    tiny.save_masked_lm(folder / "model", num_hidden_layers=LAYERS)
    tiny.write_reviews(folder / "reviews.tsv")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def arguments(**changes: str | None) -> list[str]:
    return tiny.overrides("model", **{"task__k": "4", "task__test_limit": "4", **changes})


def config_of(**changes: str | None) -> RunConfig:
    (run,) = compose_runs("select", arguments(**changes))
    return run.config


@pytest.fixture(scope="module")
def found(place: Path) -> Selections:
    """One run for all tests: eight train examples, seven choices of three layers."""
    return selections(config_of(), ("task=file",), Screen())


@pytest.fixture
def handle(found: Selections) -> KernelHandle:
    return Store("store").open(found.prepared.fingerprint)


def rows(store: str = "store", **wanted: object) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = Store(store).results("selections").to_pylist()
    return [row for row in listed if all(row[name] == value for name, value in wanted.items())]


def margin(kernel: np.ndarray) -> np.ndarray:
    """Qᵀ K Q of two outputs."""
    basis = np.array([1, -1]) / math.sqrt(2)
    return np.einsum("iajb,a,b->ij", kernel, basis, basis)


def kernel_of(handle: KernelHandle, layers: tuple[int, ...]) -> np.ndarray:
    """Query and value, which PEFT adapts by default."""
    names = [rf"layer\.{layer}\.attention\.self\.(query|value)" for layer in layers]
    return handle.kernel(names, rows=handle.grid.train)


def regularised(kernel: np.ndarray) -> float:
    values = np.linalg.eigvalsh(margin(kernel))
    ridge = 1e-3 * values.mean()
    return float((values[-1] + ridge) / (values[0] + ridge))


def test_all_choices_are_ranked_as_the_stored_kernels_say(
    found: Selections, handle: KernelHandle
) -> None:
    sets = [s for size in range(1, 4) for s in itertools.combinations(range(LAYERS), size)]
    expected = sorted((regularised(kernel_of(handle, chosen)), chosen) for chosen in sets)
    every = {row["rank"]: row for row in rows(criterion="regularised")}
    ranked = [every[rank] for rank in range(1, 8)]
    assert [tuple(row["layers"]) for row in ranked] == [chosen for _, chosen in expected]  # type: ignore[arg-type]
    for row, (value, chosen) in zip(ranked, expected, strict=True):
        assert row["regularised"] == pytest.approx(value, rel=1e-5)
        seen = margin(kernel_of(handle, chosen))
        assert row["trace"] == pytest.approx(np.trace(seen), rel=1e-6)
        whole = np.trace(margin(kernel_of(handle, (0, 1, 2)))) / 8
        assert row["sigma"] == pytest.approx(1e-3 * whole, rel=1e-6)
        identity = np.eye(8) + seen / (1e-3 * whole)
        assert row["log_det"] == pytest.approx(np.linalg.slogdet(identity)[1], rel=1e-4)
        assert row["candidates"] == [str(layer) for layer in chosen]
        assert (row["num_scored"], row["is_exhaustive"], row["num_rows"]) == (7, True, 8)
        assert row["num_features"] == 2 * 16 * 17 * len(chosen)  # weights and biases
        assert row["num_parameters"] == 2 * 8 * (16 + 16) * len(chosen)  # r (d_in + d_out)
    assert every[None]["layers"] == [0, 1, 2]


def test_labels_and_logits_are_those_of_train(found: Selections, handle: KernelHandle) -> None:
    train = handle.grid.train
    labels = example_labels(found.prepared.data)[train.start : train.stop]
    for row in rows(criterion="regularised"):
        kernel = kernel_of(handle, tuple(row["layers"]))  # type: ignore[arg-type]
        sigma = 1e-3 * np.trace(margin(kernel)) / 8
        left = leave_one_out(kernel, one_hot(labels, 2), sigma=sigma, f0=handle.logits(train))
        assert row["loo_error"] == pytest.approx(left.error, rel=1e-4)
        assert row["loo_accuracy"] == left.accuracy


def test_spectrum_says_the_same_of_a_choice(found: Selections, handle: KernelHandle) -> None:
    chosen = r"'layer\.[02]\.attention\.self\.(query|value)'"
    listed = spectra(config_of(spectrum__sets=f"[[{chosen}]]"), (), Screen())
    (own,) = (each for each in next(iter(listed.by_kind.values())) if each.patterns)
    (row,) = (r for r in rows(criterion="regularised") if r["layers"] == [0, 2])
    seen = own.seen
    assert row["num_unresolved"] == seen.num_unresolved
    assert row["condition_number"] == pytest.approx(seen.raw, rel=1e-6)
    assert row["regularised"] == pytest.approx(seen.regularised, rel=1e-6)
    assert row["top_over_median"] == pytest.approx(seen.median, rel=1e-6)
    assert row["amgm_gap"] == pytest.approx(seen.amgm_gap, rel=1e-6)
    assert row["effective_rank"] == pytest.approx(seen.effective_rank, rel=1e-6)
    assert row["num_features"] == own.num_features
    assert own.left_out is not None
    assert row["loo_error"] == pytest.approx(own.left_out.error, rel=1e-6)


def loaded(folder: str, base: nn.Module) -> nn.Module:
    """The base with the adapter that PEFT makes of a folder."""
    config = peft.PeftConfig.from_pretrained(folder)
    assert (config.peft_type, config.lora_alpha) == (peft.PeftType.LORA, 16)
    with warnings.catch_warnings():  # PEFT reads an attribute that transformers renames
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model: nn.Module = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    return model


def adapted(model: nn.Module) -> set[str]:
    """Modules that PEFT has adapted, by their paths in the plain model."""
    named = model.base_model.model.named_modules()
    return {path for path, module in named if hasattr(module, "lora_A")}


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_peft_loads_the_best_choice_as_it_is(found: Selections) -> None:
    (best,) = rows(criterion="regularised", rank=1)
    model = loaded(f"store/{best['adapter']}", RobertaForMaskedLM.from_pretrained("model"))
    assert adapted(model) == set(best["target_modules"])  # type: ignore[call-overload]
    layers: list[int] = best["layers"]  # type: ignore[assignment]
    pairs = itertools.product(layers, ("query", "value"))
    assert adapted(model) == {ROBERTA.format(layer, name) for layer, name in pairs}
    assert trained(model) == best["num_parameters"]


def test_the_same_command_computes_nothing_and_replaces_its_rows(
    found: Selections, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(rows())
    assert main(["select", *arguments()]) == 0
    assert "0 of 1 blocks computed now" in capsys.readouterr().out
    assert len(rows()) == before


def test_other_criteria_and_budgets_take_the_same_blocks(
    found: Selections, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"select__criterion": "log_det", "select__max_size": "2", "select__top": "2"}
    assert main(["select", *arguments(**changes)]) == 0
    assert main(["select", *arguments(**changes, select__exhaustive="0")]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("computing 0 blocks") == 2
    assert "greedy with exchanges, at least 63% of the best there is" in printed.out
    both = rows(criterion="log_det", rank=1)
    assert [row["is_exhaustive"] for row in both] == [True, False]
    assert both[0]["layers"] == both[1]["layers"]
    assert len(rows(criterion="log_det")) == 6
    changes = {"select__criterion": "loo_accuracy", "select__max_parameters": "600"}
    assert main(["select", *arguments(**changes)]) == 0
    (best,) = rows(criterion="loo_accuracy", rank=1)
    assert best["num_parameters"] == 512


def test_the_screen_names_criterion_choices_and_files(
    found: Selections, capsys: pytest.CaptureFixture[str]
) -> None:
    show_selections(found, Screen())
    out = capsys.readouterr().out
    assert "choices of 3 layers by regularised of sgd, 8 train examples" in out
    assert "all 3" in out
    assert "7 choices scored: all that the budget allows." in out
    (best,) = rows(criterion="regularised", rank=1)
    assert f"store/{best['adapter']}/adapter_config.json" in out
    assert "parameters=lora 'parameters.target_modules=[roberta.encoder.layer." in out


@pytest.fixture(scope="module")
def lora(place: Path) -> Selections:
    """Modules of a LoRA of rank 1: 16 features of each B, and 20 train examples, some the same."""
    lines = [
        f"{tiny.PLAIN[n % 7]} it was\t{label}" for n, (_, label) in enumerate(tiny.reviews(100))
    ]
    Path("repeated.tsv").write_text("\n".join(["review\trating", *lines]) + "\n", "utf-8")
    changes = {
        "task__train": "repeated.tsv",
        "task__k": "10",
        "kernel__block_size": "20",
        "kernel__kinds": "[sgd,asigngd]",
        "parameters": "lora",
        "parameters__r": "1",
        "parameters__target_modules": "[query,output.dense]",
        "parameters__layers_to_transform": "[0,1]",
        "select__candidates": "module",
        "select__max_size": "2",
        "select__top": "30",
        "store__path": "lora",
    }
    return selections(config_of(**changes), (), Screen())


def test_candidates_of_a_lora_are_the_modules_that_it_adapts(lora: Selections) -> None:
    (one,) = lora.by_kind  # asigngd has no spectrum
    (every,) = rows("lora", rank=None)
    names = ["query", "attention.output.dense", "output.dense"]
    assert every["candidates"] == [f"{layer}.{name}" for layer in (0, 1) for name in names]
    (best,) = rows("lora", rank=1)
    assert best["size"] == len(one.choices[0].members) <= 2
    model = loaded(f"lora/{best['adapter']}", RobertaForMaskedLM.from_pretrained("model"))
    assert adapted(model) == set(best["target_modules"])  # type: ignore[call-overload]
    assert trained(model) == best["num_parameters"]


def test_few_features_and_duplicates_are_named(
    lora: Selections, capsys: pytest.CaptureFixture[str]
) -> None:
    show_selections(lora, Screen())
    out = " ".join(capsys.readouterr().out.split())
    alone = [row for row in rows("lora") if row["size"] == 1]
    assert all(row["num_features"] == 16 for row in alone)  # A has gradient 0
    assert len(alone) == 6
    assert "6 of the 21 best have fewer features than 20 rows" in out
    train = [lora.prepared.data.examples[i] for i in lora.prepared.grid.train]
    same = {(a.id, b.id) for i, a in enumerate(train) for b in train[i + 1 :] if a.texts == b.texts}
    assert same
    assert set(lora.by_kind[0].duplicates) == same
    assert f"Duplicates: {len(same)} pair" in out
    assert "Unresolved: rounding hides" in out or "∞" in out


@pytest.mark.parametrize(
    ("verdict", "said"),
    [(False, "Not kernel-like: in 1 of 1 stored verdict "), (True, ""), (None, "is not known: ")],
)
def test_a_verdict_of_behavior_is_said(
    place: Path, found: Selections, verdict: bool | None, said: str, capsys: pytest.CaptureFixture
) -> None:
    """That of the same data set, prompt and model; of another one nothing is."""
    store = Store("store")
    row = {"fingerprint": found.prepared.fingerprint, "trial": "t", "solver": "s", "criteria": "c"}
    row |= {"task": "file", "model": "model", "prompt": "manual", "k": 4, "seed": 13}
    store.write_result("behavior", row | {"kernel_behavior": verdict})
    store.write_result("behavior", row | {"trial": "u", "k": 5, "kernel_behavior": False})
    again = selections(config_of(), (), Screen())
    assert again.verdicts == (verdict,)
    show_selections(again, Screen())
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert ("kernel-like" in out or "not known" in out) == bool(said)


def test_without_a_prompt_peft_is_given_the_encoder(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"prompt": "none", "store__path": "encoder", "model__architecture": "encoder"}
    changes |= {"prompt__template": None, "prompt__words": None}  # type: ignore[dict-item]
    found = selections(config_of(**changes, select__max_size="1"), (), Screen())
    assert len(found.by_kind[0].choices) == LAYERS + 1
    show_selections(found, Screen())
    assert "no leave-one-out accuracy" in capsys.readouterr().out
    assert {row["loo_error"] for row in rows("encoder")} == {None}  # the probe has seen them all
    (best,) = rows("encoder", rank=1)
    model = loaded(f"encoder/{best['adapter']}", RobertaModel.from_pretrained("model"))
    assert adapted(model) == set(best["target_modules"])  # type: ignore[call-overload]
    assert len(adapted(model)) == 2


def test_a_damaged_adapter_is_named_and_removed(found: Selections) -> None:
    assert verify("store").ok
    (best,) = rows(criterion="regularised", rank=1)
    path = Path("store", str(best["adapter"]), "adapter_config.json")
    content = path.read_bytes()
    assert json.loads(content)["peft_type"] == "LORA"
    path.write_bytes(content[:-20])
    assert not verify("store").ok
    assert verify("store", remove=True).bad[0].path == path.resolve()
    assert not path.exists()
    assert main(["select", *arguments()]) == 0
    assert path.read_bytes() == content
    assert verify("store").ok


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("select.criterion=log_det", "Set select.max_size, select.max_parameters or"),
        ("select.criterion=kappa", "select.criterion"),
        ("select.modules=[qury]", "did you mean 'query'"),
        ("select.modules=[LayerNorm]", "names no linear layer inside a transformer layer"),
        ("select.max_size=0", "at least 1"),
        ("spectrum.ridge=0", "more than 0"),
        ("kernel.kinds=[asigngd]", "sgd or signgd"),
        ("select.criterion=loo_error prompt=none", "fitted to all of train"),
        ("kernel.projection.method=intrinsic_dimension", "projects all layers together"),
        ("select.max_memory_mb=0.001", "select.max_memory_mb: found 65, expected at least 512"),
        ("select.max_parameters=100", "at least 512: that many parameters the smallest of 3"),
        ("parameters=lora parameters.target_modules=[query] select.modules=[valu]", "'value'"),
        (
            "parameters=lora parameters.target_modules=[query] select.modules=[query,key]",
            "'key' is a module of the model whose weights do not vary in this kernel",
        ),
        ("parameters.include=[LayerNorm]", "found none of 18 linear layers among what varies"),
        ("select.halves=3", "an even number, or 0"),
        ("select.seeds=[1]", "none without parameters=lora"),
        ("parameters=lora select.seeds=[0]", "differ from each other and from parameters.seed=0"),
        ("select.objectives=[trace]", "two criteria or more that differ"),
        ("select.objectives=[trace,random]", "criteria other than random"),
        ("select.objectives=[trace,loo_error] prompt=none", "fitted to all of train"),
        (
            "select.criterion=relative_gradient_norm select.baselines=false",
            "a criterion of the kernel, or select.baselines=true",
        ),
        ("select.criterion=importance", "Set select.max_size, select.max_parameters or"),
    ],
)
def test_wrong_settings_are_said_before_anything_is_computed(
    place: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    chosen = [*arguments(store__path="empty"), *override.split()]
    if "prompt=none" in chosen:
        chosen = [one for one in chosen if not one.startswith("prompt.")]
    assert main(["select", *chosen]) == 2
    assert said in capsys.readouterr().err
    assert not list(Path().glob("empty/kernels/*/block-*"))


def test_ranks_on_halves_are_those_of_the_sub_matrices(
    found: Selections, handle: KernelHandle
) -> None:
    """κ of every choice on each half of train, by hand; 7 choices, 8 halves."""
    train = handle.grid.train
    labels = example_labels(found.prepared.data)[train.start : train.stop]
    ranked = sorted(
        (row for row in rows(criterion="regularised") if row["rank"] is not None),
        key=lambda row: row["rank"],  # type: ignore[arg-type, return-value]
    )
    kernels = [kernel_of(handle, tuple(row["layers"])) for row in ranked]  # type: ignore[arg-type]
    ranks = []
    for half in halves(labels, 8, seed=0):
        values = np.array([regularised(kernel[half][:, :, half]) for kernel in kernels])
        ranks.append((values[:, None] > values).sum(axis=1) + 1)
    for row, own in zip(ranked, np.array(ranks).T, strict=True):
        assert row["half_mean_rank"] == pytest.approx(own.mean())
        assert (row["half_best_rank"], row["half_worst_rank"]) == (own.min(), own.max())
        assert row["half_first"] == pytest.approx((own == 1).mean())
        assert (row["num_ranked"], row["seed_first"]) == (7, None)


def test_the_front_is_of_all_choices(found: Selections, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"select__objectives": "[loo_error,regularised,num_parameters]"}
    changes |= {"store__path": "fronts"}
    assert main(["select", *arguments(**changes)]) == 0
    out = capsys.readouterr().out
    assert "Pareto front of loo_error, regularised, num_parameters" in out
    own = rows("fronts", is_front_exact=True)
    assert len(own) == 8
    chosen = [row for row in own if row["rank"] is not None]
    costs = np.array(
        [[row[k] for k in ("loo_error", "regularised", "num_parameters")] for row in chosen],
        dtype=float,
    )
    beaten = [any((other <= one).all() and (other < one).any() for other in costs) for one in costs]
    assert [row["front"] is None for row in chosen] == beaten
    places = sorted((row["front"], row["loo_error"]) for row in chosen if row["front"])
    assert [place for place, _ in places] == list(range(1, 8 - sum(beaten)))
    assert [error for _, error in places] == sorted(error for _, error in places)
    # A front that NSGA-II finds of these few is the same, and more of it is stored than is shown.
    greedy = {"select__exhaustive": "0", "select__top": "1", "select__trials": "60"}
    assert main(["select", *arguments(**changes, **greedy)]) == 0
    assert "on the front of those NSGA-II tried" in capsys.readouterr().out
    tried = [row for row in rows("fronts", is_front_exact=False) if row["front"]]
    assert {tuple(row["layers"]) for row in tried} == {  # type: ignore[arg-type]
        tuple(row["layers"])
        for row in chosen
        if row["front"]  # type: ignore[arg-type]
    }


def test_other_seeds_of_a_lora_are_kernels_of_their_own(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "parameters": "lora",
        "parameters__r": "2",
        "select__seeds": "[5,6]",
        "select__halves": "0",
        "store__path": "seeds",
    }
    assert main(["select", *arguments(**changes)]) == 0
    assert "Stability: over 3 seeds of the LoRA's A the first choice" in capsys.readouterr().out
    store = Store("seeds")
    handles = [store.open(name) for name in store.fingerprints()]
    seeds = sorted(one.identity["parameters"]["seed"] for one in handles)  # type: ignore[call-overload, index]
    assert seeds == [0, 5, 6]
    ranked = [row for row in rows("seeds") if row["rank"] is not None]
    values = np.array(
        [
            [
                regularised(
                    one.kernel(
                        [rf"layer\.{layer}\..*lora" for layer in row["layers"]],  # type: ignore[attr-defined]
                        rows=one.grid.train,
                    )
                )
                for row in ranked
            ]
            for one in handles
        ]
    )
    ranks = (values[:, :, None] > values[:, None, :] * (1 + 1e-9)).sum(axis=2) + 1
    for row, own in zip(ranked, ranks.T, strict=True):
        assert row["seed_mean_rank"] == pytest.approx(own.mean())
        assert (row["seed_best_rank"], row["seed_worst_rank"]) == (own.min(), own.max())
        assert row["half_first"] is None
    assert main(["select", *arguments(**changes)]) == 0
    assert capsys.readouterr().err.count("computing 0 blocks") == 3


def test_candidates_without_a_gradient_are_left_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A constant added to all keys changes no attention: the key bias has no gradient."""
    changes = {
        "parameters__include": "[key.bias,query.bias]",
        "select__modules": "[query,key]",
        "select__candidates": "module",
        "store__path": "dead",
    }
    assert main(["select", *arguments(**changes)]) == 0
    assert "Left out: 3 candidates without any gradient." in capsys.readouterr().out
    (every,) = rows("dead", rank=None)
    assert every["candidates"] == [f"{layer}.query" for layer in range(LAYERS)]


def test_a_criterion_that_rounding_hides_ranks_nothing(
    lora: Selections, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train examples that are the same: no choice has a smallest eigenvalue but noise."""
    settings = lora.prepared.config.select
    hidden = replace(settings, criterion=Criterion.condition_number)
    config = replace(lora.prepared.config, select=hidden)
    show_selections(selections(config, (), Screen()), Screen())
    assert "Unranked: rounding hides what the criterion is made of" in capsys.readouterr().out


def test_the_adapter_says_modules_and_layers_where_that_is_the_same(
    found: Selections,
) -> None:
    """As a person would write it, and whole paths where names alone would take other modules."""
    (one,) = found.by_kind
    config = json.loads((one.adapter / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["query", "value"]
    assert config["layers_to_transform"] == [member.layer for member in one.choices[0].members]
    linears = layer_linears(found.prepared.config.model, has_prompt=True)
    base = "roberta.encoder.layer."
    key, query = "attention.self.key", "attention.self.query"
    for chosen, expected in (
        ({(0, key), (2, key)}, {"key"}),
        ({(0, query), (0, "intermediate.dense")}, {"query", "intermediate.dense"}),
        ({(1, "attention.output.dense")}, {"attention.output.dense"}),
        # `output.dense` ends the path of another module, too; and no names and layers mean these.
        ({(1, "output.dense")}, None),
        ({(0, query), (1, key)}, None),
    ):
        targets = {f"{base}{layer}.{name}" for layer, name in chosen}
        write_adapter_config(
            Path("written"),
            {path: linears[path] for path in targets},
            model=found.prepared.config.model,
            parameters=found.prepared.config.parameters,
            has_prompt=True,
        )
        config = json.loads(Path("written/adapter_config.json").read_text())
        assert set(config["target_modules"]) == (expected or targets)
        layers = sorted({layer for layer, _ in chosen})
        assert config["layers_to_transform"] == (layers if expected else None)
        model = loaded("written", RobertaForMaskedLM.from_pretrained("model"))
        assert adapted(model) == targets


def test_peft_gives_modules_the_ranks_of_eva(found: Selections, capsys) -> None:
    """The same number of directions in all, those that explain most; and the same scale alpha/r."""
    modules = "[query,intermediate.dense,output.dense]"
    changes = {"store__path": "ranks", "parameters__r": "4", "select__rho": "2"}
    changes["select__modules"] = modules
    one = selections(config_of(**changes), (), Screen())
    show_selections(one, Screen())
    assert "Ranks by EVA: " in capsys.readouterr().out
    (best,) = rows("ranks", rank=1)
    handle = Store("ranks").open()
    shares = {path: own.shares[:8] for path, own in read_baselines(handle).items()}
    chosen = {path: shares[path] for path in best["target_modules"]}  # type: ignore[attr-defined]
    least = np.sort(np.concatenate(list(chosen.values())))[-4 * len(chosen)]
    expected = {path: int((own >= least).sum()) for path, own in chosen.items()}
    assert len(set(expected.values())) > 1
    assert json.loads(str(best["ranks"])) == {path: r for path, r in expected.items() if r}
    model = loaded(f"ranks/{best['adapter']}", RobertaForMaskedLM.from_pretrained("model"))
    layers = {
        path: layer
        for path, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {path: layer.r["default"] for path, layer in layers.items()} == {
        path: r for path, r in expected.items() if r
    }
    assert {layer.scaling["default"] for layer in layers.values()} == {16 / 4}


def test_candidates_that_share_a_parameter_are_refused() -> None:
    one, two = (Member(name, 0, (name,), (name,), 1, None) for name in ("a", "b"))
    _check_ties(["a", "b", "c", "cross(b, c)"], [one, two])
    with pytest.raises(InputError, match="a and b share a parameter"):
        _check_ties(["a", "b", "cross(a, b)"], [one, two])
