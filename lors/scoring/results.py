"""From hypotheses tables to the table of results, its summary and what a person reads of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from lors.errors import InputError
from lors.scoring.metrics import LOWER_IS_BETTER, METRICS, METRICS_OF_TASK, differs, main_metric, score
from lors.scoring.normalise import is_unspaced
from lors.scoring.recovery import complete_mean, ratio_to_expert, recovery

__all__ = ["BASE", "EXPERTS", "RESULT_COLUMNS", "markdown_table", "score_tables", "summarise"]

BASE: Final = "base"
EXPERTS: Final = "experts"
"""The systems that recovery is measured between; "experts" holds each expert on its own language and task."""

RESULT_COLUMNS: Final = (
    "system",
    "language",
    "task",
    "split",
    "metric",
    "value",
    "low",
    "high",
    "signature",
    "utterances",
    "window",
)
_NEEDED: Final = ("id", "language", "task", "split", "speaker", "reference", "hypothesis", "window")
_SPLITS: Final = ("train", "validation", "test")
_LABELS: Final = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF2"}

_Part = tuple[str, str, str]  # language, task, split


def _order(part: _Part) -> tuple[int, str, int]:
    language, task, split = part
    return list(METRICS_OF_TASK).index(task), language, _SPLITS.index(split)


def _parts(system: str, table: pd.DataFrame) -> dict[_Part, pd.DataFrame]:
    """A system's utterances by language, task and split, in the order of their ids, which pairs them with others'."""
    missing = [name for name in _NEEDED if name not in table.columns]
    if missing:
        raise InputError(f"The hypotheses of {system!r} have no column {', '.join(missing)}; transcribe them again.")
    parts: dict[_Part, pd.DataFrame] = {}
    for key, rows in table.groupby(["language", "task", "split"], sort=False, dropna=False):
        language, task, split = (str(value) for value in key)
        if task not in METRICS_OF_TASK or split not in _SPLITS:
            raise InputError(
                f"The hypotheses of {system!r} name the task {task!r} and the split {split!r}; the tasks are "
                f"{', '.join(METRICS_OF_TASK)}, the splits {', '.join(_SPLITS)}."
            )
        if rows["id"].duplicated().any():
            twice = rows["id"][rows["id"].duplicated()].iloc[0]
            raise InputError(
                f"The hypotheses of {system!r} have {twice!r} twice in {language} {task}; keep one of them."
            )
        parts[language, task, split] = rows.sort_values("id")
    return {part: parts[part] for part in sorted(parts, key=_order)}


def _texts(rows: pd.DataFrame, column: str) -> list[Any]:
    """A column as Python strings, None where a value is null."""
    return [value if isinstance(value, str) else None for value in rows[column].tolist()]


def _window(rows: pd.DataFrame) -> str:
    """The encoder windows in seconds: "7.0", or "7.0-12.5" where batches differed."""
    shortest, longest = (str(round(float(value), 2)) for value in (rows["window"].min(), rows["window"].max()))
    return shortest if shortest == longest else f"{shortest}-{longest}"


def score_tables(
    tables: Mapping[str, pd.DataFrame],  # hypotheses by the system's name, all its languages, tasks and splits
    *,
    normaliser: str = "lors",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score every system: one row (RESULT_COLUMNS) a system, language, task, split and metric; WER and CER to
    transcribe, BLEU and chrF2 to translate.

    Rows follow the systems as given, then the task (transcribe first), the language's code, the split (validation
    before test), the metric.

    Raises InputError where a column is missing, an id occurs twice, or two systems were given other utterances or other
    references for the same language, task and split: their scores would not compare.
    """
    first: dict[_Part, tuple[str, list[Any]]] = {}
    records: list[tuple[object, ...]] = []
    for system, table in tables.items():
        for part, rows in _parts(system, table).items():
            language, task, split = part
            references = _texts(rows, "reference")
            given = list(zip(rows["id"].tolist(), references, strict=True))
            other, expected = first.setdefault(part, (system, given))
            if given != expected:
                raise InputError(
                    f"{system!r} and {other!r} have different utterances or references for {language} {task} {split}; "
                    "transcribe the same split with both."
                )
            for metric in METRICS_OF_TASK[task]:
                result = score(
                    metric,
                    references,
                    _texts(rows, "hypothesis"),
                    language=language,
                    normaliser=normaliser,
                    speakers=_texts(rows, "speaker"),
                    resamples=resamples,
                    seed=seed,
                )
                numbers = (result.value, result.low, result.high, result.signature, result.utterances)
                records.append((system, language, task, split, metric, *numbers, _window(rows)))
    if not records:
        raise InputError("There are no hypotheses to score; transcribe a split that is not empty.")
    return pd.DataFrame(records, columns=list(RESULT_COLUMNS))


def _headline(results: pd.DataFrame) -> tuple[str, dict[tuple[str, str, str, str], float]]:
    """The split that is summarised (test where there is one) and its values by system, language, task and metric."""
    split = max(results["split"], key=_SPLITS.index)
    rows = results[results["split"] == split]
    keys = zip(rows["system"], rows["language"], rows["task"], rows["metric"], strict=True)
    return split, dict(zip(keys, rows["value"].astype(float), strict=True))


def _pairs(values: Mapping[tuple[str, str, str, str], float]) -> list[tuple[str, str]]:
    """Every language and task that some system has, in the order of the rows."""
    return sorted({(language, task) for _, language, task, _ in values}, key=lambda pair: _order((*pair, "test")))


def summarise(
    results: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    *,
    guard: Collection[str] = (),  # languages that no expert was trained for
    normaliser: str = "lors",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The means of every system over languages, on the test split (validation where there is no test), from the results
    of `score_tables` on the same tables: `{"systems": {NAME: {"recovery", "ratio_to_expert", "wer", "cer", "bleu",
    "chrf"}}, "recovery_left_out": ["de transcribe"]}`; with guard languages, which have no part in these, also
    `{"guard": {"languages": [..], "systems": {NAME: {"wer", .., "forgotten": ["it transcribe"]}}}}`, where forgotten is
    what a system does worse than the base beyond the interval.

    recovery and ratio_to_expert average the languages and tasks by their `main_metric`; recovery leaves out, for every
    system, those where the expert is not better than the base beyond the interval. "wer" leaves out UNSPACED languages.
    A system that lacks a part of a mean has None there, as all have without the system "base" or "experts".
    """
    split, values = _headline(results)
    watched = [pair for pair in _pairs(values) if pair[0] in guard]
    pairs = [pair for pair in _pairs(values) if pair not in watched]
    parts = {name: _parts(name, table) for name, table in tables.items()}

    def changed(system: str, language: str, task: str, *, better: bool) -> bool:
        """Whether a system is better, or worse, than the base beyond the interval."""
        metric = main_metric(task, language)
        before, after = (values[name, language, task, metric] for name in (BASE, system))
        if ((after < before) == (metric in LOWER_IS_BETTER)) != better or after == before:
            return False
        base, own = (parts[name][language, task, split] for name in (BASE, system))
        return differs(
            metric,
            _texts(base, "reference"),
            _texts(base, "hypothesis"),
            _texts(own, "hypothesis"),
            language=language,
            normaliser=normaliser,
            speakers=_texts(base, "speaker"),
            resamples=resamples,
            seed=seed,
        )

    def value(system: str, language: str, task: str, metric: str | None = None) -> float | None:
        return values.get((system, language, task, metric or main_metric(task, language)))

    comparable = [pair for pair in pairs if all((*pair, split) in parts.get(name, {}) for name in (BASE, EXPERTS))]
    defined = [pair for pair in comparable if changed(EXPERTS, *pair, better=True)]

    def relative(system: str) -> dict[str, float | None]:
        recoveries: list[float | None] = []
        for pair in defined:
            base, own, expert = (value(name, *pair) for name in (BASE, system, EXPERTS))
            recoveries.append(None if base is None or own is None or expert is None else recovery(base, own, expert))
        ratios: list[float | None] = []
        for pair in pairs:
            own, expert = value(system, *pair), value(EXPERTS, *pair)
            if expert is not None:
                ratios.append(None if own is None else ratio_to_expert(main_metric(pair[1], pair[0]), own, expert))
        return {"recovery": complete_mean(recoveries), "ratio_to_expert": complete_mean(ratios)}

    def means(system: str, over: Sequence[tuple[str, str]]) -> dict[str, Any]:
        return {
            metric: complete_mean(
                value(system, language, task, metric)
                for language, task in over
                if metric in METRICS_OF_TASK[task] and not (metric == "wer" and is_unspaced(language))
            )
            for metric in METRICS
        }

    names = list(dict.fromkeys(results["system"]))
    left_out = [" ".join(pair) for pair in comparable if pair not in defined]
    summary = {"systems": {name: relative(name) | means(name, pairs) for name in names}, "recovery_left_out": left_out}
    if watched:
        seen = [name for name in names if all((*pair, split) in parts[name] for pair in watched)]
        forgotten = {
            name: [" ".join(pair) for pair in watched if BASE in seen and changed(name, *pair, better=False)]
            for name in seen
        }
        guarded = {name: means(name, watched) | {"forgotten": forgotten[name]} for name in seen}
        summary["guard"] = {"languages": list(dict.fromkeys(language for language, _ in watched)), "systems": guarded}
    return summary


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    values: dict[str, float | None]
    lower_is_better: bool
    digits: int = 1

    def cells(self) -> dict[str, tuple[str, bool]]:
        """By system: what to print, and whether it is the best of those that are not the experts."""
        texts = {name: "-" if value is None else f"{value:.{self.digits}f}" for name, value in self.values.items()}
        rivals = [value for name, value in self.values.items() if value is not None and name != EXPERTS]
        best = f"{(min if self.lower_is_better else max)(rivals):.{self.digits}f}" if rivals else None
        return {name: (text, text == best and name != EXPERTS) for name, text in texts.items()}


def _columns(results: pd.DataFrame, summary: Mapping[str, Any]) -> list[_Column]:
    """The main metric of each language and its mean, task by task, then recovery, then the guard languages."""
    _, values = _headline(results)
    names: list[str] = list(summary["systems"])
    guard = summary.get("guard", {"languages": [], "systems": {}})

    def metrics_of(task: str, *, guarded: bool) -> dict[str, str]:
        spoken = [language for language, other in _pairs(values) if other == task]
        return {
            language: main_metric(task, language) for language in spoken if (language in guard["languages"]) == guarded
        }

    def mean(key: str, header: str, digits: int = 1) -> _Column:
        means = {name: summary["systems"][name][key] for name in names}
        return _Column(header, means, key in LOWER_IS_BETTER, digits)

    def single(language: str, task: str, metric: str, header: str) -> _Column:
        own = {name: values.get((name, language, task, metric)) for name in names}
        return _Column(header, own, metric in LOWER_IS_BETTER)

    columns: list[_Column] = []
    for task in METRICS_OF_TASK:
        metrics = metrics_of(task, guarded=False)
        columns += [single(code, task, metric, f"{code} {_LABELS[metric]}") for code, metric in metrics.items()]
        columns += [mean(metric, f"mean {_LABELS[metric]}") for metric in METRICS if metric in metrics.values()]
    columns.append(mean("recovery", "recovery", 2))
    for task in METRICS_OF_TASK:
        for code, metric in metrics_of(task, guarded=True).items():
            columns.append(single(code, task, metric, f"guard {code} {_LABELS[metric]}"))
    return columns


def _notes(results: pd.DataFrame, summary: Mapping[str, Any]) -> list[str]:
    """What the numbers need beside them: the split, the windows, the signatures (without their language)."""
    split, values = _headline(results)
    rows = results[results["split"] == split]
    windows = list(dict.fromkeys(rows["window"]))
    notes = [f"Split {split}, encoder window {', '.join(windows)} s, rates in percent."]
    if rows.groupby(["language", "task"])["window"].nunique().max() > 1:
        notes.append("The systems were not all given the same window, so their scores do not compare strictly.")
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
    shown = {main_metric(task, language) for language, task in _pairs(values)}
    for metric in METRICS:
        if metric in shown:
            signatures = rows["signature"][rows["metric"] == metric]
            unique = dict.fromkeys(re.sub(r"\|lang:[^|]*", "", signature) for signature in signatures)
            notes.append(f"{_LABELS[metric]}: {', '.join(f'`{signature}`' for signature in unique)}")
    return notes


def markdown_table(results: pd.DataFrame, summary: Mapping[str, Any]) -> str:
    """One row a system: its main metric by language, their means, recovery; the best but for the experts in bold.

    Below the table: the split, the windows and the signatures. Intervals are in the results.
    """
    columns = _columns(results, summary)
    lines = [["system", *(column.header for column in columns)], ["---", *("---:" for _ in columns)]]
    cells = [column.cells() for column in columns]
    for name in columns[0].values:
        lines.append([name, *(f"**{text}**" if best else text for text, best in (cell[name] for cell in cells))])
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {note}" for note in _notes(results, summary))]) + "\n"
