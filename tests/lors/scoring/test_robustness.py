"""What goes wrong in single utterances, against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lors.scoring.robustness import MEASURES, _repeats, robustness

LOOP = "gracias por ver el video " * 9


def values(pairs: list[tuple[str, str]], **changes: object) -> dict[str, float]:
    options: dict[str, object] = {"language": "es", "task": "transcribe", "normaliser": "lors"}
    options |= {"truncated": [False] * len(pairs)} | changes
    references, hypotheses = [a for a, _ in pairs], [b for _, b in pairs]
    return {name: own.value for name, own in robustness(references, hypotheses, **options).items()}  # type: ignore[arg-type]


def test_each_measure_by_hand() -> None:
    pairs = [
        ("Uno dos tres.", "uno, dos tres"),  # as it should be
        ("uno dos tres cuatro", "uno dos y tres cuatro"),  # one word inserted
        ("hola", LOOP),  # a loop: long, compressible, repeated, 44 words inserted and one replaced
        ("no no no no", "no no no no"),  # as spoken
        ("uno dos", "..."),  # nothing but punctuation
        ("", ""),  # nothing was said
    ]
    found = values(
        pairs, truncated=[False, False, True, False, False, False], spoken=["es", "pt", None, "es", "es", "es"]
    )
    words = 3 + 4 + 1 + 4 + 2
    assert found["insertions"] == pytest.approx(100 * (1 + 44) / words)
    for name in ("long", "compressible", "repeats", "empty", "truncated", "wrong_language"):
        assert found[name] == pytest.approx(100 / 6), name
    assert set(found) == set(MEASURES) - {"free"}


def test_characters_are_the_units_where_words_are_not_spaced() -> None:
    found = values([("你好世界", "你好好世界"), ("你好", "谢谢谢谢谢谢")], language="zh")
    assert found["insertions"] == pytest.approx(100 * (1 + 4) / 6)
    assert found["long"] == 50
    assert found["repeats"] == 50


def test_translations_are_english_words_and_have_no_insertions() -> None:
    found = values([("the house", "The house"), ("one", "one two three")], language="zh", task="translate")
    assert "insertions" not in found
    assert found["long"] == 50
    assert "wrong_language" not in found


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), st.lists(st.sampled_from("de"), max_size=4))
def test_a_phrase_three_times_in_a_row_is_found_wherever_it_stands(phrase: list[str], around: list[str]) -> None:
    assert _repeats([*around, *phrase, *phrase, *phrase, *around])
    assert not _repeats(["x", *map(str, range(9))])


@given(st.lists(st.text("ab ", max_size=12), min_size=1, max_size=6))
def test_a_perfect_system_has_none_and_all_are_shares(texts: list[str]) -> None:
    perfect = values([(text, text) for text in texts])
    assert {name: perfect[name] for name in ("insertions", "long", "repeats", "empty")} == dict.fromkeys(
        ("insertions", "long", "repeats", "empty"), 0
    )
    other = values([(text, text[::-1] + " b") for text in texts])
    assert all(np.isfinite(value) and value >= 0 for value in other.values())
