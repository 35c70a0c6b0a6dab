"""Results as Markdown, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from lors.scoring.metrics import METRICS, METRICS_OF_TASK, main_metric
from lors.scoring.results import EXPERTS, headline, main_rows, pairs_of
from lors.scoring.robustness import MEASURES

__all__ = ["ahead_of_next", "leader", "markdown_table", "robustness_table"]

_LABELS: Final = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF2"}


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    cells: dict[str, str]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def leader(summary: Mapping[str, Any]) -> str | None:
    """The single model that recovers more than every other one beyond the paired interval."""
    ahead = summary.get("ahead")
    return ahead["system"] if ahead and all((own["low"] or 0) > 0 for own in ahead["by"].values()) else None


def ahead_of_next(summary: Mapping[str, Any]) -> str | None:
    """A sentence: how much more the single model with the most recovery has than the next one."""
    if not (ahead := summary.get("ahead")):
        return None
    rival, by = min(ahead["by"].items(), key=lambda item: item[1]["value"])
    span = "" if by["low"] is None else f" [{by['low']:.2f}, {by['high']:.2f}]"
    return f"{ahead['system']} recovers {by['value']:.2f}{span} more than {rival}, the next single model."


def _recovery_cell(own: Mapping[str, Any], *, best: bool) -> str:
    text = f"**{own['recovery']:.2f}**" if best else _number(own["recovery"], 2)
    low, high = own["recovery_low"], own["recovery_high"]
    return text if low is None or low == high else f"{text} [{low:.2f}, {high:.2f}]"


def _columns(results: pd.DataFrame, summary: Mapping[str, Any]) -> list[_Column]:
    """The main metric of each language and its mean, task by task, then recovery, then the guard languages."""
    _, values = headline(results)
    systems: Mapping[str, Any] = summary["systems"]
    guard = summary.get("guard", {"languages": [], "systems": {}})

    def metrics_of(task: str, *, guarded: bool) -> dict[str, str]:
        spoken = [language for language, other in pairs_of(values) if other == task]
        return {
            language: main_metric(task, language) for language in spoken if (language in guard["languages"]) == guarded
        }

    def single(language: str, task: str, metric: str, header: str) -> _Column:
        best = summary["best"].get(f"{language} {task}")
        own = {name: _number(values.get((name, language, task, metric))) for name in systems}
        return _Column(header, {name: f"**{text}**" if name == best else text for name, text in own.items()})

    columns: list[_Column] = []
    for task in METRICS_OF_TASK:
        metrics = metrics_of(task, guarded=False)
        columns += [single(code, task, metric, f"{code} {_LABELS[metric]}") for code, metric in metrics.items()]
        for metric in METRICS:
            if metric in metrics.values():
                means = {name: _number(own[metric]) for name, own in systems.items()}
                columns.append(_Column(f"mean {_LABELS[metric]}", means))
    if EXPERTS in systems:
        first = leader(summary)
        cells = {name: _recovery_cell(own, best=name == first) for name, own in systems.items()}
        columns.append(_Column("recovery", cells))
    for task in METRICS_OF_TASK:
        for code, metric in metrics_of(task, guarded=True).items():
            columns.append(single(code, task, metric, f"guard {code} {_LABELS[metric]}"))
    return columns


def _notes(results: pd.DataFrame, summary: Mapping[str, Any]) -> list[str]:
    """What the numbers need beside them: the split, the windows, the signatures (without their language)."""
    split, values = headline(results)
    rows = main_rows(results)
    windows = list(dict.fromkeys(rows["window"]))
    notes = [f"Split {split}, encoder window {', '.join(windows)} s, rates in percent."]
    if any(summary["best"].values()) or leader(summary):
        notes.append("Bold: better than every other single model beyond the paired 95 % bootstrap interval.")
    if rows.groupby(["language", "task"])["window"].nunique().max() > 1:
        notes.append("The systems were not all given the same window, so their scores do not compare strictly.")
    if said := ahead_of_next(summary):
        notes.append(said)
    if summary["recovery_left_out"]:
        notes.append(
            "Recovery leaves out where the expert is not better than the base beyond the 95 % interval: "
            f"{', '.join(summary['recovery_left_out'])}."
        )
    if guard := summary.get("guard"):
        worse = [
            f"{name} ({', '.join(own['forgotten'])})" for name, own in guard["systems"].items() if own["forgotten"]
        ]
        notes.append(
            f"No expert was trained for the guard languages {', '.join(guard['languages'])}; worse there than the base "
            f"beyond the 95 % interval: {', '.join(worse) or 'no system'}."
        )
    shown = {main_metric(task, language) for language, task in pairs_of(values)}
    for metric in METRICS:
        if metric in shown:
            signatures = rows["signature"][rows["metric"] == metric]
            unique = dict.fromkeys(re.sub(r"\|lang:[^|]*", "", signature) for signature in signatures)
            notes.append(f"{_LABELS[metric]}: {', '.join(f'`{signature}`' for signature in unique)}")
    return notes


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def markdown_table(results: pd.DataFrame, summary: Mapping[str, Any]) -> str:
    """One row a system: its main metric by language, their means, recovery with its 95 % interval.

    In bold what `summary["best"]` and `leader` name. Below the table: the split, the windows and the signatures. The
    intervals of the scores are in the results.
    """
    columns = _columns(results, summary)
    lines = [["system", *(column.header for column in columns)], ["---", *("---:" for _ in columns)]]
    lines += [[name, *(column.cells[name] for column in columns)] for name in summary["systems"]]
    return "\n".join([*_markdown(lines), "", *(f"- {note}" for note in _notes(results, summary))]) + "\n"


def robustness_table(results: pd.DataFrame, summary: Mapping[str, Any]) -> str:
    """One row a system: its mean robustness measures, in percent, lower is better; below the table what each counts."""
    measured = set(results["metric"])
    shown = [measure for measure in MEASURES if measure in measured]
    lines = [["system", *(name.replace("_", " ") for name in shown)], ["---", *("---:" for _ in shown)]]
    lines += [[name, *(_number(own[measure]) for measure in shown)] for name, own in summary["robustness"].items()]
    return (
        "\n".join([*_markdown(lines), "", *(f"- {name.replace('_', ' ')}: {MEASURES[name]}" for name in shown)]) + "\n"
    )
