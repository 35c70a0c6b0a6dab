"""The normalisers on real phrases: what must stay, what must go, and what must be equal afterwards."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from lors.errors import InputError
from lors.scoring.normalise import NORMALISERS, UNSPACED, is_unspaced, normalise, normaliser_version

LANGUAGES = ("es", "fr", "de", "it", "ca", "pt", "ru", "id", "nl", "sv", "en", "hi", "zh", "ja", "th", "tr")


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("es", "¿Cómo estás? ¡Muy bien, señor Núñez!", "cómo estás muy bien señor núñez"),
        ("fr", "« Qu’est-ce que c’est ? »", "qu'est-ce que c'est"),
        ("fr", "Aujourd'hui, il s' appelle «Œdipe».", "aujourd'hui il s'appelle œdipe"),
        ("de", "Die Straße heißt „Große Bleichen“ – 3,5 km.", "die strasse heisst grosse bleichen 3 5 km"),
        ("it", "L' università dell'«arte» è un po' lontana.", "l'università dell'arte è un po lontana"),
        ("ca", "El col·legi d’aquí: l'ocell; COL·LECCIÓ.", "el col·legi d'aquí l'ocell col·lecció"),
        ("pt", "Na segunda-feira, não há pão-de-ló.", "na segunda-feira não há pão-de-ló"),
        ("ru", "Кто-то сказал: «По-русски — из-за ёлки!»", "кто-то сказал по-русски из-за ёлки"),
        ("id", "Anak-anak itu bermain layang-layang.", "anak-anak itu bermain layang-layang"),
        ("nl", "’s Ochtends zag hij foto's van zee-eenden.", "s ochtends zag hij foto's van zee-eenden"),
        ("sv", "Hon såg tv-programmet på Åland, eller hur?", "hon såg tv-programmet på åland eller hur"),
        ("en", "Don’t stop -- it's twenty-one 'o'clock'!", "don't stop it's twenty one o'clock"),
        ("hi", "हिन्दी में बात कीजिए।", "हिन्दी में बात कीजिए"),
        ("zh", "你好，世界！我在 2024 年。", "你好世界我在2024年"),
        ("ja", "コーヒーは、１２０円です。", "コーヒーは120円です"),
        ("th", "ภาษาไทย ที่นี่ (กรุงเทพฯ)", "ภาษาไทยที่นี่กรุงเทพฯ"),
        ("tr", "IŞIK İstanbul'da.", "ışık istanbul'da"),
    ],
)
def test_real_phrases(language: str, text: str, expected: str) -> None:
    assert normalise(text, language) == expected


@pytest.mark.parametrize(
    ("language", "variants"),
    [
        ("ca", ["col·legi", "col•legi", "coŀlegi", "COL‧LEGI", "Col∙legi."]),
        ("ca", ["l'amic", "l’amic", "l´amic", "lʼamic", "l' amic", "L’ «amic»"]),
        ("fr", ["peut-être", "peut‐être", "peut‑être", "pe\u00adut-être", "peut-e\u0302tre"]),
        ("pt", ["7-8 dias", "7–8 dias", "7 8 dias"]),
        ("hi", ["क\u093cलम", "\u0958लम"]),
        ("ja", ["ガラス", "ｶﾞﾗｽ", "カ\u3099ラス"]),
        ("zh", ["我 爱 你", "我爱你。", "我\u200b爱你"]),
        ("en", ["I love it", "I love it ❤️", "\ufeffI  love\u00a0it\n"]),
    ],
)
def test_ways_to_type_the_same_are_equal(language: str, variants: list[str]) -> None:
    assert len({normalise(variant, language) for variant in variants}) == 1


def test_the_rules_belong_to_their_languages() -> None:
    assert normalise("col·legi", "es") == "col legi"  # · is spelling in Catalan only
    assert normalise("sant·boi", "ca") == "sant boi"  # and there only between two l
    assert normalise("segunda-feira", "en") == "segunda feira"
    assert normalise("bon' ami", "fr") == "bon ami"  # a closing quote is no elision
    assert normalise("IL", "tr") != normalise("IL", "de")
    assert normalise("l' amic", "ca-ES") == normalise("l' amic", "ca") != normalise("l' amic", "en")


def test_every_mark_and_letter_of_hindi_and_thai_stays() -> None:
    for language, text in (("hi", "कीजिए क्षत्रिय हैं"), ("th", "ที่นี่เป็นผู้ใหญ่")):
        expected = unicodedata.normalize("NFKC", text)
        assert normalise(text, language) == expected.replace(" ", "" if language in UNSPACED else " ")


def test_whisper_basic_is_transformers_and_none_keeps_the_spelling() -> None:
    text = "  El col·legi d'aquí [soroll], (riu)\t sí! "
    assert normalise(text, "ca", "whisper_basic") == " ".join(BasicTextNormalizer()(text).split())
    assert normalise(text, "ca", "none") == "El col·legi d'aquí [soroll], (riu) sí!"


def test_unspaced_languages() -> None:
    assert is_unspaced("zh-CN")
    assert is_unspaced("yue")
    assert not is_unspaced("ko")
    assert normalise("我 爱 你", "zh", "none") == "我 爱 你"  # orthographic means as written


def test_signature_names_and_the_unknown_one() -> None:
    assert normaliser_version("lors") == "lors.1"
    assert normaliser_version("whisper_basic").startswith("whisper_basic.transformers-")
    with pytest.raises(InputError, match=r"'lower'.*lors, whisper_basic, none"):
        normalise("a", "es", "lower")


@given(st.text(), st.sampled_from(LANGUAGES))
def test_only_words_and_single_spaces_are_left(text: str, language: str) -> None:
    result = normalise(text, language)
    assert result == " ".join(result.split())
    assert all(char in " '-·" or unicodedata.category(char)[0] not in "PSZ" for char in result)
    if language in UNSPACED:
        assert " " not in result


PHRASES = st.text(st.sampled_from("abclLñéßÅIİŉ'’´-‑–·•.,!?«» \u00a0\t7３ｶﾞ你กำिकप़\u0301\u00ad"), max_size=30)


@given(PHRASES, st.sampled_from(LANGUAGES), st.sampled_from(sorted(NORMALISERS)))
def test_again_changes_nothing(text: str, language: str, normaliser: str) -> None:
    once = normalise(text, language, normaliser)
    assert normalise(once, language, normaliser) == once
