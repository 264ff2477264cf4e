"""Model folders and archives that somebody else made: nothing of them is run or led astray."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from raykernel.compute.tensorfile import read_tensors
from raykernel.config import ModelConfig, ParametersConfig, TaskConfig
from raykernel.errors import BlockCorruptError, InputError
from raykernel.problem.adapter_config import with_adapter
from raykernel.problem.checkpoints import load_tokenizer, model_identity
from raykernel.problem.models import load_problem
from raykernel.problem.packaged import _check_size
from raykernel.problem.sources import read_rows
from raykernel.terms import Method, Source


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What the payloads of these tests create, once they run."""
    return tmp_path / "it-ran"


@pytest.fixture
def payload(mark: Path) -> bytes:
    """A pickle that runs a command when it is read."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {mark}",)

    return pickle.dumps({"weight": Evil()}, protocol=2)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy of a model's folder."""
    return shutil.copytree(model, tmp_path / "hostile")


def load(folder: Path, **options: Any) -> Any:
    chosen = ModelConfig(name=str(folder), **options)
    load_tokenizer(chosen)
    model_identity(chosen)
    return load_problem(chosen, ParametersConfig(), label_ids=(5, 6), num_labels=2).module


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------- pickles


def test_the_payload_of_these_tests_works(payload: bytes, mark: Path):
    pickle.loads(payload)
    assert mark.exists()


def test_pickled_weights_are_refused_and_not_read(folder: Path, payload: bytes, mark: Path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(InputError, match=r"found no model\.safetensors"):
        load(folder)
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_not_read(folder: Path, payload: bytes, mark: Path):
    (folder / "pytorch_model.bin").write_bytes(payload)
    for name in ("optimizer.pt", "training_args.bin", "adapter_model.bin"):
        (folder / name).write_bytes(payload)
    load(folder)
    assert not mark.exists()


def test_a_pickle_that_is_allowed_runs_nothing_either(folder: Path, payload: bytes, mark: Path):
    """PyTorch reads tensors of it alone (`weights_only`)."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(InputError, match="could not load the weights"):
        load(folder, allow_pickle=True)
    assert not mark.exists()
    torch.save(weights, folder / "pytorch_model.bin")
    load(folder, allow_pickle=True)


@pytest.mark.parametrize("name", ["head.safetensors", "head.pt"])
def test_a_pickle_for_a_head_is_refused(tmp_path: Path, name: str, payload: bytes, mark: Path):
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(BlockCorruptError, match="damaged or foreign"):
        read_tensors(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["reviews.pkl", "reviews.pickle", "reviews.pt", "reviews.npy"])
def test_pickled_tasks_are_refused(tmp_path: Path, name: str, payload: bytes, mark: Path):
    (tmp_path / name).write_bytes(payload)
    task = TaskConfig(train=str(tmp_path / name), text=["review"], label="rating")
    with pytest.raises(InputError, match=r"expected one of \.csv"):
        read_rows(task)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["script", "pickle", "state"])
def test_a_folder_for_datasets_runs_nothing(
    tmp_path: Path, kind: str, payload: bytes, mark: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    lab = tmp_path / "lab"
    lab.mkdir()
    if kind == "script":
        (lab / "lab.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    elif kind == "pickle":
        (lab / "train.pkl").write_bytes(payload)
    else:
        (lab / "state.json").write_bytes(payload)
        (lab / "dataset_info.json").write_bytes(payload)
    task = TaskConfig(source=Source.hub, hub=str(lab), text=["review"], label="rating")
    with pytest.raises(InputError, match="cannot be loaded"):
        read_rows(task)
    assert not mark.exists()


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("known", [True, False], ids=["known type", "own type"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_checkpoint_runs_only_where_it_is_asked_for(
    folder: Path, mark: Path, file: str, known: bool
):
    (folder / "own.py").write_text(
        f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM\n"
        "class Config(RobertaConfig): model_type = 'own'\n"
        "class Model(RobertaForMaskedLM): config_class = Config\n"
        "class Words(PreTrainedTokenizerFast): pass\n"
    )
    of_models = {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Model"}
    named = {
        "auto_map": of_models if file == "config.json" else {"AutoTokenizer": ["own.Words"] * 2}
    }
    if not known:
        named |= {"model_type": "own"} if file == "config.json" else {"tokenizer_class": "Words"}
    edit(folder / file, **named)
    if file == "config.json" and not known:
        with pytest.raises(InputError, match=r"model\.trust_remote_code=true"):
            load(folder)
    else:
        assert type(load(folder)).__module__.startswith("transformers.")
    assert not mark.exists()
    load(folder, trust_remote_code=True)
    assert mark.exists()


def test_code_for_generation_and_templates_of_chats_are_not_run(folder: Path, mark: Path):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    )
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    (folder / "chat_template.jinja").write_text(escape)
    load(folder)
    assert not mark.exists()


REACHING = {
    "adapters": {"0": "elsewhere"},
    "corda_config": {"cache_file": "elsewhere.pt"},
    "lora_ga_config": {"cache_file": "elsewhere.pt"},
    "megatron_config": {"a": 1},
    "prompt_tuning_init_state_dict_path": "elsewhere.pt",
    "shadow_model": "elsewhere",
    "tokenizer_kwargs": {"trust_remote_code": True},
    "tokenizer_name_or_path": "elsewhere",
}


@pytest.mark.parametrize("name", REACHING)
def test_an_adapter_that_names_code_or_files_is_refused(name: str):
    found = {"peft_type": "LORA", "r": 2, "megatron_core": "antigravity", name: REACHING[name]}
    with pytest.raises(InputError, match=rf"sets {name}, with which PEFT loads code or files"):
        with_adapter(ParametersConfig(Method.peft, adapter=json.dumps(found)))


def test_what_peft_saves_of_an_ordinary_adapter_is_not(tmp_path: Path):
    for config in (LoraConfig(target_modules=["query"]), LoraConfig(init_lora_weights="gaussian")):
        config.save_pretrained(tmp_path)
        with_adapter(ParametersConfig(Method.peft, adapter=str(tmp_path)))


def test_no_setting_of_peft_that_looks_like_a_path_is_forgotten():
    """Of the version that is installed: a new one is looked at before it is let in."""
    import dataclasses
    import re

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from raykernel.problem.adapter_config import _REACHING

    names = {
        field.name
        for config in PEFT_TYPE_TO_CONFIG_MAPPING.values()
        for field in dataclasses.fields(config)
        if re.search(r"path|file|cache|repo|dir$|kwargs|^adapters$|_model$|_core$", field.name)
    }
    # The base's name is not kept, and the module is imported with megatron_config alone.
    assert names <= {*_REACHING, "base_model_name_or_path", "megatron_core"}


# ---------------------------------------------------------------- names that lead elsewhere


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/tmp/x.safetensors", "other.bin",
                                   "weights.safetensors", "sub/model.safetensors", 3])  # fmt: skip
def test_an_index_names_weights_beside_it_only(folder: Path, tmp_path: Path, shard: object):
    """Others would enter the kernel and not its identity."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    shutil.copy(tmp_path / "elsewhere.safetensors", folder / "weights.safetensors")
    index = {"weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="names the file"):
        load(folder)


def test_a_model_in_shards_is_read(folder: Path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    placed = {name: shards[number % 2] for number, name in enumerate(weights)}
    for shard in shards:
        own = {name: value for name, value in weights.items() if placed[name] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    load(folder)
    for content in ("{", "[]", '{"weight_map": [1]}', "[" * 5000):
        index.write_text(content)
        with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
            load(folder)


def test_a_model_with_an_adapter_in_its_folder_is_refused(folder: Path):
    """transformers adds it, so that the kernel would be another under the same name."""
    LoraConfig(target_modules=["query"]).save_pretrained(folder)
    with pytest.raises(InputError, match="merge_and_unload"):
        load(folder)


@pytest.mark.parametrize("name", ["../x.gguf", "/x.gguf", "a/../../x.gguf", "C:\\x", "..\\x.gguf"])
def test_names_inside_a_folder_lead_nowhere_else(name: str):
    for make, key in (
        (lambda: ModelConfig(name="m", gguf_file=name), r"model\.gguf_file"),
        (lambda: TaskConfig(lmbff_folder=name), r"task\.lmbff_folder"),
        (lambda: TaskConfig(lmbff_test=name), r"task\.lmbff_test"),
        (lambda: TaskConfig(packaged_train=[name]), r"task\.packaged_train"),
        (lambda: TaskConfig(packaged_test=name), r"task\.packaged_test"),
    ):
        with pytest.raises(InputError, match=rf"{key}.*a name inside its folder"):
            make()


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path: Path):
    """By what it says of itself, which zipfile holds it to."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small", b"x")
        _check_size(archive)
        for number in range(3):
            member = zipfile.ZipInfo(f"large-{number}")
            member.file_size = 1 << 30
            archive.filelist.append(member)
        with pytest.raises(InputError, match=r"unpacks to 3\.2 GB"):
            _check_size(archive)
        del archive.filelist[1:]
