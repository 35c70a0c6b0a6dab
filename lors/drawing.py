"""What the HTML pages share: one style, light and dark, tables, heat maps, bars and line charts as inline SVG.

No torch here, no script and nothing from the network. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LABEL",
    "STYLE",
    "Mark",
    "Span",
    "cut",
    "document",
    "figure",
    "heat_map",
    "hues",
    "keys",
    "label",
    "line_plot",
    "number",
    "number_table",
    "span_bars",
    "standalone",
    "svg",
    "thinned",
    "ticks",
]

CELL, LABEL, HEAD = 18, 250, 96  # pixels: a cell's side, the room for row labels and for column labels
LABEL_LETTERS = 34
MOST_POINTS = 300  # of a drawn line

_LIGHT = (
    "--ink:#1b1f24;--paper:#fff;--soft:#57606a;--line:#d0d7de;--low:#f3f4f6;--high:#7a1fa2;"
    "--warm:#b3261e;--cool:#0b57a4;--shade:38%"
)
_DARK = (
    "--ink:#e6edf3;--paper:#0d1117;--soft:#9da7b3;--line:#3d444d;--low:#21262d;--high:#d7a6ff;"
    "--warm:#ff8a80;--cool:#79b8ff;--shade:68%"
)
_CHART = """
svg{display:block;margin:.6rem 0;font:12px system-ui,sans-serif}svg text{fill:var(--ink)}svg .soft{fill:var(--soft)}
.up{fill:color-mix(in oklab,var(--high) var(--p),var(--low))}
.above{fill:color-mix(in oklab,var(--warm) var(--p),var(--low))}
.below{fill:color-mix(in oklab,var(--cool) var(--p),var(--low))}.none{fill:none;stroke:var(--line)}
.axis{stroke:var(--line);fill:none}.curve{fill:none;stroke-width:2;stroke:hsl(var(--h) 60% var(--shade))}
.key{fill:hsl(var(--h) 60% var(--shade))}.whisker{stroke:var(--ink);stroke-width:1.5;fill:none}
.value{paint-order:stroke;stroke:var(--paper);stroke-width:4px}
.ring{fill:var(--paper);stroke-width:2;stroke:hsl(var(--h) 60% var(--shade))}
"""
STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
body{{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1080px;margin:2rem auto;
padding:0 1rem}}
h1{{font-size:1.6rem}}h2{{font-size:1.15rem;margin:2.2rem 0 .3rem}}p{{max-width:75ch;margin:.4rem 0}}
.wide{{overflow-x:auto}}table{{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}}
th,td{{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:right;white-space:nowrap}}
th:first-child,td:first-child{{text-align:left}}caption{{text-align:left;color:var(--soft);padding-bottom:.3rem}}
summary{{cursor:pointer;color:var(--soft);font-size:13px}}
{_CHART}"""


class _Scale(NamedTuple):
    """Where the colours of a heat map lie: from `low` to `high`, or to both sides of `centre`."""

    low: float
    high: float
    centre: float | None

    @classmethod
    def of(cls, table: pd.DataFrame, centre: float | None) -> _Scale:
        values = [value for value in table.to_numpy(float).ravel() if math.isfinite(value)]
        if centre is None:
            return cls(0.0, max([*values, 1e-12]), None)
        reach = max([abs(value - centre) for value in values] + [1e-12])
        return cls(centre - reach, centre + reach, centre)

    def cell(self, value: float) -> str:
        """The class and the style of a cell."""
        if not math.isfinite(value):
            return 'class="none"'
        if self.centre is None:
            return f'class="up" style="--p:{max(value, 0) / self.high:.1%}"'
        share = abs(value - self.centre) / (self.high - self.centre)
        return f'class="{"above" if value >= self.centre else "below"}" style="--p:{share:.1%}"'


class Mark(NamedTuple):
    """A point of a line chart that says something when it is pointed at."""

    series: str
    x: float
    y: float
    title: str
    filled: bool = False


class Span(NamedTuple):
    """A bar from 0 to `value` with its interval."""

    name: str
    value: float
    low: float | None
    high: float | None
    group: str = ""
    """Those of one group have one colour; of none, each its own."""


def document(title: str, body: str, *, style: str = "", policy: str = "") -> str:
    """One HTML document; `body`, `style` and `policy` (of its content) are markup already."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{policy}'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body><main><h1>{escape(title)}</h1>\n"
        f"{body}\n</main></body></html>\n"
    )


def figure(heading: str, text: str, drawing: str, table: pd.DataFrame, form: str, level: int = 2) -> str:
    """A section: a drawing and, to be unfolded, its numbers."""
    values = f"<details><summary>Values</summary>{number_table(table, heading, form)}</details>"
    return (
        f"<section><h{level}>{escape(heading)}</h{level}><p>{escape(text)}</p>"
        f'<div class="wide">{drawing}</div>{values}</section>'
    )


def number_table(table: pd.DataFrame, caption: str, form: str) -> str:
    """Numbers in one format under named columns, rows named by the index."""
    head = "".join(f'<th scope="col">{escape(str(name)).replace("_", " ")}</th>' for name in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(str(label))}</th>'
        + "".join(f"<td>{number(value, form)}</td>" for value in row)
        + "</tr>"
        for label, row in zip(table.index, table.to_numpy(float).tolist(), strict=True)
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def number(value: float | None, form: str) -> str:
    """`-` where there is none."""
    return form.format(value) if value is not None and math.isfinite(value) else "-"


def heat_map(table: pd.DataFrame, centre: float | None, form: str, about: str) -> str:
    """One cell a value, its title the value; colours from 0 up, or to both sides of `centre`."""
    scale = _Scale.of(table, centre)
    width, height = LABEL + CELL * len(table.columns) + 60, HEAD + CELL * len(table) + 44
    parts = [
        f'<text transform="translate({LABEL + CELL * (x + 0.7):.0f} {HEAD - 6}) rotate(-60)">'
        f"{escape(_short(str(name)))}</text>"
        for x, name in enumerate(table.columns)
    ]
    for y, (row_name, row) in enumerate(zip(table.index, table.to_numpy(float).tolist(), strict=True)):
        top = HEAD + CELL * y
        parts.append(label(str(row_name), LABEL - 8, top + 13))
        parts += [
            f'<rect x="{LABEL + CELL * x}" y="{top}" width="{CELL - 1}" height="{CELL - 1}" {scale.cell(value)}>'
            f"<title>{escape(f'{row_name}, {name}')}: {number(value, form)}</title></rect>"
            for x, (name, value) in enumerate(zip(table.columns, row, strict=True))
        ]
    return svg(width, height, "".join(parts) + _legend(scale, form, LABEL, height - 30), about)


def _legend(scale: _Scale, form: str, x: int, y: int) -> str:
    steps = 9
    values = [scale.low + (scale.high - scale.low) * step / (steps - 1) for step in range(steps)]
    cells = "".join(
        f'<rect x="{x + 14 * step}" y="{y}" width="14" height="10" {scale.cell(value)}/>'
        for step, value in enumerate(values)
    )
    marks = [(0, values[0]), (steps - 1, values[-1])] + (
        [(steps // 2, scale.centre)] if scale.centre is not None else []
    )
    return cells + "".join(
        f'<text class="soft" x="{x + 14 * step + 7}" y="{y + 24}" text-anchor="middle">{form.format(value)}</text>'
        for step, value in marks
    )


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],  # (x, y) by name, in the order of x
    x_label: str,
    y_label: str = "",
    *,
    about: str,
    marks: Sequence[Mark] = (),  # of these series
    form: str = "{:g}",  # of the numbers at both axes
    bounds: tuple[float, float] | None = None,  # of both axes; None: what the points have
    size: tuple[int, int] = (640, 320),
) -> str:
    """Lines over axes with round numbers, the names below; points that are not finite are left out, long series drawn
    as means of neighbouring points."""
    drawn = {name: thinned([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    names = [name for name, points in drawn.items() if points or any(mark.series == name for mark in marks)]
    every = [point for points in drawn.values() for point in points] + [(mark.x, mark.y) for mark in marks]
    x_low, x_high = bounds or _range([x for x, _ in every])
    y_low, y_high = bounds or _range([y for _, y in every], 0.04)
    left, right, top, (width, full) = 56, 16, 26, size
    columns = max(1, (width - left) // 200)
    height = full - 48 - 16 * math.ceil(len(names) / columns) - top

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return left + (width - left - right) * across, top + height * (1 - up)

    parts = [f'<text class="soft" x="{left}" y="14">{escape(y_label)}</text>'] if y_label else []
    for value in ticks(y_low, y_high):
        y = at(x_low, value)[1]
        parts.append(f'<path class="axis" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(f'<text class="soft" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{form.format(value)}</text>')
    for value in ticks(x_low, x_high):
        x = at(value, y_low)[0]
        parts.append(
            f'<text class="soft" x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{form.format(value)}</text>'
        )
    parts.append(
        f'<text class="soft" x="{(left + width - right) / 2:.0f}" y="{top + height + 33}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    colours = dict(zip(names, hues(len(names)), strict=True))
    for name in names:
        if points := drawn[name]:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
            title = f"<title>{escape(name)}</title>"
            parts.append(f'<polyline class="curve" style="--h:{colours[name]}" points="{path}">{title}</polyline>')
    for mark in marks:
        x, y = at(mark.x, mark.y)
        kind, radius = ("key", 5) if mark.filled else ("ring", 3.5)
        parts.append(
            f'<circle class="{kind}" style="--h:{colours[mark.series]}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(mark.title)}</title></circle>"
        )
    parts += keys(names, list(colours.values()), left, top + height + 42, columns)
    return svg(width, full, "".join(parts), about)


def span_bars(
    spans: Sequence[Span],
    x_label: str,
    *,
    about: str,
    lines: Mapping[float, str] | None = None,  # where a vertical line stands, and what it means
    limits: tuple[float, float] = (-1.0, 2.0),  # what is beyond them is cut off
) -> str:
    """A bar and an interval a row, with the value behind it."""
    low_limit, high_limit = limits
    spans = [span for span in spans if math.isfinite(span.value)]
    lines = lines or {}
    ends = [end for span in spans for end in (span.value, span.low, span.high) if end is not None]
    low, high = max(low_limit, min([0.0, *ends, *lines])), min(high_limit, max([0.0, *ends, *lines]))
    high = high if high > low else low + 1.0
    row, top = 24, 22
    names = min(LABEL, 24 + 7 * max((len(span.name) for span in spans), default=0))
    width = names + 500
    room, bottom = width - names - 60, top + row * len(spans)

    def at(value: float) -> float:
        return names + room * (min(max(value, low), high) - low) / (high - low)

    parts = []
    for value in ticks(low, high):
        parts.append(f'<path class="axis" d="M{at(value):.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="soft" x="{at(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    for value, meaning in lines.items():
        parts.append(f'<path class="whisker" stroke-dasharray="3 3" d="M{at(value):.1f} {top - 4}V{bottom}"/>')
        parts.append(f'<text class="soft" x="{at(value):.1f}" y="{top - 8}" text-anchor="middle">{meaning}</text>')
    groups = list(dict.fromkeys(span.group or span.name for span in spans))
    colours = dict(zip(groups, hues(len(groups)), strict=True))
    for index, span in enumerate(spans):
        y, (start, end) = top + row * index, sorted((at(0), at(span.value)))
        interval = "" if span.low is None or span.high is None else f" ({span.low:.2f} to {span.high:.2f})"
        parts.append(label(span.name, names - 8, y + 16))
        hue = colours[span.group or span.name]
        parts.append(
            f'<rect class="key" style="--h:{hue}" x="{start:.1f}" y="{y + 4}" width="{max(end - start, 1):.1f}" '
            f'height="{row - 8}"><title>{escape(span.name)}: {span.value:.2f}{interval}</title></rect>'
        )
        reach = at(span.value)
        if span.low is not None and span.high is not None:
            a, b, middle = at(span.low), at(span.high), y + row / 2
            parts.append(
                f'<path class="whisker" d="M{a:.1f} {middle}H{b:.1f}M{a:.1f} {middle - 4}v8M{b:.1f} {middle - 4}v8"/>'
            )
            reach = max(reach, b)
        parts.append(f'<text class="value" x="{max(reach, at(0)) + 6:.1f}" y="{y + 16}">{span.value:.2f}</text>')
    parts.append(
        f'<text class="soft" x="{names + room / 2:.0f}" y="{bottom + 33}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return svg(width, bottom + 42, "".join(parts), about)


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        return low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    return low - margin * (high - low), high + margin * (high - low)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, which is greater, some `about` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(times * power for times in (1, 2, 2.5, 5, 10) if times * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS means of neighbouring points."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def keys(names: Sequence[str], colours: Sequence[int], x: int, y: int, columns: int = 1) -> list[str]:
    """A square and a name for each hue, row by row."""
    return [
        f'<rect class="key" style="--h:{hue}" x="{x + 200 * (index % columns)}" y="{y + 16 * (index // columns)}" '
        f'width="10" height="10"/><text x="{x + 16 + 200 * (index % columns)}" y="{y + 16 * (index // columns) + 10}">'
        f"{escape(cut(name, LABEL_LETTERS if columns == 1 else 26))}</text>"
        for index, (hue, name) in enumerate(zip(colours, names, strict=True))
    ]


def hues(count: int) -> list[int]:
    """That many colours as different as they can be."""
    return [210 + round(360 * index / max(1, count)) for index in range(count)]


def label(text: str, x: int, y: int, letters: int = LABEL_LETTERS) -> str:
    """A name that ends at x, cut where it is long, whole as its title."""
    return f'<text x="{x}" y="{y}" text-anchor="end">{escape(cut(text, letters))}<title>{escape(text)}</title></text>'


def cut(text: str, letters: int = LABEL_LETTERS) -> str:
    """Without its middle where it is longer than that."""
    return text if len(text) <= letters else f"{text[: letters // 2 - 1]}…{text[-letters // 2 :]}"


def _short(layer: str) -> str:
    """`enc 3`, `dec tokens`: a layer's name that fits over a column."""
    for long, short in (("encoder.", "enc "), ("decoder.", "dec "), ("layers.", ""), ("embed_", ""), ("layer_", "")):
        layer = layer.replace(long, short)
    return layer if len(layer) <= 16 else f"{layer[:15]}…"


def svg(width: float, height: float, content: str, about: str) -> str:
    """One image in a page; `about` is what it says to those who do not see it."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg role="img" aria-label="{escape(about)}" {size}>{content}</svg>'


def standalone(image: str) -> str:
    """An image of these functions as an SVG document with its own style, light."""
    head, _, rest = image.partition(">")
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f'{head}><style>:root{{{_LIGHT}}}{_CHART}</style><rect width="100%" height="100%" fill="#fff"/>{rest}'
