"""Templates to token ids: both spellings, both kinds of language model, limits and mistakes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from raykernel.config import PromptConfig, PromptText, TaskConfig
from raykernel.errors import InputError
from raykernel.problem.batches import collate
from raykernel.problem.prompts import Encoded, Prompt, encode, resolve_prompt
from raykernel.problem.tasks import Data, Example
from raykernel.problem.templates import Piece, PieceKind, parse
from raykernel.terms import Architecture, PromptStyle, Split, Truncation

MASKED, CAUSAL, ENCODER = Architecture.masked_lm, Architecture.causal_lm, Architecture.encoder
LABELS = ("negative", "positive")
WORDS = {"negative": "terrible", "positive": "great"}
MERGED = ["Ġterrible", "Ġgreat", "Ġwas", "ĠIt", "Ġfilm", "nice"]


@cache
def bpe(kind: str = "roberta") -> PreTrainedTokenizerFast:
    """Byte-level BPE whose only merges make the words of MERGED."""
    vocab = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
    ]
    merges = []
    for word in MERGED:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                vocab.append(word[:end])
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocab))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if kind == "llama":
        post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
        tokenizer.post_processor = post
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    names = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **names)
    wrapped.model_input_names = ["input_ids", "attention_mask"]
    return wrapped


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?:'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "was", "terrible", "great", "film"]
    vocab = dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters)])
    ids = {token: index for index, token in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        pad_token="[PAD]",
    )
    wrapped.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return wrapped


def data_of(*texts: tuple[str, ...]) -> Data:
    examples = tuple(Example(f"a:{i}", text, i % 2) for i, text in enumerate(texts))
    return Data(LABELS, examples, {Split.train: range(len(examples))}, "", ())


def encoded(
    template: str | None,
    *texts: tuple[str, ...],
    tokenizer: PreTrainedTokenizerFast | None = None,
    architecture: Architecture = MASKED,
    max_positions: int = 512,
    words: dict[str, str] = WORDS,
    **changes: object,
) -> Encoded:
    names = ["a", "b"][: len(texts[0])]
    task = TaskConfig(**{"text": names, **changes})  # type: ignore[arg-type]
    prompt = Prompt((), ())
    if template is not None:
        config = PromptConfig(template=template, words=words)
        prompt = resolve_prompt(task, config, LABELS)
    return encode(data_of(*texts), prompt, task, tokenizer or bpe(), architecture, max_positions)


def tokens(result: Encoded, tokenizer: PreTrainedTokenizerFast | None = None) -> list[str]:
    return (tokenizer or bpe()).convert_ids_to_tokens(list(result.input_ids[0]))


# ---------------------------------------------------------------- spellings
PAIRS = [
    ("{a} It was {label}.", "*cls**sent_0*_It_was*mask*.*sep+*"),
    ("{a}? {label}, {b}", "*cls**sent_0*?*mask*,*+sent_1**sep+*"),
    ("{label}: {a}", "*cls**mask*:*+sent_0**sep+*"),
    ("{a}{label}", "*cls**sent_0**mask**sep+*"),
    ("{a} {b} {label}", "*cls**sent_0**+sent_1**mask**sep+*"),
]


@pytest.mark.parametrize(("braces", "stars"), PAIRS)
@pytest.mark.parametrize("tokenizer", [bpe, wordpiece])
def test_both_spellings_give_the_same_ids(braces, stars, tokenizer):
    texts = [("nice film", "was it"), ("a", "It was great!")]
    one = encoded(braces, *texts, tokenizer=tokenizer())
    two = encoded(stars, *texts, tokenizer=tokenizer())
    assert one == two
    mask = tokenizer().mask_token_id
    assert [ids[at] for ids, at in zip(one.input_ids, one.position, strict=True)] == [mask, mask]


def test_pieces_are_tokenised_separately_and_spaces_lead():
    result = encoded("{a} It was {label}.", ("nice film",))
    expected = ["<s>", "nice", "Ġfilm", "ĠIt", "Ġwas", "<mask>", ".", "</s>"]
    assert tokens(result) == expected
    assert result.position == (5,)
    assert bpe().convert_ids_to_tokens(list(result.label_ids)) == ["Ġterrible", "Ġgreat"]
    assert result.token_type_ids is None
    assert result.truncated == 0


def test_no_token_spans_two_pieces():
    # "ni" + "ce" would merge to one token if it were one text
    result = encoded("{a}ce {label}", ("ni",))
    assert tokens(result) == ["<s>", "ni", "c", "e", "<mask>", "</s>"]


def test_mini_language_alters_texts():
    columns = ["a", "b"]
    (text,) = [p for p in parse("*mask**sent-_0*", columns) if p.kind is PieceKind.text]
    assert text.render(["Is it so.", ""]) == "Is it so"
    (text,) = [p for p in parse("*mask**+sentl_1*", columns) if p.kind is PieceKind.text]
    assert text.render(["", "The Film"]) == " the Film"
    (text,) = [p for p in parse("*mask**+sentu-_1*", columns) if p.kind is PieceKind.text]
    assert text.render(["", "the Film."]) == " The Film"


def test_doubled_braces_are_braces():
    pieces = parse("{{{a}}} is {label}", ["a"])
    assert [piece.literal for piece in pieces if piece.literal] == ["{", "} is"]


def test_stars_in_a_brace_template_are_text():
    assert Piece(PieceKind.literal, "* was *") in parse("{a}* was *{label}", ["a"])


# ---------------------------------------------------------------- kinds of models
def test_wordpiece_has_segments_and_no_space():
    result = encoded("*cls**sent_0*_It_was*mask*.*sep+*", ("film",), tokenizer=wordpiece())
    assert tokens(result, wordpiece()) == ["[CLS]", "film", "it", "was", "[MASK]", ".", "[SEP]"]
    assert result.token_type_ids == ((0,) * 7,)
    pair = encoded(None, ("film", "great"), tokenizer=wordpiece())
    assert tokens(pair, wordpiece()) == ["[CLS]", "film", "[SEP]", "great", "[SEP]"]
    assert pair.token_type_ids == ((0, 0, 0, 1, 1),)


def test_causal_model_reads_the_last_token_before_the_label():
    result = encoded(
        "{a} It was {label}. So.", ("nice film",), tokenizer=bpe("gpt2"), architecture=CAUSAL
    )
    assert tokens(result, bpe("gpt2")) == ["nice", "Ġfilm", "ĠIt", "Ġwas"]
    assert result.position == (3,)
    assert result.token_type_ids is None
    assert len([note for note in result.notes if "dropped" in note]) == 1
    assert result.pad_id == bpe("gpt2").eos_token_id


def test_causal_model_begins_as_its_tokenizer_does():
    result = encoded(
        "*cls**sent_0*_It_was*mask*.*sep+*", ("nice",), tokenizer=bpe("llama"), architecture=CAUSAL
    )
    assert tokens(result) == ["<s>", "nice", "ĠIt", "Ġwas"]


def test_standard_fine_tuning_has_single_separators():
    result = encoded(None, ("nice", "film"), architecture=MASKED)
    assert tokens(result) == ["<s>", "nice", "</s>", "f", "i", "l", "m", "</s>"]
    assert result.position == (0,)
    assert result.label_ids == ()
    decoder = encoded(None, ("nice film",), tokenizer=bpe("gpt2"), architecture=CAUSAL)
    assert tokens(decoder) == ["nice", "Ġfilm"]
    assert decoder.position == (1,)


def test_words_that_begin_with_a_bracket_are_looked_up_as_they_are():
    words = {"negative": ".", "positive": "<s>"}
    result = encoded("{a} {label}", ("nice",), words=words)
    assert bpe().convert_ids_to_tokens(list(result.label_ids)) == [".", "<s>"]


# ---------------------------------------------------------------- limits
def test_text_limits_come_first():
    result = encoded("{a} {label} {b}", ("x" * 9, "y" * 9), first_limit=3, other_limit=2)
    assert tokens(result) == ["<s>", "x", "x", "x", "<mask>", "Ġ", "y", "</s>"]
    assert result.truncated == 1


def test_the_longest_text_gives_way():
    result = encoded("{a} {label}{b}", ("x" * 9, "y" * 3), max_length=9)
    assert "".join(tokens(result)) == "<s>xxx<mask>yyy</s>"
    result = encoded("{a} {label}{b}", ("x" * 9, "y" * 9), max_positions=10)
    assert "".join(tokens(result)) == "<s>xxxx<mask>yyy</s>"


def test_the_beginning_of_a_text_gives_way_on_request():
    result = encoded("{a} {label}", ("abcdefgh",), max_length=6, truncate=Truncation.head)
    assert tokens(result) == ["<s>", "f", "g", "h", "<mask>", "</s>"]
    result = encoded("{a} {label} {b}", ("abcd", "wxyz"), first_limit=2, truncate=Truncation.head)
    assert tokens(result) == ["<s>", "c", "d", "<mask>", "Ġw", "x", "y", "z", "</s>"]
    result = encoded("{a} {label}", ("ab",), first_limit=5, truncate=Truncation.head)
    assert tokens(result) == ["<s>", "a", "b", "<mask>", "</s>"]


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40)),
        min_size=1,
        max_size=4,
    ),
    st.integers(min_value=12, max_value=60),
    st.integers(min_value=12, max_value=60),
    st.none() | st.integers(min_value=1, max_value=20),
    st.none() | st.integers(min_value=1, max_value=20),
    st.sampled_from(["{a} It was {label}. {b}", "{label}: {a}{b}", "{b}{a} It {label}"]),
    st.sampled_from(Truncation),
)
@settings(max_examples=60, deadline=None)
def test_only_texts_are_cut(texts, max_length, max_positions, first, other, template, truncate):
    limits = {"max_length": max_length, "first_limit": first, "other_limit": other}
    limits["truncate"] = truncate
    result = encoded(template, *texts, max_positions=max_positions, **limits)
    empty = encoded(template, *[("", "")] * len(texts))
    space = bpe().convert_tokens_to_ids("Ġ")
    for ids, at, fixed in zip(result.input_ids, result.position, empty.input_ids, strict=True):
        assert len(ids) <= min(max_length, max_positions)
        assert ids[at] == bpe().mask_token_id
        rest = iter(ids)  # template, special tokens and mask are there, in order
        assert all(token in rest for token in fixed if token != space)
    whole = encoded(template, *texts, max_length=10_000, max_positions=10_000)
    assert result.truncated == sum(
        len(ids) < len(full) for ids, full in zip(result.input_ids, whole.input_ids, strict=True)
    )


def test_collate_pads_on_the_right():
    result = encoded("{a} {label}", ("nice",), ("a",), ("nice film",), tokenizer=wordpiece())
    batch = collate(result, [2, 1], torch.device("cpu"))
    assert batch["input_ids"].shape == batch["token_type_ids"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(result.input_ids[i]) for i in (2, 1)]
    assert (batch["input_ids"][1, len(result.input_ids[1]) :] == result.pad_id).all()
    rows = torch.arange(2)
    masks = batch["input_ids"][rows, batch["position"]]
    assert masks.tolist() == [wordpiece().mask_token_id] * 2
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{a} It was great.", ["0 places", "{label}"]),
        ("{a} {label} {label}", ["2 places"]),
        ("*cls**sent_0*_It_was.*sep+*", ["0 places", "*mask*"]),
        ("{aa} {label}", ["{aa}", "'a'"]),
        ("{a:>3} {label}", ["{a:>3}"]),
        ("{a {label}", ["{"]),
        ("{a} {label}}", ["unbalanced"]),
        ("It was {label}", ["no text", "{a}"]),
        ("*cls**sent_1**mask*", ["*sent_1*", "below 1"]),
        ("*sent_0**mask**label_0*", ["demonstration"]),
        ("", ["0 places"]),
    ],
)
def test_wrong_templates(template, parts):
    task = TaskConfig(text=["a"])
    with pytest.raises(InputError) as caught:
        resolve_prompt(task, PromptConfig(template=template, words=WORDS), LABELS)
    for part in ["prompt.template", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ({"negative": "terrible"}, ["'positive'", "no word"]),
        ({**WORDS, "positve": "great"}, ["'positve'", "'positive'"]),
        ({"negative": "great", "positive": "great"}, ["'great'", "one token"]),
        ({"negative": " ", "positive": "great"}, ["'negative'", "no word"]),
    ],
)
def test_wrong_words(words, parts):
    with pytest.raises(InputError) as caught:
        resolve_prompt(
            TaskConfig(text=["a"]), PromptConfig(template="{a} {label}", words=words), LABELS
        )
    for part in ["prompt.words", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("word", "tokenizer", "part"),
    [
        ("horrible", bpe, "'Ġ' 'h'"),
        ("horrible", wordpiece, "'##o'"),
        ("日", wordpiece, "not in the vocabulary"),
        ("<nothing>", bpe, "not in the vocabulary"),
        ("Great", wordpiece, "one token"),
    ],
)
def test_words_that_are_not_one_token_of_their_own(word, tokenizer, part):
    words = {"negative": word, "positive": "great"}
    with pytest.raises(InputError, match=r"prompt\.words") as caught:
        encoded("{a} {label}", ("nice",), tokenizer=tokenizer(), words=words)
    assert part in str(caught.value)


def test_words_of_the_task_may_name_more_labels_than_are_used():
    task = TaskConfig(
        text=["a"], prompts={"manual": PromptText("{a} {label}", {**WORDS, "other": "okay"})}
    )
    assert resolve_prompt(task, PromptConfig(), LABELS).words == ("terrible", "great")


def test_unknown_style_names_the_others():
    task = TaskConfig(text=["a"], prompts={"manual": PromptText("{a} {label}", WORDS)})
    with pytest.raises(InputError, match="prompt=manual, prompt=none"):
        resolve_prompt(task, PromptConfig(style=PromptStyle.searched), LABELS)


def test_a_head_has_no_template():
    config = PromptConfig(style=PromptStyle.none, template="{a} {label}")
    with pytest.raises(InputError, match="prompt=none"):
        resolve_prompt(TaskConfig(text=["a"]), config, LABELS)
    config = PromptConfig(style=PromptStyle.none)
    assert resolve_prompt(TaskConfig(text=["a"]), config, LABELS) == Prompt((), ())


def test_template_longer_than_the_limit():
    with pytest.raises(InputError, match="beside the texts"):
        encoded("{a} " + "long " * 10 + "{label}", ("nice",), max_length=20)


def test_models_that_cannot_answer():
    with pytest.raises(InputError, match="prompt=none"):
        encoded("{a} {label}", ("nice",), architecture=ENCODER)
    with pytest.raises(InputError, match="mask token"):
        encoded("{a} {label}", ("nice",), tokenizer=bpe("gpt2"), architecture=MASKED)
    with pytest.raises(InputError, match="no text before"):
        encoded("{label}: {a}", ("nice",), tokenizer=bpe("gpt2"), architecture=CAUSAL)
    with pytest.raises(InputError, match="a:1"):
        encoded("{a}{label}", ("nice",), ("",), tokenizer=bpe("gpt2"), architecture=CAUSAL)
