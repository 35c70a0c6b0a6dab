"""The paired bootstrap: scores as functions of sums over utterances, drawn again with replacement.

Shapes: n utterances, b blocks that are resampled (utterances or speakers), s resamples, k sufficient statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


class Blocks:
    """What is resampled: speakers where every utterance has one and there are at least 10, else utterances.

    Raises InputError where `speakers` (n,) are not `n`.
    """

    def __init__(self, n: int, speakers: Sequence[str | None] | None) -> None:
        self.unit, self.of, self.count = "utterance", np.arange(n), n
        if speakers is not None:
            if len(speakers) != n:
                raise InputError(
                    f"There are {len(speakers)} speakers for {n} utterances; give one speaker an utterance."
                )
            names = {name for name in speakers if isinstance(name, str)}
            if all(isinstance(name, str) for name in speakers) and len(names) >= _FEWEST_SPEAKERS:
                number = {name: i for i, name in enumerate(sorted(names))}
                own = np.array([number[str(name)] for name in speakers], dtype=np.intp)
                self.unit, self.of, self.count = "speaker", own, len(names)


def resample(systems: Sequence[Statistics], blocks: Blocks, resamples: int, seed: int, language: str) -> list[Array]:
    """The scores (s,) of every system on the same resamples: b blocks drawn with replacement, as often as there are.

    Both tasks of a language meet the same draws, since they share its utterances; other languages meet others.
    """
    if resamples < 1:
        raise InputError(f"An interval cannot come from {resamples} resamples; give 1 or more.")
    sums = []
    for system in systems:
        by_block = np.zeros((blocks.count, system.rows.shape[1]))
        np.add.at(by_block, blocks.of, system.rows)
        sums.append(by_block)
    generator = np.random.default_rng([seed, *language.encode()])
    at_once = max(1, _DRAWS_AT_ONCE // blocks.count)
    scores: list[list[Array]] = [[] for _ in systems]
    share = np.full(blocks.count, 1 / blocks.count)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        draws = generator.multinomial(blocks.count, share, size=size).astype(np.float64)  # (s, b)
        for system, by_block, values in zip(systems, sums, scores, strict=True):
            values.append(system.of_sums(draws @ by_block))
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
