"""The page: one file of HTML that asks no network for anything.

Jinja2 escapes whatever comes from data; figures are SVG that matplotlib has escaped. The page's
content security policy allows its own script, by hash, and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from raykernel.report.chart import Chart
from raykernel.report.ink import PALETTE, inline_svgs, swatch
from raykernel.report.tables import PageTable


@dataclass(frozen=True, slots=True)
class Page:
    """What a page says."""

    title: str
    question: str
    answer: str
    facts: Sequence[tuple[str, str]]
    """Names and values of what it is made of."""
    charts: Sequence[Chart]
    tables: Sequence[PageTable]
    made_by: str
    """Name and version of the program."""
    created: datetime


def render(page: Page) -> str:
    """The page as HTML.

    Args:
        page: its content.

    Returns:
        A whole document.
    """
    environment = Environment(
        loader=PackageLoader("raykernel.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _resource("page.js")
    sections = list(dict.fromkeys(chart.section for chart in page.charts))
    return environment.get_template("page.html").render(
        page=page,
        sections=[
            (name, [_figure(chart) for chart in page.charts if chart.section == name])
            for name in sections
        ],
        style=Markup(_variables() + _resource("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _figure(chart: Chart) -> dict[str, object]:
    """A chart with its panels and legend as SVG elements, which Jinja2 leaves as they are."""
    return {
        "chart": chart,
        "panels": [Markup(svg) for svg in inline_svgs(chart)],
        "legend": [(Markup(swatch(series)), series.label) for series in chart.series],
    }


def _variables() -> str:
    """Colours in light, in dark where that is preferred or chosen, and in light on paper."""
    light, dark = (
        "".join(f"--{name}:{shades[i]};" for name, shades in PALETTE.items()) for i in (0, 1)
    )
    return (
        f":root{{color-scheme:light;{light}}}"
        f"@media screen{{@media (prefers-color-scheme:dark){{"
        f":root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )


def _resource(name: str) -> str:
    return files("raykernel.report").joinpath(name).read_text(encoding="utf-8")
