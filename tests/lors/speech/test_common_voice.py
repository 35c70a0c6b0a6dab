from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import soundfile
from speech_sounds import sound

from lors.errors import ConfigError, CorpusError
from lors.files import Memo
from lors.speech.corpora.common_voice import find_locale
from lors.speech.corpora.settings import CommonVoiceCorpora
from lors.speech.corpora.sources import SplitSource, candidates, describe
from lors.speech.corpus import Utterance, read_split, write_split

# The columns of a release of Mozilla Data Collective.
HEADER = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
).split()
SENTENCES = {
    "common_voice_sv-SE_1.mp3": ("a1", 'Hon sade "nej'),
    "common_voice_sv-SE_2.mp3": ("a1", "En två tre"),
    "common_voice_sv-SE_3.mp3": ("b2", "Vad heter du?"),
    "common_voice_sv-SE_4.mp3": ("c3", "God dag"),
}
COVOST = [
    ("common_voice_sv-SE_1.mp3", 'She said \\"no', "train"),
    ("common_voice_sv-SE_2.mp3", "One two three", "train_covost"),
    ("common_voice_sv-SE_3.mp3", "What is your name?", "dev"),
    ("common_voice_sv-SE_4.mp3", "Good day", "test"),
    ("common_voice_sv-SE_9.mp3", "Gone", "train"),
    ("common_voice_sv-SE_3.mp3x", "Other", "dev_covost"),
]


def write_tsv(path: Path, clips: list[str]) -> None:
    lines = ["\t".join(HEADER)]
    for clip in clips:
        who, sentence = SENTENCES[clip]
        own = {"client_id": who, "path": clip, "sentence": sentence, "locale": "sv-SE", "up_votes": "2"}
        lines.append("\t".join(own.get(name, "") for name in HEADER))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_locale(folder: Path) -> Path:
    (folder / "clips").mkdir(parents=True)
    for seed, clip in enumerate(SENTENCES):
        soundfile.write(folder / "clips" / clip, sound(0.6, 32000, seed=seed), 32000, format="MP3")
    first, second, third, fourth = SENTENCES
    write_tsv(folder / "validated.tsv", [fourth, first, second, third])
    write_tsv(folder / "train.tsv", [first, second])
    write_tsv(folder / "dev.tsv", [third])
    write_tsv(folder / "test.tsv", [fourth])
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_locale(tmp_path / "cv-corpus-25.0-2026-03-09" / "sv-SE")
    lines = ["path\ttranslation\tsplit", *("\t".join(row) for row in COVOST)]
    (tmp_path / "covost_v2.sv-SE_en.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def described(path: Path, split: str, memo: Memo | None = None, **own: Any) -> SplitSource:
    corpora = CommonVoiceCorpora.model_validate({"source": "common_voice", "path": str(path), **own})
    return describe(corpora, "sv", split, memo)


def prepared(path: Path, split: str, out: Path, **own: Any) -> list[Utterance]:
    source = described(path, split, **own)
    everything = {"source": "common_voice", "language": "sv", "split": split, **source.settings}
    assert json.loads(json.dumps([everything, source.places])) == [everything, source.places]
    write_split(candidates(everything, source.places), out / f"{split}.parquet", language="sv")
    return read_split(out / f"{split}.parquet")


@pytest.mark.parametrize("given", [".", "cv-corpus-25.0-2026-03-09", "cv-corpus-25.0-2026-03-09/sv-SE"])
def test_splits_speakers_and_quotes_of_common_voice(corpus: Path, given: str) -> None:
    found = {split: prepared(corpus / given, split, corpus / "out") for split in ("train", "validation", "test")}
    assert [(u.id, u.text, u.speaker, u.translation) for u in found["train"]] == [
        ("common_voice_sv-SE_1", 'Hon sade "nej', "a1", None),
        ("common_voice_sv-SE_2", "En två tre", "a1", None),
    ]
    assert [u.speaker for split in ("validation", "test") for u in found[split]] == ["b2", "c3"]
    assert found["test"][0].seconds == pytest.approx(0.6, abs=0.1)


def test_covost_gives_translations_and_splits(corpus: Path) -> None:
    own = {"translations": f"{corpus}/covost_v2.{{language}}_en.tsv"}  # sv stands for sv-SE too
    found = {split: prepared(corpus, split, corpus / "out", **own) for split in ("train", "validation", "test")}
    # train_covost is training's, dev_covost is no split of version 2; the order is that of validated.tsv.
    assert {split: [(u.text, u.translation, u.speaker) for u in part] for split, part in found.items()} == {
        "train": [('Hon sade "nej', 'She said "no', "a1"), ("En två tre", "One two three", "a1")],
        "validation": [("Vad heter du?", "What is your name?", "b2")],
        "test": [("God dag", "Good day", "c3")],
    }


def test_columns_of_other_releases(corpus: Path) -> None:
    [first, *_] = prepared(corpus, "train", corpus / "out", columns={"text": "locale", "id": "path"})
    assert (first.id, first.text, first.speaker) == ("common_voice_sv-SE_1.mp3", "sv-SE", "a1")


def test_the_locale_is_found_or_asked_for(tmp_path: Path) -> None:
    for name in ("zh-CN", "zh-TW", "sv-SE", "es", "es-MX", "yue"):
        (tmp_path / "cv-corpus-25.0" / name).mkdir(parents=True)
        (tmp_path / "cv-corpus-25.0" / name / "validated.tsv").touch()
    (tmp_path / "cv-corpus-25.0" / "notes").mkdir()

    def found(language: str, locale: str | None = None) -> str:
        return find_locale(tmp_path, language, locale).name

    assert [found("sv"), found("es"), found("yue"), found("zh", "zh-TW")] == ["sv-SE", "es", "yue", "zh-TW"]
    with pytest.raises(CorpusError, match=r"has cv-corpus-25\.0/zh-CN and cv-corpus-25\.0/zh-TW; .* corpora\.locale"):
        found("zh")
    with pytest.raises(
        CorpusError, match=r"has no de with its TSV files \(it has es, es-MX, sv-SE, yue, zh-CN, zh-TW\)"
    ):
        found("de")
    with pytest.raises(CorpusError, match="has no zh-HK"):
        found("zh", "zh-HK")
    (tmp_path / "cv-corpus-24.0" / "yue").mkdir(parents=True)
    (tmp_path / "cv-corpus-24.0" / "yue" / "test.tsv").touch()
    with pytest.raises(CorpusError, match=r"corpora\.path"):
        found("yue")
    with pytest.raises(CorpusError, match="nowhere does not exist"):
        find_locale(tmp_path / "nowhere", "es", None)
    assert find_locale(tmp_path / "cv-corpus-24.0" / "yue", "zh", None).name == "yue"


def test_the_folder_of_another_language_is_refused(corpus: Path) -> None:
    """A path that names one locale would give every language its speech."""
    place = corpus / "cv-corpus-25.0-2026-03-09" / "sv-SE"
    assert find_locale(place, "sv", None) == find_locale(place, "no", "sv-SE") == place
    with pytest.raises(
        CorpusError, match=r"sv-SE is of sv-SE, not of es; give the folder above it, or .*locale to sv-SE"
    ):
        find_locale(place, "es", None)
    for table in place.glob("*.tsv"):  # of an old release
        table.write_text(table.read_text().replace("locale", "other"))
    assert find_locale(place, "es", None) == place


def test_what_is_missing_ends_in_a_sentence(corpus: Path) -> None:
    locale = corpus / "cv-corpus-25.0-2026-03-09" / "sv-SE"
    with pytest.raises(ConfigError, match=r"corpora\.translations '\{x\}' may have \{language\}"):
        described(corpus, "train", translations="{x}")
    with pytest.raises(CorpusError, match=r"nowhere\.tsv does not exist; check corpora\.translations"):
        described(corpus, "train", translations="nowhere.tsv")
    with pytest.raises(CorpusError, match="has no column split; give covost_v2"):
        described(corpus, "train", translations=str(locale / "train.tsv"))
    (corpus / "other.tsv").write_text("path\ttranslation\tsplit\nx.mp3\thi\ttrain\n")
    with pytest.raises(CorpusError, match=r"no clip of .*validated\.tsv is in the train split of .*Common Voice 4"):
        described(corpus, "train", translations=str(corpus / "other.tsv"))
    with pytest.raises(CorpusError, match="no column 'words' for the text; it has: client_id, path"):
        described(corpus, "train", columns={"text": "words"})
    (locale / "dev.tsv").unlink()
    with pytest.raises(CorpusError, match=r"dev\.tsv does not exist"):
        described(corpus, "validation")
    (locale / "clips").rename(locale / "clips.bak")
    with pytest.raises(CorpusError, match="has no folder clips; unpack the whole archive"):
        described(corpus, "train")


def test_only_clips_that_are_read_are_hashed_and_only_once(corpus: Path, tmp_path: Path) -> None:
    time.sleep(0.05)  # younger files are not memoised
    memo = Memo(tmp_path / "memo.json")

    def hashed(split: str, **own: Any) -> list[str]:
        described(corpus, split, memo, **own)
        found = sorted(Path(name).stem[-1] for name in memo)
        memo.clear()
        return found

    assert hashed("train") == ["1", "2"]
    assert hashed("train", limits={"train": 1}, max_rejected=0.0) == ["1", "2"]  # one more, for the rounding
    assert hashed("test", translations=str(corpus / "covost_v2.sv-SE_en.tsv")) == ["4"]
    first = described(corpus, "train", memo).outside
    clip = corpus / "cv-corpus-25.0-2026-03-09" / "sv-SE" / "clips" / "common_voice_sv-SE_1.mp3"
    memo[str(clip)] += "0"  # a memo that lies shows that the clip was not read
    assert described(corpus, "train", memo).outside != first
    translated = described(corpus, "train", translations=str(corpus / "covost_v2.sv-SE_en.tsv")).outside
    assert translated != first
    table = corpus / "covost_v2.sv-SE_en.tsv"
    table.write_text(table.read_text().replace("One two", "1 2"))
    assert described(corpus, "train", translations=str(table)).outside != translated
    table.write_text(table.read_text().replace("Good day", "Good morning"))  # another split's
    after = described(corpus, "train", translations=str(table)).outside
    table.write_text(table.read_text().replace("1 2", "One two"))
    assert described(corpus, "train", translations=str(table)).outside == translated != after
