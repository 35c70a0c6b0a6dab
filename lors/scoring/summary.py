"""What the results come to: recovery, means, who is best, robustness, what was forgotten."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from lors.scoring.bootstrap import Array, Blocks, interval, resample
from lors.scoring.metrics import LOWER_IS_BETTER, METRICS_OF_TASK, main_metric, statistics
from lors.scoring.normalise import is_unspaced
from lors.scoring.recovery import complete_mean, ratio_to_expert, recovery, relative_to_base
from lors.scoring.results import (
    BASE,
    EXPERTS,
    SCORES,
    SWITCHED,
    Pair,
    Values,
    blocks_of_parts,
    headline,
    pairs_of,
    parts_of,
    texts,
)
from lors.scoring.robustness import MEASURES

__all__ = ["summarise"]

_SEVERAL_MODELS: Final = (EXPERTS, SWITCHED)


class _Main:
    """The main metric of one language and task: every system on the same resamples."""

    def __init__(
        self,
        pair: Pair,
        rows: Mapping[str, pd.DataFrame],
        blocks: Blocks,
        normaliser: str,
        resamples: int,
        seed: int,
    ) -> None:
        language, task = pair
        self.metric = main_metric(task, language)
        self.blocks = blocks
        found = {
            name: statistics(self.metric, texts(own, "reference"), texts(own, "hypothesis"), language, normaliser)
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
    - `ahead`: the system with the most `recovery` of these rivals, and for each of the others `by` how much it is ahead
      with the paired interval; None without two of them;
    - `robustness`: each system's mean measures over the languages and tasks;
    - `guard`, where there are guard languages, which have no part in the above: their means, and what each system
      does worse than the base beyond the interval (`forgotten`).

    The means are over languages and tasks by their `main_metric`; "wer" leaves out UNSPACED languages. A system that
    lacks a part of a mean has None there, as all have without the system "base" or "experts".
    """
    split, values = headline(results)
    names = list(dict.fromkeys(results["system"]))
    parts = {name: parts_of(name, table) for name, table in tables.items()}
    blocks = blocks_of_parts(parts)
    mains = {
        pair: _Main(
            pair,
            {name: own[*pair, split] for name, own in parts.items() if (*pair, split) in own},
            blocks[*pair, split],
            normaliser,
            resamples,
            seed,
        )
        for pair in pairs_of(values)
    }
    watched = [pair for pair in mains if pair[0] in guard]
    pairs = [pair for pair in mains if pair not in watched]
    comparable = [pair for pair in pairs if {BASE, EXPERTS} <= mains[pair].values.keys()]
    defined = {pair: mains[pair] for pair in comparable if mains[pair].gain(EXPERTS, BASE)[0] > 0}
    recoveries = {name: _Recovery.of_system(name, defined) for name in names}
    summary: dict[str, Any] = {
        "split": split,
        "normaliser": normaliser,
        "systems": {
            name: recoveries[name].described()
            | _relative(name, {pair: mains[pair] for pair in pairs})
            | _means(name, pairs, values)
            for name in names
        },
        "recovery_of": {name: _recovery_of_pairs(name, defined) for name in names},
        "recovery_left_out": [" ".join(pair) for pair in comparable if pair not in defined],
        "best": {" ".join(pair): mains[pair].best() for pair in mains},
        "ahead": _ahead(recoveries),
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


@dataclass(frozen=True, slots=True)
class _Recovery:
    """A system's recovery on each language and task, and over all of them."""

    singles: dict[Pair, float | None]
    mean: float | None  # None where the system lacks one of them
    drawn: Array  # (s,) the resampled means
    blocks: Blocks | None

    @classmethod
    def of_system(cls, name: str, mains: Mapping[Pair, _Main]) -> _Recovery:
        found = {pair: main.recovery(name) for pair, main in mains.items() if name in main.values}
        singles = {pair: found[pair][0] if pair in found else None for pair in mains}
        mean = complete_mean(singles.values())
        if mean is None:
            return cls(singles, None, np.empty(0), None)
        blocks = min((main.blocks for main in mains.values()), key=lambda blocks: blocks.count)
        return cls(singles, mean, np.mean([drawn for _, drawn in found.values()], axis=0), blocks)

    def interval(self, less: Array | float = 0.0) -> tuple[float | None, float | None]:
        return (None, None) if self.blocks is None else _between(self.drawn - less, self.blocks)

    def described(self) -> dict[str, Any]:
        """As `summary["systems"]` has it: over all, by task, and where it is least."""
        low, high = self.interval()
        worst = min(self.singles, key=lambda pair: self.singles[pair] or 0.0) if self.mean is not None else None
        by_task = {task: [value for pair, value in self.singles.items() if pair[1] == task] for task in METRICS_OF_TASK}
        return {
            "recovery": self.mean,
            "recovery_low": low,
            "recovery_high": high,
            "recovery_by_task": {task: complete_mean(values) for task, values in by_task.items()},
            "worst": None if worst is None else {"recovery": self.singles[worst], "of": " ".join(worst)},
        }


def _ahead(recoveries: Mapping[str, _Recovery]) -> dict[str, Any] | None:
    means = {name: own.mean for name, own in recoveries.items() if own.mean is not None and name not in _SEVERAL_MODELS}
    if len(means) < 2:
        return None
    leader = max(means, key=lambda name: means[name])
    by = {}
    for name in means:
        if name != leader:
            low, high = recoveries[leader].interval(recoveries[name].drawn)
            by[name] = {"value": means[leader] - means[name], "low": low, "high": high}
    return {"system": leader, "by": by}


def _recovery_of_pairs(name: str, mains: Mapping[Pair, _Main]) -> dict[str, Any]:
    made = {}
    for pair, main in mains.items():
        if name in main.values:
            value, drawn = main.recovery(name)
            low, high = _between(drawn, main.blocks)
            made[" ".join(pair)] = {"value": value, "low": low, "high": high}
    return made


def _relative(name: str, mains: Mapping[Pair, _Main]) -> dict[str, float | None]:
    """Its mean scores beside the expert's and the base's, where those are there."""

    def mean(other: str, compare: Any) -> float | None:
        return complete_mean(
            compare(main.metric, main.values[name], main.values[other]) if name in main.values else None
            for main in mains.values()
            if other in main.values
        )

    return {"ratio_to_expert": mean(EXPERTS, ratio_to_expert), "relative_to_base": mean(BASE, relative_to_base)}


def _means(name: str, over: Sequence[Pair], values: Values) -> dict[str, float | None]:
    of_task = {metric: task for task, metrics in METRICS_OF_TASK.items() for metric in metrics} | {"comet": "translate"}
    return {
        metric: complete_mean(
            values.get((name, language, task, metric))
            for language, task in over
            if task == of_task[metric] and not (metric == "wer" and is_unspaced(language))
        )
        for metric in SCORES
    }


def _robustness(name: str, over: Sequence[Pair], values: Values) -> dict[str, float | None]:
    measured = {(language, task, metric) for _, language, task, metric in values}
    return {
        measure: complete_mean(values.get((name, *pair, measure)) for pair in over if (*pair, measure) in measured)
        for measure in MEASURES
    }


def _forgotten(name: str, watched: Sequence[Pair], mains: Mapping[Pair, _Main]) -> list[str]:
    if name == BASE:
        return []
    return [" ".join(pair) for pair in watched if BASE in mains[pair].values and mains[pair].gain(name, BASE)[1] < 0]
