"""Utterances that show how systems differ, with what is wrong in each hypothesis. No HTML here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from statistics import pstdev
from typing import NamedTuple

import jiwer
import pandas as pd

from lors.scoring.normalise import is_unspaced, normalise

__all__ = ["Piece", "Sample", "choose_samples", "compare"]


class Piece(NamedTuple):
    """Words in a row that are right or wrong in one way."""

    kind: str
    """equal, insert, delete or substitute."""
    reference: str
    hypothesis: str


class Sample(NamedTuple):
    """One utterance and what every system made of it."""

    id: str
    language: str
    task: str
    reference: str
    hypotheses: dict[str, str]
    rates: dict[str, float]
    """Wrong words (characters of unspaced scripts) over those of the reference."""


def choose_samples(
    tables: Mapping[str, pd.DataFrame],  # hypotheses by system
    split: str,
    count: int = 3,
) -> list[Sample]:
    """The utterances of each language and task whose error rates spread most over the systems, ties by length and id.

    A rate above 1 counts as 1, so that one endless loop does not decide. Only utterances that every system with that
    language and task has.
    """
    parts: dict[tuple[str, str], dict[str, dict[str, tuple[str, str]]]] = {}
    for system, table in tables.items():
        rows = table[table["split"] == split]
        for row in zip(
            *(rows[name].tolist() for name in ("language", "task", "id", "reference", "hypothesis")), strict=True
        ):
            language, task, utterance, reference, hypothesis = row
            if isinstance(reference, str):
                said = hypothesis if isinstance(hypothesis, str) else ""
                parts.setdefault((language, task), {}).setdefault(system, {})[utterance] = (reference, said)
    chosen = []
    for (language, task), systems in sorted(parts.items(), key=lambda item: (item[0][1] != "transcribe", item[0])):
        first = next(iter(systems.values()))
        ids = sorted(set.intersection(*(set(found) for found in systems.values())))
        script = "en" if task == "translate" else language
        rates = {name: _rates([found[i] for i in ids], script) for name, found in systems.items()}
        apart = []
        for index, utterance in enumerate(ids):
            own = [min(of[index], 1.0) for of in rates.values()]
            apart.append((-round(pstdev(own), 6), -len(first[utterance][0]), utterance, index))
        for _, _, utterance, index in sorted(apart)[:count]:
            chosen.append(
                Sample(
                    utterance,
                    language,
                    task,
                    first[utterance][0],
                    {name: found[utterance][1] for name, found in systems.items()},
                    {name: of[index] for name, of in rates.items()},
                )
            )
    return chosen


def compare(reference: str, hypothesis: str, language: str) -> list[Piece]:
    """The hypothesis against the reference, word by word (character by character in an unspaced script); case and
    punctuation are shown but are no difference."""
    words = (_words(reference, language), _words(hypothesis, language))
    (chunks,) = _process([words], language).alignments or [[]]
    between = "" if is_unspaced(language) else " "
    return [
        Piece(
            chunk.type,
            between.join(words[0][chunk.ref_start_idx : chunk.ref_end_idx]),
            between.join(words[1][chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in chunks
    ]


def _rates(pairs: list[tuple[str, str]], language: str) -> list[float]:
    words = [(_words(reference, language), _words(hypothesis, language)) for reference, hypothesis in pairs]
    rates = []
    for (reference, _), chunks in zip(words, _process(words, language).alignments if words else [], strict=True):
        wrong = sum(
            max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks if c.type != "equal"
        )
        rates.append(wrong / max(1, len(reference)))
    return rates


def _words(text: str, language: str) -> list[str]:
    return [letter for letter in text if not letter.isspace()] if is_unspaced(language) else text.split()


def _process(words: list[tuple[list[str], list[str]]], language: str) -> jiwer.WordOutput:
    keys = [" ".join(_key(word, language) for word in side) for pair in words for side in pair]
    as_words = jiwer.Compose([jiwer.ReduceToListOfListOfWords()])
    return jiwer.process_words(keys[::2], keys[1::2], reference_transform=as_words, hypothesis_transform=as_words)


@lru_cache(maxsize=65536)
def _key(word: str, language: str) -> str:
    """What two words are compared by; punctuation alone stays as it is."""
    return normalise(word, language).replace(" ", "") or word
