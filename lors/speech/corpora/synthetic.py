"""The synthetic corpus: multilingual parallel sentences (CLDR and number words) spoken by eSpeak NG.

A sentence is a language-independent form, such as (weekday 2, territory FR, 45 kilometres). It is rendered in the
spoken language (the transcription) and in English (the translation). The form alone decides the split, and every voice
belongs to one split, so test sentences and test voices are never trained on: in no language and with no seed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import random
from collections.abc import Iterator
from typing import Any

from lors.errors import InputError
from lors.speech.corpora.espeak import VOICES, speak
from lors.speech.corpus import Candidate

__all__ = ["LANGUAGES", "candidates", "generator_versions", "render", "sentences", "voices_of"]

LANGUAGES = ("ca", "de", "en", "es", "fr", "id", "it", "nl", "pt", "ru", "sv")

_TERRITORIES = (
    "AR AT AU BE BG BR CA CH CL CN CO CU CY CZ DE DK DZ EC EE EG ES ET FI FR GE GR HR HU ID IE IL IN IQ IR IS IT JP "
    "KE LT LV MA MX NG NL NO NP PE PL PT RO RS RU SE SI SK TR UA UY VE VN"
).split()
_LANGUAGE_NAMES = ("ar bg ca cs da de el en es et fi fr hi hr hu it ja ko nl pl pt ro ru sv tr").split()
_UNITS = (
    "area-hectare digital-gigabyte digital-megabyte duration-minute duration-second duration-week electric-volt "
    "length-centimeter length-kilometer length-meter mass-gram mass-kilogram mass-tonne power-kilowatt power-watt "
    "volume-liter"
).split()
# Numbers that end in 1 or 2 take the gender of what they count in several of the languages; num2words does not.
_NUMBERS = [n for n in range(3, 100) if n % 10 not in (1, 2) or n in (11, 12)]
# Keeps an utterance under 4 s in the most long-winded of the languages at the slowest rate used.
_MAX_CHARACTERS = 54
_SPLIT_PERCENT = {"test": 15, "validation": 10}

Phrase = tuple[str, Any]


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"the synthetic corpus needs {error.name}, which is not installed: run `pip install 'lors[synthesis]'`"
        ) from error


@functools.cache
def _locale(language: str) -> Any:
    with _extra():
        from babel import Locale
    return Locale(language)


@functools.cache
def _render_phrase(kind: str, value: Any, language: str) -> str:
    with _extra():
        from num2words import num2words
    locale = _locale(language)
    if kind == "territory":
        return str(locale.territories[value])
    if kind == "language":
        return str(locale.languages[value])
    if kind == "weekday":
        return str(locale.days["stand-alone"]["wide"][value])
    if kind == "month":
        return str(locale.months["stand-alone"]["wide"][value])
    number, unit = value
    patterns = locale._data["unit_patterns"][unit]["long"]  # format_unit() would print the number in digits
    pattern = patterns.get(locale.plural_form(number)) or patterns["other"]
    return str(pattern).replace("{0}", str(num2words(number, lang=language))).replace("\u00a0", " ")


def render(form: tuple[Phrase, ...], language: str) -> str:
    """The sentence of a form in a language, as CLDR writes it, its first letter upper case."""
    with _extra():
        from babel.lists import format_list
    text = str(format_list([_render_phrase(*phrase, language) for phrase in form], locale=_locale(language)))
    return text[0].upper() + text[1:]


def _sample(rng: random.Random) -> tuple[Phrase, ...]:
    def phrase() -> Phrase:
        kind = rng.choices(("territory", "language", "weekday", "month", "measure"), (4, 2, 1, 1, 4))[0]
        if kind == "territory":
            return kind, rng.choice(_TERRITORIES)
        if kind == "language":
            return kind, rng.choice(_LANGUAGE_NAMES)
        if kind == "weekday":
            return kind, rng.randrange(7)
        if kind == "month":
            return kind, rng.randrange(1, 13)
        return kind, (rng.choice(_NUMBERS), rng.choice(_UNITS))

    return tuple(dict.fromkeys(phrase() for _ in range(rng.choices((1, 2, 3), (1, 5, 3))[0])))


def _split_of(form: tuple[Phrase, ...]) -> str:
    bucket = _hash(*form) % 100
    for split, percent in _SPLIT_PERCENT.items():
        if bucket < percent:
            return split
        bucket -= percent
    return "train"


@functools.cache
def voices_of(split: str) -> tuple[str, ...]:
    """The voices of a split: of 55, ten are heard in tests only and five in validation only."""
    ranked = sorted(VOICES, key=_hash)
    return tuple({"test": ranked[:10], "validation": ranked[10:15], "train": ranked[15:]}[split])


def sentences(split: str, count: int, seed: int) -> Iterator[tuple[Phrase, ...]]:
    """`count` different forms of a split, the same for every language, so that row i is parallel in all of them."""
    rng, seen = random.Random(_hash("forms", seed)), set()
    for _ in range(1000 * (count + 10)):
        if count <= 0:
            return
        form = _sample(rng)
        if form in seen or _split_of(form) != split:
            continue
        if max(len(render(form, language)) for language in LANGUAGES) > _MAX_CHARACTERS:
            continue
        seen.add(form)
        count -= 1
        yield form
    raise InputError(
        f"the synthetic corpus has no {count} more different sentences for the {split} split: ask for fewer utterances"
    )


def candidates(language: str, split: str, count: int, seed: int) -> Iterator[Candidate]:
    """The `count` utterances of a split, spoken by voices of that split at varied rates and pitches."""
    if language not in LANGUAGES:
        raise InputError(
            f"the synthetic corpus does not speak {language!r}: choose from {', '.join(LANGUAGES)}, or give a manifest"
        )
    voices = voices_of(split)
    for index, form in enumerate(sentences(split, count, seed)):
        rng = random.Random(_hash("speech", language, split, index, seed))
        text, voice = render(form, language), rng.choice(voices)
        load = functools.partial(speak, text, language, voice, rng.randint(150, 195), rng.randint(25, 75))
        yield Candidate(f"{split}-{index:05d}", text, render(form, "en"), voice, load)


def generator_versions() -> dict[str, str]:
    """Versions of what shapes the corpus: a new release of any may change sentences or samples."""
    with _extra():
        return {name: importlib.metadata.version(name) for name in ("babel", "num2words", "espeakng-loader")}
