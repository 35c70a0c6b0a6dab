"""The check of the data as one HTML file: inline SVG, no script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from unicodedata import name

from lors.diagnostics_page import STYLE
from lors.speech.data_findings import SEVERITIES

if TYPE_CHECKING:
    from lors.speech.data_check import DataReport
    from lors.speech.data_facts import Distribution, SplitFacts
    from lors.speech.data_findings import Finding

__all__ = ["page"]

WIDTH, HEIGHT, MARGIN = 300, 120, 34  # of a histogram, in pixels; the margin holds its axis
MOST_BARS = 40

_STYLE = """
ol{list-style:none;padding:0;margin:.6rem 0}li{border-left:4px solid var(--edge);padding:.15rem .8rem;margin:.5rem 0;
max-width:90ch;overflow-wrap:anywhere}
.error{--edge:var(--warm)}.warning{--edge:#d29922}.note{--edge:var(--line)}
li b{text-transform:capitalize}li span{color:var(--soft)}
.row{display:flex;flex-wrap:wrap;gap:0 1.5rem}figure{margin:0}figcaption{color:var(--soft);font-size:13px}
.bar{fill:var(--cool)}.middle{stroke:var(--warm);stroke-width:1.5}
th,td{padding:.2rem .35rem}thead th{white-space:normal;vertical-align:bottom}
td:nth-child(2),th:nth-child(2){text-align:left}
td.text,th.text{text-align:left;white-space:normal;min-width:18ch;max-width:60ch;overflow-wrap:anywhere}
"""


def page(report: DataReport, title: str) -> str:
    """One self-contained HTML document; all that comes from the corpora is escaped."""
    sections = [
        _findings(report.findings),
        _summary(report.splits),
        _histograms(report.splits),
        _overlaps(report),
        _misfits(report.splits),
        _characters(report.splits),
        _rejected(report.splits),
        _audio(report.splits),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>\n"
        f"<p>Speech to {escape(' and '.join(report.tasks))} with the base <strong>{escape(report.base)}</strong>. "
        f"{_verdict(report)}</p>\n" + "\n".join(filter(None, sections)) + "\n</main></body></html>\n"
    )


def _verdict(report: DataReport) -> str:
    if report.failed:
        return "A run would stop at the errors below."
    if any(finding.severity == "warning" for finding in report.findings):
        return "A run would work, but read the warnings before you trust its scores."
    return "Nothing stands in the way of a run."


def _findings(findings: Sequence[Finding]) -> str:
    counts = {severity: sum(f.severity == severity for f in findings) for severity in SEVERITIES}
    count = ", ".join(f"{number} {severity}{'' if number == 1 else 's'}" for severity, number in counts.items())
    items = "".join(
        f'<li class="{finding.severity}"><b>{finding.severity}</b> <span>{escape(finding.where)}, '
        f"{escape(finding.about)}</span><br>{escape(_sentence(finding.sentence))}</li>"
        for finding in findings
    )
    meaning = (
        "Error: a run would stop at it. Warning: scores would say too much, or the model would learn wrong things. "
        "Note: to know when you read the results."
    )
    return f"<h2>Findings: {count}</h2><p>{meaning}</p><ol>{items}</ol>"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _summary(splits: Sequence[SplitFacts]) -> str:
    rows = [
        [
            facts.language,
            facts.split,
            facts.utterances,
            f"{facts.hours:.2f}",
            f"{facts.seconds.median:.1f}",
            f"{facts.seconds.p5:.1f} to {facts.seconds.p95:.1f}",
            f"{facts.seconds.maximum:.1f}",
            f"{facts.characters_per_second.median:.1f}",
            f"{facts.words_per_second.median:.1f}" if facts.words_per_second else "-",
            "-" if facts.correlation is None else f"{facts.correlation:.2f}",
            facts.speakers or "-",
            facts.utterances - facts.repeated,
            facts.utterances - facts.without_translation,
            sum(facts.rejected.values()),
        ]
        for facts in splits
    ]
    head = (
        "language, split, utterances, hours, median seconds, middle 90 % of seconds, longest, characters per second, "
        "words per second, length correlation, speakers, distinct sentences, translated, rejected rows"
    ).split(", ")
    meaning = (
        "Rates are medians. Length correlation is the rank correlation of a text's characters and its seconds: 0.7 and "
        "more where texts and audio belong together, about 0 where they were shuffled; it is left out for few "
        "utterances and for durations that hardly differ."
    )
    return _section("Splits", meaning, _table(head, rows)) if rows else ""


def _histograms(splits: Sequence[SplitFacts]) -> str:
    parts = []
    for figure, meaning, unit in (
        (
            "seconds",
            "Splits of one corpus should look alike. What is longer than the base's window never got here: see the "
            "rejected rows. The red line is the median.",
            "seconds",
        ),
        (
            "characters_per_second",
            "One hump, with thin tails. A tail to the left is silence or missing words, one to the right is cut "
            "audio or a text that is too long; two humps are two kinds of speech, or two ways of writing.",
            "characters a second",
        ),
    ):
        drawings = []
        for language in dict.fromkeys(facts.language for facts in splits):
            here = [facts for facts in splits if facts.language == language]
            end = max(_last(getattr(facts, figure)) for facts in here)
            drawings.append(
                '<div class="row">'
                + "".join(
                    f"<figure><figcaption>{escape(language)} {escape(facts.split)}, {facts.utterances} utterances"
                    f"</figcaption>{_histogram(getattr(facts, figure), end, unit)}</figure>"
                    for facts in here
                )
                + "</div>"
            )
        heading = "Durations" if figure == "seconds" else "Speaking rate"
        parts.append(_section(heading, meaning, "".join(drawings)))
    return "".join(parts) if splits else ""


def _last(distribution: Distribution) -> int:
    """The number of bins up to the last one that holds something."""
    return max(index for index, count in enumerate(distribution.counts) if count) + 1


def _histogram(distribution: Distribution, end: int, unit: str) -> str:
    merge = -(-end // MOST_BARS)  # bins in a bar
    counts = [sum(distribution.counts[start : start + merge]) for start in range(0, end, merge)]
    width, total, top = WIDTH / len(counts), sum(distribution.counts), max(counts)
    reach = len(counts) * merge * distribution.width
    bars = "".join(
        f'<rect class="bar" x="{width * index:.1f}" y="{HEIGHT * (1 - count / top):.1f}" '
        f'width="{max(1.0, width - 1):.1f}" height="{HEIGHT * count / top:.1f}"><title>'
        f"{index * merge * distribution.width:g} to {(index + 1) * merge * distribution.width:g} {unit}: {count} "
        f"utterances, {count / total:.1%}</title></rect>"
        for index, count in enumerate(counts)
        if count
    )
    middle = min(WIDTH, WIDTH * distribution.median / reach)
    axis = "".join(
        f'<text class="soft" x="{WIDTH * share:.0f}" y="{HEIGHT + 15}" text-anchor="{anchor}">{reach * share:g}</text>'
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))
    )
    return (
        f'<svg role="img" width="{WIDTH}" height="{HEIGHT + MARGIN}" viewBox="0 0 {WIDTH} {HEIGHT + MARGIN}">{bars}'
        f'<path class="middle" d="M{middle:.1f} 0v{HEIGHT}"><title>median {distribution.median:g} {unit}</title></path>'
        f'<path class="axis" d="M0 {HEIGHT}h{WIDTH}"/>{axis}'
        f'<text class="soft" x="{WIDTH / 2:.0f}" y="{HEIGHT + 30}" text-anchor="middle">{unit}</text></svg>'
    )


def _overlaps(report: DataReport) -> str:
    meaning = (
        "What a split shares with one that it should share nothing with. Sentences are compared as scores compare "
        "them: without case and punctuation."
    )
    rows = [
        [o.language, o.split, o.other, o.about, o.shared, o.utterances, f"{o.share:.1%}", "; ".join(o.examples[:3])]
        for o in report.overlaps
    ]
    head = ("language", "split", "shares with", "what", "distinct", "utterances", "of the split", "examples")
    return _section("In common", meaning, _table(head, rows, text=1)) if rows else ""


def _misfits(splits: Sequence[SplitFacts]) -> str:
    meaning = (
        "The worst of each split. A text usually takes the seconds of the last but one column at the language's median "
        "rate: far more than the audio has means cut audio or a wrong text, far fewer means missing words or silence."
    )
    rows = [
        [facts.language, facts.split, odd.id, f"{odd.seconds:.1f}", f"{odd.usual:.1f}", odd.text]
        for facts in splits
        for odd in facts.worst_misfits
    ]
    head = ("language", "split", "id", "seconds", "usual seconds", "text")
    return _section("Texts that cannot belong to their audio", meaning, _table(head, rows, text=1)) if rows else ""


def _characters(splits: Sequence[SplitFacts]) -> str:
    rows = [
        [
            facts.language,
            facts.split,
            why,
            character,
            f"U+{ord(character):04X}",
            number,
            name(character, ""),
        ]
        for facts in splits
        for why, counts in (("not in the tokenizer", facts.unwritable), ("another script", facts.foreign_letters))
        for character, number in counts.items()
    ]
    meaning = "Characters that the base cannot write, and letters of a script that the language is not written in."
    head = ("language", "split", "why", "character", "code", "times", "name")
    return _section("Characters", meaning, _table(head, rows, text=1)) if rows else ""


def _rejected(splits: Sequence[SplitFacts]) -> str:
    rows = [
        [
            facts.language,
            facts.split,
            reason,
            number,
            f"{number / (sum(facts.rejected.values()) + facts.utterances):.1%}",
        ]
        for facts in splits
        for reason, number in facts.rejected.items()
    ]
    meaning = "They are in no split. The findings say where each row is named."
    head = ("language", "split", "reason", "rows", "of those read")
    return _section("Rejected rows", meaning, _table(head, rows)) if rows else ""


def _audio(splits: Sequence[SplitFacts]) -> str:
    rows = [
        [
            facts.language,
            facts.split,
            facts.audio.sampled,
            facts.audio.clipped.count,
            facts.audio.quiet.count,
            f"{facts.audio.median_level:.1f}",
        ]
        for facts in splits
    ]
    meaning = (
        "Of recordings drawn at random. The level is what 1 % of a recording's samples are above, in dB of full scale: "
        "speech has some -20 to -5, less than -40 is very quiet."
    )
    head = ("language", "split", "sampled", "clipped", "very quiet", "median level dB")
    return _section("Audio", meaning, _table(head, rows)) if rows else ""


def _section(heading: str, meaning: str, content: str) -> str:
    return f'<section><h2>{escape(heading)}</h2><p>{escape(meaning)}</p><div class="wide">{content}</div></section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], text: int = 0) -> str:
    """The last `text` columns hold text that may be long."""

    def row(cells: Sequence[Any], kind: str) -> str:
        classes = [""] * (len(cells) - text) + [' class="text"'] * text
        return "".join(f"<{kind}{c}>{escape(str(cell))}</{kind}>" for c, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f"<table><thead><tr>{row(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
