"""The line chart as an image."""

from __future__ import annotations

import base64
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors.drawing import ticks
from lors.plots import as_data_uri, line_chart, recovery_chart, scaling_chart

POINTS = st.lists(st.tuples(st.integers(0, 10**6), st.floats(width=32)), max_size=50)
NAMESPACE = "{http://www.w3.org/2000/svg}"


def lines(svg: str) -> list[list[tuple[float, float]]]:
    found = ElementTree.fromstring(svg).iter(f"{NAMESPACE}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in found]  # type: ignore[misc]


@given(st.dictionaries(st.text("ab<&", max_size=4), POINTS, max_size=3))
def test_every_chart_is_well_formed_and_inside_its_frame(series: dict[str, list[tuple[float, float]]]) -> None:
    drawn = lines(line_chart({name: sorted(points) for name, points in series.items()}, "step"))
    assert len(drawn) == sum(any(math.isfinite(y) for _, y in points) for points in series.values())
    assert all(0 <= x <= 640 and 0 <= y <= 320 for line in drawn for x, y in line)


def test_a_falling_loss_falls() -> None:
    svg = line_chart({"loss": [(1, 4.0), (2, 3.0), (3, 1.0)], "validation loss": [(2, 2.0)]}, "step")
    loss, validation = lines(svg)
    assert [y for _, y in loss] == sorted(y for _, y in loss)  # down is a larger y
    assert len(validation) == 1
    assert ">validation loss<" in svg
    assert base64.b64decode(as_data_uri(svg).partition(",")[2]).decode() == svg


def test_long_series_are_drawn_as_means() -> None:
    (line,) = lines(line_chart({"loss": [(x, float(x % 2)) for x in range(10_000)]}, "step"))
    assert 100 < len(line) <= 300
    assert len({y for _, y in line}) == 1  # every mean of an even number of neighbours is one half


def test_recovery_is_as_long_as_it_is() -> None:
    systems = {
        "base": {"recovery": 0.0},
        "lors": {"recovery": 0.5, "recovery_low": 0.25, "recovery_high": 0.75},
        "<ties>": {"recovery": 0.25},
        "worse": {"recovery": -0.25},
        "unknown": {"recovery": None},
    }
    root = ElementTree.fromstring(recovery_chart({"systems": systems}))
    bars = [bar for bar in root.iter(f"{NAMESPACE}rect") if bar.attrib.get("class") == "key"]
    titles = [bar.findtext(f"{NAMESPACE}title") for bar in bars]
    assert titles == ["lors: 0.50 (0.25 to 0.75)", "<ties>: 0.25", "worse: -0.25"]
    long, short, back = (float(bar.attrib["width"]) for bar in bars)
    assert long == pytest.approx(2 * short, abs=0.2)
    assert back == pytest.approx(short, abs=0.2)
    assert float(bars[2].attrib["x"]) + back == pytest.approx(float(bars[0].attrib["x"]), abs=0.2)


def test_the_chosen_point_of_a_search_is_filled() -> None:
    point = {"scaling": 0.3, "factors": {}, "coordinate": None, "value": 35.0}
    by_part = {"scaling": 0.3, "factors": {"encoder": 2.0}, "coordinate": "encoder", "value": 34.0}
    curve = {"scaling": 0.3, "factors": {"encoder": 2.0}, "metric": "wer", "points": [point, by_part]}
    old = {"scaling": 0.1, "points": [{"scaling": 0.1, "error": 40.0}, {"scaling": 0.6, "error": 41.0}]}
    root = ElementTree.fromstring(scaling_chart({"lors": curve, "old": old, "none": {"scaling": 1.0, "points": []}}))
    titles = {c.findtext(f"{NAMESPACE}title"): c for c in root.iter(f"{NAMESPACE}circle")}
    filled = [title for title, circle in titles.items() if circle.attrib["class"] == "key"]
    assert filled == ["lors at 0.3 (encoder × 2): 34", "old at 0.1: 40"]
    at = {title: float(circle.attrib["cx"]) for title, circle in titles.items()}
    assert at["lors at 0.3 (encoder × 2): 34"] == at["old at 0.6: 41"]  # 2 times 0.3
    assert "none" not in {text.text for text in root.iter(f"{NAMESPACE}text")}


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-6 * width - 1e-9 * abs(low) <= x <= low + width * (1 + 1e-6) + 1e-9 * abs(low) for x in found)
