"""What a figure of the report is: its words, its data, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from raykernel.console import short

WIDTH, HEIGHT = 3.5, 2.65
"""Of a panel, in inches: as wide as a phone."""

KERNELS, FINETUNING = "Kernels at the start", "Fine-tuning"
"""Headings of several figures."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


Line = Literal["", "-", "--", ":"]
"""How points are joined; empty: not at all."""


@dataclass(frozen=True, slots=True)
class Series:
    """An entry of the legend."""

    label: str
    colour: str
    """A key of `ink.PALETTE`, or a colour."""
    marker: str = ""
    """One of `o s ^ D v P`; empty: none."""
    line: Line = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes; a page stacks the panels of a figure where there is no room."""

    title: str
    """The quantity on the vertical axis with its unit, written above it."""
    draw: Callable[[Axes], None]
    height: float = HEIGHT
    """In inches."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure."""

    name: str
    """Of its files."""
    title: str
    finding: str
    """What it shows: a sentence that is made of the data; empty where the page begins with it."""
    alt: str
    """What is drawn, for those who do not see it."""
    made: str
    """SQL over the store's tables, or what else the data come from."""
    data: pa.Table
    panels: Sequence[Panel]
    series: Sequence[Series] = ()
    """The legend; empty: none."""
    section: str = ""
    """Heading that it stands under."""


# ---------------------------------------------------------------- axes


def power(value: float) -> str:
    """A tick of a logarithmic axis: powers of ten from a million on, or below 0.001, as such."""
    if value <= 0:
        return f"{value:g}"
    exponent = round(math.log10(value))
    is_power = math.isclose(value, 10.0**exponent, rel_tol=1e-9)
    if is_power and not -3 <= exponent < 6:
        return "10" + str(exponent).translate(_SUPERSCRIPTS)
    return f"{value:,.0f}" if 1e4 <= value < 1e6 else short(value)


def logarithmic(axis: Axis) -> None:
    """Ticks of a logarithmic axis as text, without TeX; few decades have ticks between."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) if low > 0 else math.inf
    if decades < 0.8:
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    else:
        subs = (1.0, 2.0, 5.0) if decades < 1.8 else (1.0,)
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def fitted(text: str, length: int) -> str:
    """A text that leaves room for what it stands beside: its beginning, where it is too long."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def percent(value: float) -> str:
    """A share of one, as `86.7 %`."""
    return f"{100 * value:.1f} %"
