"""Any task file, template, override or adapter: a value, or our words of what is wrong."""

from __future__ import annotations

import contextlib
import copy
import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from raykernel.compose import compose_point, compose_runs, schema_keys
from raykernel.config import ModelConfig, ParametersConfig, RunConfig, TaskConfig
from raykernel.errors import InputError
from raykernel.problem.adapter_config import with_adapter
from raykernel.problem.gguf import dequantized
from raykernel.problem.parameters import select_parameters
from raykernel.problem.skeleton import blank_model
from raykernel.problem.tasks import load_data
from raykernel.problem.templates import PieceKind, parse
from raykernel.terms import Architecture, Method
from tests.fuzz.readers import EFFORT, JSON, ODD_JSON, damaged, fuzz, json_like

# ---------------------------------------------------------------- task files

CSV = b'review,rating\nfine,a\nbad,b\n"so\nso",a\nok,b\nwell,a\nmeh,b\n'
ROWS = [{"review": f"text {n}", "rating": "ab"[n % 2]} for n in range(8)]
CELLS = st.sampled_from(
    [pa.array(["a", "b"]), pa.array([1, None]), pa.nulls(2), pa.array([float("nan"), 1e300]),
     pa.array([b"\xff", b"b"]), pa.array([["a"], None]), pa.array([{"x": 1}, None]),
     pa.array(["b", "a"]).dictionary_encode(), pa.array([2**62, -1], pa.timestamp("s")),
     pa.array([2**31 - 1, -(2**31)], pa.date32()), pa.array([True, False]),
     pa.array([2**63 - 1, 0], pa.duration("ns")),
     pa.array([b"\xff\xfe", b""], pa.large_binary()),
     pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 1, 2)),
                                            pa.py_buffer(b"\xff\xfe")])]
)  # fmt: skip


@st.composite
def tables(draw: st.DrawFn, suffix: str) -> bytes:
    """A Parquet or Arrow file of the right columns with any cells."""
    names = ["review", "rating", *draw(st.lists(st.sampled_from(["review", "x", ""]), max_size=2))]
    table = pa.Table.from_arrays([draw(CELLS) for _ in names], names=names)
    sink = pa.BufferOutputStream()
    if suffix == ".parquet":
        with contextlib.suppress(pa.ArrowException):
            pq.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def as_file(suffix: str) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    if suffix == ".parquet":
        pq.write_table(table, sink)
        return sink.getvalue().to_pybytes()
    if suffix == ".arrow":
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()
    if suffix == ".jsonl":
        return "\n".join(map(json.dumps, ROWS)).encode()
    return json.dumps(ROWS).encode() if suffix == ".json" else CSV


@EFFORT
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"])
def test_task_files_are_rows_or_refused(tmp_path: Path, suffix: str, effort: int):
    path = tmp_path / f"reviews{suffix}"
    whole = as_file(suffix)
    inputs = damaged(whole) | st.binary(max_size=60) | ODD_JSON
    if suffix in (".csv", ".tsv"):
        whole = whole.replace(b",", b"\t") if suffix == ".tsv" else whole
        inputs |= st.text(alphabet='a,\t\n\r" ', max_size=60).map(
            lambda text: whole + text.encode()
        )
    elif suffix == ".json":
        inputs |= st.lists(JSON | st.just(ROWS[0]), max_size=4).map(
            lambda x: json.dumps(x).encode()
        )
    elif suffix == ".jsonl":
        inputs |= json_like(ROWS[0])
    else:
        inputs |= tables(suffix)
    task = TaskConfig(train=str(path), text=["review"], label="rating", k=1)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        data = load_data(task)
        assert all(isinstance(text, str) for example in data.examples for text in example.texts)

    fuzz(inputs, check, effort=effort)


@EFFORT
def test_files_of_lmbff_are_rows_or_refused(tmp_path: Path, effort: int):
    task = TaskConfig(
        data_dir=str(tmp_path), lmbff_folder="SST-2", lmbff_columns=[0], lmbff_label=1,
        text=["review"], labels=["0", "1"], k=1,
    )  # fmt: skip
    folder = tmp_path / "SST-2"
    folder.mkdir()
    whole = b"review\tlabel\n" + b"good\t1\nbad\t0\n" * 4
    (folder / "dev.tsv").write_bytes(whole)

    def check(content: bytes) -> None:
        (folder / "train.tsv").write_bytes(content)
        load_data(task)

    fuzz(damaged(whole) | st.binary(max_size=60), check, effort=effort)


# ---------------------------------------------------------------- templates

WORDS = st.sampled_from(
    ["{review}", "{label}", "{", "}", "{{", "}}", "{review!r}", "{label:>9}", "{0}", "{}", "*mask*",
     "*sent_0*", "*sent-_1*", "*+sentu_0*", "*cls*", "*sep+*", "*", "_", "*label_0*", "{review.x}",
     "{review[0]}", "*sent_99999999999999999999*", "*sent_" + "9" * 5000 + "*", "*sent_٣*",
     "*sent_²*", "\x1b[31m", "It was", "{label.__class__}"]
)  # fmt: skip


@EFFORT
def test_templates_are_pieces_or_refused(effort: int):
    def check(template: str) -> None:
        pieces = parse(template, ["review"])
        assert sum(piece.kind is PieceKind.label for piece in pieces) == 1
        assert all(piece.render(["text"]) is not None for piece in pieces)

    inputs = st.lists(WORDS | st.text(max_size=3), max_size=6).map("".join)
    fuzz(inputs, check, effort=effort, examples=150)


# ---------------------------------------------------------------- overrides

KEYS = st.sampled_from([*schema_keys(RunConfig), "task", "model", "prompt", "experiment", "x"])
VALUES = st.sampled_from(
    ["1", "-1", "null", "[]", "[a", "{a: 1}", "{}", "${x}", "${oc.env:NOT_SET}", "${task}", "nan",
     "inf", "1e999", "'", '"', "a,b", "choice(1,2)", "range(1,3)", "interval(0,1)", "sort(",
     "???", "../../x", "/etc/passwd", "true", "\\", "$", "@", "roberta_base", "file", "none", "ray",
     "[[[["]
)  # fmt: skip


@EFFORT
def test_overrides_are_configurations_or_refused(here: Path, effort: int):
    """As runs of a study compose them."""
    starts = st.sampled_from(["", "", "", "+", "~", "++"])
    spelt = st.builds(lambda *parts: "".join(parts), starts, KEYS, st.just("="), VALUES)

    def check(overrides: list[str]) -> None:
        config = compose_point("kernel", overrides).config
        assert isinstance(config, RunConfig)

    fuzz(st.lists(spelt | st.text(min_size=1, max_size=9), max_size=3), check, effort=effort,
         folder=here, examples=12)  # fmt: skip


@EFFORT
def test_command_lines_are_configurations_or_refused(here: Path, effort: int):
    """As typed; what starts with a dash is Hydra's parser's, which ends the program with help."""
    text = st.text(min_size=1, max_size=12).filter(lambda text: not text.startswith("-"))
    spelt = st.builds("{}={}".format, KEYS, VALUES | text)

    def check(arguments: list[str]) -> None:
        assert all(isinstance(run.config, RunConfig) for run in compose_runs("kernel", arguments))

    fuzz(st.lists(spelt | text, max_size=2), check, effort=effort, folder=here, examples=4)


# ---------------------------------------------------------------- adapters and models

ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], "lora_dropout": 0.0,
    "bias": "none", "use_dora": False, "rank_pattern": {}, "layers_to_transform": [0],
    "init_lora_weights": True, "modules_to_save": None, "task_type": None,
}  # fmt: skip


@EFFORT
def test_adapter_configs_are_parameters_or_refused(model: Path, tmp_path: Path, effort: int):
    blank = blank_model(
        ModelConfig(name=str(model), architecture=Architecture.masked_lm), has_prompt=True
    )
    path = tmp_path / "adapter_config.json"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        parameters = with_adapter(ParametersConfig(method=Method.peft, adapter=str(path)))
        select_parameters(copy.deepcopy(blank), parameters)

    fuzz(json_like(ADAPTER), check, effort=effort, folder=tmp_path / "none", examples=20)


GGUF = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
GGUF += b"".join(
    struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    for key, value in [(b"general.architecture", b"llama"), (b"general.name", b"x")]
)
GGUF += struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 4, 0, 0)
GGUF += bytes(-len(GGUF) % 32) + bytes(16)


@EFFORT
def test_gguf_files_are_converted_or_refused(tmp_path: Path, monkeypatch, effort: int):
    """Of a whole header and a tensor; what follows of a real model is transformers' to read."""
    monkeypatch.setenv("RAYKERNEL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.gguf_file"):
            dequantized(path)
        assert not any(path.is_dir() for path in tmp_path.glob("cache/gguf/*"))

    fuzz(damaged(GGUF), check, effort=effort, examples=8)
