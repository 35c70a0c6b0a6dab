"""Charts as standalone SVG images, for where no page's style reaches. No torch here."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from lors.drawing import Mark, Span, line_plot, span_bars, standalone

__all__ = ["as_data_uri", "line_chart", "recovery_bars", "recovery_chart", "scaling_chart", "scaling_lines"]


def line_chart(
    series: Mapping[
        str, Sequence[tuple[float, float]]
    ],  # (x, y) by name, in the order of x; a y not finite is left out
    x_label: str,
) -> str:
    """One SVG document with axes and a legend; long series are drawn as means of neighbouring points."""
    return standalone(line_plot(series, x_label, about=f"{', '.join(series)} by {x_label}"))


def recovery_chart(summary: Mapping[str, Any]) -> str:
    """One SVG document: recovery by system with its interval, from summary.json."""
    return standalone(recovery_bars(summary))


def scaling_chart(
    curves: Mapping[str, Mapping[str, Any]],  # scaling.json by merging method, those of one metric
) -> str:
    """One SVG document: what every point of the searches was worth, the chosen one filled."""
    return standalone(scaling_lines(curves))


def recovery_bars(summary: Mapping[str, Any]) -> str:
    """The image of `recovery_chart` for a page with its own style. Systems without recovery are left out."""
    spans = [
        Span(name, own["recovery"], own.get("recovery_low"), own.get("recovery_high"))
        for name, own in summary["systems"].items()
        if own.get("recovery") is not None and name not in ("base", "experts")
    ]
    told = ", ".join(f"{span.name} {span.value:.2f}" for span in spans)
    return span_bars(spans, "recovery", about=f"Recovery: {told}", lines={0.0: "base", 1.0: "experts"})


def scaling_lines(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """The image of `scaling_chart` for a page with its own style; searches without points are left out."""
    lines: dict[str, list[tuple[float, float]]] = {}
    marks: list[Mark] = []
    for name, curve in curves.items():
        if not curve["points"]:
            continue
        chosen = (curve["scaling"], curve.get("factors") or {})
        points = [point for point in curve["points"] if point.get("coordinate") is None]
        lines[name] = sorted((point["scaling"], _value(point)) for point in points)
        for point in curve["points"]:
            at, factors = point.get("coordinate"), point.get("factors") or {}
            told = ", ".join(f"{part} × {factor:g}" for part, factor in factors.items())
            title = f"{name} at {point['scaling']:g}{f' ({told})' if told else ''}: {_value(point):.4g}"
            x = point["scaling"] * (1.0 if at is None else factors.get(at, 1.0))
            marks.append(Mark(name, x, _value(point), title, (point["scaling"], factors) == chosen))
    drawn = [curve for curve in curves.values() if curve["points"]]
    metric = ", ".join(dict.fromkeys(curve.get("metric", "score") for curve in drawn))
    better = "higher" if any(curve.get("higher_is_better") for curve in drawn) else "lower"
    about = "; ".join(f"{name} chooses {curves[name]['scaling']:g}" for name in lines)
    return line_plot(
        lines,
        "scaling coefficient",
        f"validation {metric}, {better} is better",
        about=f"Validation by scaling coefficient: {about}",
        marks=marks,
    )


def as_data_uri(svg: str) -> str:
    """The image as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _value(point: Mapping[str, Any]) -> float:
    """Of a point; runs before there were other metrics called it error."""
    return float(point["value"] if "value" in point else point["error"])
