"""What all fuzz tests share: readers, how hard they are tried, and what may come of it.

The property of every reader: whatever its input is, it gives a value or raises one of our own
errors, and changes no file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raykernel.errors import RaykernelError

QUICK = 40
EFFORT = pytest.mark.parametrize(
    "effort", [1, pytest.param(20, marks=pytest.mark.slow)], ids=["quick", "long"]
)
"""Times as many examples: the same ones every time, or under `-m slow` others every time."""


def tree(root: Path) -> dict[str, bytes | None]:
    """Content of every file below a folder; None of a folder."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def fuzz(
    inputs: st.SearchStrategy[Any],
    read: Callable[[Any], object],
    *,
    effort: int,
    folder: Path | None = None,
    examples: int = QUICK,
) -> None:
    """Give inputs to a reader.

    Args:
        inputs: what to draw.
        read: gives a value or raises one of our errors; may assert more of the value.
        effort: of `EFFORT`.
        folder: nothing below it may change while `read` runs.
        examples: how many under effort 1.
    """

    @settings(
        max_examples=examples * effort,
        derandomize=effort == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def check(found: Any) -> None:
        before = tree(folder) if folder else None
        with contextlib.suppress(RaykernelError):
            read(found)
        assert folder is None or tree(folder) == before, "reading writes nothing"

    check()


# ---------------------------------------------------------------- inputs


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few bytes changed, a part cut out, repeated or replaced; seldom left whole."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([0, 1, 2, 4, 8, 64, 1000]))
        kind = draw(st.sampled_from(["flip", "cut", "end", "repeat", "put", "noughts", "ones"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "end":
            del content[at:]
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        elif kind == "put":
            content[at : at + length] = draw(st.binary(max_size=16))
        else:
            content[at : at + length] = bytes([255 * (kind == "ones")]) * length
    return bytes(content)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, -1, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
ODD_JSON = st.sampled_from(
    [b"", b"{", b"[" * 2000, b'{"a":' * 2000, b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"\xff",
     b"\x00", b'"\\ud800"', b"{}", b"[]", b"null", b"5", b'"text"', b"[[1, 2]]", b"\xef\xbb\xbf{}"]
)  # fmt: skip


@st.composite
def json_like(draw: st.DrawFn, model: dict[str, Any]) -> bytes:
    """JSON: a right one with values or keys replaced, any other, or what is none."""
    kind = draw(st.sampled_from(["near", "near", "near", "any", "odd", "damaged"]))
    if kind == "odd":
        return draw(ODD_JSON)
    if kind == "damaged":
        return draw(damaged(json.dumps(model).encode()))
    found: Any = draw(JSON) if kind == "any" else json.loads(json.dumps(model))
    if kind == "near":
        for _ in range(draw(st.integers(1, 3))):
            place = found
            while True:
                key = draw(st.sampled_from(sorted(place)))
                inner = place[key]
                if not isinstance(inner, dict) or not inner or draw(st.booleans()):
                    break
                place = inner
            if draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(JSON)
            if not found:
                break
    # A lone surrogate is text that JSON can spell and no file can hold.
    return json.dumps(found).encode()
