"""Prompts: examples as token ids, with the place where logits are read.

Pieces of a template are tokenised separately, without special tokens, and joined, so that no
token spans two pieces. A masked LM reads the label word at its mask token. A causal LM predicts
it after the last token before the label's place; what follows that place is dropped. Without a
prompt (standard fine-tuning), a linear head reads the first token, or the last one of a decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from raykernel.config import Json, PromptConfig, PromptText, TaskConfig
from raykernel.errors import InputError
from raykernel.problem.label_words import label_ids, label_words, tokens_of
from raykernel.problem.tasks import Data
from raykernel.problem.templates import CLS, LABEL, SEP, Piece, PieceKind, parse
from raykernel.terms import Architecture, PromptStyle, Truncation


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template and its label words; both empty for standard fine-tuning."""

    pieces: tuple[Piece, ...]
    words: tuple[str, ...]
    """Label words in the order of the labels."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples as token ids: what a worker needs, plain integers, small enough to ship."""

    input_ids: tuple[tuple[int, ...], ...]
    """One sequence per example, not padded."""
    token_type_ids: tuple[tuple[int, ...], ...] | None
    """Segments, for models that have them."""
    position: tuple[int, ...]
    """Where the logits (without a prompt: the features) are read."""
    label_ids: tuple[int, ...]
    """Token ids of the label words, in the order of the labels; empty without a prompt."""
    pad_id: int
    notes: tuple[str, ...]
    """What to say once on screen."""
    truncated: int
    """Number of examples that lost tokens of their texts."""

    def of(self, example: int) -> list[Json]:
        """What the model is given of one example, and where it is read."""
        segments = self.token_type_ids
        return [
            list(self.input_ids[example]),
            None if segments is None else list(segments[example]),
            self.position[example],
        ]


# ---------------------------------------------------------------- without a tokenizer
def resolve_prompt(task: TaskConfig, prompt: PromptConfig, labels: Sequence[str]) -> Prompt:
    """The template and label words that a run uses, checked as far as no tokenizer is needed.

    Args:
        task: its own prompts, by style, and its text columns.
        prompt: which of them, and what replaces their parts.
        labels: label values in the order of the outputs.

    Returns:
        The pieces of the template, and one word per label.

    Raises:
        InputError: if there is no such prompt, the template is wrong, or words are wrong.
    """
    if prompt.style is PromptStyle.none:
        if prompt.template is not None or prompt.words:
            raise InputError(
                "prompt=none: found prompt.template or prompt.words, too, expected neither; a "
                "linear head has no prompt. Remove them, or leave prompt=none out."
            )
        return Prompt(pieces=(), words=())
    own = task.prompts.get(prompt.style.value)
    needs_own = prompt.template is None or not prompt.words
    if own is None and needs_own:
        choices = ", ".join([*(f"prompt={style}" for style in task.prompts), "prompt=none"])
        raise InputError(
            f"prompt={prompt.style.value}: task {task.name!r} has no such prompt. Choose one of "
            f"{choices}, or give one: 'prompt.template=\"{{{(task.text or ['column'])[0]}}} It was "
            "{label}.\"' 'prompt.words={LABEL: WORD, …}'."
        )
    own = own or PromptText()
    template = prompt.template if prompt.template is not None else own.template
    pieces = parse(template, task.text)
    return Prompt(pieces=pieces, words=label_words(own.words, prompt.words, labels))


# ---------------------------------------------------------------- with a tokenizer
def encode(
    data: Data,
    prompt: Prompt,
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    max_positions: int,
) -> Encoded:
    """All examples as token ids.

    The texts are cut to `first_limit` and `other_limit`; if the whole is still longer than
    `max_length` or the model's positions, the longest text gives way, from its end or, with
    `task.truncate=head`, from its beginning. Template, special tokens and label word are never cut.

    Args:
        data: the examples.
        prompt: template and label words.
        task: limits, in tokens.
        tokenizer: the model's tokenizer.
        architecture: which head the model has.
        max_positions: tokens that the model can take.

    Returns:
        Token ids in the order of the examples.

    Raises:
        InputError: if model and prompt do not fit, a word is not one token, or the template
            alone is too long.
    """
    check_fit(prompt, tokenizer, architecture)
    words = label_ids(prompt.words, data.labels, tokenizer)
    pieces, notes = arrange(prompt, len(task.text), tokenizer, architecture)
    limit = min(task.max_length, max_positions)
    columns = [tokenize_piece(piece, data, tokenizer) for piece in pieces]  # [piece][example]
    sequences, truncated = [], 0
    for index, example in enumerate(data.examples):
        parts = [column[index] for column in columns]
        kept = cut(parts, pieces, task, limit)
        truncated += sum(map(len, kept)) < sum(map(len, parts))
        if not any(kept):
            raise InputError(
                f"example {example.id}: found no token before the label's place, expected at least "
                "one. Begin prompt.template with a word, or remove empty texts."
            )
        sequences.append(kept)
    if truncated:
        notes.append(f"{truncated} of {len(sequences)} examples lost text to the token limits")
    return Encoded(
        input_ids=tuple(tuple(token for part in parts for token in part) for parts in sequences),
        token_type_ids=segments(pieces, sequences)
        if architecture is not Architecture.causal_lm
        and "token_type_ids" in tokenizer.model_input_names
        else None,
        position=tuple(readout_position(pieces, parts, architecture) for parts in sequences),
        label_ids=words,
        pad_id=pad_id(tokenizer),
        notes=tuple(notes),
        truncated=truncated,
    )


def check_fit(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, architecture: Architecture
) -> None:
    """Check that a model of this architecture can answer the prompt.

    Raises:
        InputError: if it has no language-model head or no mask token.
    """
    if not prompt.pieces:
        return
    if architecture is Architecture.encoder:
        raise InputError(
            "model.architecture=encoder: found a prompt, expected prompt=none: the model has no "
            "language-model head to read a label word from. Use prompt=none, or a masked or causal "
            "language model."
        )
    if architecture is Architecture.masked_lm and tokenizer.mask_token_id is None:
        raise InputError(
            "model.architecture=masked_lm: found a tokenizer without a mask token, expected one. "
            "Is the model a causal one? Then set model.architecture=causal_lm."
        )


def arrange(
    prompt: Prompt,
    num_texts: int,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
) -> tuple[tuple[Piece, ...], list[str]]:
    """The pieces as one model reads them, and notes on what is dropped.

    Args:
        prompt: the template; empty for standard fine-tuning.
        num_texts: number of texts per example.
        tokenizer: the model's tokenizer.
        architecture: which head the model has.

    Returns:
        Pieces that are all tokenised: cls stands for what begins a sequence.

    Raises:
        InputError: if nothing of the texts is left for a causal model.
    """
    if is_decoder(tokenizer, architecture):
        begin = [CLS] if adds_bos(tokenizer) else []
        if not prompt.pieces:
            texts = [Piece(PieceKind.text, column=i, lead=" " * (i > 0)) for i in range(num_texts)]
            return (*begin, *texts), []
        place = prompt.pieces.index(LABEL)
        fixed = (PieceKind.cls, PieceKind.sep)
        before = [piece for piece in prompt.pieces[:place] if piece.kind not in fixed]
        after = [piece for piece in prompt.pieces[place + 1 :] if piece.kind not in fixed]
        if not any(piece.kind is PieceKind.text for piece in before):
            raise InputError(
                "prompt.template: found no text before the label's place, expected one: a causal "
                "language model predicts the label word from what precedes it. Put the text first, "
                "as in '{review} It was {label}.'"
            )
        return (*begin, *before), [dropped(after)] if after else []
    if prompt.pieces:
        return prompt.pieces, []
    pieces = [CLS]
    for column in range(num_texts):
        pieces += [Piece(PieceKind.text, column=column), SEP]
    return tuple(pieces), []


def dropped(pieces: Sequence[Piece]) -> str:
    """A note on what a causal language model does not see."""
    texts = sum(piece.kind is PieceKind.text for piece in pieces)
    also = f", and with it {texts} text(s) of every example" if texts else ""
    return f"the template after the label's place is dropped{also}: the model predicts what is next"


def is_decoder(tokenizer: PreTrainedTokenizerBase, architecture: Architecture) -> bool:
    """Whether the last token, not a mask or cls token, has seen the whole text."""
    if architecture is Architecture.encoder:
        return tokenizer.cls_token_id is None
    return architecture is Architecture.causal_lm


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a sequence with its bos token."""
    with_special = tokenizer.encode("a", add_special_tokens=True)
    return tokenizer.bos_token_id is not None and with_special[:1] == [tokenizer.bos_token_id]


def tokenize_piece(piece: Piece, data: Data, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of one piece for every example."""
    if piece.kind is PieceKind.text:
        return tokens_of([piece.render(example.texts) for example in data.examples], tokenizer)
    return [fixed_tokens(piece, tokenizer)] * len(data.examples)


def fixed_tokens(piece: Piece, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a piece that is the same for all examples."""
    if piece.kind is PieceKind.literal:
        # One character is a token of its own, looked up; as in the papers, "." has no space.
        found = tokenizer.convert_tokens_to_ids(piece.literal) if len(piece.literal) == 1 else None
        if isinstance(found, int) and found != tokenizer.unk_token_id:
            return [found]
        return tokens_of([piece.literal], tokenizer)[0]
    token = {
        PieceKind.cls: first_known(tokenizer.cls_token_id, tokenizer.bos_token_id),
        PieceKind.sep: first_known(tokenizer.sep_token_id, tokenizer.eos_token_id),
        PieceKind.label: tokenizer.mask_token_id,
    }[piece.kind]
    return [] if token is None else [token]


def first_known(*tokens: int | None) -> int | None:
    """The first token id that the tokenizer has."""
    return next((token for token in tokens if token is not None), None)


def cut(
    parts: Sequence[list[int]], pieces: Sequence[Piece], task: TaskConfig, limit: int
) -> list[list[int]]:
    """The parts of one example within all limits; only texts lose tokens, from one end.

    Args:
        parts: token ids of each piece.
        pieces: the pieces.
        task: limits of single texts, in tokens, and the end that gives way.
        limit: tokens of the whole.

    Returns:
        The parts, cut.

    Raises:
        InputError: if what must not be cut leaves no token for a text.
    """
    kept = list(parts)
    texts = [index for index, piece in enumerate(pieces) if piece.kind is PieceKind.text]
    for index in texts:
        bound = task.other_limit if pieces[index].column else task.first_limit
        if bound is not None:
            kept[index] = shortened(kept[index], bound, task.truncate)
    total = sum(map(len, kept))
    fixed = total - sum(len(kept[index]) for index in texts)
    if fixed >= limit:
        raise InputError(
            f"prompt.template: found {fixed} tokens beside the texts, expected fewer than {limit} "
            "(task.max_length, and what the model can take). Shorten it or raise task.max_length."
        )
    while total > limit:
        longest = max(texts, key=lambda index: (len(kept[index]), index))
        others = [len(kept[index]) for index in texts if index != longest]
        # down to the next longest at once, then one by one in turn
        step = min(total - limit, max(1, len(kept[longest]) - max(others, default=0)))
        kept[longest] = shortened(kept[longest], len(kept[longest]) - step, task.truncate)
        total -= step
    return kept


def shortened(tokens: list[int], length: int, truncate: Truncation) -> list[int]:
    """At most `length` tokens, without those beyond it at one end."""
    if truncate is Truncation.head:
        return tokens[max(0, len(tokens) - length) :]
    return tokens[:length]


def segments(
    pieces: Sequence[Piece], sequences: Sequence[Sequence[Sequence[int]]]
) -> tuple[tuple[int, ...], ...]:
    """Segment of every token: 1 after the first sep that ends a segment (BERT knows two)."""
    segment, by_piece = 0, []
    for piece in pieces:
        by_piece.append(min(segment, 1))
        segment += piece.new_segment
    return tuple(
        tuple(
            segment for part, segment in zip(parts, by_piece, strict=True) for _ in range(len(part))
        )
        for parts in sequences
    )


def readout_position(
    pieces: Sequence[Piece], parts: Sequence[Sequence[int]], architecture: Architecture
) -> int:
    """Where one example is read: mask, first token of an encoder, last token of a decoder."""
    if LABEL in pieces:
        place = list(pieces).index(LABEL)
        assert len(parts[place]) == 1, "the mask is never cut"
        return sum(map(len, parts[:place]))
    encoder = architecture is not Architecture.causal_lm and pieces[0] is CLS
    return 0 if encoder else sum(map(len, parts)) - 1


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token that fills a batch up; any will do, since attention never sees it."""
    return first_known(tokenizer.pad_token_id, tokenizer.eos_token_id) or 0
