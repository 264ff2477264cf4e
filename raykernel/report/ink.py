"""Colours and letters of figures, and a chart as SVG and PNG.

The colours are those of Okabe and Ito (2008), which the colour-blind tell apart; every series has a
marker of its own beside. Inside the page a figure's colours become variables of the page, so that
it follows light and dark, and its text is text in the page's own letters.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator

from raykernel.report.chart import WIDTH, Chart, Line, Panel, Series, fitted

PALETTE: Mapping[str, tuple[str, str]] = {
    "blue": ("#0072b2", "#56a8e0"),
    "vermillion": ("#d55e00", "#f2803a"),
    "green": ("#009e73", "#35c79e"),
    "purple": ("#b85c92", "#e39cc8"),
    "orange": ("#bd8200", "#f0b429"),
    "sky": ("#3f93c6", "#9ad4f7"),
    "ink": ("#1b1f24", "#e7e9ec"),
    "muted": ("#5f6973", "#9aa4ae"),
    "rule": ("#dfe3e7", "#343b43"),
    "paper": ("#ffffff", "#15181c"),
}
"""In light and in dark; hues of Okabe and Ito, darker on white where theirs are pale."""
CYCLE = ("blue", "vermillion", "green", "purple", "orange", "sky")
MARKERS = ("o", "s", "^", "D", "v", "P")

_BRIEF = 10
"""Letters of legend entries of which three fit beside each other."""
_TITLE = 52
"""Letters of a panel's title that fit."""

_STYLE: Mapping[Any, object] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a task may be named `a$b$`
    "font.family": ["DejaVu Sans"],
    "font.size": 8.0,
    "text.color": PALETTE["ink"][0],
    "axes.edgecolor": PALETTE["muted"][0],
    "axes.labelcolor": PALETTE["muted"][0],
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.titlecolor": PALETTE["ink"][0],
    "axes.titlepad": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.unicode_minus": False,
    "grid.color": PALETTE["rule"][0],
    "grid.linewidth": 0.6,
    "xtick.color": PALETTE["muted"][0],
    "ytick.color": PALETTE["muted"][0],
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 3.0,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.facecolor": PALETTE["paper"][0],
    "axes.facecolor": "none",
    "savefig.facecolor": PALETTE["paper"][0],
}
_BARE = {"Date": None, "Creator": None, "Format": None, "Type": None}


def colour(name: str) -> str:
    """A colour of the palette in light, or the colour itself."""
    return PALETTE[name][0] if name in PALETTE else name


def cycle(labels: Sequence[str], *, line: Line = "") -> list[Series]:
    """A series a label; from the seventh on colours come again with other markers.

    Args:
        labels: of the legend.
        line: how points are joined.

    Returns:
        As many series.
    """
    return [
        Series(label, CYCLE[i % len(CYCLE)], MARKERS[(i + i // len(CYCLE)) % len(MARKERS)], line)
        for i, label in enumerate(labels)
    ]


def to_svg(chart: Chart) -> bytes:
    """The whole figure as a file of its own, on white."""
    with _style(chart.name):
        return _svg(_whole(chart)).encode()


def to_png(chart: Chart) -> bytes:
    """The same in pixels, 200 to the inch."""
    with _style(chart.name):
        sink = io.BytesIO()
        _whole(chart).savefig(sink, format="png", dpi=200, metadata={"Software": None})
        return sink.getvalue()


def inline_svgs(chart: Chart) -> list[str]:
    """Every panel as an element of the page.

    Args:
        chart: the figure.

    Returns:
        SVG elements whose colours are the page's variables and whose identifiers are their own.
    """
    found = []
    for number, panel in enumerate(chart.panels):
        name = f"{chart.name}-{number + 1}"
        with _style(name):
            figure = Figure(figsize=(WIDTH, panel.height), layout="constrained")
            _draw(figure, panel)
            found.append(_inline(_svg(figure), name, f"{panel.title}. {chart.alt}"))
    return found


def swatch(series: Series) -> str:
    """A legend entry's line and marker as an SVG element."""
    paint = f"var(--{series.colour})" if series.colour in PALETTE else series.colour
    dash = {"--": "4 2", ":": "1 2"}.get(series.line)
    parts = []
    if series.line:
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path d="M0 6H24" stroke="{paint}" stroke-width="2"{dashed}/>')
    if series.marker:
        parts.append(f'<path d="{_SHAPES[series.marker]}" fill="{paint}"/>')
    return f'<svg class="swatch" viewBox="0 0 24 12" aria-hidden="true">{"".join(parts)}</svg>'


_SHAPES = {
    "o": "M8 6a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M8.5 2.5h7v7h-7z",
    "^": "M12 1.5l4.5 8h-9z",
    "D": "M12 1.2l4.8 4.8l-4.8 4.8l-4.8-4.8z",
    "v": "M12 10.5l-4.5-8h9z",
    "P": "M10.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
}

# ---------------------------------------------------------------- inside


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """The report's own style, whatever the user's is; the same figure gives the same bytes."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        # A browser has letters that matplotlib's own have not.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _whole(chart: Chart) -> Figure:
    """All panels side by side, at most three in a row, under the legend."""
    count = len(chart.panels)
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    height = rows * max(panel.height for panel in chart.panels)
    figure = Figure(figsize=(WIDTH * columns, height), layout="constrained")
    for number, panel in enumerate(chart.panels):
        _draw(figure, panel, (rows, columns, number + 1))
    if chart.series:
        brief = all(len(series.label) <= _BRIEF for series in chart.series)
        figure.legend(
            [_handle(series) for series in chart.series],
            [series.label for series in chart.series],
            loc="outside upper left",
            ncols=min(len(chart.series), (3 if brief else 2) * columns),
        )
    return figure


def _draw(figure: Figure, panel: Panel, place: tuple[int, int, int] = (1, 1, 1)) -> None:
    axes = figure.add_subplot(*place)
    axes.set_title(fitted(panel.title, _TITLE))
    panel.draw(axes)
    for axis in (axes.xaxis, axes.yaxis):
        locator = axis.get_major_locator()
        if isinstance(locator, AutoLocator):  # not one that the panel has set
            locator.set_params(nbins=6)


def _handle(series: Series) -> Line2D:
    return Line2D(
        [],
        [],
        color=colour(series.colour),
        marker=series.marker or "none",
        linestyle=series.line,
    )


def _svg(figure: Figure) -> str:
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata=_BARE)
    return sink.getvalue()


def _inline(svg: str, name: str, label: str) -> str:
    """An SVG file as an element of the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    # Without identifiers that nothing refers to; the others are unique in the page.
    used = set(re.findall(r"(?:#)([\w.-]+)[\")]", body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    for variable, (light, _) in PALETTE.items():
        body = re.sub(rf"(?<=: ){light}", f"var(--{variable})", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    size = re.search(r'viewBox="([^"]*)"', body)
    assert size is not None, "matplotlib writes a viewBox"
    head = f'<svg viewBox="{size[1]}" role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, body, count=1)
