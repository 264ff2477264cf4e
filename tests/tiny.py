"""A tiny random model folder and a small review file: real input for tests of whole commands."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

GOOD = ["great", "lovely", "fine", "helpful", "strong"]
BAD = ["terrible", "awful", "weak", "useless", "sad"]
PLAIN = ["the", "pill", "was", "and", "it", "made", "me", "feel", "day", "night"]


def reviews(num: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of text and label whose words give the label away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    rows = []
    for number in range(num):
        label = ("negative", "positive")[number % 2]
        words = [draw(PLAIN) for _ in range(6)] + [draw(GOOD if number % 2 else BAD)]
        rows.append((" ".join(words) + f" {number}", label))
    return rows


def overrides(model: Path | str, /, **changes: str | None) -> list[str]:
    """The command line of a run on `reviews.tsv`, three examples of a label; None drops a key."""
    chosen = {
        "task": "file",
        "task.train": "reviews.tsv",
        "task.text": "[review]",
        "task.label": "rating",
        "task.k": "3",
        "model": "hf",
        "model.name": str(model),
        "prompt.template": '"{review} It was {label}."',
        "prompt.words": "{negative: terrible, positive: great}",
        "store.path": "store",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in chosen.items() if value is not None]


def write_reviews(path: Path, num: int = 60, seed: int = 0) -> Path:
    """A TSV with the columns review and rating."""
    lines = ["review\trating", *("\t".join(row) for row in reviews(num, seed))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def study(rates: str, *, steps: int) -> str:
    """A study of short fine-tuning runs on `reviews.tsv`: two samples, some learning rates.

    Args:
        rates: values of `training.learning_rate`.
        steps: of every run.

    Returns:
        The text of its file.
    """
    base = overrides("tiny", task__k="2", task__test_limit="6", store__path="store")
    training = {"steps": str(steps), "eval_every": "1", "batch_size": "2", "keep_weights": "false"}
    base += [f"training.{key}={value}" for key, value in training.items()]
    return _STUDY.format(base=dict(one.split("=", 1) for one in base), rates=rates)


_STUDY = """
from raykernel.study import Arm, Line, Study, TaskTable
from raykernel.terms import Command

study = Study(
    question="Which rate?",
    base={base!r},
    space={{"task.seed": "13,21"}},
    arms=[Arm("SGD", Command.finetune, {{"training": "sgd"}},
              {{"training.learning_rate": {rates!r}}})],
    table=TaskTable([Line("SGD", "SGD", "finetuned")], title="Test", by=[]),
)
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in RoBERTa's style, trained on the reviews."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f" {word} It was" for word in [*GOOD, *BAD, *PLAIN]] * 20
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_masked_lm(folder: Path, *, hidden_size: int = 16, num_hidden_layers: int = 2) -> Path:
    """A tied RoBERTa with random weights, saved as a hub checkpoint would be."""
    words = tokenizer()
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        initializer_range=0.2,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
