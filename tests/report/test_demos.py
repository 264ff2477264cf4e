"""The reports of the demo studies, on the packaged model and data, in a browser; minutes each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raykernel.cli import main
from tests.report import test_browser as checks
from tests.report.test_browser import browser  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.packaged, pytest.mark.browser]
HERE = ["compute=inline", "sweep.engine=pool", "sweep.workers=1"]
"""One process: what is looked at are the pages."""


@pytest.mark.parametrize("name", ["quickstart", "lambda_path", "condition_number", "table2"])
def test_the_page_of_a_demo(
    name: str,
    browser: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = [] if name == "quickstart" else ["experiment=demo"]
    assert main(["sweep", name, *experiment, *HERE]) == 0
    assert main(["report", name]) == 0
    (page,) = (tmp_path / "raykernel-report").rglob("index.html")
    checks.open_page(browser, page)
    checks.test_nothing_is_reported_on_the_console_and_nothing_is_asked_of_a_network(browser, page)
    checks.test_every_figure_is_seen_and_has_ink(browser, page)
    checks.test_a_phone_scrolls_sideways_in_tables_alone(browser, page)
