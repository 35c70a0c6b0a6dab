"""Which letters belong to a language: by script, not by alphabet, so that names and loan words pass."""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import chain
from typing import Final

__all__ = ["is_foreign", "script"]

# Whisper's languages that are not written in Latin letters alone.
_SCRIPTS: Final = {
    language: frozenset(scripts.split())
    for languages, scripts in {
        "am": "ETHIOPIC",
        "ar fa ps sd ur": "ARABIC",
        "as bn": "BENGALI",
        "ba be bg kk mk mn ru tg tt uk": "CYRILLIC",
        "bo": "TIBETAN",
        "el": "GREEK",
        "gu": "GUJARATI",
        "he yi": "HEBREW",
        "hi mr ne sa": "DEVANAGARI",
        "hy": "ARMENIAN",
        "ja": "CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA LATIN",
        "ka": "GEORGIAN",
        "km": "KHMER",
        "kn": "KANNADA",
        "ko": "HANGUL CJK LATIN",
        "lo": "LAO",
        "ml": "MALAYALAM",
        "my": "MYANMAR",
        "pa": "GURMUKHI",
        "si": "SINHALA",
        "sr uz": "CYRILLIC LATIN",
        "ta": "TAMIL",
        "te": "TELUGU",
        "th": "THAI",
        "yue zh": "CJK LATIN",
    }.items()
    for language in languages.split()
}
_KNOWN_SCRIPTS: Final = frozenset(chain(["LATIN"], *_SCRIPTS.values()))


@cache
def script(character: str) -> str | None:
    """The script of a letter, as its Unicode name begins (LATIN); None for what scripts share, such as 7, - and º."""
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").partition(" ")[0]
    return name if name in _KNOWN_SCRIPTS else None


@cache
def is_foreign(character: str, language: str) -> bool:
    """Whether a letter is of a script that the language, by Whisper's code, is not written in."""
    found = script(character)
    return found is not None and found not in _SCRIPTS.get(language, {"LATIN"})
