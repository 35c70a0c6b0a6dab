"""The page: one run as sections, several side by side with their sections folded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from lors.drawing import Mark, Span, document, line_plot, number, span_bars
from lors.files import writing
from lors.merging.settings import TOUCHED_UP
from lors.report.parts import LABELS, Cell, Section, between, download, table, wide
from lors.report.run import Run, flat_settings, load_runs
from lors.report.samples import Sample, choose_samples, compare
from lors.report.scores import guard, headline, recovery, robustness
from lors.report.workings import cost, interference, scaling, settings, size, training
from lors.versions import product_of

__all__ = ["LIMIT", "report_page", "write_report"]

LIMIT = 4_800_000  # bytes of the page
FRAME = 20_000  # bytes, at most, of style, headings and links of a run
MOST_BARS = 60

_STYLE = """
body{max-width:1280px}h2{margin-top:2.6rem}h3{font-size:1rem;margin:1.6rem 0 .2rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;border-bottom:1px solid var(--line);padding:.4rem 0;font-size:14px}
a{color:var(--cool)}a:focus-visible,summary:focus-visible{outline:2px solid var(--cool);outline-offset:2px}
.facts{display:flex;flex-wrap:wrap;gap:.6rem 2rem;margin:1rem 0;padding:0}
.facts div{border-left:3px solid var(--cool);padding-left:.7rem}
.facts dt{color:var(--soft);font-size:13px}.facts dd{margin:0;font-size:1.25rem;font-variant-numeric:tabular-nums}
small{display:block;color:var(--soft);font-size:11px;line-height:1.2}
thead th{vertical-align:bottom}td,th{vertical-align:top}
th[scope=row]{font-weight:600;position:sticky;left:0;background:var(--paper)}th[scope=colgroup]{text-align:center;color:var(--soft)}
tbody tr:hover{background:var(--low)}td.text{text-align:left;white-space:normal;min-width:18rem}
td.code,pre{font:12px/1.45 ui-monospace,monospace}pre{overflow-x:auto;background:var(--low);padding:.8rem}
td.bad{color:var(--warm)}details{margin:.5rem 0}details.run{border-top:1px solid var(--line);padding-top:.6rem}
details.run>summary{font-size:1.05rem;font-weight:600;color:var(--ink)}
.csv{display:inline-block;margin:.3rem 1rem .3rem 0;font-size:13px}.csv a::before{content:"↓ ";speak:never}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:0 1rem;overflow-x:auto}
.sample table{width:100%}th.text{text-align:left;width:100%}
.sample td.text{min-width:16rem}.sample caption{color:var(--ink);padding-top:.8rem}
ins{color:var(--cool);text-decoration:underline;text-underline-offset:3px}
del{color:var(--soft);text-decoration:line-through}
mark{color:var(--warm);background:none;font-weight:600;text-decoration:underline dotted;text-underline-offset:3px}
@media(max-width:600px){body{margin:1rem auto}.sample td.text{min-width:9rem}th,td{padding:.2rem .4rem}}
@media print{body{max-width:none;margin:0}nav,.csv{display:none}.wide,.grid{overflow:visible}
details::details-content{content-visibility:visible;display:block;height:auto}
svg,mark,ins,del{print-color-adjust:exact;-webkit-print-color-adjust:exact}h2,h3{break-after:avoid}
section.part>figure,tr{break-inside:avoid}td.text{min-width:0}}
"""
# Nothing is fetched and no script runs, whatever a hypothesis holds.
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'\">"
)


def write_report(folders: Sequence[Path], out: Path) -> None:
    """The page of all folders, of each run or sweep, at `out`; errors of `load_run`."""
    text = report_page(load_runs(folders))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)


def report_page(runs: Sequence[Run]) -> str:
    """One HTML document without scripts that fetches nothing, smaller than 5 MB: what does not fit is named instead."""
    comparison = _comparison(runs) if len(runs) > 1 else ""
    sections = _within([[part for part in _sections(run) if part] for run in runs], len(comparison.encode()))
    if len(runs) == 1:
        (run,), (own,) = runs, sections
        body = _facts(run) + _links(own) + "\n".join(_written(part) for part in own)
        return document(f"Report: {run.name}", body, style=_STYLE, policy=_POLICY)
    folded = "\n".join(
        f'<details class="run" id="run-{place}"><summary>{escape(run.name)}</summary>{_facts(run)}'
        + "\n".join(_written(part, f"-{place}") for part in own)
        + "</details>"
        for place, (run, own) in enumerate(zip(runs, sections, strict=True), 1)
    )
    body = f"{comparison}<h2>The runs</h2>{folded}"
    return document(f"Report: {len(runs)} runs side by side", body, style=_STYLE, policy=_POLICY)


def _sections(run: Run) -> list[Section | None]:
    parts: list[Callable[[Run], Section | None]] = [
        headline,
        recovery,
        guard,
        robustness,
        _samples,
        scaling,
        size,
        interference,
        training,
        cost,
        settings,
    ]
    return [part(run) for part in parts]


def _within(sections: list[list[Section]], taken: int) -> list[list[Section]]:
    """The sections with the largest left out until the page fits, scores last; `taken` bytes are the comparison's."""
    weights = {(r, p): len(part.html.encode()) for r, own in enumerate(sections) for p, part in enumerate(own)}
    total = taken + sum(weights.values()) + FRAME * len(sections)

    def order(place: tuple[int, int]) -> tuple[bool, int]:
        run, part = place
        return sections[run][part].id == "scores", -weights[place]

    for run, part in sorted(weights, key=order):
        if total <= LIMIT:
            break
        note = "<p>Left out to keep this page below 5 MB. A report of this run alone may have room for it.</p>"
        total -= weights[run, part] - len(note)
        sections[run][part] = sections[run][part]._replace(html=note)
    return sections


def _written(part: Section, suffix: str = "") -> str:
    place = f"{part.id}{suffix}"
    return (
        f'<section class="part" aria-labelledby="{place}"><h2 id="{place}">{escape(part.heading)}</h2>'
        f"{part.html}</section>"
    )


def _links(sections: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{part.id}">{escape(part.heading)}</a>' for part in sections)
    return f'<nav aria-label="Sections">{links}</nav>'


def _facts(run: Run) -> str:
    """What a run was and came to, in one row."""
    summary = run.summary
    given = summary.get("experiment") or {}
    method = (given.get("merge") or {}).get("method")
    product = product_of(summary)["system"] if method else ""
    own = run.systems.get(product, {})
    corpora = (summary.get("corpora") or {}).values()
    trained = [split["train"] for split in corpora if "train" in split]
    hours = sum(facts.get("hours", facts.get("seconds", 0) / 3600) for facts in trained)
    facts = {
        "base": given.get("base"),
        "languages": ", ".join(given.get("languages") or dict.fromkeys(language for language, _ in run.pairs())),
        "tasks": ", ".join(given.get("tasks") or dict.fromkeys(task for _, task in run.pairs())),
        "training data": f"{hours:.1f} h" if hours else None,
        "merged with": f"{method}, touched up" if product == TOUCHED_UP else method,
        "scaling coefficient": number(summary.get("scaling"), "{:g}") if "scaling" in summary else None,
        "recovery": number(own["recovery"], "{:.2f}") if own.get("recovery") is not None else None,
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items() if value)
    return f'<dl class="facts">{rows}</dl>'


def _samples(run: Run) -> Section | None:
    """A few utterances, every system's words against the reference."""
    samples = choose_samples(run.hypotheses(), run.split)
    if not samples:
        return None
    text = (
        "<p>The utterances on which the systems differ most, so these are not typical. Against the reference: "
        "<ins>added</ins>, <del>left out</del>, <mark>other</mark> words; case and punctuation do not count.</p>"
    )
    by_part: dict[str, list[Sample]] = {}
    for sample in samples:
        by_part.setdefault(f"{sample.language} {sample.task}", []).append(sample)
    shown = "".join(
        f'<details class="sample"{" open" if place == 0 else ""}><summary>{escape(name)}</summary>'
        f"{''.join(_sample(sample) for sample in own)}</details>"
        for place, (name, own) in enumerate(by_part.items())
    )
    records = [
        {
            "id": sample.id,
            "language": sample.language,
            "task": sample.task,
            "system": system,
            "reference": sample.reference,
            "hypothesis": hypothesis,
            "error_rate": sample.rates[system],
        }
        for sample in samples
        for system, hypothesis in sample.hypotheses.items()
    ]
    return Section("samples", "Sample hypotheses", text + shown + download("samples", pd.DataFrame(records)))


def _sample(sample: Sample) -> str:
    script = "en" if sample.task == "translate" else sample.language
    rows = "".join(
        f'<tr><th scope="row">{escape(system)}</th><td>{sample.rates[system]:.0%}</td>'
        f'<td class="text" lang="{escape(script)}">{_words(sample.reference, hypothesis, script)}</td></tr>'
        for system, hypothesis in sample.hypotheses.items()
    )
    reference = f'<b lang="{escape(script)}">{escape(sample.reference)}</b>'
    return wide(
        f"<table><caption>{reference} <small>{escape(sample.id)}</small></caption><thead><tr>"
        '<th scope="col">system</th><th scope="col">wrong</th><th scope="col" class="text">hypothesis</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _words(reference: str, hypothesis: str, language: str) -> str:
    pieces = []
    for piece in compare(reference, hypothesis, language):
        said, meant = escape(piece.hypothesis), escape(piece.reference)
        if piece.kind == "equal":
            pieces.append(said)
        elif piece.kind == "insert":
            pieces.append(f"<ins>{said}</ins>")
        elif piece.kind == "delete":
            pieces.append(f"<del>{meant}</del>")
        else:
            pieces.append(f'<mark title="instead of: {meant}">{said}</mark>')
    return " ".join(pieces)


def _comparison(runs: Sequence[Run]) -> str:
    """One row a run and system, with the settings that differ."""
    changes = _changes(runs)
    keys = list(dict.fromkeys(key for own in changes for key in own))
    metrics = [m for m in LABELS if any(own.get(m) is not None for run in runs for own in run.systems.values())]
    rows: list[list[Cell | str]] = []
    records: list[dict[str, Any]] = []
    for place, (run, own_changes) in enumerate(zip(runs, changes, strict=True), 1):
        for system, own in run.systems.items():
            ends = (own.get("recovery_low"), own.get("recovery_high"))
            rows.append(
                [
                    run.name or str(place),
                    *(own_changes.get(key, "-") for key in keys),
                    system,
                    Cell(number(own.get("recovery"), "{:.2f}"), between(*ends, "{:.2f}")),
                    *(number(own.get(metric), "{:.1f}") for metric in metrics),
                ]
            )
            records.append(
                {
                    "run": run.name,
                    **own_changes,
                    "system": system,
                    "recovery": own.get("recovery"),
                    "recovery_low": ends[0],
                    "recovery_high": ends[1],
                    **{metric: own.get(metric) for metric in metrics},
                }
            )
    head = ["run", *keys, "system", "recovery", *(f"mean {LABELS[metric]}" for metric in metrics)]
    results = pd.concat(
        [run.results.assign(run=run.name, **own) for run, own in zip(runs, changes, strict=True)], ignore_index=True
    )
    results = results[[*("run", *keys), *(name for name in results if name not in ("run", *keys))]]
    links = "".join(f'<a href="#run-{place}">{escape(run.name)}</a>' for place, run in enumerate(runs, 1))
    return (
        f'<nav aria-label="Runs">{links}</nav><h2>Side by side</h2><p>Means over languages and tasks on the '
        "summarised split; recovery with its 95 % interval. Runs compare where data and seeds are the same.</p>"
        + table("Runs and systems", head, rows)
        + download("comparison", pd.DataFrame(records))
        + download("results", results)
        + _bars(runs)
        + _sizes(runs)
    )


def _changes(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What tells the runs apart: what the sweep says, or the settings whose values differ."""
    if all(run.changes is not None for run in runs):
        return [flat_settings(run.changes or {}) for run in runs]
    flat = [flat_settings(run.summary.get("experiment") or {}) for run in runs]
    keys = dict.fromkeys(key for own in flat for key in own if key not in ("output", "store"))
    differ = [key for key in keys if len({own.get(key) for own in flat}) > 1]
    return [{key: own[key] for key in differ if key in own} for own in flat]


def _bars(runs: Sequence[Run]) -> str:
    spans = [
        Span(f"{system}, {run.name}", own["recovery"], own.get("recovery_low"), own.get("recovery_high"), system)
        for run in runs
        for system, own in run.systems.items()
        if own.get("recovery") is not None and system not in ("base", "experts")
    ]
    if not spans:
        return ""
    spans.sort(key=lambda span: -span.value)
    cut = f" The {MOST_BARS} best of {len(spans)}." if len(spans) > MOST_BARS else ""
    drawing = span_bars(
        spans[:MOST_BARS], "recovery", about="Recovery by run and system", lines={0.0: "base", 1.0: "experts"}
    )
    return f"<h2>Recovery</h2><p>Best first.{cut}</p>{wide(drawing)}"


def _sizes(runs: Sequence[Run]) -> str:
    marks = []
    for run in runs:
        experts = (run.summary.get("sizes") or {}).get("experts") or {}
        found = run.systems.get("switched", {}).get("recovery")
        if experts and found is not None:
            weight = sum(experts.values()) / 1e6
            marks.append(Mark(run.name, weight, found, f"{run.name}: {weight:.1f} MB, {found:.2f}", filled=True))
    if len(marks) < 2:
        return ""
    plot = line_plot(
        {mark.series: [] for mark in marks},
        "MB of all compact experts",
        "recovery of switched",
        about="Recovery of switched against the size of all compact experts, by run",
        marks=marks,
        size=(640, 320 + 16 * (len(marks) // 2)),
    )
    return f"<h2>Size against quality</h2>{wide(plot)}"
