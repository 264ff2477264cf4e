"""Templates: text with places for the task's columns and for the label word, cut into pieces.

Two spellings make the same pieces. Braces: `{review} Overall, it was {label}.` LM-BFF's
mini-language, in which the papers' prompts are given: `*cls**sent_0*_Overall,_it_was*mask*.*sep+*`.

A space leads the piece that follows it, because that is where byte-level BPE keeps it: a space
before `{column}` belongs to the text (`+sent` in the mini-language), one before `{label}` to the
label word, which always has one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from string import Formatter

from raykernel.errors import InputError, nearest


class PieceKind(Enum):
    """What stands at a place of a prompt."""

    literal = "literal"
    text = "text"
    label = "label"
    cls = "cls"
    sep = "sep"


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of a prompt, tokenised by itself."""

    kind: PieceKind
    literal: str = ""
    """What is written there (literal)."""
    column: int = 0
    """Which of the task's texts (text)."""
    lead: str = ""
    """A space, or nothing, before the text."""
    first: str = ""
    """`l` or `u`: the text's first letter in lower or upper case."""
    drop_last: bool = False
    """Without the text's last character, usually its full stop."""
    new_segment: bool = False
    """What follows is another segment, for models with token types (sep)."""

    def render(self, texts: Sequence[str]) -> str:
        """The text of this piece for one example, as the papers alter it."""
        if self.kind is not PieceKind.text:
            return self.literal
        text = texts[self.column]
        if self.first:
            head = text[:1].lower() if self.first == "l" else text[:1].upper()
            text = head + text[1:]
        return self.lead + (text[:-1] if self.drop_last else text)


LABEL = Piece(PieceKind.label)
CLS = Piece(PieceKind.cls)
SEP = Piece(PieceKind.sep, new_segment=True)
_SENTENCE = re.compile(r"(?P<lead>\+?)sent(?P<first>[lu]?)(?P<drop>-?)_(?P<column>\d+)")


def parse(template: str, columns: Sequence[str]) -> tuple[Piece, ...]:
    """Pieces of a template in either spelling.

    Args:
        template: the template.
        columns: the task's text columns.

    Returns:
        Its pieces; with braces, special tokens stand around them.

    Raises:
        InputError: if it cannot be read, has not exactly one place for the label, or no text.
    """
    mini_language = "{" not in template and "*" in template
    pieces = parse_stars(template, columns) if mini_language else parse_braces(template, columns)
    place = "*mask*" if mini_language else "{label}"
    count = pieces.count(LABEL)
    if count != 1:
        raise InputError(
            f"prompt.template={template!r}: found {count} places for the label word, expected one. "
            f"Put {place} where the label word belongs, once."
        )
    if not any(piece.kind is PieceKind.text for piece in pieces):
        text = "*sent_0*" if mini_language else "{" + (columns[0] if columns else "column") + "}"
        raise InputError(
            f"prompt.template={template!r}: found no text in it, expected at least one of the "
            f"columns {', '.join(columns)}. Insert {text}."
        )
    return tuple(pieces)


def parse_braces(template: str, columns: Sequence[str]) -> list[Piece]:
    """Pieces of a template with `{column}` and `{label}`; `{{` and `}}` are braces.

    Args:
        template: the template.
        columns: the task's text columns.

    Returns:
        Its pieces between cls and sep.

    Raises:
        InputError: for unbalanced braces or an unknown column.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"prompt.template={template!r}: found unbalanced braces ({error}), expected "
            "{column} and {label}; a brace itself is written {{ or }}."
        ) from error
    pieces, literal = [CLS], ""
    for before, name, spec, conversion in parts:
        literal += before
        if name is None:
            continue  # Formatter cuts literals at doubled braces
        lead = " " if literal.endswith(" ") else ""
        literal = literal.removesuffix(" ")
        if literal:
            pieces.append(Piece(PieceKind.literal, literal))
        literal = ""
        if spec or conversion or (name not in columns and name != "label"):
            name += (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise InputError(
                f"prompt.template={template!r}: found {{{name}}}, expected {{label}} or one of "
                f"task.text; {nearest(name, [*columns, 'label'])}"
            )
        pieces.append(
            LABEL
            if name == "label"
            else Piece(PieceKind.text, column=list(columns).index(name), lead=lead)
        )
    if literal:
        pieces.append(Piece(PieceKind.literal, literal))
    return [*pieces, SEP]


def parse_stars(template: str, columns: Sequence[str]) -> list[Piece]:
    """Pieces of a template in LM-BFF's mini-language (Gao et al. 2021).

    Between stars stand `cls`, `mask`, `sep`, `sep+` (a new segment follows), `sent_0` (text 0),
    `sent-_0` (without its last character), `sentl_0`, `sentu_0` (first letter in lower, upper
    case), `+sent…` (a space before it), or literal text with `_` for a space.

    Args:
        template: the template.
        columns: the task's text columns.

    Returns:
        Its pieces.

    Raises:
        InputError: for a text that the task does not have, or a demonstration.
    """
    special = {
        "cls": CLS,
        "mask": LABEL,
        "sep": Piece(PieceKind.sep),
        "sep+": SEP,
    }
    pieces = []
    for part in template.split("*"):
        sentence = _SENTENCE.fullmatch(part)
        if part in special:
            pieces.append(special[part])
        elif sentence:
            digits = sentence["column"]
            column = int(digits) if len(digits) < 10 else len(columns)
            if column >= len(columns):
                raise InputError(
                    f"prompt.template={template!r}: found *{part}*, expected a text number below "
                    f"{len(columns)}; task.text is {', '.join(columns)}."
                )
            pieces.append(
                Piece(
                    PieceKind.text,
                    column=column,
                    lead=" " if sentence["lead"] else "",
                    first=sentence["first"],
                    drop_last=bool(sentence["drop"]),
                )
            )
        elif re.fullmatch(r"labelx?_\d+", part):
            raise InputError(
                f"prompt.template={template!r}: found the demonstration *{part}*, expected none. "
                "Use *mask* for the label word; demonstrations are not supported."
            )
        elif part:
            pieces.append(Piece(PieceKind.literal, part.replace("_", " ")))
    return pieces
