"""Label words: the word that stands for each label, and its one token."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from raykernel.errors import InputError, nearest


def label_words(
    own: dict[str, str], given: dict[str, str], labels: Sequence[str]
) -> tuple[str, ...]:
    """One word per label.

    Args:
        own: the task's words by label; may name more labels than are used.
        given: the user's words, instead; empty: the task's own.
        labels: label values in the order of the outputs.

    Returns:
        The words in that order.

    Raises:
        InputError: if a label has no word, a word no label, or two labels the same word.
    """
    words = given or own
    for value in given:
        if value not in labels:
            raise InputError(
                f"prompt.words: found a word for {value!r}, which is no label; "
                f"{nearest(value, labels)}"
            )
    for value in labels:
        if not words.get(value, "").strip():
            raise InputError(
                f"prompt.words: found no word for label {value!r}, expected one for each of "
                f"{list(labels)}. Add it: 'prompt.words={{{value}: WORD, …}}'."
            )
    chosen = tuple(words[value].strip() for value in labels)
    check_different(chosen, labels, chosen)
    return chosen


def check_different(keys: Sequence[object], labels: Sequence[str], words: Sequence[str]) -> None:
    """Check that no two labels share a word or token.

    Raises:
        InputError: if two do: their logits would be the same.
    """
    first: dict[object, int] = {}
    for index, key in enumerate(keys):
        other = first.setdefault(key, index)
        if other != index:
            raise InputError(
                f"prompt.words: found {words[other]!r} for label {labels[other]!r} and "
                f"{words[index]!r} for {labels[index]!r}, which are one token; expected different "
                "ones. Choose another word for one of them."
            )


def label_ids(
    words: Sequence[str], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Token ids of the label words.

    Args:
        words: one word per label; empty for standard fine-tuning.
        labels: label values.
        tokenizer: the model's tokenizer.

    Returns:
        One token id per label.

    Raises:
        InputError: if a word is not one token, or two are the same.
    """
    ids = tuple(word_id(word, tokenizer) for word in words)
    check_different(ids, labels, words)
    return ids


def word_id(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id of a label word with a space before it, as it stands after other text.

    A word that begins with one of `<[.,` is looked up as it is (Gao et al. 2021).

    Args:
        word: the word.
        tokenizer: the model's tokenizer.

    Returns:
        Its token id.

    Raises:
        InputError: if it is several tokens, or none that the vocabulary has.
    """
    tokens = literal_token(word, tokenizer) if word[0] in "<[.," else spaced(word, tokenizer)
    if len(tokens) == 1 and (tokens[0] != tokenizer.unk_token_id or word == tokenizer.unk_token):
        return tokens[0]
    spelling = " ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in tokens)
    found = f"{len(tokens)} tokens ({spelling})" if len(tokens) > 1 else "not in the vocabulary"
    raise InputError(
        f"prompt.words: found {word!r}, which is {found} of this tokenizer, expected exactly one "
        "token. Choose a common short word of the same meaning, in the case in which it is usually "
        "written."
    )


def literal_token(word: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that is spelt exactly so, if there is one."""
    token = tokenizer.convert_tokens_to_ids(word)
    return [token] if isinstance(token, int) else []


def spaced(word: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a word that follows a space."""
    tokens, alone = tokens_of([" " + word, word], tokenizer)
    # SentencePiece marks a word's beginning itself, and a space is one token more
    if len(tokens) > 1 and len(alone) == 1 and starts_word(alone[0], tokenizer):
        return alone
    return tokens


def starts_word(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token carries SentencePiece's mark of a word's beginning."""
    return str(tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text without special tokens."""
    # verbose=False: it would warn of long texts, which are cut here
    encoding = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)
    return [list(ids) for ids in encoding["input_ids"]]
