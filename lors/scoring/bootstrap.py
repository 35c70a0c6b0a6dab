"""The paired bootstrap: scores as functions of sums over utterances, drawn again with replacement.

Shapes: n utterances, b blocks that are resampled (utterances or speakers), s resamples, k sufficient statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lors.errors import InputError

__all__ = ["Array", "Blocks", "Statistics", "interval", "p_value", "percent", "resample"]

Array = NDArray[np.float64]

# With fewer clusters a cluster bootstrap's interval is far too narrow; the number is ours.
_FEWEST_SPEAKERS = 10
_DRAWS_AT_ONCE = 4_000_000  # bounds the matrix of draws (float64) to 32 MB


@dataclass(frozen=True, slots=True)
class Statistics:
    """A score of one system as what can be resampled."""

    rows: Array
    """(n, k), summed over utterances they give the corpus score."""
    value: float
    """The corpus score, the library's own where one computes it."""
    signature: str
    of_sums: Callable[[Array], Array]
    """(s, k) sums to (s,) scores."""


def percent(sums: Array) -> Array:
    """(s, 2) counts and totals to percent; with a total of 0, 100 times the count (as jiwer counts insertions)."""
    return 100 * sums[:, 0] / np.maximum(sums[:, 1], 1)


@dataclass(frozen=True, slots=True)
class Blocks:
    """What is resampled: speakers where every utterance has one and there are at least 10, else utterances."""

    unit: str
    of: NDArray[np.intp]
    """(n,), the block of each utterance."""
    drawn: int
    """b, of all blocks of the language; one task may have utterances of some only."""

    @property
    def count(self) -> int:
        """The blocks that have utterances here."""
        return len(np.unique(self.of))

    @classmethod
    def of_utterances(cls, n: int, speakers: Sequence[str | None] | None) -> Blocks:
        """The blocks of one list; raises InputError where `speakers` (n,) are not `n`."""
        if speakers is None:
            speakers = [None] * n
        if len(speakers) != n:
            raise InputError(f"There are {len(speakers)} speakers for {n} utterances; give one speaker an utterance.")
        return cls.of_tasks([range(n)], [speakers])[0]

    @classmethod
    def of_tasks(cls, ids: Sequence[Sequence[Any]], speakers: Sequence[Sequence[str | None]]) -> list[Blocks]:
        """The blocks of each task of a language, (n,) ids and speakers each, numbered over all the tasks: so they meet
        the same draws also where one lacks utterances. Speakers are blocks where they can be in every task.
        """
        by_speaker = all(_can_be_blocks(own) for own in speakers)
        labels: Sequence[Sequence[Any]] = speakers if by_speaker else ids
        number = {label: i for i, label in enumerate(sorted({label for own in labels for label in own}))}
        unit = "speaker" if by_speaker else "utterance"
        return [cls(unit, np.array([number[label] for label in own], dtype=np.intp), len(number)) for own in labels]


def _can_be_blocks(speakers: Sequence[str | None]) -> bool:
    return all(isinstance(name, str) for name in speakers) and len({*speakers}) >= _FEWEST_SPEAKERS


def resample(systems: Sequence[Statistics], blocks: Blocks, resamples: int, seed: int, language: str) -> list[Array]:
    """The scores (s,) of every system on the same resamples: b blocks drawn with replacement, as often as there are;
    NaN where no utterance of this task was drawn.

    Tasks of a language that share their blocks (`Blocks.of_tasks`) meet the same draws; other languages meet others.
    """
    if resamples < 1:
        raise InputError(f"An interval cannot come from {resamples} resamples; give 1 or more.")
    sums = []
    for system in systems:
        by_block = np.zeros((blocks.drawn, system.rows.shape[1]))
        np.add.at(by_block, blocks.of, system.rows)
        sums.append(by_block)
    generator = np.random.default_rng([seed, *language.encode()])
    at_once = max(1, _DRAWS_AT_ONCE // blocks.drawn)
    scores: list[list[Array]] = [[] for _ in systems]
    share = np.full(blocks.drawn, 1 / blocks.drawn)
    utterances = np.bincount(blocks.of, minlength=blocks.drawn)  # (b,)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        draws = generator.multinomial(blocks.drawn, share, size=size).astype(np.float64)  # (s, b)
        met = draws @ utterances > 0
        for system, by_block, values in zip(systems, sums, scores, strict=True):
            values.append(np.where(met, system.of_sums(draws @ by_block), np.nan))
    return [np.concatenate(values) for values in scores]


def interval(values: Array, blocks: Blocks) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values (s,), leaving out undefined ones (NaN); NaN where all are, or
    where there are fewer than two blocks to resample.
    """
    known = values[~np.isnan(values)]
    if blocks.count < 2 or not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def p_value(differences: Array, blocks: Blocks) -> float:
    """Two-sided, of no difference: twice the share of resampled differences (s,) on the rarer side of 0, with one more
    on each side (Davison and Hinkley 1997, section 4.2.5). Undefined ones and NaN as in `interval`.
    """
    known = differences[~np.isnan(differences)]
    if blocks.count < 2 or not len(known):
        return float("nan")
    rarer = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (rarer + 1) / (len(known) + 1)))
