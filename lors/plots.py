"""A line chart as a standalone SVG image, for where no page's style reaches. No torch here."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["as_data_uri", "line_chart"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 320, 64, 44, 28, 16
_COLOURS = ("#0b57a4", "#b3261e", "#2e7d32", "#7a1fa2")
_POINTS = 300


def line_chart(
    series: Mapping[
        str, Sequence[tuple[float, float]]
    ],  # (x, y) by name, in the order of x; a y not finite is left out
    x_label: str,
) -> str:
    """One SVG document with axes and a legend; long series are drawn as means of neighbouring points."""
    drawn = {name: _thinned([p for p in points if math.isfinite(p[1])]) for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    xs = [x for points in drawn.values() for x, _ in points] or [0.0]
    ys = [y for points in drawn.values() for _, y in points] or [0.0]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> str:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        left, top = _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)
        return f"{left:.1f},{top:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="#fff"/>',
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="#888"/>',
    ]
    for x, anchor in ((x_low, "start"), (x_high, "end")):
        left = place(x, y_low).split(",")[0]
        parts.append(f'<text x="{left}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="{anchor}">{x:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    for y in (y_low, y_high):
        height = place(x_low, y).split(",")[1]
        parts.append(f'<text x="{_LEFT - 6}" y="{height}" text-anchor="end">{y:.4g}</text>')
    for number, (name, points) in enumerate(drawn.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_LEFT + 8 + 150 * number}" y="18" fill="{colour}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def as_data_uri(svg: str) -> str:
    """The image as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
