"""The report as a real browser shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_folders import write_run, write_sweep

from docs.screenshots import Page, browsing, find_browser
from lors.report import write_report

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here; LORS_BROWSER names one")

CONTRAST = """
(() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const worst = {};
  for (const e of document.querySelectorAll('p,td,th,a,small,caption,summary,ins,del,mark,dt,dd,svg text')) {
    const style = getComputedStyle(e);
    const ink = light(e.closest('svg') ? style.fill : style.color);
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) worst[e.tagName] = ratio;
  }
  return worst;
})()
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report([folder], folder / "report.html")
    return folder


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1400])
def test_a_report_is_readable(tab: Page, run: Path, width: int, dark: bool) -> None:
    tab.said.clear()
    tab.asked.clear()
    tab.open(run / "report.html", width=width, dark=dark)
    tab.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("innerWidth") == width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(13, 17, 23)") == dark
    assert tab.evaluate(CONTRAST) == {}
    assert tab.evaluate("document.querySelectorAll('table').length") > 20
    assert tab.evaluate("[...document.querySelectorAll('thead')].every(h => h.querySelector('th[scope=col]'))")
    assert tab.evaluate(
        "[...document.querySelectorAll('section svg')].every(s => s.getBoundingClientRect().height > 40)"
    )
    assert tab.evaluate("document.title") == "Report: demo"  # a hypothesis is a script that would change it
    assert tab.said == []
    assert tab.asked == [(run / "report.html").resolve().as_uri()]


def test_a_table_is_saved_from_the_page(tab: Page, run: Path, tmp_path: Path) -> None:
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.open(run / "report.html", width=1400)
    tab.evaluate("document.querySelector('a[download=\"results.csv\"]').click()")
    saved, end = tmp_path / "results.csv", time.monotonic() + 20
    while not saved.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    assert saved.read_text() == (run / "results.csv").read_text()


def test_what_is_folded_is_printed(tab: Page, run: Path) -> None:
    tab.open(run / "report.html", width=1400)
    settings = "document.querySelector('pre').checkVisibility()"
    assert not tab.evaluate(settings)
    tab.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert tab.evaluate(settings)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.querySelector('nav').getBoundingClientRect().height") == 0


def test_runs_side_by_side_unfold(tab: Page, tmp_path: Path) -> None:
    write_report([write_sweep(tmp_path / "sweep")], tmp_path / "report.html")
    tab.said.clear()
    tab.open(tmp_path / "report.html", width=390)
    visible = "document.querySelector('#scores-2').checkVisibility()"
    assert not tab.evaluate(visible)
    tab.evaluate("document.querySelector('#run-2 > summary').click()")
    assert tab.evaluate(visible)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.said == []
