"""The synthetic corpus: the same in every process, parallel, and split so that tests stay unseen."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lors.errors import InputError
from lors.speech.corpora import espeak, synthetic
from lors.speech.corpora.espeak import VOICES, speak
from lors.speech.corpora.synthetic import LANGUAGES, candidates, generator_versions, render, sentences, voices_of
from lors.speech.corpus import SPLITS

SPOKEN = [("Dos kilómetros y medio", "es", "m3"), ("Frankreich und Italien", "de", "belinda"), ("Tisdag", "sv", "f4")]


def digest(samples: np.ndarray) -> str:
    return hashlib.sha256(samples.tobytes()).hexdigest()


def spoken() -> list[str]:
    return [digest(speak(text, language, voice, 170, 40)[0]) for text, language, voice in SPOKEN]


def test_same_samples_in_any_process_thread_and_order() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_synthetic; print(*reversed(test_synthetic.spoken()))"
    )
    command = [sys.executable, "-c", program]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONHASHSEED": seed}) for seed in "12"
    ]
    expected = spoken()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda s: digest(speak(s[0], s[1], s[2], 170, 40)[0]), SPOKEN[::-1]))
    assert found == expected[::-1]
    assert [child.communicate()[0].split() for child in children] == [expected[::-1]] * 2


def test_no_voice_sets_breath() -> None:
    """With it, eSpeak reads memory that nothing wrote: other samples in every process."""
    import espeakng_loader

    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    breathing = {path.name for path in folder.iterdir() if "breath" in path.read_text(encoding="utf-8")}
    assert {"f3", "victor"} <= breathing
    assert not breathing & set(VOICES)


def test_every_voice_differs_from_the_others() -> None:
    """eSpeak takes its default voice, without a word, for a variant that it does not know."""
    found = {digest(speak("ala", "es", voice, 190, 50)[0]) for voice in VOICES}
    assert len(found) == len(VOICES) == len(set(VOICES))


def test_rate_and_pitch_matter() -> None:
    audio, rate = speak("Alemania y Francia", "es", "m1", 170, 40)
    assert rate == 22_050
    assert audio.dtype == np.float32
    assert 0.01 < np.abs(audio).max() <= 1
    assert len(speak("Alemania y Francia", "es", "m1", 140, 40)[0]) > 1.1 * len(audio)
    assert digest(speak("Alemania y Francia", "es", "m1", 170, 70)[0]) != digest(audio)


def test_unknown_language_and_voice() -> None:
    with pytest.raises(InputError, match="eSpeak NG does not speak 'xx'"):
        speak("a", "xx", "m1", 170, 40)
    with pytest.raises(InputError, match="no voice 'm99': choose from m1, m2"):
        speak("a", "es", "m99", 170, 40)
    with pytest.raises(InputError, match="does not speak 'ja': choose from ca, de"):
        next(candidates("ja", "test", 1, 0))
    assert len(speak("a", "es", "m1", 170, 40)[0]) > 0  # an error leaves nothing behind


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_speaks(language: str) -> None:
    for split in SPLITS:
        for candidate in candidates(language, split, 2, 5):
            samples, rate = candidate.load()
            assert 0.3 < len(samples) / rate <= 4.0
            assert np.abs(samples).max() > 0.01
            assert candidate.text
            assert candidate.translation
            assert candidate.speaker in voices_of(split)


def test_sentences_are_parallel_in_all_languages() -> None:
    rows = {code: list(candidates(code, "test", 12, 3)) for code in LANGUAGES}
    english = [candidate.text for candidate in rows["en"]]
    for code in LANGUAGES:
        assert [candidate.translation for candidate in rows[code]] == english
        assert [candidate.id for candidate in rows[code]] == [candidate.id for candidate in rows["en"]]
        assert all(text[0] == text[0].upper() and len(text) <= 54 for text in (c.text for c in rows[code]))
        assert code == "en" or sum(c.text != c.translation for c in rows[code]) >= 10
    assert len(set(english)) == 12


def test_rendering() -> None:
    form = (("territory", "DE"), ("weekday", 1), ("measure", (45, "length-kilometer")))
    assert render(form, "en") == "Germany, Tuesday, and forty-five kilometers"
    assert render(form, "es") == "Alemania, martes y cuarenta y cinco kilómetros"
    assert render(form, "de") == "Deutschland, Dienstag und fünfundvierzig Kilometer"
    assert render((("month", 12), ("language", "sv")), "fr") == "Décembre et suédois"
    assert render((("measure", (5, "length-kilometer")),), "ru") == "Пять километров"  # its third plural form


def test_splits_share_no_sentence_whatever_the_seed() -> None:
    found = {split: {form for seed in (0, 1, 7) for form in sentences(split, 100, seed)} for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not found[one] & found[other]
        texts = [{render(form, "es") for form in found[split]} for split in (one, other)]
        assert not texts[0] & texts[1]
    assert len(found["test"]) > 250  # other seeds, other sentences


def test_sentences_of_a_seed() -> None:
    few, more = list(sentences("train", 10, 0)), list(sentences("train", 30, 0))
    assert len(set(more)) == 30
    assert more[:10] == few  # a larger corpus keeps the smaller one's rows
    assert list(sentences("train", 10, 1)) != few
    assert list(sentences("train", 0, 0)) == []


def test_voices_belong_to_one_split() -> None:
    voices = {split: set(voices_of(split)) for split in SPLITS}
    assert {split: len(names) for split, names in voices.items()} == {"train": 40, "validation": 5, "test": 10}
    assert set.union(*voices.values()) == set(VOICES)


def test_corpus_does_not_change_unnoticed() -> None:
    """Golden: a change here needs a new version of the `prepare_split` step, and a new starter."""
    rows = list(candidates("fr", "train", 3, 0))
    assert [row.text for row in rows] == ["Finlande et Roumanie", "Février", "Portugais et Népal"]
    assert [row.speaker for row in rows] == ["Mario", "max", "aunty"]


@pytest.mark.parametrize("package", ["babel", "num2words", "espeakng_loader"])
def test_missing_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic._locale.cache_clear()
    synthetic._render_phrase.cache_clear()
    for name in (package, "babel.lists") if package == "babel" else (package,):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"which is not installed: run `pip install 'lors\[synthesis\]'`"):
        next(candidates("es", "test", 1, 0)).load()


def test_versions() -> None:
    assert set(generator_versions()) == {"babel", "num2words", "espeakng-loader"}


def test_missing_extra_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(InputError, match="needs babel, which is not installed"):
        generator_versions()


def test_broken_installation_is_an_error_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its data eSpeak would end the whole process."""
    import espeakng_loader

    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path / "espeak-ng-data"))
    with pytest.raises(InputError, match=r"eSpeak NG did not start from .*: reinstall the `espeakng-loader` package"):
        espeak.speak("a", "es", "m1", 170, 40)
