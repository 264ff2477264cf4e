from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from raykernel.config import ModelConfig, ParametersConfig
from raykernel.errors import InputError
from raykernel.ntk.capture import Tracer
from raykernel.ntk.contract import gram
from raykernel.ntk.stream import Streamer
from raykernel.problem.architectures import check_model
from raykernel.problem.batches import Batch
from raykernel.problem.checkpoints import (
    load_tokenizer,
    max_positions,
    model_identity,
    prepare_model,
)
from raykernel.problem.models import Problem, load_problem
from raykernel.problem.probe import Head
from raykernel.problem.readout import LabelRows
from raykernel.terms import Architecture, ModelSource, Pooling, Precision

VOCABULARY = 60
LABELS = (7, 41, 23)
FULL = ParametersConfig()

SIZE = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = SIZE | {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 40}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
DISTIL = {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
LLAMA = BERT | {"num_key_value_heads": 1, "pad_token_id": 1}
NEOX = BERT | {"rotary_pct": 0.5}
OPT = SIZE | {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1}

MASKED: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**BERT, pad_token_id=1)
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaForMaskedLM(
        transformers.XLMRobertaConfig(**BERT, pad_token_id=1)
    ),
    "camembert": lambda: transformers.CamembertForMaskedLM(
        transformers.CamembertConfig(**BERT, pad_token_id=1)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(**DISTIL, max_position_embeddings=40)
    ),
    "albert": lambda: transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**BERT, embedding_size=8)
    ),
    "electra": lambda: transformers.ElectraForMaskedLM(
        transformers.ElectraConfig(**BERT, embedding_size=8)
    ),
    "deberta-v2": lambda: transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**BERT)),
    "modernbert": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **BERT, pad_token_id=1, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
        )
    ),
    "mpnet": lambda: transformers.MPNetForMaskedLM(transformers.MPNetConfig(**BERT)),
}
CAUSAL: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=8)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**NEOX, bos_token_id=0, eos_token_id=0)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**OPT, max_position_embeddings=40)
    ),
}
EVERY = MASKED | CAUSAL


def save(folder: Path, name: str) -> ModelConfig:
    """A tiny random model of a family, as any user's folder."""
    torch.manual_seed(0)
    model = EVERY[name]()
    # A head whose bias is zero, as fresh ones are, would hide a bias that is left out.
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(folder)
    architecture = Architecture.masked_lm if name in MASKED else Architecture.causal_lm
    return ModelConfig(name=str(folder), architecture=architecture, pooling=Pooling.mean)


def batch_of(lengths: list[int], positions: list[int], *, width: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), width or max(lengths)), 1)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        drawn = torch.randint(4, VOCABULARY, (length,), generator=generator)
        ids[row, :length], mask[row, :length] = drawn, 1
    return {"input_ids": ids, "attention_mask": mask, "position": torch.tensor(positions)}


BATCH_TOKENS = 11
BATCH = batch_of([9, 6, BATCH_TOKENS], [4, 5, 0])


def load(
    model: ModelConfig,
    parameters: ParametersConfig = FULL,
    *,
    label_ids: tuple[int, ...] = LABELS,
    head: Head | None = None,
    precision: Precision = Precision.float64,
) -> Problem:
    return load_problem(
        model, parameters, label_ids=label_ids, num_labels=3, head=head, precision=precision
    )


def whole_model(model: ModelConfig) -> transformers.PreTrainedModel:
    """As transformers loads it."""
    auto = (
        transformers.AutoModelForMaskedLM
        if model.architecture is Architecture.masked_lm
        else transformers.AutoModelForCausalLM
    )
    loaded = auto.from_pretrained(model.name, dtype=torch.float64, attn_implementation="eager")
    return loaded.eval()  # type: ignore[no-any-return]


def label_logits(whole: transformers.PreTrainedModel, batch: Batch) -> Tensor:
    """The definition: every logit of every position, then one position and the label columns."""
    logits = whole(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[torch.arange(len(logits)), batch["position"]][:, list(LABELS)]


@torch.no_grad()
def whole_logits(model: ModelConfig, batch: Batch) -> Tensor:
    return label_logits(whole_model(model), batch)


@pytest.mark.parametrize("name", EVERY)
def test_readout_is_the_whole_model_at_one_position_and_the_label_words(
    tmp_path: Path, name: str
) -> None:
    model = save(tmp_path, name)
    problem = load(model)
    logits = problem.readout(problem.module, BATCH)
    torch.testing.assert_close(logits, whole_logits(model, BATCH), rtol=1e-12, atol=1e-12)
    assert not problem.module.training
    assert all(parameter.requires_grad for parameter in problem.module.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_the_head_runs_on_one_position_and_the_label_words_only(tmp_path: Path, name: str) -> None:
    problem = load(save(tmp_path, name))
    shapes: list[torch.Size] = []
    inside: list[str] = []
    base = type(problem.module.base_model)

    def record(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, LabelRows):
            shapes.extend((args[0].shape, output.shape))
        elif isinstance(module, torch.nn.Linear | torch.nn.LayerNorm) and args[0].shape[1] == 1:
            inside.append(type(module).__name__)

    outside = set(dict(problem.module.named_children()).values()) - {problem.module.base_model}
    layers = [m for top in outside for m in top.modules()]
    head = next(m for m in problem.module.modules() if isinstance(m, LabelRows))
    for module in {*layers, head}:
        module.register_forward_hook(record)
    problem.readout(problem.module, BATCH)
    (_, positions, _), (_, _, words) = shapes
    assert (positions, words) == (1, 3)
    transforms = [m for m in layers if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm)]
    assert len(inside) == len(transforms) - 1, f"{base.__name__} ran its head on more positions"


BERT_TAIL = {"attention.output.dense", "intermediate.dense", "output.dense"}
LLAMA_TAIL = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
TAILS = {
    **dict.fromkeys(["roberta", "xlm-roberta", "camembert", "bert", "electra"], BERT_TAIL),
    "mpnet": {"intermediate.dense", "output.dense"},
    "distilbert": {"ffn.lin1", "ffn.lin2"},
    "modernbert": {"mlp.Wi", "mlp.Wo"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3"], LLAMA_TAIL),
    "gpt_neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
}
"""Linear layers of the last of two blocks that run on one token."""


@pytest.mark.parametrize("name", EVERY)
def test_after_its_attention_the_last_block_runs_on_the_read_token_alone(
    tmp_path: Path, name: str
) -> None:
    problem = load(save(tmp_path, name))
    tokens: dict[str, int] = {}
    for path, module in problem.module.base_model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):

            def record(_: object, args: tuple[Tensor], __: object, path: str = path) -> None:
                if args[0].dim() == 3:
                    tokens[path] = args[0].shape[1]

            module.register_forward_hook(record)
    problem.readout(problem.module, BATCH)
    single = {path for path, count in tokens.items() if count == 1}
    assert {path.partition(".1.")[2] for path in single} == TAILS.get(name, set())
    assert {count for path, count in tokens.items() if path not in single} == {BATCH_TOKENS}


@pytest.mark.parametrize("why", ["its own code", "in chunks"])
def test_a_block_that_is_not_known_runs_on_all_tokens(tmp_path: Path, why: str) -> None:
    problem = load(save(tmp_path, "bert"))
    base: Any = problem.module.base_model
    if why == "its own code":
        base.__class__ = type("BertModel", (type(base),), {"__module__": "modeling_own"})
    else:
        base.config.chunk_size_feed_forward = 11
        base.encoder.layer[-1].chunk_size_feed_forward = 11
    shapes: list[torch.Size] = []
    base.encoder.layer[-1].intermediate.register_forward_hook(
        lambda module, args, out: shapes.append(args[0].shape)
    )
    problem.readout(problem.module, BATCH)
    assert [shape[1] for shape in shapes] == [BATCH_TOKENS]


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_the_whole_models(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, name)
    problem = load(model)
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    named = dict(problem.module.named_parameters())
    logits = problem.readout(problem.module, BATCH)
    found = torch.autograd.grad((logits * weights).sum(), list(named.values()), allow_unused=True)
    whole = whole_model(model)
    definition = label_logits(whole, BATCH)
    wanted = dict(zip(named, found, strict=True))
    own = {key: p for key, p in whole.named_parameters() if key in named}
    expected = torch.autograd.grad(
        (definition * weights).sum(), list(own.values()), allow_unused=True
    )
    assert len(own) >= len(named) - 1  # the head's bias has two names
    for key, gradient in zip(own, expected, strict=True):
        zero = torch.zeros_like(own[key])
        torch.testing.assert_close(
            zero if wanted[key] is None else wanted[key],
            zero if gradient is None else gradient,
            rtol=1e-10,
            atol=1e-12,
            msg=lambda text, key=key: f"{key}: {text}",
        )


# MPNet's blocks share relative positions, so that they are no chain.
@pytest.mark.parametrize("name", [name for name in TAILS if name != "mpnet"])
def test_the_blocks_of_a_loaded_model_stream_to_the_same_kernel(tmp_path: Path, name: str) -> None:
    """The last block runs again without the readout, thus on all tokens."""
    problem = load(save(tmp_path, name))
    tracer = Tracer(problem.module, problem.readout)
    whole = tracer.capture(BATCH)
    expected = gram(whole, whole)
    streamer = Streamer(tracer)
    for _ in range(2):  # learnt, then known
        found = [gram(capture, capture) for capture in streamer.stream(BATCH)]
        assert len(found) == 3, "two blocks, and what is outside of them"
        blocks = {group: block for own in found for group, block in own.items()}
        assert blocks.keys() == expected.keys()
        for group, block in expected.items():
            torch.testing.assert_close(blocks[group], block, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_padding_on_the_right_changes_no_logit(tmp_path: Path, name: str) -> None:
    problem = load(save(tmp_path, name))
    wide = batch_of([9, 6, 11], [4, 5, 0], width=17)
    # Llama's norms and softmaxes and every rotary angle are float32 inside transformers, whatever
    # the weights: hence 1e-5 there.
    tolerance = 1e-12 if name in ("roberta", "bert", "distilbert", "albert", "electra") else 1e-5
    torch.testing.assert_close(
        problem.readout(problem.module, wide),
        problem.readout(problem.module, BATCH),
        rtol=tolerance,
        atol=tolerance,
    )


def test_hooks_last_no_longer_than_the_readout(tmp_path: Path) -> None:
    problem = load(save(tmp_path, "roberta"))
    problem.readout(problem.module, BATCH)
    with torch.no_grad():
        inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
        assert problem.module(**inputs).logits.shape == (3, 11, 3)


@pytest.mark.parametrize("name", ["roberta", "bert", "albert", "gpt2"])
def test_tie_head_false_gives_the_head_its_own_copy(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, name)
    tied, untied = load(model), load(replace(model, tie_head=False))
    for problem, shared in ((tied, True), (untied, False)):
        embedding = problem.module.get_input_embeddings()
        head = next(m for m in problem.module.modules() if isinstance(m, LabelRows))
        assert (head.weight is embedding.weight) == shared
        torch.testing.assert_close(head.weight, embedding.weight, rtol=0, atol=0)
        assert head.weight.shape[0] == VOCABULARY
    extra = untied.module.get_input_embeddings().weight.numel()
    count = [sum(p.numel() for p in x.module.parameters()) for x in (tied, untied)]
    assert count[1] - count[0] == extra
    torch.testing.assert_close(
        tied.readout(tied.module, BATCH), untied.readout(untied.module, BATCH), rtol=0, atol=0
    )


def test_tie_head_true_refuses_a_head_of_its_own(tmp_path: Path) -> None:
    model = save(tmp_path, "llama")
    assert load(replace(model, tie_head=False)).module.lm_head.weight.shape == (VOCABULARY, 16)
    torch.testing.assert_close(
        load(replace(model, tie_head=False)).readout(load(model).module, BATCH),
        whole_logits(model, BATCH),
        rtol=1e-12,
        atol=1e-12,
    )
    with pytest.raises(InputError, match=r"model\.tie_head"):
        load(replace(model, tie_head=True))


def test_a_head_that_the_file_leaves_out_is_cloned_even_where_the_config_unties(
    tmp_path: Path,
) -> None:
    model = save(tmp_path, "roberta")
    expected = whole_logits(model, BATCH)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    problem = load(replace(model, tie_head=False))
    torch.testing.assert_close(problem.readout(problem.module, BATCH), expected)
    with pytest.raises(InputError, match=r"lm_head\.decoder\.weight"):
        load(model)


def test_every_parameter_belongs_to_the_layer_that_uses_it(tmp_path: Path) -> None:
    names = dict(load(save(tmp_path, "roberta")).module.named_parameters())
    assert "lm_head.decoder.bias" in names
    assert "lm_head.bias" not in names


@pytest.mark.parametrize("pooling", Pooling)
def test_the_linear_head_reads_the_encoders_hidden_state(tmp_path: Path, pooling: Pooling) -> None:
    model = replace(save(tmp_path, "roberta"), pooling=pooling)
    rng = np.random.default_rng(0)
    head = Head(rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=3).astype(np.float32))
    batch = BATCH | {"position": torch.zeros(3, dtype=torch.long)}
    problem = load(model, label_ids=(), head=head)
    encoder = transformers.RobertaModel.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager", add_pooling_layer=False
    ).eval()
    hidden = encoder(batch["input_ids"], attention_mask=batch["attention_mask"])[0].detach()
    if pooling is Pooling.cls:
        expected = hidden[:, 0]
    else:
        expected = torch.stack([hidden[i, :n].mean(0) for i, n in enumerate([9, 6, 11])])
    torch.testing.assert_close(problem.features(batch), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        problem.readout(problem.module, batch),
        expected @ torch.from_numpy(head.weight).double().T + torch.from_numpy(head.bias).double(),
        rtol=1e-12,
        atol=1e-12,
    )
    assert not any("pooler" in name for name, _ in problem.module.named_parameters())
    zero = load(model, label_ids=())
    assert not zero.readout(zero.module, batch).any()


@pytest.mark.parametrize("name", ["gpt2", "llama", "distilbert", "albert"])
def test_any_model_serves_as_an_encoder(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, name)
    problem = load(model, label_ids=())
    assert problem.features(BATCH).shape == (3, 16)
    encoder = replace(model, architecture=Architecture.encoder)
    torch.testing.assert_close(
        load(encoder, label_ids=()).features(BATCH), problem.features(BATCH), rtol=0, atol=0
    )


def test_features_need_a_linear_head(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="prompt=none"):
        load(save(tmp_path, "bert")).features(BATCH)


@pytest.mark.parametrize("precision", [Precision.float32, Precision.float64, Precision.bfloat16])
def test_precision_is_the_weights_type(tmp_path: Path, precision: Precision) -> None:
    dtype = getattr(torch, precision.value)
    model = save(tmp_path, "llama")
    for problem in (
        load(model, precision=precision),
        load(model, label_ids=(), precision=precision),
    ):
        assert {p.dtype for p in problem.module.parameters()} == {dtype}
        assert problem.readout(problem.module, BATCH).dtype == dtype
        frequencies = [b for n, b in problem.module.named_buffers() if "inv_freq" in n]
        assert all(buffer.dtype == torch.float32 for buffer in frequencies)


def test_identity_is_the_content_wherever_it_lies(tmp_path: Path) -> None:
    model = save(tmp_path / "here", "bert")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = replace(model, name=str(tmp_path / "there"))
    identity = model_identity(model)
    assert model_identity(moved) == identity
    assert str(tmp_path) not in json.dumps(identity)
    assert model_identity(replace(model, tie_head=False)) != identity
    torch.manual_seed(5)
    MASKED["bert"]().save_pretrained(tmp_path / "there")
    other = model_identity(moved)
    assert {key for key in identity if identity[key] != other[key]} == {"weights"}


def test_prepare_model_leaves_local_models_as_they_are(tmp_path: Path) -> None:
    model = save(tmp_path, "bert")
    assert prepare_model(model) == model


def test_positions_are_those_that_text_can_take(tmp_path: Path) -> None:
    found = {
        name: max_positions(save(tmp_path / name, name)) for name in ("roberta", "bert", "gpt2")
    }
    assert found == {"roberta": 38, "bert": 40, "gpt2": 40}


def test_pickled_weights_need_consent(tmp_path: Path) -> None:
    model = save(tmp_path, "bert")
    expected = whole_logits(model, BATCH)
    weights = MASKED["bert"]().from_pretrained(tmp_path).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.allow_pickle=true"):
        load(model)
    problem = load(replace(model, allow_pickle=True))
    torch.testing.assert_close(problem.readout(problem.module, BATCH), expected)


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    model = save(tmp_path, "roberta")
    transformers.RobertaModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lm_head\.dense\.weight"):
        load(model)
    assert load(model, label_ids=()).features(BATCH).shape == (3, 16)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not load the weights"):
        load(model)


def write_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"architecture": Architecture.encoder}, "prompt=none"),
        ("bert", {"architecture": Architecture.causal_lm}, r"model\.architecture=masked_lm"),
        ("gpt2", {"architecture": Architecture.masked_lm}, r"model\.architecture=causal_lm"),
        ("bert", {"name": "./no/such/folder"}, "no folder"),
        ("bert", {"name": "???"}, r"model\.name"),
        ("bert", {"name": "a b"}, "no model 'a b' on the Hugging Face hub"),
        ("bert", {"source": ModelSource.packaged, "name": "smollm"}, "smollm2_135m"),
        ("bert", {"source": ModelSource.gguf}, r"model\.gguf_file"),
        ("bert", {"gguf_file": "absent.gguf"}, r"absent\.gguf"),
    ],
)
def test_a_wrong_model_is_an_input_error_before_weights_load(
    tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    model = save(tmp_path, name)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(InputError, match=message):
        check_model(replace(model, **changes), has_prompt=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "trust_remote_code=true"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_a_config_that_cannot_work_is_an_input_error(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    model = save(tmp_path, "bert")
    write_config(tmp_path, **config)
    with pytest.raises(InputError, match=message):
        check_model(model, has_prompt=True)


def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    model = ModelConfig(name=str(tmp_path))
    with pytest.raises(InputError, match=r"some\.gguf.*model\.gguf_file"):
        check_model(model, has_prompt=True)
    (tmp_path / "config.json").write_text("{not json")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="JSON"):
        check_model(model, has_prompt=True)


def test_a_file_that_is_no_gguf_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYKERNEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "some.gguf").write_bytes(b"not a GGUF file")
    model = ModelConfig(name=str(tmp_path), source=ModelSource.gguf, gguf_file="some.gguf")
    with pytest.raises(InputError, match=r"some\.gguf"):
        check_model(model, has_prompt=True)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_the_first_token_of_a_causal_model_is_refused_as_feature(tmp_path: Path) -> None:
    model = replace(save(tmp_path, "gpt2"), pooling=Pooling.cls)
    with pytest.raises(InputError, match=r"model\.pooling=mean"):
        check_model(model, has_prompt=False)


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("gpu", Precision.float32, r"compute\.device"),
        ("cuda:99", Precision.float32, r"compute\.device=cpu"),
        ("cpu", Precision.tf32, r"kernel\.precision=float32"),
    ],
)
def test_a_device_that_is_not_there_is_an_input_error(
    tmp_path: Path, device: str, precision: Precision, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_problem(
            ModelConfig(name=str(tmp_path)),
            FULL,
            label_ids=LABELS,
            num_labels=3,
            device=device,
            precision=precision,
        )


def test_without_a_network_the_hub_cache_serves_and_a_missing_name_gets_alternatives(
    tmp_path: Path,
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    save(repository / "snapshots" / commit, "bert")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    script = """
from raykernel.config import ModelConfig
from raykernel.errors import InputError
from raykernel.problem.architectures import check_model
from raykernel.problem.checkpoints import model_identity, prepare_model
pinned = prepare_model(ModelConfig(name="org/tiny"))
check_model(pinned, has_prompt=True)
print(pinned.revision, prepare_model(pinned) == pinned, model_identity(pinned)["revision"])
try:
    check_model(ModelConfig(name="org/no-such-model"), has_prompt=True)
except InputError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, rest = run.stdout.split("\n", 1)
    assert first == f"{commit} True {commit}"
    assert "not in the local cache" in rest
    assert "model=smollm2_135m" in rest


def test_tokenizer_comes_with_the_model_or_is_asked_for(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    model = save(tmp_path, "bert")
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(model)
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "good": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(tmp_path)
    assert load_tokenizer(model)("good bad").input_ids == [2, 0]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="could not read the tokenizer"):
        load_tokenizer(model)


@pytest.mark.packaged
def test_smollm2_completes_a_review() -> None:
    model = ModelConfig(
        name="smollm2_135m",
        source=ModelSource.packaged,
        architecture=Architecture.causal_lm,
    )
    tokenizer = load_tokenizer(model)
    words = tuple(tokenizer(word).input_ids[0] for word in (" terrible", " great"))
    texts = ("I loved every minute of it. It was", "A complete waste of money. It was")
    problem = load_problem(model, FULL, label_ids=words, num_labels=2)
    logits = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position": torch.tensor([ids.shape[1] - 1]),
        }
        with torch.no_grad():
            logits.append(problem.readout(problem.module, batch)[0])
    margin = [float(row[1] - row[0]) for row in logits]
    assert margin[0] > margin[1] + 1
    assert model_identity(model)["revision"] == "0.1.2"
    assert max_positions(model) == 8192


@pytest.mark.packaged
def test_minilm_places_similar_sentences_together() -> None:
    model = ModelConfig(
        name="minilm_l6",
        source=ModelSource.packaged,
        architecture=Architecture.encoder,
        pooling=Pooling.mean,
    )
    texts = ["The cat sits on the mat.", "A cat is lying on a rug.", "Shares fell on Monday."]
    encoded = load_tokenizer(model)(texts, padding=True, return_tensors="pt")
    batch = dict(encoded) | {"position": torch.zeros(3, dtype=torch.long)}
    problem = load_problem(model, FULL, label_ids=(), num_labels=2)
    features = torch.nn.functional.normalize(problem.features(batch), dim=1)
    similar, different = features[0] @ features[1], features[0] @ features[2]
    assert similar > 0.5 > 0.2 > different
    assert max_positions(model) == 512
