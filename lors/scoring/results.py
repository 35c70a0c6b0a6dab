"""From hypotheses tables to the table of results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pandas as pd

from lors.errors import InputError
from lors.scoring.bootstrap import Array, Blocks, Statistics, interval, p_value, resample
from lors.scoring.metrics import METRICS, METRICS_OF_TASK, full_signature, main_metric, statistics
from lors.scoring.robustness import robustness

__all__ = [
    "BASE",
    "EXPERTS",
    "RESULT_COLUMNS",
    "SCORES",
    "SWITCHED",
    "Pair",
    "Part",
    "Values",
    "blocks_of_parts",
    "headline",
    "main_rows",
    "order_of",
    "pairs_of",
    "parts_of",
    "score_tables",
    "texts",
]

BASE: Final = "base"
EXPERTS: Final = "experts"
"""The systems that recovery is measured between; "experts" holds each expert on its own language and task."""
SWITCHED: Final = "switched"
"""The base with each expert's compact task vector in turn: like the experts a model for each language and task."""
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
SCORES: Final = (*METRICS, "comet")
_AS_WRITTEN: Final = "none"
_SCORE_OF: Final = ("system", "language", "task", "metric")

Part = tuple[str, str, str]  # language, task, split


def order_of(part: Part) -> tuple[int, str, int]:
    """The key that sorts parts as the rows are sorted."""
    language, task, split = part
    return list(METRICS_OF_TASK).index(task), language, _SPLITS.index(split)


def parts_of(system: str, table: pd.DataFrame) -> dict[Part, pd.DataFrame]:
    """A system's utterances by language, task and split, in the order of their ids, which pairs them with others'."""
    missing = [name for name in _NEEDED if name not in table.columns]
    if missing:
        raise InputError(f"The hypotheses of {system!r} have no column {', '.join(missing)}; transcribe them again.")
    parts: dict[Part, pd.DataFrame] = {}
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
    return {part: parts[part] for part in sorted(parts, key=order_of)}


def blocks_of_parts(by_system: Mapping[str, Mapping[Part, pd.DataFrame]]) -> dict[Part, Blocks]:
    """What is resampled of each part; the tasks of a language and split share it."""
    first: dict[Part, pd.DataFrame] = {}
    for parts in by_system.values():
        first = {**parts, **first}
    tasks: dict[Pair, list[Part]] = {}
    for language, task, split in sorted(first, key=order_of):
        tasks.setdefault((language, split), []).append((language, task, split))
    found: dict[Part, Blocks] = {}
    for own in tasks.values():
        ids = [first[part]["id"].tolist() for part in own]
        speakers = [texts(first[part], "speaker") for part in own]
        found |= zip(own, Blocks.of_tasks(ids, speakers), strict=True)
    return found


def texts(rows: pd.DataFrame, column: str) -> list[Any]:
    """A column as Python strings, None where a value is null."""
    return [value if isinstance(value, str) else None for value in rows[column].tolist()]


def _window(rows: pd.DataFrame) -> str:
    """The encoder windows in seconds: "7.0", or "7.0-12.5" where batches differed."""
    shortest, longest = (str(round(float(value), 2)) for value in (rows["window"].min(), rows["window"].max()))
    return shortest if shortest == longest else f"{shortest}-{longest}"


def _optional(rows: pd.DataFrame, column: str) -> list[Any] | None:
    """A column of texts where it is there and not null throughout."""
    return texts(rows, column) if column in rows.columns and rows[column].notna().any() else None


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


def _all_statistics(rows: pd.DataFrame, part: Part, normaliser: str) -> dict[tuple[str, str], Statistics]:
    """Every score and measure of one system on one part, by metric and normaliser, in the order of the rows."""
    language, task, _ = part
    references, hypotheses = texts(rows, "reference"), texts(rows, "hypothesis")
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
    by_system = {system: parts_of(system, table) for system, table in tables.items()}
    _require_same_utterances(by_system)
    order = {system: place for place, system in enumerate(tables)}
    all_blocks = blocks_of_parts(by_system)
    records: list[tuple[object, ...]] = []
    for part in sorted({part for parts in by_system.values() for part in parts}, key=order_of):
        language = part[0]
        rows = {system: parts[part] for system, parts in by_system.items() if part in parts}
        found = {system: _all_statistics(own, part, normaliser) for system, own in rows.items()}
        blocks = all_blocks[part]
        flat = [(system, *key) for system, own in found.items() for key in own]
        own_statistics = [found[system][metric, form] for system, metric, form in flat]
        draws = dict(zip(flat, resample(own_statistics, blocks, resamples, seed, language), strict=True))
        for (system, metric, form), own in zip(flat, own_statistics, strict=True):
            drawn = draws[system, metric, form]
            others = [draws.get((other, metric, form)) for other in (BASE, _PEER)]
            ps = [
                p_value(drawn - other, blocks)
                if other is not None and name != system and metric in SCORES
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


def _require_same_utterances(by_system: Mapping[str, Mapping[Part, pd.DataFrame]]) -> None:
    first: dict[Part, tuple[str, list[Any]]] = {}
    for system, parts in by_system.items():
        for part, rows in parts.items():
            given = list(zip(rows["id"].tolist(), texts(rows, "reference"), strict=True))
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


Values = dict[tuple[str, str, str, str], float]
Pair = tuple[str, str]


def headline(results: pd.DataFrame) -> tuple[str, Values]:
    """The split that is summarised and its values by system, language, task and metric."""
    rows = _summarised(results)
    keys = zip(rows["system"], rows["language"], rows["task"], rows["metric"], strict=True)
    return str(rows["split"].iloc[0]), dict(zip(keys, rows["value"].astype(float), strict=True))


def pairs_of(values: Values) -> list[Pair]:
    """Every language and task that some system has, in the order of the rows."""
    return sorted({(language, task) for _, language, task, _ in values}, key=lambda pair: order_of((*pair, "test")))
