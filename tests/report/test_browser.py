"""The report in a real browser: no error, no network, every figure, phone and dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raykernel.report.ink import PALETTE
from tests.report.conftest import NASTY, Made

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver on PATH"
    ),
]
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
]  # fmt: skip
PHONE = 360


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with an empty profile, driven by its own driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(params=["whole", "study"])
def page(request: pytest.FixtureRequest, browser: Any, made: Made) -> Path:
    """Each page, opened at the width of a desktop, in light."""
    path: Path = getattr(made, request.param)
    open_page(browser, path)
    return path


def open_page(browser: Any, path: Path) -> None:
    """Show a page, and forget what the browser asked for itself before."""
    see(browser, 1200, "light")
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(path.as_uri())


def see(browser: Any, width: int, scheme: str) -> None:
    """Set the width of the window and what the system prefers."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def colours(browser: Any) -> tuple[str, str]:
    """Background of the page, and the colour of the first figure's first letters."""
    found: list[str] = browser.execute_script(
        "return [getComputedStyle(document.documentElement).backgroundColor,"
        " getComputedStyle(document.querySelector('figure .panels text')).fill]"
    )
    return found[0], found[1]


def rgb(name: str, dark: bool) -> str:
    value = PALETTE[name][dark]
    return f"rgb({', '.join(str(int(value[i : i + 2], 16)) for i in (1, 3, 5))})"


def test_nothing_is_reported_on_the_console_and_nothing_is_asked_of_a_network(browser, page):
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    }
    assert {url.split(":")[0] for url in urls} <= {"file", "data"}
    assert browser.title.startswith("raykernel · ")


def test_every_figure_is_seen_and_has_ink(browser, page):
    panels = browser.execute_script(
        "return [...document.querySelectorAll('figure')].map(f => [f.id,"
        " [...f.querySelectorAll('.panels > svg')].map(s => { const r = s.getBoundingClientRect();"
        " return [r.width, r.height, s.querySelectorAll('path').length,"
        " s.getAttribute('aria-label')] })])"
    )
    assert len(panels) == page.read_text(encoding="utf-8").count("<figure ")
    for name, own in panels:
        assert own, name
        for width, height, paths, label in own:
            assert min(width, height) > 100, name
            assert paths > 3, name
            assert len(label) > 40, name


def test_tables_hold_the_stores_numbers(browser, made):
    browser.get(made.whole.as_uri())
    lines = browser.execute_script(
        "return [...document.querySelectorAll('#table-trials tr')].map("
        "r => [...r.children].map(c => c.textContent))"
    )
    column = lines[0].index("finetuned")
    stored = made.store.results("trials").sort_by([("created", "descending")])
    expected = [f"{value:.3f}" for value in stored["finetuned"].to_pylist()]
    assert [line[column] for line in lines[1:]] == expected
    right = browser.execute_script(
        "return getComputedStyle(document.querySelector('#table-trials td.n')).textAlign"
    )
    assert right == "right"


def test_a_name_in_html_is_shown_and_not_run(browser, made):
    browser.get(made.whole.as_uri())
    assert browser.title == "raykernel · store"
    assert NASTY in browser.execute_script("return document.body.textContent")
    assert browser.execute_script("return document.images.length") == 0


def test_a_phone_scrolls_sideways_in_tables_alone(browser, page):
    see(browser, PHONE, "light")
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll table')"
        " && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.tagName + '.' + e.className)"
    )
    assert wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == PHONE
    letters = browser.execute_script(
        "const t = document.querySelector('figure .panels text');"
        "return t.getBoundingClientRect().height"
    )
    assert letters > 8  # of 8 pt


def test_light_and_dark_follow_the_system_and_the_button(browser, page):
    light, dark = ((rgb("paper", d), rgb("ink", d)) for d in (False, True))
    muted = {rgb("muted", False), rgb("muted", True)}
    assert colours(browser)[0] == light[0]
    see(browser, 1200, "dark")
    ground, letters = colours(browser)
    assert ground == dark[0]
    assert letters in {dark[1], *muted}
    browser.execute_script("document.getElementById('theme').click()")
    assert colours(browser)[0] == light[0]
    browser.execute_script("document.getElementById('theme').click()")
    assert colours(browser)[0] == dark[0]
    assert browser.get_log("browser") == []


def test_paper_is_light(browser, page):
    see(browser, 1200, "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert colours(browser)[0] == rgb("paper", False)
        pdf = browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
        assert len(pdf) > 10_000
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
