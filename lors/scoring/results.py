"""From hypotheses tables to the table of results, its summary and what a person reads of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd

from lors.errors import InputError
from lors.scoring.bootstrap import Array, Blocks, Statistics, interval, p_value, resample
from lors.scoring.metrics import (
    LOWER_IS_BETTER,
    METRICS,
    METRICS_OF_TASK,
    full_signature,
    main_metric,
    statistics,
)
from lors.scoring.normalise import is_unspaced
from lors.scoring.recovery import complete_mean, ratio_to_expert, recovery, relative_to_base
from lors.scoring.robustness import MEASURES, robustness

__all__ = [
    "BASE",
    "EXPERTS",
    "RESULT_COLUMNS",
    "SWITCHED",
    "main_rows",
    "markdown_table",
    "robustness_table",
    "score_tables",
    "summarise",
]

BASE: Final = "base"
EXPERTS: Final = "experts"
"""The systems that recovery is measured between; "experts" holds each expert on its own language and task."""
SWITCHED: Final = "switched"
"""The base with each expert's compact task vector in turn: like the experts a model for each language and task."""
_SEVERAL_MODELS: Final = (EXPERTS, SWITCHED)
_PEER: Final = "task_arithmetic"

RESULT_COLUMNS: Final = (
    "system",
    "language",
    "task",
    "split",
    "metric",
    "normaliser",
    "value",
    "low",
    "high",
    "p_base",
    "p_task_arithmetic",
    "signature",
    "utterances",
    "window",
)
_NEEDED: Final = ("id", "language", "task", "split", "speaker", "reference", "hypothesis", "window")
_SPLITS: Final = ("train", "validation", "test")
_LABELS: Final = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF2"}
_SCORES: Final = (*METRICS, "comet")
_AS_WRITTEN: Final = "none"
_SCORE_OF: Final = ("system", "language", "task", "metric")

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


def _optional(rows: pd.DataFrame, column: str) -> list[Any] | None:
    """A column of texts where it is there and not null throughout."""
    return _texts(rows, column) if column in rows.columns and rows[column].notna().any() else None


def _mean(sums: Array) -> Array:
    """(s, 2) sums and counts to means times 100, NaN where nothing was counted."""
    with np.errstate(invalid="ignore"):
        return 100 * sums[:, 0] / sums[:, 1]


def _comet(rows: pd.DataFrame, language: str) -> Statistics:
    """COMET's mean, times 100, over the utterances that have one in the column that the scoring stage joined."""
    scores = rows["comet"].to_numpy(np.float64)
    known = ~np.isnan(scores)
    sums = np.stack([np.where(known, scores, 0), known], axis=1)
    model = next(iter(_optional(rows.loc[known], "comet_signature") or ["COMET"]))
    return Statistics(sums, float(100 * np.nanmean(scores)), f"{model}|lang:{language}", _mean)


def _all_statistics(rows: pd.DataFrame, part: _Part, normaliser: str) -> dict[tuple[str, str], Statistics]:
    """Every score and measure of one system on one part, by metric and normaliser, in the order of the rows."""
    language, task, _ = part
    references, hypotheses = _texts(rows, "reference"), _texts(rows, "hypothesis")
    found: dict[tuple[str, str], Statistics] = {}
    for form in dict.fromkeys((normaliser, "whisper_basic", _AS_WRITTEN)) if task == "transcribe" else (_AS_WRITTEN,):
        for metric in METRICS_OF_TASK[task]:
            found[metric, form] = statistics(metric, references, hypotheses, language, form)
    if task == "translate" and "comet" in rows.columns and rows["comet"].notna().any():
        found["comet", _AS_WRITTEN] = _comet(rows, language)
    form = normaliser if task == "transcribe" else _AS_WRITTEN
    measures = robustness(
        references,
        hypotheses,
        language=language,
        task=task,
        normaliser=normaliser,
        truncated=rows["truncated"].astype(bool).tolist() if "truncated" in rows.columns else [False] * len(rows),
        spoken=_optional(rows, "spoken"),
    )
    found |= {(name, form): own for name, own in measures.items()}
    free = _optional(rows, "free") if task == "transcribe" else None
    if free is not None and None not in free:
        metric = main_metric(task, language)
        own = statistics(metric, references, free, language, normaliser)
        found["free", form] = replace(own, signature=f"{metric}|{own.signature}")
    return found


def score_tables(
    tables: Mapping[str, pd.DataFrame],  # hypotheses by the system's name, all its languages, tasks and splits
    *,
    normaliser: str = "lors",
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score every system: one row (RESULT_COLUMNS) a system, language, task, split, metric and normaliser.

    To transcribe: WER and CER with the normaliser, with `whisper_basic` and as written ("none"). To translate: BLEU,
    chrF2 and, where the hypotheses have a column `comet`, its mean times 100. Then the measures of
    `robustness.MEASURES`. low and high are the 95 % bootstrap interval, p_base and p_task_arithmetic the p-values of
    the paired differences from those systems, NaN for the measures and for the systems themselves.

    Rows follow the systems as given, then the task (transcribe first), the language's code, the split (validation
    before test), the normaliser (the given one first), the metric.

    Raises InputError where a column is missing, an id occurs twice, or two systems were given other utterances or other
    references for the same language, task and split: their scores would not compare.
    """
    by_system = {system: _parts(system, table) for system, table in tables.items()}
    _require_same_utterances(by_system)
    order = {system: place for place, system in enumerate(tables)}
    records: list[tuple[object, ...]] = []
    for part in sorted({part for parts in by_system.values() for part in parts}, key=_order):
        language = part[0]
        rows = {system: parts[part] for system, parts in by_system.items() if part in parts}
        found = {system: _all_statistics(own, part, normaliser) for system, own in rows.items()}
        blocks = Blocks(len(next(iter(rows.values()))), _texts(next(iter(rows.values())), "speaker"))
        flat = [(system, *key) for system, own in found.items() for key in own]
        own_statistics = [found[system][metric, form] for system, metric, form in flat]
        draws = dict(zip(flat, resample(own_statistics, blocks, resamples, seed, language), strict=True))
        for (system, metric, form), own in zip(flat, own_statistics, strict=True):
            drawn = draws[system, metric, form]
            others = [draws.get((other, metric, form)) for other in (BASE, _PEER)]
            ps = [
                p_value(drawn - other, blocks)
                if other is not None and name != system and metric in _SCORES
                else float("nan")
                for name, other in zip((BASE, _PEER), others, strict=True)
            ]
            numbers = (own.value, *interval(drawn, blocks), *ps, full_signature(own, blocks, resamples, seed))
            scored = int(own.rows[:, 1].sum()) if metric == "comet" else len(own.rows)
            records.append((system, *part, metric, form, *numbers, scored, _window(rows[system])))
    if not records:
        raise InputError("There are no hypotheses to score; transcribe a split that is not empty.")
    records.sort(key=lambda record: order[str(record[0])])
    return pd.DataFrame(records, columns=list(RESULT_COLUMNS))


def _require_same_utterances(by_system: Mapping[str, Mapping[_Part, pd.DataFrame]]) -> None:
    first: dict[_Part, tuple[str, list[Any]]] = {}
    for system, parts in by_system.items():
        for part, rows in parts.items():
            given = list(zip(rows["id"].tolist(), _texts(rows, "reference"), strict=True))
            other, expected = first.setdefault(part, (system, given))
            if given != expected:
                raise InputError(
                    f"{system!r} and {other!r} have different utterances or references for {' '.join(part)}; "
                    "transcribe the same split with both."
                )


def _summarised(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the split that is summarised (test where there is one), in the run's own normaliser."""
    split = max(results["split"], key=_SPLITS.index)
    rows: pd.DataFrame = results[results["split"] == split]
    return rows.drop_duplicates([name for name in rows if name in _SCORE_OF or name not in RESULT_COLUMNS])


def main_rows(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of `main_metric` on the split that is summarised, in the run's own normaliser; of a sweep's results
    those of every variant.
    """
    rows = _summarised(results)
    wanted = [
        metric == main_metric(task, language)
        for language, task, metric in zip(rows["language"], rows["task"], rows["metric"], strict=True)
    ]
    return rows[wanted]


_Values = dict[tuple[str, str, str, str], float]
_Pair = tuple[str, str]


def _headline(results: pd.DataFrame) -> tuple[str, _Values]:
    """The split that is summarised and its values by system, language, task and metric."""
    rows = _summarised(results)
    keys = zip(rows["system"], rows["language"], rows["task"], rows["metric"], strict=True)
    return str(rows["split"].iloc[0]), dict(zip(keys, rows["value"].astype(float), strict=True))


def _pairs(values: _Values) -> list[_Pair]:
    """Every language and task that some system has, in the order of the rows."""
    return sorted({(language, task) for _, language, task, _ in values}, key=lambda pair: _order((*pair, "test")))


class _Main:
    """The main metric of one language and task: every system on the same resamples."""

    def __init__(
        self, pair: _Pair, rows: Mapping[str, pd.DataFrame], normaliser: str, resamples: int, seed: int
    ) -> None:
        language, task = pair
        self.metric = main_metric(task, language)
        first = next(iter(rows.values()))
        self.blocks = Blocks(len(first), _texts(first, "speaker"))
        found = {
            name: statistics(self.metric, _texts(own, "reference"), _texts(own, "hypothesis"), language, normaliser)
            for name, own in rows.items()
        }
        draws = resample(list(found.values()), self.blocks, resamples, seed, language)
        self.draws = dict(zip(found, draws, strict=True))
        self.values = {name: own.value for name, own in found.items()}

    def gain(self, system: str, over: str) -> tuple[float, float]:
        """The 95 % interval of how much better `system` is than `over`."""
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        return interval(sign * (self.draws[system] - self.draws[over]), self.blocks)

    def best(self) -> str | None:
        """The one model that is better than every other beyond the interval."""
        rivals = [name for name in self.values if name not in _SEVERAL_MODELS]
        for name in rivals if len(rivals) > 1 else []:
            if all(self.gain(name, other)[0] > 0 for other in rivals if other != name):
                return name
        return None

    def recovery(self, system: str) -> tuple[float | None, Array]:
        """The value, and the resampled ones (s,), NaN where a resample's base and expert are equal."""
        base, own, expert = (self.draws[name] for name in (BASE, system, EXPERTS))
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = np.where(base != expert, (base - own) / (base - expert) + 0.0, np.nan)
        return recovery(*(self.values[name] for name in (BASE, system, EXPERTS))), drawn


def _between(drawn: Array, blocks: Blocks) -> tuple[float | None, float | None]:
    """The interval of resampled values, None where it is undefined."""
    low, high = interval(drawn, blocks)
    return (None, None) if np.isnan(low) else (low, high)


def summarise(
    results: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    *,
    guard: Collection[str] = (),  # languages that no expert was trained for
    normaliser: str = "lors",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What the results of `score_tables` on the same tables come to, on the test split (validation where there is no
    test):

    - `systems`: for each its `recovery` with `recovery_low` and `recovery_high` (the 95 % bootstrap interval),
      `recovery_by_task`, the `worst` language and task, `ratio_to_expert`, `relative_to_base`, and its mean scores;
    - `recovery_of`: the recovery of each system on each language and task, with its interval;
    - `recovery_left_out`: where the expert is not better than the base beyond the interval, so that there is nothing
      to recover; they are left out of every system's mean;
    - `best`: on each language and task the system that is better than every other beyond the paired interval, if one
      is; "experts" and "switched", which hold a model for each, are no rivals;
    - `robustness`: each system's mean measures over the languages and tasks;
    - `guard`, where there are guard languages, which have no part in the above: their means, and what each system
      does worse than the base beyond the interval (`forgotten`).

    The means are over languages and tasks by their `main_metric`; "wer" leaves out UNSPACED languages. A system that
    lacks a part of a mean has None there, as all have without the system "base" or "experts".
    """
    split, values = _headline(results)
    names = list(dict.fromkeys(results["system"]))
    parts = {name: _parts(name, table) for name, table in tables.items()}
    mains = {
        pair: _Main(
            pair,
            {name: own[*pair, split] for name, own in parts.items() if (*pair, split) in own},
            normaliser,
            resamples,
            seed,
        )
        for pair in _pairs(values)
    }
    watched = [pair for pair in mains if pair[0] in guard]
    pairs = [pair for pair in mains if pair not in watched]
    comparable = [pair for pair in pairs if {BASE, EXPERTS} <= mains[pair].values.keys()]
    defined = [pair for pair in comparable if mains[pair].gain(EXPERTS, BASE)[0] > 0]
    summary: dict[str, Any] = {
        "split": split,
        "normaliser": normaliser,
        "systems": {
            name: _recovery_of_system(name, {pair: mains[pair] for pair in defined})
            | _relative(name, {pair: mains[pair] for pair in pairs})
            | _means(name, pairs, values)
            for name in names
        },
        "recovery_of": {name: _recovery_of_pairs(name, {pair: mains[pair] for pair in defined}) for name in names},
        "recovery_left_out": [" ".join(pair) for pair in comparable if pair not in defined],
        "best": {" ".join(pair): mains[pair].best() for pair in mains},
        "robustness": {name: _robustness(name, pairs, values) for name in names},
    }
    if watched:
        seen = [name for name in names if all(name in mains[pair].values for pair in watched)]
        summary["guard"] = {
            "languages": list(dict.fromkeys(language for language, _ in watched)),
            "systems": {
                name: _means(name, watched, values) | {"forgotten": _forgotten(name, watched, mains)} for name in seen
            },
        }
    return summary


def _recovery_of_system(name: str, mains: Mapping[_Pair, _Main]) -> dict[str, Any]:
    """Its recovery over all of `mains`, by task, and where it is least."""
    found = {pair: main.recovery(name) for pair, main in mains.items() if name in main.values}
    singles = {pair: found[pair][0] if pair in found else None for pair in mains}
    mean = complete_mean(singles.values())
    low, high = None, None
    if mean is not None:
        blocks = min((main.blocks for main in mains.values()), key=lambda blocks: blocks.count)
        low, high = _between(np.mean([drawn for _, drawn in found.values()], axis=0), blocks)
    worst = min(singles, key=lambda pair: singles[pair] or 0.0) if mean is not None else None
    return {
        "recovery": mean,
        "recovery_low": low,
        "recovery_high": high,
        "recovery_by_task": {
            task: complete_mean(value for pair, value in singles.items() if pair[1] == task) for task in METRICS_OF_TASK
        },
        "worst": None if worst is None else {"recovery": singles[worst], "of": " ".join(worst)},
    }


def _recovery_of_pairs(name: str, mains: Mapping[_Pair, _Main]) -> dict[str, Any]:
    made = {}
    for pair, main in mains.items():
        if name in main.values:
            value, drawn = main.recovery(name)
            low, high = _between(drawn, main.blocks)
            made[" ".join(pair)] = {"value": value, "low": low, "high": high}
    return made


def _relative(name: str, mains: Mapping[_Pair, _Main]) -> dict[str, float | None]:
    """Its mean scores beside the expert's and the base's, where those are there."""

    def mean(other: str, compare: Any) -> float | None:
        return complete_mean(
            compare(main.metric, main.values[name], main.values[other]) if name in main.values else None
            for main in mains.values()
            if other in main.values
        )

    return {"ratio_to_expert": mean(EXPERTS, ratio_to_expert), "relative_to_base": mean(BASE, relative_to_base)}


def _means(name: str, over: Sequence[_Pair], values: _Values) -> dict[str, float | None]:
    of_task = {metric: task for task, metrics in METRICS_OF_TASK.items() for metric in metrics} | {"comet": "translate"}
    return {
        metric: complete_mean(
            values.get((name, language, task, metric))
            for language, task in over
            if task == of_task[metric] and not (metric == "wer" and is_unspaced(language))
        )
        for metric in _SCORES
    }


def _robustness(name: str, over: Sequence[_Pair], values: _Values) -> dict[str, float | None]:
    measured = {(language, task, metric) for _, language, task, metric in values}
    return {
        measure: complete_mean(values.get((name, *pair, measure)) for pair in over if (*pair, measure) in measured)
        for measure in MEASURES
    }


def _forgotten(name: str, watched: Sequence[_Pair], mains: Mapping[_Pair, _Main]) -> list[str]:
    if name == BASE:
        return []
    return [" ".join(pair) for pair in watched if BASE in mains[pair].values and mains[pair].gain(name, BASE)[1] < 0]


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    cells: dict[str, str]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _recovery_cell(own: Mapping[str, Any]) -> str:
    text = _number(own["recovery"], 2)
    low, high = own["recovery_low"], own["recovery_high"]
    return text if low is None or low == high else f"{text} [{low:.2f}, {high:.2f}]"


def _columns(results: pd.DataFrame, summary: Mapping[str, Any]) -> list[_Column]:
    """The main metric of each language and its mean, task by task, then recovery, then the guard languages."""
    _, values = _headline(results)
    systems: Mapping[str, Any] = summary["systems"]
    guard = summary.get("guard", {"languages": [], "systems": {}})

    def metrics_of(task: str, *, guarded: bool) -> dict[str, str]:
        spoken = [language for language, other in _pairs(values) if other == task]
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
        columns.append(_Column("recovery", {name: _recovery_cell(own) for name, own in systems.items()}))
    for task in METRICS_OF_TASK:
        for code, metric in metrics_of(task, guarded=True).items():
            columns.append(single(code, task, metric, f"guard {code} {_LABELS[metric]}"))
    return columns


def _notes(results: pd.DataFrame, summary: Mapping[str, Any]) -> list[str]:
    """What the numbers need beside them: the split, the windows, the signatures (without their language)."""
    split, values = _headline(results)
    rows = main_rows(results)
    windows = list(dict.fromkeys(rows["window"]))
    notes = [f"Split {split}, encoder window {', '.join(windows)} s, rates in percent."]
    if any(summary["best"].values()):
        notes.append("Bold: better than every other single model beyond the paired 95 % bootstrap interval.")
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


def _markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def markdown_table(results: pd.DataFrame, summary: Mapping[str, Any]) -> str:
    """One row a system: its main metric by language, their means, recovery with its 95 % interval.

    In bold what `summary["best"]` names. Below the table: the split, the windows and the signatures. The intervals of
    the scores are in the results.
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
