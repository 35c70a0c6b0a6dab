"""Corpus-level WER, CER (jiwer), BLEU and chrF2 (sacrebleu), each with a signature and a bootstrap interval.

Shapes: n utterances, b blocks that are resampled (utterances or speakers), s resamples, k sufficient statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lors.errors import InputError
from lors.scoring.normalise import is_unspaced, normalise, normaliser_version

__all__ = ["LOWER_IS_BETTER", "METRICS", "METRICS_OF_TASK", "Score", "differs", "main_metric", "score"]

Array = NDArray[np.float64]

METRICS: Final = ("wer", "cer", "bleu", "chrf")
LOWER_IS_BETTER: Final = frozenset({"wer", "cer"})
METRICS_OF_TASK: Final = {"transcribe": ("wer", "cer"), "translate": ("bleu", "chrf")}

# With fewer clusters a cluster bootstrap's interval is far too narrow; the number is ours.
_FEWEST_SPEAKERS = 10
_DRAWS_AT_ONCE = 4_000_000  # bounds the matrix of draws (float64) to 32 MB


@dataclass(frozen=True, slots=True)
class Score:
    """One corpus-level score with its 95 % interval."""

    metric: str
    value: float
    """In percent (WER and CER may exceed 100); BLEU and chrF2 on sacrebleu's scale of 0 to 100."""
    low: float
    """2.5 % quantile of the resampled scores; NaN where there are fewer than two blocks to resample."""
    high: float
    """97.5 % quantile."""
    signature: str
    """What is needed to compute the same number again, in sacrebleu's style."""
    utterances: int


@dataclass(frozen=True, slots=True)
class _Statistics:
    rows: Array  # (n, k), summed over utterances they give the corpus score
    value: float  # the library's own corpus score
    signature: str
    of_sums: Callable[[Array], Array]  # (s, k) sums to (s,) scores


def main_metric(task: str, language: str) -> str:
    """The metric that decides: "bleu" to translate; to transcribe "wer", or "cer" in an UNSPACED language."""
    if task == "translate":
        return "bleu"
    return "cer" if is_unspaced(language) else "wer"


def _error_rate(sums: Array) -> Array:
    """(s, 2) errors and reference length to percent; with nothing to recognise jiwer counts the insertions."""
    return 100 * sums[:, 0] / np.maximum(sums[:, 1], 1)


def _bleu(sums: Array) -> Array:
    """(s, 10) in sacrebleu's layout to BLEU-4, smoothed by `exp` (Papineni et al. 2002; Chen and Cherry 2014)."""
    hypothesis, reference, correct, total = sums[:, 0], sums[:, 1], sums[:, 2:6], sums[:, 6:10]
    brevity = np.exp(np.minimum(0, 1 - reference / np.maximum(hypothesis, 1)))
    smoothed = 0.5 ** np.cumsum(correct == 0, axis=1)
    precision = np.where(correct > 0, correct, smoothed) / np.maximum(total, 1)
    defined = (total > 0).all(axis=1) & (correct > 0).any(axis=1)
    return np.where(defined, 100 * brevity * np.exp(np.log(precision).mean(axis=1)), 0)


def _chrf(sums: Array) -> Array:
    """(s, 18) in sacrebleu's layout to chrF2 (Popovic 2015): F2 of the mean precision and recall of 1 to 6-grams."""
    hypothesis, reference, match = (sums[:, i::3] for i in range(3))
    effective = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(effective.sum(axis=1), 1)
    precision = (effective * match / np.maximum(hypothesis, 1)).sum(axis=1) / orders
    recall = (effective * match / np.maximum(reference, 1)).sum(axis=1) / orders
    f_score: Array = 5 * precision * recall / np.where(precision + recall > 0, 4 * precision + recall, 1)
    return 100 * f_score


def _edit_statistics(
    metric: str, references: Sequence[str], hypotheses: Sequence[str], language: str, normaliser: str
) -> _Statistics:
    import jiwer

    process = jiwer.process_words if metric == "wer" else jiwer.process_characters
    output: Any = process(
        [normalise(text, language, normaliser) for text in references],
        [normalise(text, language, normaliser) for text in hypotheses],
    )
    rows = [
        (
            sum(
                max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                for chunk in chunks
                if chunk.type != "equal"
            ),
            len(reference),
        )
        for chunks, reference in zip(output.alignments, output.references, strict=True)
    ]
    value = 100 * float(output.wer if metric == "wer" else output.cer)
    signature = f"jiwer:{version('jiwer')}|normaliser:{normaliser_version(normaliser)}|lang:{language}"
    return _Statistics(np.array(rows, dtype=np.float64), value, signature, _error_rate)


def _overlap_statistics(
    metric: str, references: Sequence[str], hypotheses: Sequence[str], language: str
) -> _Statistics:
    from sacrebleu.metrics import BLEU, CHRF

    scorer: Any = BLEU() if metric == "bleu" else CHRF()
    # The statistics that sacrebleu's own significance tests resample; it has no public name for them.
    rows = scorer._extract_corpus_statistics(list(hypotheses), [list(references)])
    array = np.array(rows, dtype=np.float64)
    corpus = scorer._compute_score_from_stats([int(total) for total in array.sum(axis=0)])
    signature = f"{corpus.name}|{scorer.get_signature().format(short=False)}|lang:{language}"
    return _Statistics(array, float(corpus.score), signature, _bleu if metric == "bleu" else _chrf)


def _statistics(
    metric: str, references: Sequence[str], hypotheses: Sequence[str], language: str, normaliser: str
) -> _Statistics:
    if metric not in METRICS:
        raise InputError(f"There is no metric {metric!r}; choose one of {', '.join(METRICS)}.")
    if len(references) != len(hypotheses):
        raise InputError(
            f"{metric} for {language!r} has {len(references)} references and {len(hypotheses)} hypotheses; "
            "give one hypothesis a reference."
        )
    if not references:
        raise InputError(f"{metric} for {language!r} has no utterances; give a split that is not empty.")
    for name, texts in (("reference", references), ("hypothesis", hypotheses)):
        missing = sum(not isinstance(text, str) for text in texts)
        if missing:
            raise InputError(
                f"{metric} for {language!r} has no {name} for {missing} of {len(texts)} utterances; "
                "leave those utterances out or fill them in."
            )
    if metric in LOWER_IS_BETTER:
        return _edit_statistics(metric, references, hypotheses, language, normaliser)
    return _overlap_statistics(metric, references, hypotheses, language)


def _blocks(n: int, speakers: Sequence[str | None] | None) -> tuple[str, NDArray[np.intp], int]:
    """What is resampled ("speaker" or "utterance"), the block of each utterance (n,), the number of blocks."""
    if speakers is not None:
        if len(speakers) != n:
            raise InputError(f"There are {len(speakers)} speakers for {n} utterances; give one speaker an utterance.")
        names = {name for name in speakers if isinstance(name, str)}
        if all(isinstance(name, str) for name in speakers) and len(names) >= _FEWEST_SPEAKERS:
            number = {name: i for i, name in enumerate(sorted(names))}
            return "speaker", np.array([number[str(name)] for name in speakers], dtype=np.intp), len(names)
    return "utterance", np.arange(n), n


def _resample(
    systems: Sequence[_Statistics],
    block: NDArray[np.intp],  # (n,), the block of each utterance
    blocks: int,
    resamples: int,
    seed: int,
) -> list[Array]:
    """The scores (s,) of every system on the same resamples: b blocks drawn with replacement, as often as there are."""
    if resamples < 1:
        raise InputError(f"An interval cannot come from {resamples} resamples; give 1 or more.")
    sums = []
    for system in systems:
        by_block = np.zeros((blocks, system.rows.shape[1]))
        np.add.at(by_block, block, system.rows)
        sums.append(by_block)
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // blocks)
    scores: list[list[Array]] = [[] for _ in systems]
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        draws = generator.multinomial(blocks, np.full(blocks, 1 / blocks), size=size).astype(np.float64)  # (s, b)
        for system, by_block, values in zip(systems, sums, scores, strict=True):
            values.append(system.of_sums(draws @ by_block))
    return [np.concatenate(values) for values in scores]


def _interval(values: Array, blocks: int) -> tuple[float, float]:
    if blocks < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def score(
    metric: str,
    references: Sequence[str],  # (n,)
    hypotheses: Sequence[str],  # (n,)
    *,
    language: str,
    normaliser: str = "lors",
    speakers: Sequence[str | None] | None = None,  # (n,)
    resamples: int = 1000,
    seed: int = 0,
) -> Score:
    """Score a corpus: "wer" and "cer" by jiwer on normalised text, "bleu" and "chrf" by sacrebleu on raw cased text.

    The interval is the percentile bootstrap (Bisani and Ney 2004; Koehn 2004) over utterances, or over speakers where
    every utterance has one and there are at least 10; the signature says which. `language` is the one spoken: it picks
    the normaliser's rules, while BLEU's 13a tokeniser suits the English that Whisper translates to.

    Raises InputError for an unknown metric or normaliser, no utterances, unequal lengths or a missing text. Empty texts
    are fine.
    """
    statistics = _statistics(metric, references, hypotheses, language, normaliser)
    unit, block, blocks = _blocks(len(references), speakers)
    low, high = _interval(_resample([statistics], block, blocks, resamples, seed)[0], blocks)
    signature = f"{statistics.signature}|bootstrap:{resamples}.seed:{seed}|by:{unit}"
    return Score(metric, statistics.value, low, high, signature, len(references))


def differs(
    metric: str,
    references: Sequence[str],  # (n,)
    hypotheses_a: Sequence[str],  # (n,), of one system
    hypotheses_b: Sequence[str],  # (n,), of the other
    *,
    language: str,
    normaliser: str = "lors",
    speakers: Sequence[str | None] | None = None,  # (n,)
    resamples: int = 1000,
    seed: int = 0,
) -> bool:
    """Whether two systems differ on the same utterances: the 95 % paired bootstrap interval of the difference of their
    scores (Koehn 2004, section 4: both systems on the same resamples) excludes 0. Arguments and errors as in `score`.
    """
    systems = [_statistics(metric, references, texts, language, normaliser) for texts in (hypotheses_a, hypotheses_b)]
    _, block, blocks = _blocks(len(references), speakers)
    a, b = _resample(systems, block, blocks, resamples, seed)
    low, high = _interval(a - b, blocks)
    return low > 0 or high < 0
