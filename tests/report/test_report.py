"""The report's numbers are the store's, and nothing of a user's becomes code of the page."""

from __future__ import annotations

import csv
import json
import math
import platform
import re
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats

from raykernel.cli import main
from raykernel.lambda_table import LambdaTable
from raykernel.report.chart import power
from raykernel.report.correlations import convergence_chart
from raykernel.report.costs import cost_chart, history_chart, pareto_front
from raykernel.report.evidence import Evidence, is_papers_setting, of_study, read_evidence
from raykernel.report.heatmaps import module_in_layer
from raykernel.report.ink import PALETTE, inline_svgs, to_svg
from raykernel.report.tables import cell
from raykernel.report.write import all_charts, report
from raykernel.store.blocks import Store
from raykernel.store.query import query
from raykernel.store.results import TABLES
from raykernel.study import Arm, Study
from raykernel.sweep import load_study
from raykernel.terms import Command
from tests.report.conftest import NASTY, Made

DRAWN = {
    "eigenvalues", "kappa-by-module", "alignment-by-module", "kernel-and-finetuning", "linearized",
    "lambda-path", "bounds", "pareto", "history", "cost",
}  # fmt: skip


class Reader(HTMLParser):
    """Tables as texts, figures, headings and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.figures: dict[str, int] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._name, self._in_cell = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        own = dict(attrs)
        self.tags.append((tag, own))
        if tag == "div" and own.get("class") == "table":
            self._name = own["id"]
            self.tables[self._name] = []
        if tag == "figure":
            self._figure = own["id"]
            self.figures[self._figure] = 0
        if tag == "svg" and own.get("role") == "img":
            self.figures[self._figure] += 1
        if tag == "tr":
            self.tables[self._name].append([])
        if tag in {"td", "th"}:
            self.tables[self._name][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in {"td", "th"}

    def handle_data(self, data):
        if self._in_cell:
            self.tables[self._name][-1][-1] += data


@pytest.fixture(autouse=True)
def _in_folder(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies and files of the user's own are looked for in the working folder."""
    monkeypatch.chdir(made.folder)


@pytest.fixture(scope="module")
def page(made: Made) -> Reader:
    return Reader(made.whole.read_text(encoding="utf-8"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def evidence(made: Made) -> Evidence:
    return read_evidence(made.store)


# ---------------------------------------------------------------- files


def test_every_figure_is_there_as_svg_png_and_csv_and_nothing_half_written(made, page):
    assert set(page.figures) == DRAWN
    assert all(page.figures.values())
    for name in DRAWN:
        assert (made.whole.parent / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (made.whole.parent / f"{name}.svg").read_text(encoding="utf-8").endswith("</svg>\n")
        assert read_csv(made.whole.parent / f"{name}.csv")
    assert not [path for path in made.whole.parent.iterdir() if path.name.startswith(".")]
    links = {own["href"] for tag, own in page.tags if tag == "a"}
    files = {link for link in links if not link.startswith("#")}
    assert files == {path.name for path in made.whole.parent.iterdir()} - {"index.html"}


def test_a_figure_that_cannot_be_written_leaves_no_page(made, tmp_path):
    (tmp_path / "cost.png").mkdir()
    with pytest.raises(OSError, match=r"cost\.png"):
        report("store", tmp_path, study="pull", made_by="raykernel 0")
    assert not (tmp_path / "index.html").exists()


def test_the_same_figure_has_the_same_bytes(made):
    first, second = (all_charts(evidence(made))[-1] for _ in range(2))
    assert to_svg(first) == to_svg(second)


# ---------------------------------------------------------------- numbers


def test_the_data_of_a_figure_are_the_answer_to_the_sql_that_it_names(made):
    charts = [c for c in all_charts(evidence(made)) if c.made.startswith(("select", "with"))]
    assert {chart.name for chart in charts} == {
        "kernel-and-finetuning", "linearized", "lambda-path", "bounds", "kappa-by-module",
        "pareto", "history", "cost",
    }  # fmt: skip
    for chart in charts:
        answer = query(chart.made, made.store.path)
        assert chart.data.num_rows == answer.num_rows
        assert sorted(map(str, chart.data.to_pylist())) == sorted(map(str, answer.to_pylist()))


def test_eigenvalues_are_those_of_the_contrast_of_every_layers_kernel(made):
    rows = read_csv(made.whole.parent / "eigenvalues.csv")
    handle = made.store.open(rows[0]["fingerprint"])
    basis = np.array([1, -1]) / math.sqrt(2)
    for layer in (0, 1):
        kernel = handle.kernel(layers_to_transform=[layer], rows=handle.grid.train)
        seen = np.einsum("iajb,a,b->ij", kernel, basis, basis)
        expected = np.linalg.eigvalsh(seen)[::-1]
        own = [
            r for r in rows if (r["layer"], r["fingerprint"]) == (str(layer), handle.fingerprint)
        ]
        found = [float(row["eigenvalue"]) for row in own]
        np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-9)
        assert [int(row["index"]) for row in own] == list(range(1, len(own) + 1))
        assert len(own) == 6


def test_alignment_is_that_of_centred_kernel_and_labels(made):
    rows = read_csv(made.whole.parent / "alignment-by-module.csv")
    handle = made.store.open(rows[0]["fingerprint"])
    train = handle.grid.train
    names = handle.identity["task"]["labels"]
    labels = [names.index(label) for label in handle.examples()["label"].to_pylist()[: len(train)]]
    centre = np.eye(len(train)) - 1 / len(train)
    y = centre @ (np.eye(2)[labels] @ [1, -1])
    for row in rows:
        kernel = handle.kernel([row["layer_group"]], rows=train)
        seen = centre @ np.einsum("iajb,a,b->ij", kernel, [1, -1], [1, -1]) @ centre
        expected = y @ seen @ y / (np.linalg.norm(seen) * (y @ y))
        assert float(row["alignment"]) == pytest.approx(expected, rel=1e-9)


def test_tables_of_the_page_are_the_stores(made, page):
    rows = made.store.results("trials").sort_by([("created", "descending")]).to_pylist()
    header, *lines = page.tables["table-trials"]
    assert len(lines) == len(rows) == 6
    for line, row in zip(lines, rows, strict=True):
        for name, text in zip(header, line, strict=True):
            assert text == cell(name, row[name])
        assert float(line[header.index("finetuned")]) == pytest.approx(row["finetuned"], abs=5e-4)
    known = {table.removeprefix("table-") for table in page.tables}
    assert known == {"kernels", "trials", "behavior", "spectra", "selections", "bounds", "twins-1"}


def test_kappa_of_a_module_is_that_of_the_table_spectra(made):
    stored = {
        (row["fingerprint"], row["layer_group"]): row["regularised"]
        for row in made.store.results("spectra").to_pylist()
        if row["layer_group"] is not None and row["change"] is None
    }
    rows = read_csv(made.whole.parent / "kappa-by-module.csv")
    for row in rows:
        expected = stored[row["fingerprint"], row["layer_group"]]
        assert row["regularised"] == ("" if expected is None else row["regularised"])
        if expected is not None:
            assert float(row["regularised"]) == pytest.approx(expected, rel=1e-12)


def test_a_run_of_several_kinds_costs_its_seconds_once(made):
    run = {"fingerprint": "f", "task": "t", "model": "m", "k": 1, "seed": 1, "seconds": 30.0}
    rows = [run | {"kind": kind} for kind in ("sgd", "signgd", "asigngd")]
    rows += [run | {"fingerprint": "g", "kind": "sgd", "seconds": 12.0}]
    table = pa.Table.from_pylist(rows, schema=TABLES["kernels"].schema)
    chart = cost_chart(Evidence(made.store, {"kernels": table}))
    assert chart is not None
    assert chart.data["seconds"].to_pylist() == [30.0, 12.0]
    assert chart.finding.startswith("2 results took 42 s in all")


def test_a_dot_is_the_run_that_dev_selects(made):
    rows = read_csv(made.whole.parent / "kernel-and-finetuning.csv")
    tuned = [
        row for row in rows if row["method"].startswith("fine-tuning") and row["task"] == "file"
    ]
    trials = [row for row in made.store.results("trials").to_pylist() if row["task"] == "file"]
    for row in tuned:
        same = [t for t in trials if (t["seed"], t["method"]) == (int(row["seed"]), "full")]
        assert float(row["dev"]) == max(t["dev"] for t in same)
        assert float(row["score"]) in {
            t["finetuned"] for t in same if t["dev"] == float(row["dev"])
        }


def test_no_choice_on_the_front_is_beaten_and_every_other_one_is():
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 12, (60, 2)).astype(float)]
    front = pareto_front(points)

    def beats(one, other):
        return one[0] <= other[0] and one[1] <= other[1] and one != other

    for place, point in enumerate(points):
        beaten = any(beats(other, point) for other in points)
        twin = any(points[at] == point for at in front)
        assert (place in front) == (not beaten and points.index(point) == place)
        assert beaten != twin


def test_history_counts_runs_by_how_they_ended(made):
    start = datetime(2026, 1, 1, tzinfo=timezone.utc)
    status = ["ok", "ok", "failed", "ok", "stopped"]
    runs = pa.table({
        "study": ["s"] * 5, "arm": ["a"] * 5, "command": ["finetune"] * 5, "status": status,
        "cause": [None, None, "memory", None, None], "error": ["", "", "token=hf_x", "", ""],
        "seconds": [1.0] * 5,
        "created": [start + timedelta(minutes=10 * i) for i in range(5)],
        "overrides": [["a=b"]] * 5,
    })  # fmt: skip
    chart = history_chart(Evidence(made.store, {"runs": runs}))
    assert chart is not None
    assert chart.finding.startswith("3 of 5 runs done, 1 failed (memory), 1 stopped, within 40 min")
    assert [series.label for series in chart.series] == ["done", "failed", "stopped"]
    assert "hf_x" not in str(chart.data.to_pylist())
    assert inline_svgs(chart)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (0.1, "0.1"), (1e-4, "10⁻⁴"), (1e6, "10⁶"), (500.0, "500"), (2e4, "20,000")],
)
def test_ticks_of_a_logarithmic_axis(value, text):
    assert power(value) == text


def test_a_module_is_named_by_its_path_in_its_layer():
    name = "base.encoder.layer.3.attention.self.query.lora_B.default"
    assert module_in_layer(name) == "attention.self.query B"
    assert module_in_layer("model.layers.12.mlp.down_proj") == "mlp.down_proj"


# ---------------------------------------------------------------- a study


def test_a_study_has_its_own_question_rows_and_table(made):
    study = load_study("pull")
    own, rows = of_study(evidence(made), study)
    assert {row["lam"] for row in rows} == {0.0, 10.0}
    assert len({row["trial"] for row in rows}) == 4
    assert own.tables["trials"].num_rows == 4
    page = Reader(made.study.read_text(encoding="utf-8"))
    (sheet,) = study.table(rows, compare=False)
    assert page.tables == {"table-1": [list(sheet.columns), *map(list, sheet.rows)]}
    assert set(page.figures) == {"lambda-path", "bounds", "history", "cost"}
    text = made.study.read_text(encoding="utf-8")
    assert "Is &lt;b&gt;f&lt;/b&gt; nearer" in text
    means = {
        lam: np.mean([r["deviation"] for r in rows if r["lam"] == lam and r["split"] == "test"])
        for lam in (0.0, 10.0)
    }
    moved = re.search(r"‖θ − θ₀‖ falls from ([\d.]+) to ([\d.]+)", text)
    assert moved is not None
    assert (float(moved[1]), float(moved[2])) == pytest.approx((means[0.0], means[10.0]), abs=5e-4)


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        (("model=m", "training=sgd", "task=c", "training.steps=2"), True),
        (("model=m", "training=sgd", "task=c", "training.steps=2", "store.path=x"), True),
        (("model=m", "training=sgd", "task=c", "training.steps=9"), False),
        (("training=sgd", "task=a", "training.steps=2"), False),  # the demo, with another model
        (("model=n", "training=sgd", "task=a", "training.steps=2"), True),  # as its numbers say
        (("model=m", "training=sgd", "task=a", "training.steps=2", "kernel.dim=3"), False),
    ],
)
def test_the_papers_numbers_stand_beside_its_setting_alone(overrides, same):
    arm = Arm("sgd", Command.finetune, {"training": "sgd"}, {"training.steps": "1,2"})
    study = Study("?", {"task": "a,b"}, [arm], LambdaTable(), base={"model": "m"}, name="s")
    assert is_papers_setting([{"overrides": list(overrides)}], study) == same


# ---------------------------------------------------------------- what is the user's stays text


def test_names_of_the_user_never_become_elements(made, page):
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert "i" not in tags
    assert NASTY in {line[0] for line in page.tables["table-kernels"]}
    assert tags.count("svg") == made.whole.read_text(encoding="utf-8").count("</svg>")


def test_the_page_asks_no_network_and_tells_no_command_line(made, page):
    text = made.whole.read_text(encoding="utf-8")
    assert "hf_secret" not in text
    assert "http" not in re.sub(r"http-equiv", "", text)
    for _, own in page.tags:
        assert not {"src", "srcset", "action"} & set(own)
    policy = next(own["content"] for tag, own in page.tags if own.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_identifiers_are_unique(page):
    names = [own["id"] for _, own in page.tags if "id" in own]
    assert len(names) == len(set(names))


# ---------------------------------------------------------------- the command and its errors


def test_the_command_prints_the_page(made, tmp_path, capsys):
    arguments = ["report", "pull", "--store", str(made.folder / "store"), "--out"]
    assert main([*arguments, str(tmp_path / "a" / "b")]) == 0
    printed = capsys.readouterr().out.strip()
    assert Path(printed) == tmp_path / "a" / "b" / "index.html"
    assert Path(printed).is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pul"], "did you mean 'pull'"),
        (["--store", "nowhere"], "found no store"),
        (["--store", "empty"], "found no results"),
        (["condition_number"], "no results of the study condition_number"),
        (["--out", "reviews.tsv/page"], "cannot be written"),
    ],
)
def test_what_cannot_be_reported_is_said(made, tmp_path, arguments, message, capsys):
    Store(tmp_path / "empty").create()
    arguments = [str(tmp_path / "empty") if text == "empty" else text for text in arguments]
    given = arguments if "--store" in arguments else [*arguments, "--store", "store"]
    assert main(["report", *given]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- κ against training


def test_kappa_and_training_have_spearmans_correlations(made):
    kappas, losses = [10.0, 20.0, 40.0, 80.0], [0.1, 0.3, 0.2, 0.4]
    scores = [0.9, 0.7, 0.8, 0.6]
    shared = {"task": "t", "model": "m", "k": 4, "seed": 13}
    rows: dict[str, list[dict[str, object]]] = {"spectra": [], "trials": [], "curves": []}
    for i, (kappa, loss, score) in enumerate(zip(kappas, losses, scores, strict=True)):
        chosen = {"target_modules": ["query"], "layers_to_transform": [i]}
        rows["spectra"].append(
            shared | {"groups": [f"layer.{i}"], "layers": [i], "modules": ["query"],
                      "regularised": kappa, "mean": 1.0, "num_rows": 4}
        )  # fmt: skip
        rows["trials"].append(
            shared | {"trial": f"{i}", "lam": 0.0, "training": "{}", "finetuned": score,
                      "parameters": json.dumps(chosen)}
        )  # fmt: skip
        for step, value in enumerate((1.0, loss), start=1):
            point = {"trial": f"{i}", "step": step, "train_loss": value, "dev_score": 0.5}
            rows["curves"].append(point)
    tables = {n: pa.Table.from_pylist(own, schema=TABLES[n].schema) for n, own in rows.items()}
    chart = convergence_chart(Evidence(made.store, tables))
    assert chart is not None
    for target in (losses, scores):
        rho = scipy.stats.spearmanr(kappas, target).statistic
        assert f"{rho:+.2f} (query)".replace("-", "−") in chart.finding
    assert chart.data["final_train_loss"].to_pylist() == losses
    assert chart.data["test"].to_pylist() == scores
    few = tables | {"trials": tables["trials"].slice(0, 2)}
    assert convergence_chart(Evidence(made.store, few)) is None


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("name", [name for name in PALETTE if name not in {"rule", "paper"}])
@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_is_seen_on_its_ground(name, dark):
    """Contrast as of WCAG 2.1: 3 for lines and marks, 4.5 for letters."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted(luminance(PALETTE[key][dark]) for key in (name, "paper"))
    assert (high + 0.05) / (low + 0.05) >= (4.5 if name in {"ink", "muted"} else 3.0)


@pytest.mark.parametrize(
    "table", ["kernels", "spectra", "selections", "trials", "twins", "behavior"]
)
def test_a_result_says_where_it_comes_from_and_what_it_took(made, table):
    for row in made.store.results(table).to_pylist():
        assert row["seconds"] >= 0
        assert row["peak_memory_bytes"] > 50 * 2**20  # no process with PyTorch has less
        assert row["host"] == platform.node()
        assert {"raykernel", "torch", "python"} <= json.loads(row["versions"]).keys()
        assert row["overrides"]
