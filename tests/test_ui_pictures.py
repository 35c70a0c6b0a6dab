"""The script that takes the pictures of docs/ui.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from docs.screenshots import Page, browsing, find_browser
from docs.ui_pictures import EXPERIMENT, press, says, still
from lors.config import parse_experiment

ROOT = Path(__file__).parents[1]
# As the UI does: texts that come later, a button that a script makes, a canvas that moves for a while.
PAGE = """
<canvas></canvas><script>
setTimeout(() => { document.body.insertAdjacentHTML("beforeend", "<ul><li>Logs</li><li>Task Runs</li></ul>");
  document.querySelectorAll("li")[1].onclick = () => { document.body.append("51 Task runs"); move(0) } }, 600)
const move = x => { document.querySelector("canvas").getContext("2d").fillRect(0, 0, x, 40);
  if (x < 200) setTimeout(() => move(x + 10), 50) }
</script>
"""


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Page]:
    with browsing(tmp_path / "profile") as page:
        yield page


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here; LORS_BROWSER names one")
def test_a_page_is_waited_for(tab: Page) -> None:
    tab.open(f"data:text/html,{quote(PAGE)}", width=400, height=300)
    assert not tab.evaluate(says("Task Runs"))
    press(tab, "li", "Task Runs")
    tab.wait_for(says("51 Task runs"))
    early, late = tab.picture(), still(tab.picture, pause=0.5)
    assert early != late == tab.picture()
    with pytest.raises(AssertionError, match="not yet"):
        tab.wait_for(says("Cached"), seconds=0.3)


def test_the_experiment_of_the_pictures_is_valid() -> None:
    assert len(parse_experiment(EXPERIMENT).experts) == 4


def test_the_page_shows_every_picture_that_the_script_takes() -> None:
    taken = re.findall(r'take\("(\w+)"', (ROOT / "docs" / "ui_pictures.py").read_text("utf-8"))
    shown = re.findall(r"\(pictures/prefect-(\w+)\.png\)", (ROOT / "docs" / "ui.md").read_text("utf-8"))
    assert sorted(shown) == sorted(taken)
