"""The line chart as an image."""

from __future__ import annotations

import base64
import math
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from lors.plots import as_data_uri, line_chart

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
