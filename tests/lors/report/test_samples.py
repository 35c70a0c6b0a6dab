"""Which utterances are shown, and what is marked in them."""

from __future__ import annotations

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from lors.report.samples import choose_samples, compare

SENTENCES = st.lists(st.sampled_from(["Año", "año,", "¡", "l'amic", "B", "b-b", "<x>", "日本"]), max_size=8).map(
    " ".join
)


@given(SENTENCES, SENTENCES, st.sampled_from(["es", "en", "ja", "ca"]))
def test_pieces_give_both_texts_back(reference: str, hypothesis: str, language: str) -> None:
    pieces = compare(reference, hypothesis, language)
    for text, own in ((reference, [p.reference for p in pieces]), (hypothesis, [p.hypothesis for p in pieces])):
        assert "".join("".join(own).split()) == "".join(text.split())
    assert {p.kind for p in pieces} <= {"equal", "insert", "delete", "substitute"}
    assert all(p.reference == "" for p in pieces if p.kind == "insert")
    assert all(p.hypothesis == "" for p in pieces if p.kind == "delete")


def test_differences_are_of_words_not_of_their_spelling() -> None:
    assert [
        tuple(p) for p in compare("Hola, buen día a todos mis amigos", "hola mal día todos mis amigos ya", "es")
    ] == [
        ("equal", "Hola,", "hola"),
        ("substitute", "buen", "mal"),
        ("equal", "día", "día"),
        ("delete", "a", ""),
        ("equal", "todos mis amigos", "todos mis amigos"),
        ("insert", "", "ya"),
    ]
    assert [p.kind for p in compare("日本語", "日木語", "ja")] == ["equal", "substitute", "equal"]


def table(hypotheses: list[str | None]) -> pd.DataFrame:
    references = ["a b c d", "a b c d", "a b c d e f", None, "a b"]
    return pd.DataFrame(
        {
            "id": [f"u{n}" for n in range(5)],
            "language": "es",
            "task": "transcribe",
            "split": ["test"] * 4 + ["validation"],
            "reference": references,
            "hypothesis": hypotheses,
        }
    )


def test_the_most_disputed_utterances_come_first() -> None:
    tables = {
        "base": table(["a b c x", "x x x x", None, "a", "x"]),
        "lors": table(["a b c d", "a b c d", "a b c d e f", "a", "a b"]),
    }
    chosen = choose_samples(tables, "test", 2)
    assert [sample.id for sample in chosen] == ["u2", "u1"]  # both by 1; the longer one first
    assert chosen[0].rates == {"base": 1.0, "lors": 0.0}
    assert chosen[0].hypotheses["base"] == ""
    assert choose_samples(tables, "test", 2) == choose_samples({k: v[::-1] for k, v in tables.items()}, "test", 2)
    assert choose_samples({}, "test") == []
