"""What a person reads: numbers of tables, and text that only shows."""

from __future__ import annotations

import io
import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykernel.cli import main
from raykernel.console import Screen, pace, short, visible
from raykernel.store.blocks import Store


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (999.4, "999"),
        (999.6, "1000"),
        (-999.6, "-1000"),
        (1000.0, "1000"),
        (12345.6, "12346"),
        (999_600.0, "999600"),
        (1e6, "1e+06"),
        (1e-9, "1e-09"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (math.nan, "nan"),
    ],
)
def test_three_digits_and_no_exponent_from_a_thousandth_to_a_million(value, text):
    assert short(value) == text


@pytest.mark.parametrize("value", [10**e * m for e in range(-3, 6) for m in (1.0, 9.996, 9.994)])
def test_no_exponent_where_none_is_needed_and_three_digits_are_right(value):
    assert "e" not in short(value)
    assert float(short(value)) == pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.0, "0/s"),
        (1234.5, "1234/s"),
        (1.0, "1/s"),
        (0.6, "1.67 s each"),
        (0.02, "50 s each"),
        (0.01, "1 min 40 s each"),
    ],
)
def test_slow_work_says_what_each_piece_takes(rate, text):
    assert pace(rate) == text


BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
EVIL = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eesrever\r [bold]x[/] [link=file:///]y"


@given(st.text() | st.text(alphabet="\x00\x07\x1b\x9b\r\n\t\u202e\u2066a[]"))
def test_shown_text_has_nothing_that_acts_on_a_terminal(text: str):
    shown = visible(text)
    for letter in shown:
        assert letter in "\n\t" or unicodedata.category(letter) != "Cc"
        assert unicodedata.bidirectional(letter) not in BIDI_CONTROLS
    if shown == text:
        assert not any(ord(letter) < 32 for letter in text.translate({9: None, 10: None}))


def test_every_way_to_the_screen_spells_out_what_data_hold(capsys):
    screen = Screen()
    screen.say(EVIL)
    screen.note(EVIL)
    screen.out.print(EVIL)
    screen.table([EVIL, "n"], [[EVIL, "1"]], title=EVIL)
    screen.facts([[EVIL, EVIL]], title=EVIL)
    with screen.stage(EVIL), screen.progress(EVIL, 1) as advance:
        advance(1)
    read = capsys.readouterr()
    for text in (read.out, read.err):
        assert not set("\x1b\x07\x9b\r\u202e") & set(text)
        assert "\\x1b[31mred" in text
        assert "[bold]x[/]" in text


def test_a_terminal_gets_colours_of_tables_and_none_of_data(monkeypatch):
    sink = io.StringIO()
    screen = Screen()
    screen.out = type(screen.out)(file=sink, force_terminal=True, highlight=False, width=200)
    screen.err = type(screen.err)(file=sink, force_terminal=True, highlight=False, width=200)
    screen.table(["name"], [[EVIL]])
    with screen.stage(EVIL), screen.progress(EVIL, 1) as advance:
        advance(1)
    text = sink.getvalue()
    assert "\x1b[1m" in text
    assert "\x1b[31m" not in text
    assert "\x1b]0;" not in text
    assert "\x9b" not in text


def test_an_error_and_a_queried_cell_spell_them_out(tmp_path: Path, capsys):
    assert main([f"no{EVIL}"]) == 2
    store = Store(tmp_path / "store")
    store.write_result("runs", {"study": EVIL, "run": "r", "status": "ok", "results": "[]"})
    assert main(["query", "select study from runs", "--store", str(store.path)]) == 0
    assert main(["query", f"select '{EVIL}' as \"{EVIL}\"", "--store", str(store.path)]) == 0
    assert main(["query", "select nothing", "--store", f"{tmp_path}/{EVIL.replace('/', '')}"]) == 2
    read = capsys.readouterr()
    for text in (read.out, read.err):
        assert not set("\x1b\x07\x9b\r\u202e") & set(text)
        assert "\\x1b[31m" in text


def test_csv_and_json_keep_every_character_where_a_program_reads_them(tmp_path: Path, capsys):
    store = Store(tmp_path / "store")
    store.write_result("runs", {"study": EVIL, "run": "r", "status": "ok", "results": "[]"})
    for kind in ("csv", "json"):
        asked = ["query", "select study from runs", "--store", str(store.path), "--format", kind]
        assert main(asked) == 0
    text = capsys.readouterr().out
    assert text.count("\u202e") == 2
