"""Text normalisers for error rates; each has a name and a version that go into a score's signature.

Whisper's `BasicTextNormalizer` (arXiv 2212.04356, appendix C) turns combining marks into spaces, Hindi's vowel signs
included, and splits `col·legi`, `d'aquí` and `segunda-feira`. The default here, "lors", strips punctuation and symbols
only, and keeps the ones that spelling puts inside a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Final

from lors.errors import InputError

__all__ = ["NORMALISERS", "UNSPACED", "is_unspaced", "normalise", "normaliser_version"]

UNSPACED: Final = frozenset({"bo", "ja", "km", "lo", "my", "th", "yue", "zh"})
"""Languages written without spaces between words: CER is their error rate, and "lors" removes their spaces."""

# The spacing accents are mapped before NFKC, which would make them a space and a combining mark.
_APOSTROPHES = str.maketrans(dict.fromkeys("’‘‛ʼʻ´`′＇", "'"))
_TURKIC_CASE = str.maketrans({"I": "ı", "İ": "i"})
# Transcripts write "l' università" and "l'«università»" for the one word l'università; only these forms are joined,
# since an apostrophe before a space is also a truncation ("un po' di") or a closing quote.
_ELIDED: Final = {
    "ca": "d|l|m|n|s|t",
    "fr": "c|d|j|l|m|n|s|t|qu|jusqu|lorsqu|puisqu|quoiqu",
    "it": "c|d|l|m|n|s|t|v|un|all|anch|coll|com|cos|dall|dell|dov|mezz|nell|quell|quest|senz|sull|tutt",
}
_ELISION: Final = {language: re.compile(rf"\b({forms})'[\W_]+(?=\w)") for language, forms in _ELIDED.items()}
_CATALAN_DOT: Final = re.compile("(?<=l)[•∙⋅‧・](?=l)")


def _primary(language: str) -> str:
    """`sv-SE` and `pt_BR` follow the rules of `sv` and `pt`."""
    return re.split("[-_]", language.casefold(), maxsplit=1)[0]


def is_unspaced(language: str) -> bool:
    """Whether the language is written without spaces between words; regional codes (`zh-CN`) count."""
    return _primary(language) in UNSPACED


def _joins(before: str, char: str, after: str, language: str) -> bool:
    """Whether the punctuation `char` belongs to the spelling of the word around it."""
    if unicodedata.category(before)[0] not in "LMN" or unicodedata.category(after)[0] not in "LN":
        return False
    if char == "-":
        # English alternates (twenty-one, twenty one) where segunda-feira and rubah-rubah are spelling; 7-8 is a range.
        return language != "en" and not (before.isdigit() and after.isdigit())
    return char == "'" or (char == "·" and language == "ca" and before == after == "l")


def _lors(text: str, language: str) -> str:
    # Soft hyphens, zero-width and direction marks show nothing and would hide a word's neighbours.
    text = "".join(char for char in text if char.isspace() or unicodedata.category(char) not in ("Cc", "Cf"))
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
    if language in ("tr", "az"):
        text = text.translate(_TURKIC_CASE)
    text = unicodedata.normalize("NFKC", text.casefold()).translate(_APOSTROPHES).replace("\u2010", "-")
    if language in _ELISION:
        text = _ELISION[language].sub(r"\1'", text)
    if language == "ca":
        text = _CATALAN_DOT.sub("·", text)
    kept: list[str] = []
    for char, after in zip(text, text[1:] + " ", strict=False):  # the empty text has an "after" too many
        before = kept[-1] if kept else " "
        kind = unicodedata.category(char)[0]
        if kind in "PS" and not _joins(before, char, after, language):
            kept.append(" ")
        elif kind != "M" or not before.isspace():  # a mark without a letter is an emoji's remains
            kept.append(char)
    return ("" if language in UNSPACED else " ").join("".join(kept).split())


@cache
def _basic_text_normaliser() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer  # takes a second to import

    return BasicTextNormalizer()  # type: ignore[no-any-return]


def _whisper_basic(text: str, language: str) -> str:
    return " ".join(_basic_text_normaliser()(text).split())


def _none(text: str, language: str) -> str:
    return " ".join(text.split())


NORMALISERS: Final[dict[str, tuple[str, Callable[[str, str], str]]]] = {
    "lors": ("1", _lors),
    "whisper_basic": (f"transformers-{version('transformers')}", _whisper_basic),
    "none": ("1", _none),
}
"""Name: (version, function of text and primary language code); whoever changes an output raises its version."""


def _find(normaliser: str) -> tuple[str, Callable[[str, str], str]]:
    if normaliser not in NORMALISERS:
        raise InputError(f"There is no normaliser {normaliser!r}; choose one of {', '.join(NORMALISERS)}.")
    return NORMALISERS[normaliser]


def normalise(text: str, language: str, normaliser: str = "lors") -> str:
    """Normalise a transcript for an error rate.

    - "lors": NFKC, casefold (dotted and dotless i for Turkish and Azerbaijani), punctuation and symbols become spaces,
      combining marks stay. Inside a word these stay: the apostrophe, one character however it was typed, so that an
      elision is one word (`l'amic`); the hyphen, but for English; the Catalan `l·l`. Spaces go in UNSPACED languages.
    - "whisper_basic": transformers' `BasicTextNormalizer`.
    - "none": the text as written (orthographic), white space collapsed.

    Raises InputError for an unknown normaliser.
    """
    return _find(normaliser)[1](text, _primary(language))


def normaliser_version(normaliser: str) -> str:
    """The name with its version, as in a signature: `lors.1`. Raises InputError for an unknown normaliser."""
    return f"{normaliser}.{_find(normaliser)[0]}"
