"""The prompts of Malladi et al. 2023, Table 9: six tasks, each with four of them, spelt out.

The expected texts are written from Gao et al. 2021 (manual: Table 1; searched: the first line of
its result files for seed 42, Table E.1) and Logan IV et al. 2022 (null).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raykernel.compose import conf_dir
from raykernel.config import PromptConfig, TaskConfig
from raykernel.problem.prompts import Encoded, encode, resolve_prompt
from raykernel.problem.tasks import Data, Example
from raykernel.terms import Architecture, PromptStyle, Split

ONE = ("a fine film .",)
TWO = ("Is it raining?", "The streets are wet.")
TEXTS = {"sst2": ONE, "mr": ONE, "cr": ONE, "qnli": TWO, "rte": TWO, "qqp": TWO}

# The mask stands for the label word, which brings its own space; words in the order of the labels.
PROMPTS = {
    ("sst2", "manual"): ("a fine film . It was<mask>.", "terrible great"),
    ("sst2", "searched"): ("a fine film . A<mask> one.", "pathetic irresistible"),
    ("sst2", "null"): ("a fine film .<mask>", "terrible great"),
    ("mr", "manual"): ("a fine film . It was<mask>.", "terrible great"),
    ("mr", "searched"): (" It was<mask>! a fine film .", "terrible epic"),
    ("mr", "null"): ("a fine film .<mask>", "terrible great"),
    ("cr", "manual"): ("a fine film . It was<mask>.", "terrible great"),
    ("cr", "searched"): ("a fine film . It's<mask>!", "horrible fantastic"),
    ("cr", "null"): ("a fine film .<mask>", "terrible great"),
    ("qnli", "manual"): ("Is it raining?<mask>, the streets are wet.", "Yes No"),
    ("qnli", "searched"): ("Is it raining?<mask>. Yes, the streets are wet.", "Okay Nonetheless"),
    ("qnli", "null"): ("Is it raining? The streets are wet.<mask>", "Yes No"),
    ("rte", "manual"): ("Is it raining?<mask>, the streets are wet.", "Yes No"),
    ("rte", "searched"): ("Is it raining.<mask>, I believe the streets are wet.", "Clearly Yet"),
    ("rte", "null"): ("Is it raining? The streets are wet.<mask>", "Yes No"),
    ("qqp", "manual"): ("Is it raining?<mask>, the streets are wet.", "No Yes"),
    ("qqp", "searched"): ("Is it raining?<mask>,but the streets are wet.", "Since Me"),
    ("qqp", "null"): ("Is it raining? The streets are wet.<mask>", "No Yes"),
    ("sst2", "none"): ("a fine film .", ""),
    ("mr", "none"): ("a fine film .", ""),
    ("cr", "none"): ("a fine film .", ""),
    ("qnli", "none"): ("Is it raining?</s>The streets are wet.", ""),
    ("rte", "none"): ("Is it raining?</s>The streets are wet.", ""),
    ("qqp", "none"): ("Is it raining?</s>The streets are wet.", ""),
}


@cache
def roberta() -> PreTrainedTokenizerFast:
    """Bytes, RoBERTa's special tokens, and a token for every label word after a space."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in sorted({word for _, words in PROMPTS.values() for word in words.split()}):
        spelt = f"Ġ{word}"
        for end in range(2, len(spelt) + 1):
            pair = (spelt[: end - 1], spelt[end - 1])
            if pair not in merges:
                merges.append(pair)
                vocab.append(spelt[:end])
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("bos", "pad", "eos", "unk", "mask")
    tokens = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **tokens
    )


def encoded(task: str, style: str) -> Encoded:
    """One example under a shipped task's prompt."""
    written = OmegaConf.load(conf_dir() / "task" / f"{task}.yaml")
    merged = OmegaConf.merge(OmegaConf.structured(TaskConfig), written)
    own = replace(OmegaConf.to_object(merged), max_length=512)
    splits = dict(zip(Split, (range(1), range(1, 1), range(1, 1)), strict=True))
    data = Data(tuple(own.labels), (Example("0", TEXTS[task], 0),), splits, "", ())
    prompt = resolve_prompt(own, PromptConfig(style=PromptStyle(style)), data.labels)
    architecture = Architecture.encoder if style == "none" else Architecture.masked_lm
    return encode(data, prompt, own, roberta(), architecture, 512)


def test_the_table_is_whole() -> None:
    assert set(PROMPTS) == set(product(TEXTS, [style.value for style in PromptStyle]))


@pytest.mark.parametrize(("task", "style"), PROMPTS, ids=map("-".join, PROMPTS))
def test_prompt_is_spelt_as_published(task: str, style: str) -> None:
    text, words = PROMPTS[task, style]
    found = encoded(task, style)
    assert roberta().decode(found.input_ids[0]) == f"<s>{text}</s>"
    assert [roberta().decode([token]).strip() for token in found.label_ids] == words.split()
    read = roberta().convert_ids_to_tokens(found.input_ids[0][found.position[0]])
    assert read == ("<s>" if style == "none" else "<mask>")
