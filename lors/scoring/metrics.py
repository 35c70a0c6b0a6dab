"""Corpus-level WER, CER (jiwer), BLEU and chrF2 (sacrebleu), each with a signature and a bootstrap interval.

Shapes: n utterances, s resamples, k sufficient statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import numpy as np

from lors.errors import InputError
from lors.scoring.bootstrap import Array, Blocks, Statistics, interval, p_value, percent, resample
from lors.scoring.normalise import is_unspaced, normalise, normaliser_version

__all__ = [
    "LOWER_IS_BETTER",
    "METRICS",
    "METRICS_OF_TASK",
    "Difference",
    "Score",
    "difference",
    "full_signature",
    "main_metric",
    "score",
    "statistics",
]

METRICS: Final = ("wer", "cer", "bleu", "chrf")
LOWER_IS_BETTER: Final = frozenset({"wer", "cer"})
METRICS_OF_TASK: Final = {"transcribe": ("wer", "cer"), "translate": ("bleu", "chrf")}


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
class Difference:
    """Between the scores of two systems on the same utterances."""

    value: float
    """The first system's score less the second's."""
    low: float
    """2.5 % quantile of the difference on the same resamples; NaN where there are fewer than two blocks."""
    high: float
    """97.5 % quantile."""
    p: float
    """Two-sided, of no difference (`bootstrap.p_value`)."""


def main_metric(task: str, language: str) -> str:
    """The metric that decides: "bleu" to translate; to transcribe "wer", or "cer" in an UNSPACED language."""
    if task == "translate":
        return "bleu"
    return "cer" if is_unspaced(language) else "wer"


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
) -> Statistics:
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
    return Statistics(np.array(rows, dtype=np.float64), value, signature, percent)


def _overlap_statistics(metric: str, references: Sequence[str], hypotheses: Sequence[str], language: str) -> Statistics:
    from sacrebleu.metrics import BLEU, CHRF

    scorer: Any = BLEU() if metric == "bleu" else CHRF()
    # The statistics that sacrebleu's own significance tests resample; it has no public name for them.
    rows = scorer._extract_corpus_statistics(list(hypotheses), [list(references)])
    array = np.array(rows, dtype=np.float64)
    corpus = scorer._compute_score_from_stats([int(total) for total in array.sum(axis=0)])
    signature = f"{corpus.name}|{scorer.get_signature().format(short=False)}|lang:{language}"
    return Statistics(array, float(corpus.score), signature, _bleu if metric == "bleu" else _chrf)


def statistics(
    metric: str, references: Sequence[str], hypotheses: Sequence[str], language: str, normaliser: str
) -> Statistics:
    """What a score is made from, utterance by utterance. Arguments and errors as in `score`."""
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
    found = statistics(metric, references, hypotheses, language, normaliser)
    blocks = Blocks.of_utterances(len(references), speakers)
    low, high = interval(resample([found], blocks, resamples, seed, language)[0], blocks)
    signature = full_signature(found, blocks, resamples, seed)
    return Score(metric, found.value, low, high, signature, len(references))


def full_signature(found: Statistics, blocks: Blocks, resamples: int, seed: int) -> str:
    """A score's signature with that of its interval."""
    return f"{found.signature}|bootstrap:{resamples}.seed:{seed}|by:{blocks.unit}"


def difference(
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
) -> Difference:
    """How far two systems' scores on the same utterances lie apart, by the paired bootstrap (Koehn 2004, section 4:
    both systems on the same resamples). Arguments and errors as in `score`.
    """
    systems = [statistics(metric, references, texts, language, normaliser) for texts in (hypotheses_a, hypotheses_b)]
    blocks = Blocks.of_utterances(len(references), speakers)
    a, b = resample(systems, blocks, resamples, seed, language)
    return Difference(systems[0].value - systems[1].value, *interval(a - b, blocks), p_value(a - b, blocks))
