"""What is measured of prepared speech: whether texts and audio belong together, who speaks, what cannot be written.

Texts are read column by column; of the audio a sample is decoded. N is the number of utterances of a split.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from lors.scoring.normalise import is_unspaced, normalise
from lors.speech.corpus import LONGEST_SECONDS, Utterance
from lors.speech.scripts import is_foreign

if TYPE_CHECKING:
    from lors.speech.architecture import Architecture

__all__ = [
    "Audio",
    "Cases",
    "Distribution",
    "Misfit",
    "Overlap",
    "Rows",
    "SplitFacts",
    "Writer",
    "language_facts",
    "misfits",
    "order_correlation",
    "overlaps_of_languages",
    "overlaps_of_splits",
    "sample_audio",
]

Floats = npt.NDArray[np.float64]
Shared = Literal["speakers", "sentences", "translations"]

SAMPLE, SAMPLE_GROUPS = 200, 25  # recordings that are decoded, from so many row groups of some 20 MB at most
SHOWN = 10  # of the worst and of the most frequent

# Our choice: speakers differ by less than this, and the seconds leave room for the silence around a short word.
TOO_MUCH, MUCH_SECONDS = 2.0, 1.0  # of text: times as long as usual, and so many seconds more than there are
TOO_LITTLE, LITTLE_SECONDS = 1 / 3, 3.0
CORRELATED_ROWS = 50  # a rank correlation of fewer says little: its standard error is 1 / sqrt(N - 1)

FULL_SCALE = 0.999  # a sample as loud was cut off
CLIPPED_SHARE = 1e-3  # of a recording's samples at full scale: audibly distorted
QUIET_DB = -40.0  # of a recording's level: most of its 16 bits are unused


@dataclass(frozen=True, slots=True)
class Cases:
    """How many utterances have something, and the ids of some, the worst or first ones first."""

    count: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Quantiles, and a histogram of bins of `width` from 0 on; the last one holds what is beyond it, too."""

    minimum: float
    p5: float
    p25: float
    median: float
    p75: float
    p95: float
    maximum: float
    width: float
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Floats, width: float, bins: int) -> Distribution:
        """Of (N,) values from 0 on, N >= 1."""
        quantiles = np.round(np.quantile(values, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)), 3)
        minimum, p5, p25, median, p75, p95, maximum = quantiles.tolist()
        counts = np.bincount(np.minimum(values / width, bins - 1).astype(int), minlength=bins)
        return cls(minimum, p5, p25, median, p75, p95, maximum, width, tuple(counts.tolist()))


@dataclass(frozen=True, slots=True)
class Misfit:
    """A text that cannot belong to its audio; `usual` is the seconds that such a text takes in this language."""

    id: str
    seconds: float
    usual: float
    text: str


@dataclass(frozen=True, slots=True)
class Audio:
    """Of the decoded sample. A level is what 1 % of a recording's samples are above, in dB of full scale."""

    sampled: int
    clipped: Cases
    quiet: Cases
    median_level: float


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """The figures of one prepared split; numbers are of utterances unless they say otherwise."""

    language: str
    split: str
    utterances: int
    hours: float
    seconds: Distribution
    characters_per_second: Distribution
    words_per_second: Distribution | None
    """None where words are not spaced."""
    misfits: Cases
    worst_misfits: tuple[Misfit, ...]
    correlation: float | None
    """See `order_correlation`, of characters and seconds."""
    speakers: int
    without_speaker: int
    without_translation: int
    repeated: int
    """Those whose normalised text an earlier one has."""
    most_repeated: dict[str, int]
    unwritten: Cases
    """Those with a text or translation that the base's tokenizer does not write and read back."""
    unwritable: dict[str, int]
    """The characters that it cannot write, with their occurrences."""
    foreign: Cases
    """Those with letters of a script that the language, or English, is not written in."""
    foreign_letters: dict[str, int]
    """Those letters, with their occurrences."""
    token_limit: int
    """Of the decoder, its prompt included."""
    too_long: dict[str, Cases]
    """By task: those with more tokens than that."""
    window: float
    """Seconds that a batch with the longest one takes, by the experiment's settings."""
    outside_window: Cases
    rejected: dict[str, int]
    """Rows by reason."""
    rejects: str
    """The file that names them."""
    audio: Audio


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a split has in common with one that it should have nothing in common with."""

    about: Shared
    language: str
    split: str
    other: str
    """The other split; `LANGUAGE train` is another language's."""
    shared: int
    """Distinct speakers, sentences or translations."""
    utterances: int
    """Of `split`, that have them."""
    share: float
    """Of the utterances of `split`."""
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """The columns of a prepared split, without the audio."""

    path: Path
    language: str
    ids: list[str]
    texts: list[str]
    translations: list[str | None]
    speakers: list[str | None]
    seconds: Floats

    @classmethod
    def read(cls, path: Path, language: str) -> Rows:
        """Of `SPLIT.parquet`, with `rejects.jsonl` beside it."""
        names = ("id", "text", "translation", "speaker", "seconds")
        ids, texts, translations, speakers, seconds = (pq.read_table(path, columns=[name]).column(0) for name in names)
        texts, translations, speakers = texts.to_pylist(), translations.to_pylist(), speakers.to_pylist()
        return cls(path, language, ids.to_pylist(), texts, translations, speakers, seconds.to_numpy())

    @property
    def split(self) -> str:
        """Its name."""
        return self.path.stem

    @cached_property
    def sentences(self) -> list[str]:
        """The normalised texts."""
        return [normalise(text, self.language) for text in self.texts]

    @cached_property
    def english(self) -> list[str]:
        """The normalised translations; empty where there is none."""
        return [normalise(text or "", "en") for text in self.translations]

    def shared(self, about: Shared) -> list[str]:
        """What an overlap is looked for in; empty where there is none."""
        if about == "speakers":
            return [speaker or "" for speaker in self.speakers]
        return self.sentences if about == "sentences" else self.english

    def cases(self, chosen: npt.NDArray[np.bool_]) -> Cases:
        """Of (N,) flags."""
        return Cases(int(chosen.sum()), tuple(self.ids[index] for index in np.flatnonzero(chosen)[:SHOWN]))


class Writer:
    """What the base's tokenizer and decoder make of a text."""

    def __init__(self, architecture: Architecture, config: Any, tokenizer: Any) -> None:
        self.architecture, self.config = architecture, config
        self._tokenizer = tokenizer
        self._can: dict[str, bool] = {}
        self.limit = architecture.token_limit(config)

    def write(self, text: str) -> tuple[int, bool]:
        """The tokens of a text, and whether they read back as that text, but for white space."""
        tokens = self.architecture.text_tokens(self._tokenizer, text)
        return len(tokens), self._read(tokens).split() == text.split()

    def can_write(self, character: str) -> bool:
        """Whether a character comes back, standing alone."""
        if character not in self._can:
            tokens = self.architecture.text_tokens(self._tokenizer, character)
            self._can[character] = character.isspace() or character in self._read(tokens)
        return self._can[character]

    def prompt(self, language: str, task: str) -> int:
        """Tokens before the text, the start token left out."""
        return len(self.architecture.prefix(self._tokenizer, language, task))

    def _read(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def language_facts(
    splits: Mapping[str, Rows],
    writer: Writer,
    tasks: Sequence[str],
    windows: Mapping[str, float | str],  # the setting by split
    on_progress: Callable[[str, int, int], None],
) -> list[SplitFacts]:
    """The facts of each split of one language; what is usual in it is taken over all of them.

    `on_progress` is called with a split, the texts written so far, and all.
    """
    characters = {split: _counts(rows.texts, len) for split, rows in splits.items()}
    rates = {split: characters[split] / rows.seconds for split, rows in splits.items()}
    usual = float(np.median(np.concatenate([*rates.values()]))) if rates else 0.0
    facts = []
    for split, rows in splits.items():
        words = _counts(rows.texts, lambda text: len(text.split())) / rows.seconds
        facts.append(
            SplitFacts(
                language=rows.language,
                split=split,
                utterances=len(rows.ids),
                hours=round(float(rows.seconds.sum()) / 3600, 4),
                seconds=Distribution.of(rows.seconds, 0.5, round(LONGEST_SECONDS / 0.5)),
                characters_per_second=Distribution.of(rates[split], 1.0, 40),
                words_per_second=None if is_unspaced(rows.language) else Distribution.of(words, 0.25, 40),
                correlation=order_correlation(characters[split], rows.seconds),
                audio=_audio(rows),
                **_fit(rows, characters[split], usual),
                **_sources(rows),
                **_letters(rows, tasks),
                **_tokens(rows, writer, tasks, on_progress),
                **_window(rows, writer, windows[split]),
            )
        )
    return facts


def _counts(texts: Sequence[str], count: Callable[[str], int]) -> Floats:
    return np.array([count(text) for text in texts], dtype=np.float64)


def misfits(
    characters: Floats,  # (N,) of each text, at least 1
    seconds: Floats,  # (N,) of its audio
    usual: float,  # characters a second, in the language
) -> Floats:
    """(N,) log2 of the seconds that a text usually takes over those it has; 0 where the two may belong together."""
    needed = characters / usual
    ratio = needed / seconds
    much = (ratio > TOO_MUCH) & (needed - seconds > MUCH_SECONDS)
    little = (ratio < TOO_LITTLE) & (seconds - needed > LITTLE_SECONDS)
    return np.where(much | little, np.log2(ratio), 0.0)


def order_correlation(
    characters: Floats,  # (N,)
    seconds: Floats,  # (N,)
) -> float | None:
    """Spearman's rank correlation: 0.7 and more for speech and its text, 0 where rows were shuffled.

    None for few utterances, or where their durations hardly differ.
    """
    if len(seconds) < CORRELATED_ROWS or np.quantile(seconds, 0.9) < 1.5 * np.quantile(seconds, 0.1):
        return None
    first, second = (pd.Series(values).rank() for values in (characters, seconds))
    return round(float(first.corr(second)), 3) if first.nunique() > 1 else 0.0


def _fit(rows: Rows, characters: Floats, usual: float) -> dict[str, Any]:
    apart = np.abs(misfits(characters, rows.seconds, usual))
    count = int(np.count_nonzero(apart))
    worst = [
        Misfit(rows.ids[i], round(float(rows.seconds[i]), 2), round(float(characters[i] / usual), 2), rows.texts[i])
        for i in np.argsort(-apart, kind="stable")[: min(SHOWN, count)].tolist()
    ]
    return {"misfits": Cases(count, tuple(misfit.id for misfit in worst)), "worst_misfits": tuple(worst)}


def _sources(rows: Rows) -> dict[str, Any]:
    """Speakers, translations, repeated sentences and rejected rows."""
    counts = Counter(rows.sentences)
    rejects = rows.path.with_name("rejects.jsonl")
    lines = rejects.read_text(encoding="utf-8").split("\n")
    return {
        "speakers": len(set(rows.speakers) - {None}),
        "without_speaker": rows.speakers.count(None),
        "without_translation": rows.translations.count(None),
        "repeated": len(rows.ids) - len(counts),
        "most_repeated": {text: number for text, number in counts.most_common(SHOWN) if number > 1},
        "rejected": dict(Counter(json.loads(line)["reason"] for line in lines if line).most_common()),
        "rejects": str(rejects),
    }


def _letters(rows: Rows, tasks: Sequence[str]) -> dict[str, Any]:
    targets = [(rows.texts, rows.language)] if "transcribe" in tasks else []
    targets += [([text or "" for text in rows.translations], "en")] if "translate" in tasks else []
    foreign, letters = np.zeros(len(rows.ids), bool), Counter[str]()
    for texts, language in targets:
        for index, text in enumerate(texts):
            if found := [character for character in set(text) if is_foreign(character, language)]:
                foreign[index] = True
                letters.update({character: text.count(character) for character in found})
    return {"foreign": rows.cases(foreign), "foreign_letters": dict(letters.most_common(SHOWN))}


def _tokens(
    rows: Rows, writer: Writer, tasks: Sequence[str], on_progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    lost, too_long, unwritable = np.zeros(len(rows.ids), bool), {}, Counter[str]()
    every = len(tasks) * len(rows.ids)
    for done, task in enumerate(tasks):
        longer, room = np.zeros(len(rows.ids), bool), writer.limit - writer.prompt(rows.language, task)
        for index, text in enumerate(rows.texts if task == "transcribe" else rows.translations):
            if index % 1000 == 0:
                on_progress(rows.split, done * len(rows.ids) + index, every)
            if text is None:
                continue
            tokens, same = writer.write(text)
            longer[index] = tokens >= room
            if not same:
                lost[index] = True
                unwritable.update(character for character in text if not writer.can_write(character))
        too_long[task] = rows.cases(longer)
    return {
        "unwritten": rows.cases(lost),
        "unwritable": dict(unwritable.most_common(SHOWN)),
        "token_limit": writer.limit,
        "too_long": too_long,
    }


def _window(rows: Rows, writer: Writer, setting: float | str) -> dict[str, Any]:
    window = writer.architecture.window_for(writer.config, float(rows.seconds.max()), setting)
    return {"window": window, "outside_window": rows.cases(rows.seconds > window + 0.01)}


def _audio(rows: Rows) -> Audio:
    found = {identity: _loudness(audio) for identity, audio in sample_audio(rows.path, SAMPLE)}
    clipped = sorted((i for i, (full, _) in found.items() if full > CLIPPED_SHARE), key=lambda i: -found[i][0])
    quiet = sorted((i for i, (_, level) in found.items() if level < QUIET_DB), key=lambda i: found[i][1])
    return Audio(
        len(found),
        Cases(len(clipped), tuple(clipped[:SHOWN])),
        Cases(len(quiet), tuple(quiet[:SHOWN])),
        round(float(np.median([level for _, level in found.values()])), 1),
    )


def sample_audio(path: Path, count: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """(id, (samples,) float32) of `count` recordings of a prepared split, or of all if there are fewer.

    In the file's order, and the same for the same seed; one row group is in memory at a time.
    """
    draw = random.Random(seed)
    with pq.ParquetFile(path) as file:
        groups = draw.sample(range(file.num_row_groups), min(file.num_row_groups, SAMPLE_GROUPS))
        rows = [(group, row) for group in groups for row in range(file.metadata.row_group(group).num_rows)]
        wanted = draw.sample(rows, min(len(rows), count))
        for group in sorted(groups):
            here = sorted(row for owner, row in wanted if owner == group)
            for row in file.read_row_group(group, columns=["id", "audio.bytes"]).take(here).to_pylist():
                yield row["id"], Utterance(row["id"], "", None, None, 0.0, row["audio"]["bytes"]).audio()


def _loudness(audio: np.ndarray) -> tuple[float, float]:
    """(share of the samples at full scale, level) of (samples,) in [-1, 1]."""
    size = np.abs(audio)
    return float(np.mean(size >= FULL_SCALE)), 20 * math.log10(max(float(np.quantile(size, 0.99)), 1e-6))


def overlaps_of_splits(splits: Mapping[str, Rows]) -> Iterator[Overlap]:
    """What the splits of one language have in common."""
    abouts: tuple[Shared, ...] = ("speakers", "sentences", "translations")
    for split, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        if split in splits and other in splits:
            for about in abouts:
                theirs = set(splits[other].shared(about))
                yield from _overlap(about, splits[split].language, split, other, splits[split].shared(about), theirs)


def overlaps_of_languages(
    tested: Mapping[str, Sequence[str]],  # the normalised translations of each language's test split
    trained: Mapping[str, Collection[str]],  # and of its train split
) -> Iterator[Overlap]:
    """What a language's test split has in common with what another language trains the one decoder to write."""
    for language, mine in tested.items():
        for other, theirs in trained.items():
            if other != language:
                yield from _overlap("translations", language, "test", f"{other} train", mine, theirs)


def _overlap(
    about: Shared, language: str, split: str, other: str, mine: Sequence[str], theirs: Collection[str]
) -> Iterator[Overlap]:
    counts = Counter(value for value in mine if value and value in theirs)
    if counts:
        hit = sum(counts.values())
        examples = tuple(value for value, _ in counts.most_common(SHOWN))
        yield Overlap(about, language, split, other, len(counts), hit, round(hit / len(mine), 4), examples)
