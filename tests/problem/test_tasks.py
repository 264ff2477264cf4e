"""Few-shot samples and readers: the papers' procedure, every format, every mistake."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from raykernel.config import PromptConfig, RunConfig, TaskConfig
from raykernel.errors import InputError
from raykernel.problem.prompts import resolve_prompt
from raykernel.problem.sources import read_rows
from raykernel.problem.tasks import Data, load_data, shuffled
from raykernel.terms import PromptStyle, Source, Split

CONF = Path(__file__).parents[2] / "conf"


def write_csv(path: Path, num_rows: int = 60, labels: tuple[str, ...] = ("bad", "good")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "rating"])
        writer.writerows([f"text {i}", labels[i % len(labels)]] for i in range(num_rows))
    return path


def task_of(train: Path, **changes: object) -> TaskConfig:
    settings: dict[str, object] = {"text": ["review"], "label": "rating", "k": 4}
    return TaskConfig(train=str(train), **{**settings, **changes})  # type: ignore[arg-type]


def rows_of(data: Data, split: Split) -> list[str]:
    return [data.examples[index].id for index in data.splits[split]]


def conf_run(group: str, name: str) -> RunConfig:
    """A group file merged over the schema, as on the command line."""
    schema = OmegaConf.structured(RunConfig)
    for node in (schema, schema.task, schema.prompt, schema.model):
        OmegaConf.set_readonly(node, False)  # frozen dataclasses make read-only nodes
    own = {"model": {"name": "any"}, group: OmegaConf.load(CONF / group / f"{name}.yaml")}
    run = OmegaConf.to_object(OmegaConf.merge(schema, own))
    assert isinstance(run, RunConfig)
    return run


def conf_task(name: str) -> TaskConfig:
    return conf_run("task", name).task


# ---------------------------------------------------------------- the papers' procedure
def write_glue(folder: Path, num_train: int = 400, num_dev: int = 150) -> None:
    (folder / "SST-2").mkdir(parents=True)
    for file, count in (("train.tsv", num_train), ("dev.tsv", num_dev)):
        lines = [f'"{file} sentence {i}, with a quote\t{(i * 7 // 3) % 2}\n' for i in range(count)]
        (folder / "SST-2" / file).write_text("sentence\tlabel\n" + "".join(lines))


@pytest.mark.parametrize("seed", [13, 100])
def test_glue_sample_is_the_papers_own(tmp_path: Path, seed: int) -> None:
    write_glue(tmp_path)
    task = conf_task("sst2")
    fields = {**vars(task), "data_dir": str(tmp_path), "k": 16, "seed": seed, "test_limit": 100}
    data = load_data(TaskConfig(**fields))

    lines = (tmp_path / "SST-2" / "train.tsv").read_text().splitlines(keepends=True)[1:]
    np.random.seed(seed)
    np.random.shuffle(lines)
    by_label: dict[str, list[str]] = {}
    for line in lines:
        by_label.setdefault(line.strip().split("\t")[-1], []).append(line.split("\t")[0])
    test_lines = (tmp_path / "SST-2" / "dev.tsv").read_text().splitlines(keepends=True)[1:]
    np.random.seed(42)
    np.random.shuffle(test_lines)

    def texts(split: Split) -> list[str]:
        return [data.examples[index].texts[0] for index in data.splits[split]]

    assert texts(Split.train) == by_label["0"][:16] + by_label["1"][:16]
    assert texts(Split.dev) == by_label["0"][16:32] + by_label["1"][16:32]
    assert texts(Split.test) == [line.split("\t")[0] for line in test_lines[:100]]


def test_csv_style_folder_without_header(tmp_path: Path) -> None:
    (tmp_path / "trec").mkdir()
    for file, count in (("train.csv", 90), ("test.csv", 40)):
        with (tmp_path / "trec" / file).open("w", newline="") as lines:
            csv.writer(lines).writerows([i % 6, f'what, is "{i}"?'] for i in range(count))
    task = TaskConfig(**{**vars(conf_task("trec")), "data_dir": str(tmp_path), "k": 2})
    data = load_data(task)
    assert data.labels == ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
    assert [len(data.splits[split]) for split in Split] == [12, 12, 40]
    first = data.examples[0]
    assert first.texts[0] == f'what, is "{first.id.split(":")[1]}"?'


def test_test_rows_of_the_csv_style_are_those_of_pandas_sample() -> None:
    # pandas draws RandomState(seed).choice(n, size, replace=False)
    assert shuffled(500, 42)[:100] == np.random.RandomState(42).choice(500, 100, False).tolist()


def test_broken_glue_rows_are_shuffled_along_but_never_chosen(tmp_path: Path) -> None:
    (tmp_path / "QQP").mkdir()
    rows = [f"{i}\ta\tb\tfirst {i}\tsecond {i}\t{i % 2}" for i in range(40)]
    rows[5] = "broken line"
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "QQP" / file).write_text("\n".join(["header", *rows]) + "\n")
    task = TaskConfig(**{**vars(conf_task("qqp")), "data_dir": str(tmp_path), "k": 2})
    data = load_data(task)
    order = [row for row in shuffled(40, task.seed) if row != 5 and row % 2 == 0]
    assert rows_of(data, Split.train)[:2] == [f"train.tsv:{row}" for row in order[:2]]
    assert len(data.splits[Split.test]) == 39
    assert any("left out" in note for note in data.notes)


def test_samples_nest_over_k_and_share_the_test_examples(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", 200)
    small, large = (load_data(task_of(train, k=k)) for k in (3, 9))
    few = {*rows_of(small, Split.train), *rows_of(small, Split.dev)}
    assert few <= set(rows_of(large, Split.train))
    assert rows_of(small, Split.test) == rows_of(large, Split.test)
    other = load_data(task_of(train, seed=21))
    assert rows_of(other, Split.test) == rows_of(small, Split.test)
    assert rows_of(other, Split.train) != rows_of(small, Split.train)[: len(few)]


def test_held_out_test_rows_are_in_no_sample_of_any_seed(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", 80)
    test = set(rows_of(load_data(task_of(train)), Split.test))
    assert len(test) == 40
    for seed in range(20):
        data = load_data(task_of(train, seed=seed, k=10))
        assert not test & {*rows_of(data, Split.train), *rows_of(data, Split.dev)}
        assert set(rows_of(data, Split.test)) == test


def test_examples_are_unique_and_ordered_by_label(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv")
    (tmp_path / "other").mkdir()
    test = write_csv(tmp_path / "other" / "a.csv")
    data = load_data(task_of(train, test=str(test)))
    ids = [example.id for example in data.examples]
    assert len(set(ids)) == len(ids) == 8 + 8 + 60
    assert [data.examples[i].label for i in data.splits[Split.train]] == [0] * 4 + [1] * 4
    assert any("repeat a text" in note for note in data.notes)


def test_balanced_test_has_equally_many_of_each_label(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", 90, labels=("bad", "good", "good"))
    data = load_data(task_of(train, test=str(train), test_balanced=True, test_limit=21))
    counts = Counter(data.examples[index].label for index in data.splits[Split.test])
    assert counts == {0: 10, 1: 10}


def test_fingerprint_is_that_of_the_chosen_examples(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv")
    one, same = load_data(task_of(train)), load_data(task_of(train))
    assert one.fingerprint == same.fingerprint
    assert load_data(task_of(train, seed=21)).fingerprint != one.fingerprint
    (tmp_path / "b").mkdir()
    elsewhere = write_csv(tmp_path / "b" / "a.csv")
    assert load_data(task_of(elsewhere)).fingerprint == one.fingerprint


def test_labels_found_are_sorted_numbers_by_size(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", labels=("10", "nan", "9", "a", "-1"))
    assert load_data(task_of(train, k=2)).labels == ("-1", "9", "10", "a", "nan")


def test_labels_can_be_left_out_by_name_or_all_others(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", labels=("bad", "good", "so so", ""))
    chosen = {"labels": ["good", "bad"], "k": 2}
    data = load_data(task_of(train, drop_other_labels=True, **chosen))
    assert data.labels == ("good", "bad")
    train = write_csv(tmp_path / "b.csv", labels=("bad", "good", "so so"))
    assert load_data(task_of(train, drop_labels=["so so"], k=2)).labels == ("bad", "good")


# ---------------------------------------------------------------- formats
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    texts = [f'row {i}: "quoted", tab\t and\nline' for i in range(40)]
    table = pa.table({"id": list(range(40)), "review": texts, "rating": [i % 2 for i in range(40)]})
    path = tmp_path / f"reviews{suffix}"
    objects = table.to_pylist()
    if suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerow(table.column_names)
            writer.writerows(item.values() for item in objects)
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, objects)))
    elif suffix == ".json":
        path.write_text(json.dumps(objects))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    data = load_data(task_of(path))
    assert data.labels == ("0", "1")
    for example in data.examples:
        row = int(example.id.removeprefix(f"reviews{suffix}:"))
        assert example.texts == (texts[row],)
        assert example.label == row % 2


def test_arrow_file_format_is_read_too(tmp_path: Path) -> None:
    table = pa.table({"review": [f"t{i}" for i in range(40)], "rating": ["a", "b"] * 20})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert load_data(task_of(tmp_path / "a.arrow")).labels == ("a", "b")


def test_hub_data_set_with_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # a local folder is a data set to `datasets`, as a hub name is
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["negative", "positive"]),
    )
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        rows = {"sentence": [f"{split} {i}" for i in range(20)], "label": [0, 1] * 10}
        part = datasets.Dataset.from_dict(rows, features=features)
        part.to_parquet(tmp_path / "set" / f"{split}.parquet")
    own = {"hub": str(tmp_path / "set"), "hub_config": None, "k": 4}
    data = load_data(TaskConfig(**{**vars(conf_task("sst2")), **own}))
    assert data.labels == ("negative", "positive")
    assert data.examples[0].id.startswith("train:")
    assert [len(data.splits[split]) for split in Split] == [8, 8, 20]


# ---------------------------------------------------------------- the shipped tasks
@pytest.mark.parametrize("path", sorted((CONF / "task").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_task_is_typed_and_its_prompts_parse(path: Path) -> None:
    task = conf_task(path.stem)
    assert task.name == path.stem
    assert len(task.labels) == len(set(task.labels))
    assert task.name == "file" or "manual" in task.prompts
    for style in task.prompts:
        config = PromptConfig(style=PromptStyle[style])
        prompt = resolve_prompt(task, config, task.labels)
        assert len(prompt.words) == len(task.labels)
    if task.lmbff_folder:
        assert len(task.lmbff_columns) == len(task.text)
        assert not task.lmbff_labels or len(task.lmbff_labels) == len(task.labels)
        assert task.lmbff_header == (task.lmbff_test.endswith(".tsv") and task.name != "cola")


@pytest.mark.parametrize(
    "path", sorted((CONF / "prompt").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_prompt_is_the_style_of_its_name(path: Path) -> None:
    assert conf_run("prompt", path.stem).prompt.style is PromptStyle[path.stem]


@pytest.mark.packaged
def test_packaged_drug_reviews() -> None:
    data = load_data(conf_task("drug_reviews"))
    assert data.labels == ("negative", "positive")
    assert [len(data.splits[split]) for split in Split] == [32, 32, 190]
    conditions = load_data(conf_task("drug_conditions"))
    assert [len(conditions.splits[split]) for split in Split] == [48, 48, 155]
    assert len(load_data(conf_task("drug_reviews_three")).splits[Split.test]) == 108
    texts = [text for example in data.examples for text in example.texts]
    assert not any("&#" in text or text.startswith('"') for text in texts)


def test_clean_text_undoes_entities_and_outer_quotes_only_where_asked(tmp_path: Path) -> None:
    cells = ['"I&#039;m &quot;fine&quot; now"', "plain"]
    lines = [f"{cell}\t{label}" for label in "ab" for cell in cells]
    (tmp_path / "a.tsv").write_text("review\trating\n" + "\n".join(lines) + "\n")
    task = TaskConfig(text=["review"], label="rating", train=str(tmp_path / "a.tsv"), k=1)
    raw, _ = read_rows(task)
    clean, _ = read_rows(replace(task, clean_text=True))
    assert "I&#039;m" in str(raw.texts[0][0])
    assert clean.texts[0][0] == 'I\'m "fine" now'
    assert clean.texts[1] == raw.texts[1] == ("plain",)
    assert clean.ids == raw.ids


# ---------------------------------------------------------------- mistakes
def fails(task: TaskConfig, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_data(task)
    for word in words:
        assert word in str(caught.value)


def test_missing_file_names_the_near_ones(tmp_path: Path) -> None:
    write_csv(tmp_path / "reviews.csv")
    fails(task_of(tmp_path / "review.csv"), "no such file", "'reviews.csv'")


def test_no_file_at_all() -> None:
    fails(TaskConfig(text=["review"]), "task.train")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    fails(task_of(tmp_path / "a.xlsx"), "'.xlsx'", ".parquet")


@pytest.mark.parametrize("content", ["", "review,rating\n"])
def test_empty_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    fails(task_of(tmp_path / "a.csv"), "a.csv", "expected labelled rows")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_wrong_encoding_names_the_byte(tmp_path: Path, suffix: str) -> None:
    content = "review,rating\nfine,1\ncafé,0\n"
    if suffix == ".jsonl":
        content = '\n{"review": "fine", "rating": 1}\n{"review": "café", "rating": 0}\n'
    (tmp_path / f"a{suffix}").write_bytes(content.encode("latin1"))
    fails(task_of(tmp_path / f"a{suffix}"), "0xe9", "line 3", "UTF-8")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arrow", ".jsonl", ".json"])
def test_damaged_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_text('review,rating\n{"x",1\n2\n')
    fails(task_of(tmp_path / f"a{suffix}"), f"a{suffix}", "cannot be read as")


def test_missing_columns_name_the_near_ones(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv")
    fails(task_of(train, text=["reviews"]), "task.text", "'reviews'", "'review'")
    fails(task_of(train, label="ratings"), "task.label", "'rating'")
    fails(task_of(train, text=[]), "task.text", "review, rating")


def test_too_few_examples_of_a_label(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv", 40, labels=("good", "good", "good", "bad"))
    fails(task_of(train, test=str(train), k=6), "10 examples of label 'bad'", "12", "task.k=5")
    fails(task_of(train, k=6), "5 examples of label 'bad'", "held out", "task.k=2")


def test_one_label_only(tmp_path: Path) -> None:
    fails(task_of(write_csv(tmp_path / "a.csv", labels=("good",))), "at least two label values")


def test_label_that_is_not_listed(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv")
    fails(task_of(train, labels=["bad", "god"]), "'good' (30 rows)", "'god'", "drop_labels")
    fails(task_of(train, labels=["bad", "good"], drop_labels=["bad"]), "task.drop_labels")
    fails(task_of(train, labels=["bad", "bad"]), "different values")


def test_missing_cells(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv")
    content = train.read_text()
    train.write_text(content.replace("text 7,", ","))
    fails(task_of(train), "no text in row 7", "'review'")
    train.write_text(content.replace("text 7,good", "text 7,"))
    fails(task_of(train), "no label in 1 rows", "row 7")
    objects = [{"review": None if i == 3 else "x", "rating": i % 2} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, objects)))
    fails(task_of(tmp_path / "a.jsonl"), "no text in row 3")


def test_balanced_test_without_a_label(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv")
    test = write_csv(tmp_path / "b.csv", labels=("good",))
    fails(task_of(train, test=str(test), test_balanced=True), "test_balanced", "'bad'")


def test_unreachable_hub_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    task = TaskConfig(**{**vars(conf_task("sst2")), "hub": "nobody/nothing-at-all"})
    fails(task, "nobody/nothing-at-all", "task.data_dir=", "task=file", "task=drug_reviews")


def test_lmbff_folder_mistakes(tmp_path: Path) -> None:
    fails(conf_task("mpqa"), "task.data_dir=FOLDER")
    settings = vars(conf_task("sst2"))
    fails(TaskConfig(**{**settings, "data_dir": str(tmp_path)}), "SST-2/train.tsv", "holds nothing")
    write_glue(tmp_path)
    (tmp_path / "SST-2" / "dev.tsv").unlink()
    fails(TaskConfig(**{**settings, "data_dir": str(tmp_path)}), "dev.tsv", "train.tsv")
    fails(task_of(tmp_path / "a.csv", data_dir=str(tmp_path)), "come from elsewhere")
    fails(TaskConfig(data_dir=str(tmp_path), text=["a"]), "has no place")


def test_files_for_a_task_that_reads_the_hub(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "a.csv")
    fails(task_of(train, source=Source.hub, hub="a/b"), "task.source=file")
