"""What goes wrong in single utterances: inserted words, loops, empty texts, token limits, another language.

Shapes: n utterances. Each measure is a percentage with a numerator and a denominator an utterance, so that it is
resampled like a score.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from lors.scoring.bootstrap import Statistics, percent
from lors.scoring.normalise import is_unspaced, normalise, normaliser_version

__all__ = ["MEASURES", "loops", "robustness"]

MEASURES: Final[Mapping[str, str]] = {
    "insertions": "inserted words, percent of the reference's",
    "long": "more than twice as long as the reference",
    "compressible": "zlib ratio above 2.4",
    "repeats": "a phrase three times in a row that the reference has not",
    "empty": "no text where the reference has some",
    "truncated": "stopped at the token limit",
    "wrong_language": "heard as another language",
    "free": "error rate with the language that the model hears",
}
"""Every measure and what it counts, in percent of utterances unless it says otherwise. Lower is better in all."""

_LONG = 2.0
_COMPRESSIBLE = 2.4  # Whisper's own threshold for a failed decoding (arXiv 2212.04356, section 4.5)
_LONGEST_PHRASE = 8


def robustness(
    references: Sequence[str],  # (n,)
    hypotheses: Sequence[str],  # (n,)
    *,
    language: str,
    task: str,
    normaliser: str,
    truncated: Sequence[bool],  # (n,)
    spoken: Sequence[str | None] | None = None,  # (n,), the language that the model hears; None: it was not asked
) -> dict[str, Statistics]:
    """The statistics of each measure but `free`. Units are words, in an UNSPACED language characters; `insertions` is
    of transcripts only. Texts are compared in the normaliser's form, translations as written in lower case.
    """
    unspaced = task == "transcribe" and is_unspaced(language)

    def units(text: str) -> list[str]:
        text = normalise(text, language, normaliser) if task == "transcribe" else " ".join(text.casefold().split())
        return [char for char in text if not char.isspace()] if unspaced else text.split()

    expected, found = [units(text) for text in references], [units(text) for text in hypotheses]
    pairs = list(zip(expected, found, strict=True))
    counts: dict[str, Sequence[float]] = {
        "long": [len(own) > _LONG * len(reference) for reference, own in pairs],
        "compressible": [loops(text) for text in hypotheses],
        "repeats": [_repeats(own) and not _repeats(reference) for reference, own in pairs],
        "empty": [bool(reference) and not own for reference, own in pairs],
        "truncated": list(truncated),
    }
    if spoken is not None:
        counts["wrong_language"] = [other is not None and other != language for other in spoken]
    form = normaliser_version(normaliser) if task == "transcribe" else "lowercase"
    signature = f"lors-robustness:1|normaliser:{form}|lang:{language}"
    totals: dict[str, Sequence[float]] = dict.fromkeys(counts, [1] * len(pairs))
    if task == "transcribe":
        counts = {"insertions": _insertions(expected, found), **counts}
        totals["insertions"] = [len(reference) for reference in expected]
    made = {}
    for name, numbers in counts.items():
        rows = np.array([numbers, totals[name]], dtype=np.float64).T
        made[name] = Statistics(rows, float(percent(rows.sum(axis=0, keepdims=True))[0]), signature, percent)
    return made


def _insertions(expected: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> list[int]:
    """Of each utterance, in an alignment with the fewest errors (jiwer's)."""
    import jiwer

    output: Any = jiwer.process_words([" ".join(units) for units in expected], [" ".join(units) for units in found])
    return [
        sum(chunk.hyp_end_idx - chunk.hyp_start_idx for chunk in chunks if chunk.type == "insert")
        for chunks in output.alignments
    ]


def loops(text: str) -> bool:
    """Whether the UTF-8 text is more than 2.4 times as long as its zlib compression."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) > _COMPRESSIBLE


def _repeats(units: Sequence[str]) -> bool:
    """Whether a phrase of up to 8 units stands three times in a row."""
    for length in range(1, min(_LONGEST_PHRASE, len(units) // 3) + 1):
        run = 0
        for here, there in zip(units, units[length:], strict=False):
            run = run + 1 if here == there else 0
            if run == 2 * length:
                return True
    return False
