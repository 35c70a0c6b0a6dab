"""The sections about how a run came to its scores: search, training, sizes, deltas, cost, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd
import yaml

from lors.drawing import Mark, line_plot, number
from lors.plots import scaling_lines
from lors.report.parts import Cell, Section, between, details, download, table, wide
from lors.report.run import Run

__all__ = ["cost", "data_table", "interference", "scaling", "settings", "size", "training"]

_MB = 1e6


def scaling(run: Run) -> Section | None:
    """What the searches for the scaling coefficients tried."""
    curves: dict[str, dict[str, Any]] = {n: c for n, c in run.summary.get("curves", {}).items() if c.get("points")}
    if not curves:
        return None
    metrics = dict.fromkeys(curve.get("metric", "score") for curve in curves.values())
    drawings = "".join(
        wide(scaling_lines({name: curve for name, curve in curves.items() if curve.get("metric", "score") == metric}))
        for metric in metrics
    )
    records = [
        {
            "method": name,
            "metric": curve.get("metric", "score"),
            "point": place,
            "coordinate": point.get("coordinate"),
            "scaling": point["scaling"],
            **{f"factor {part}": factor for part, factor in (point.get("factors") or {}).items()},
            "value": point.get("value", point.get("error")),
            **(point.get("values") or point.get("errors") or {}),
        }
        for name, curve in curves.items()
        for place, point in enumerate(curve["points"], 1)
    ]
    frame = pd.DataFrame(records)
    frame = frame.drop(columns=[name for name in ("coordinate",) if frame[name].isna().all()])
    chosen = "; ".join(
        f"{name} {curve['scaling']:g}"
        + "".join(f", {part} × {factor:g}" for part, factor in (curve.get("factors") or {}).items())
        for name, curve in curves.items()
    )
    text = (
        "<p>Each point is a merge scored on the validation split; the filled ones were chosen: "
        f"{escape(chosen)}. Points off a line gave one part or expert a coefficient of its own.</p>"
    )
    values = details(f"All {len(frame)} points", _plain(frame, "Points in the order tried"))
    return Section("scaling", "Scaling coefficient", text + drawings + values + download("scaling", frame))


def size(run: Run) -> Section | None:
    """What compact experts weigh against what they recover."""
    sizes = run.summary.get("sizes") or {}
    experts: dict[str, int] = sizes.get("experts") or {}
    if not experts:
        return None
    whole, of = sizes.get("model"), run.summary.get("recovery_of", {}).get("switched", {})
    records: list[dict[str, Any]] = []
    for expert, weight in experts.items():
        found = of.get(" ".join(expert.rsplit("-", 1))) or {}
        records.append(
            {
                "expert": expert,
                "bytes": weight,
                "share of a model": weight / whole if whole else None,
                "recovery": found.get("value"),
                "low": found.get("low"),
                "high": found.get("high"),
            }
        )
    rows: list[list[Cell | str]] = [
        [
            str(own["expert"]),
            f"{own['bytes'] / _MB:.2f}",
            number(own["share of a model"], "{:.1%}"),
            Cell(number(own["recovery"], "{:.2f}"), between(own["low"], own["high"], "{:.2f}")),
        ]
        for own in records
    ]
    total = sum(experts.values())
    told = f"All {len(experts)} compact experts take {total / _MB:.1f} MB"
    if whole:
        told += f", as many full models {len(experts) * whole / _MB:.1f} MB, the merged one {whole / _MB:.1f} MB"
    marks = [
        Mark(own["expert"], own["bytes"] / _MB, own["recovery"], f"{own['expert']}: {own['recovery']:.2f}", True)
        for own in records
        if own["recovery"] is not None
    ]
    drawing, head = "", ["expert", "MB", "of a model", "recovery"]
    if marks:
        told += ". Recovery is that of the system switched, which applies one compact expert at a time"
        plot = line_plot(
            {mark.series: [] for mark in marks},
            "MB of the compact expert",
            "recovery when it is applied alone",
            about="Recovery against size by compact expert",
            marks=marks,
        )
        drawing = wide(plot)
    else:
        head, rows = head[:-1], [row[:-1] for row in rows]
    shown = table("Compact experts", head, rows) + download("sizes", pd.DataFrame(records))
    return Section("size", "Size against quality", f"<p>{told}.</p>{drawing}{shown}")


def interference(run: Run) -> Section | None:
    """The figures of `lors diagnose`."""
    if run.diagnosis is None:
        return None
    from lors.diagnosis import Diagnosis
    from lors.diagnostics_page import sections

    frames = {
        name: pd.DataFrame(run.diagnosis[name]).pipe(_without_tensors)
        for name in ("experts", "spectra", "pairs", "subspaces")
    }
    diagnosis = Diagnosis(
        base=run.diagnosis["base"],
        scaling=run.diagnosis["scaling"],
        rank_ratios=tuple(run.diagnosis["rank_ratios"]),
        **frames,
    )
    links = "".join(download(f"diagnosis-{name}", frame) for name, frame in frames.items() if len(frame))
    return Section("interference", "Deltas and interference", "\n".join(sections(diagnosis, 3)) + links)


def _without_tensors(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that the figures are of; numbers as numbers where JSON had null."""
    if frame.empty:
        return frame
    kept = frame[frame["level"] != "tensor"].reset_index(drop=True)
    texts = {"level", "name", "expert", "first", "second"}
    return kept.astype({name: float for name in kept.columns if name not in texts})


def training(run: Run) -> Section | None:
    """Loss by step, one image a model."""
    if run.training is None or run.training.empty:
        return None
    log = run.training
    drawings = []
    for name, rows in log.groupby("model", sort=False):
        lines = {
            title: [(float(x), float(y)) for x, y in zip(rows["step"], rows[column], strict=True) if pd.notna(y)]
            for column, title in (("loss", "training loss"), ("validation_loss", "validation loss"))
            if column in rows
        }
        plot = line_plot(lines, "step", str(name), about=f"Loss of {name} by step", size=(330, 230))
        drawings.append(f"<div>{plot}</div>")
    last = [
        [
            str(name),
            number(rows["step"].max(), "{:.0f}"),
            *(_last(rows, column, form) for column, form in _LOGGED.items()),
        ]
        for name, rows in log.groupby("model", sort=False)
    ]
    head = ["model", "steps", "last loss", "best validation loss", "best validation score"]
    text = "<p>Means of neighbouring steps where there are many.</p>"
    return Section(
        "training",
        "Training curves",
        text
        + f'<div class="grid">{"".join(drawings)}</div>'
        + details("Last and best values", table("Trainings", head, last))
        + download("training", log),
    )


_LOGGED = {"loss": "{:.3f}", "validation_loss": "{:.3f}", "validation_score": "{:.2f}"}


def _last(rows: pd.DataFrame, column: str, form: str) -> str:
    values = rows[column].dropna() if column in rows else pd.Series(dtype=float)
    if values.empty:
        return "-"
    return form.format(values.iloc[-1] if column == "loss" else values.min())


def cost(run: Run) -> Section | None:
    """Seconds by stage, and what was cached; experts of one language may be one training, which counts once."""
    named = pd.DataFrame(run.summary.get("steps") or [])
    if named.empty:
        return None
    steps = named.sort_values("state", ascending=False, kind="stable").drop_duplicates("key").sort_index()  # run first
    rows = []
    for stage, own in steps.groupby("stage", sort=False):
        ran = own["state"].eq("run")
        rows.append(
            [
                str(stage).replace("_", " "),
                str(len(own)),
                str(int(ran.sum())),
                str(int((~ran).sum())),
                _time(own.loc[ran, "seconds"].sum()),
                _time(own.loc[~ran, "seconds"].sum()),
            ]
        )
    spent, saved = (steps.loc[steps["state"].eq("run") == ran, "seconds"].sum() for ran in (True, False))
    clock = run.summary.get("seconds")
    wall = f" in {_time(clock)} by the clock" if clock is not None else ""
    cached = int(steps["state"].eq("cached").sum())
    told = f"{len(steps) - cached} of {len(steps)} steps ran, {_time(spent)} of computing{wall}."
    if cached:
        told += f" {cached} were in the store already, which saved {_time(saved)}."
    head = ["stage", "steps", "ran", "cached", "computed for", "saved by the cache"]
    named = named.assign(digest=named["name"].map(run.summary.get("digests", {})))
    return Section("cost", "Cost", f"<p>{told}</p>" + table("Time by stage", head, rows) + download("steps", named))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def data_table(run: Run) -> str:
    """Utterances and hours by language and split."""
    corpora: Mapping[str, Mapping[str, Mapping[str, Any]]] = run.summary.get("corpora") or {}
    rows, records = [], []
    for language, splits in corpora.items():
        for split, facts in splits.items():
            hours = facts.get("hours", facts.get("seconds", math.nan) / 3600)
            rejected = sum((facts.get("rejected") or {}).values())
            speakers = facts.get("speakers")
            records.append({"language": language, "split": split, **facts, "hours": hours, "rejected": rejected})
            rows.append(
                [
                    language,
                    split,
                    str(facts.get("utterances", "-")),
                    number(hours, "{:.2f}"),
                    str(speakers or "-"),
                    str(rejected),
                ]
            )
    if not rows:
        return ""
    head = ["language", "split", "utterances", "hours", "speakers", "rejected rows"]
    return table("Data", head, rows) + download("data", pd.DataFrame(records))


def settings(run: Run) -> Section | None:
    """What would be needed to run it again."""
    parts = []
    summary = run.summary
    if summary.get("experiment"):
        text = yaml.safe_dump(summary["experiment"], sort_keys=False, allow_unicode=True)
        parts.append(details("Settings, defaults included", f"<pre>{escape(text)}</pre>"))
    facts = [
        *((name, str(version)) for name, version in (summary.get("versions") or {}).items()),
        *((f"seed of {name}", str(seed)) for name, seed in (summary.get("seeds") or {}).items()),
    ]
    if summary.get("machine"):
        facts.append(("machine", str(summary["machine"])))
    if facts:
        rows = [[name, Cell(value, kind="text")] for name, value in facts]
        parts.append(details("Versions, seeds and machine", table("Versions and seeds", ["name", "value"], rows)))
    if summary.get("digests"):
        states = {step["name"]: step for step in summary.get("steps") or []}
        digests = [
            [
                name,
                str(states.get(name, {}).get("state", "-")),
                number(states.get(name, {}).get("seconds"), "{:.1f}"),
                Cell(digest[:16], title=digest, kind="code"),
            ]
            for name, digest in summary["digests"].items()
        ]
        head = ["step", "state", "seconds", "digest"]
        parts.append(
            details(f"All {len(digests)} steps with the digests of their results", table("Steps", head, digests))
        )
    data = data_table(run)
    return Section("settings", "What was run", data + "".join(parts)) if data or parts else None


def _plain(frame: pd.DataFrame, caption: str) -> str:
    rows = [
        ["-" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
        for row in frame.itertuples(index=False)
    ]
    return table(caption, [str(name) for name in frame.columns], rows)
