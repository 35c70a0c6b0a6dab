"""Data sets as the Hugging Face hub lays them out: real Parquet with real audio in folders; only the hub is played."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hub_server import HubServer
from speech_sounds import sound

from lors import network
from lors.config import parse_experiment
from lors.errors import ConfigError, CorpusError, InputError, UnreachableError
from lors.files import Memo
from lors.speech.corpora import hub
from lors.speech.corpora.layout import find_layout
from lors.speech.corpora.presets import PRESETS
from lors.speech.corpora.settings import DatasetsCorpora
from lors.speech.corpora.sources import SplitSource, candidates, describe
from lors.speech.corpus import SplitReport, Utterance, read_split, write_split

SHA = "0123456789abcdef0123456789abcdef01234567"


def spoken(seed: int, seconds: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound(seconds, 16000, seed=seed), 16000, format="WAV")
    return buffer.getvalue()


def write(path: Path, rows: list[dict[str, Any]], audio: str = "audio") -> Path:
    """Parquet with the metadata by which `datasets` knows an audio column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    kinds = {name: {"dtype": str(table.schema.field(name).type), "_type": "Value"} for name in table.column_names}
    info = {"info": {"features": kinds | {audio: {"sampling_rate": 16000, "_type": "Audio"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    return path


def row(number: int, **own: Any) -> dict[str, Any]:
    return {"audio": {"bytes": spoken(number), "path": f"clip{number}.wav"}, "text": f"hola {number}", **own}


def described(
    path: Path | str | None, language: str = "es", split: str = "train", memo: Any = None, **own: Any
) -> SplitSource:
    data = {"source": "datasets", **own} | ({"path": str(path)} if path else {})
    return describe(DatasetsCorpora.model_validate(data), language, split, memo)


def report_of(source: SplitSource, out: Path, language: str = "es", split: str = "train", **own: Any) -> SplitReport:
    everything = {"source": "datasets", "language": language, "split": split, **source.settings}
    # Both go to a child process as JSON.
    everything, places = json.loads(json.dumps([everything, source.places]))
    limits = {name: source.settings[name] for name in ("limit", "hours")}
    return write_split(candidates(everything, places), out / f"{split}.parquet", language=language, **limits, **own)


def prepared(
    path: Path | str | None, out: Path, language: str = "es", split: str = "train", **own: Any
) -> list[Utterance]:
    report_of(described(path, language, split, **own), out, language, split)
    return read_split(out / f"{split}.parquet")


# What a data set is made of


def test_every_layout_of_the_hub(tmp_path: Path) -> None:
    def laid(*files: str, card: str = "") -> dict[str, dict[str, list[str]]]:
        return {name: dict(splits) for name, splits in find_layout("x", files, card).files.items()}

    assert laid(
        "es/train-00000-of-00002.parquet", "es/train-00001-of-00002.parquet", "fr/dev-00000-of-00001.parquet"
    ) == {
        "es": {"train": ["es/train-00000-of-00002.parquet", "es/train-00001-of-00002.parquet"]},
        "fr": {"dev": ["fr/dev-00000-of-00001.parquet"]},
    }
    converted = ["es_419/train/0000.parquet", "es_419/train/0001.parquet", "de/partial-train/0000.parquet"]
    assert laid(*converted) == {"es_419": {"train": converted[:2]}, "de": {"train": converted[2:]}}
    hashed = [f"data/train-0000{n}-of-00002-0123456789abcdef.parquet" for n in range(2)]
    assert laid(*hashed, "data/test.parquet") == {"default": {"train": hashed, "test": ["data/test.parquet"]}}
    assert laid("train.parquet", "dev/0000.parquet") == {
        "default": {"train": ["train.parquet"], "dev": ["dev/0000.parquet"]}
    }
    files = ["b/x-1.parquet", "b/x-2.parquet", "b/y.parquet", "c/deep/z.parquet", "w/train-0.parquet", "README.md"]
    card = """---
license: cc0-1.0
configs:
- config_name: one
  data_files:
  - {split: train, path: b/x-*}
  - {split: dev, path: [b/y.parquet, "c/**/*.parquet"]}
- {config_name: two, data_files: "./b/?-[!1].parquet"}
- {config_name: three, data_files: {test: b/y*}}
- {config_name: four, data_dir: w}
- {config_name: gone, data_files: nothing/*}
---
# Words
"""
    assert laid(*files, card=card) == {
        "one": {"train": files[:2], "dev": ["b/y.parquet", "c/deep/z.parquet"]},
        "two": {"train": ["b/x-2.parquet"]},
        "three": {"test": ["b/y.parquet"]},
        "four": {"train-0": ["w/train-0.parquet"]},
    }


def test_what_is_no_data_set_of_parquet() -> None:
    with pytest.raises(CorpusError, match=r"X is a loading script \(x\.py\), which is never run here; .*refs/convert"):
        find_layout("X", ["x.py", "README.md"], "")
    with pytest.raises(CorpusError, match="X has no Parquet files; where the hub keeps"):
        find_layout("X", ["train.csv"], "")
    for card in ("configs: [", "date: 2026-13-01"):
        with pytest.raises(CorpusError, match=r"README\.md of X does not begin with valid YAML"):
            find_layout("X", ["a.parquet"], f"---\n{card}\n---\n")


@pytest.mark.parametrize(
    "configs", ["[es]", "[{data_files: 7}]", "[{data_files: [{split: train}]}]", "[{data_files: '[b-a]'}]"]
)
def test_configs_of_another_form_are_named(configs: str) -> None:
    with pytest.raises(CorpusError, match=r"the configs in the README\.md of X are not laid out as the hub's"):
        find_layout("X", ["a.parquet"], f"---\nconfigs: {configs}\n---\n")


def test_configurations_splits_and_missing_shards_are_named(tmp_path: Path) -> None:
    for name, split in (("es_419", "train"), ("es_419", "dev"), ("fr_fr", "train")):
        write(tmp_path / name / f"{split}-00000-of-00001.parquet", [row(1)])
    with pytest.raises(ConfigError, match=r"several configurations: set corpora\.name to one of es_419, fr_fr"):
        described(tmp_path)
    with pytest.raises(ConfigError, match="no configuration 'es_41', did you mean 'es_419'"):
        described(tmp_path, name="es_41")
    with pytest.raises(
        ConfigError, match=r"no split 'validation' in es_419; it has dev, train: .*`\{validation: dev\}`"
    ):
        described(tmp_path, name="es_419", split="validation")
    with pytest.raises(ConfigError, match=r"corpora\.name '\{code\}' may have \{language\}"):
        described(tmp_path, name="{code}")
    assert described(tmp_path, name="{language}_419", split="validation", splits={"validation": "dev"}).outside
    shutil.copy(tmp_path / "fr_fr/train-00000-of-00001.parquet", tmp_path / "fr_fr/test-00001-of-00003.parquet")
    with pytest.raises(CorpusError, match=r"lacks fr_fr/test-00000-of-00003\.parquet, which the names"):
        described(tmp_path, name="fr_fr", split="test")
    with pytest.raises(CorpusError, match="is neither a folder nor the id of a data set"):
        described(tmp_path / "nowhere")


def test_a_split_that_the_hub_cut_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "sk/partial-train/0000.parquet", [row(1)])
    described(tmp_path)
    assert "has only a part of this split" in caplog.text


# Reading


@pytest.mark.parametrize("folder", ["plain", "odd [x] *?"])
@pytest.mark.parametrize("streaming", [True, False])
def test_columns_of_any_name_and_all_shards_in_order(tmp_path: Path, folder: str, streaming: bool) -> None:
    root = tmp_path / folder
    for shard in range(3):
        rows = [
            {
                "wave": {"bytes": spoken(n), "path": None},
                "words": f"hola {n}",
                "english": "hi",
                "key": n,
                "who": f"s{shard}",
            }
            for n in range(40 * shard, 40 * shard + 40)
        ]
        write(root / f"data/train-0000{shard}-of-00003.parquet", rows, "wave")
    columns = {"audio": "wave", "text": "words", "translation": "english", "id": "key", "speaker": "who"}
    found = prepared(root, tmp_path / "out", columns=columns, streaming=streaming)
    assert [(u.id, u.text, u.translation, u.speaker) for u in found] == [
        (str(n), f"hola {n}", "hi", f"s{n // 40}") for n in range(120)
    ]
    assert found[7].audio()[:8000] == pytest.approx(sound(0.5, seed=7), abs=1e-4)


def test_a_missing_column_is_named_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row(1)])
    with pytest.raises(CorpusError, match=r"has no column 'words' for the text; it has: audio, text; map"):
        described(tmp_path, columns={"text": "words"})
    with pytest.raises(CorpusError, match="has no column 'client' for the speaker"):
        described(tmp_path, columns={"speaker": "client"})
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match=r"train\.parquet is not a readable Parquet file"):
        described(tmp_path)


def test_odd_rows_are_rejected_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.wav").write_bytes(spoken(3))  # no digest covers it, so it is not read
    good = row(0)["audio"]
    odd = [good, good, {"bytes": b"RIFF", "path": "b.wav"}, good, {"bytes": None, "path": "here.wav"}, None]
    raw = pa.array([b"hola", b"ma\xf1ana", b"tres", None, b"cinco", b"seis"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"audio": odd, "text": text}), tmp_path / "train.parquet")
    report = report_of(described(tmp_path), tmp_path / "out", max_rejected=0.9)
    assert report.rejected == {"wrong encoding": 1, "unreadable audio": 1, "empty text": 1, "missing file": 2}
    assert [u.id for u in read_split(tmp_path / "out/train.parquet")] == ["clip0"]


def test_audio_that_is_plain_bytes(tmp_path: Path) -> None:
    rows = [{"audio": spoken(n), "text": "hola"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert [u.id for u in prepared(tmp_path, tmp_path / "out")] == ["row-1", "row-2", "row-3"]


def test_damage_inside_a_file_ends_in_a_sentence(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", [row(n) for n in range(20)])
    data = bytearray(file.read_bytes())
    data[4:2000] = bytes(1996)
    file.write_bytes(data)
    with pytest.raises(CorpusError, match="cannot be read"):
        report_of(described(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("written", "expected"),
    [("train[:3]", [0, 1, 2]), ("train[7:]", [7, 8, 9]), ("train[2:4]", [2, 3]), ("train[:]", list(range(10)))],
)
def test_slices(tmp_path: Path, written: str, expected: list[int]) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", [row(n, id=n) for n in range(5)])
    write(tmp_path / "train-00001-of-00002.parquet", [row(n, id=n) for n in range(5, 10)])
    found = prepared(tmp_path, tmp_path / "out", split="validation", splits={"validation": written})
    assert [int(u.id) for u in found] == expected


@pytest.mark.parametrize("written", ["train[:10%]", "train[-5:]", "train[3:3]", "train[", "train[:2]+test", "[:2]"])
def test_what_is_no_slice(tmp_path: Path, written: str) -> None:
    write(tmp_path / "train.parquet", [row(0)])
    with pytest.raises(ConfigError, match=rf"{re.escape(repr(written))} is no split and no slice"):
        described(tmp_path, splits={"train": written})


def test_limits_and_hours_stop_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.parquet", [row(n) for n in range(200)])
    taken: list[int] = []
    original = hub.values

    def counted(column: Any) -> list[Any]:
        taken.append(len(column))
        return original(column)

    monkeypatch.setattr(hub, "values", counted)
    assert len(prepared(tmp_path, tmp_path / "out", limits={"train": 3})) == 3
    assert sum(taken) <= 2 * 64
    assert len(prepared(tmp_path, tmp_path / "out", hours={"train": 2.2 / 3600})) == 5
    assert len(prepared(tmp_path, tmp_path / "out", hours={"train": 2.2 / 3600}, limits={"train": 4})) == 4


def test_the_digest_is_of_the_files_that_are_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "data" / "es" / f"{split}-00000-of-00001.parquet", [row(1)])
        write(tmp_path / "data" / "fr" / f"{split}-00000-of-00001.parquet", [row(2)])
    time.sleep(0.05)  # younger files are not memoised
    memo = Memo(tmp_path / "memo.json")

    def outside(split: str = "train", **own: Any) -> dict[str, str]:
        return described(tmp_path / "data", split=split, memo=memo, name="es", **own).outside

    first = outside()
    assert [Path(name).relative_to(tmp_path).as_posix() for name in memo] == ["data/es/train-00000-of-00001.parquet"]
    write(tmp_path / "data" / "es" / "test-00000-of-00001.parquet", [row(3)])
    write(tmp_path / "data" / "fr" / "train-00000-of-00001.parquet", [row(3)])
    assert outside() == first
    write(tmp_path / "data" / "es" / "train-00000-of-00001.parquet", [row(3)])
    assert outside() != first
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    assert described(tmp_path / "moved", name="es").outside == outside()


# Presets


def fleurs_rows(language: str, numbers: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "num_samples": 8000,
            "path": f"/cache/{index}{number}.wav",
            "audio": {"bytes": spoken(number), "path": f"{language}{index}{number}.wav"},
            "transcription": f"{language} sentence {number} lower",
            "raw_transcription": f"{language} Sentence, {number}",
            "gender": 1,
            "lang_id": 5,
            "language": language,
            "lang_group_id": 0,
        }
        for index, number in enumerate(numbers)
    ]


def make_fleurs(root: Path) -> Path:
    for split, numbers in {"train": [1, 2, 2, 9], "validation": [3], "test": [4]}.items():
        write(root / "es_419" / split / "0000.parquet", fleurs_rows("es", numbers))
    # Its sentences lie in other splits, and 9 is in none.
    write(root / "en_us" / "train" / "0000.parquet", fleurs_rows("en", [1, 4]))
    write(root / "en_us" / "train" / "0001.parquet", fleurs_rows("en", [3, 3]))
    write(root / "en_us" / "test" / "0000.parquet", fleurs_rows("en", [2]))
    return root


def test_fleurs_joins_the_english_sentence(tmp_path: Path) -> None:
    root = make_fleurs(tmp_path / "fleurs")
    found = {s: prepared(root, tmp_path / "out", split=s, preset="fleurs") for s in ("train", "validation", "test")}
    assert [(u.id, u.text, u.translation, u.speaker) for u in found["train"]] == [
        ("es01", "es Sentence, 1", "en Sentence, 1", None),
        ("es12", "es Sentence, 2", "en Sentence, 2", None),
        ("es22", "es Sentence, 2", "en Sentence, 2", None),
        ("es39", "es Sentence, 9", None, None),
    ]
    assert [u.translation for s in ("validation", "test") for u in found[s]] == ["en Sentence, 3", "en Sentence, 4"]
    before = described(root, preset="fleurs").outside
    write(root / "en_us" / "test" / "0000.parquet", fleurs_rows("en", [7]))
    assert described(root, preset="fleurs").outside != before
    assert [u.translation for u in prepared(root, tmp_path / "out", "en", preset="fleurs")] == [None] * 4


def test_fleurs_without_the_columns_of_the_join(tmp_path: Path) -> None:
    root = make_fleurs(tmp_path / "fleurs")
    shutil.rmtree(root / "en_us")
    write(root / "en_us" / "train" / "0000.parquet", [row(1)])
    with pytest.raises(
        CorpusError, match="cannot be joined to its configuration en_us, as it has no column id or raw_"
    ):
        report_of(described(root, preset="fleurs"), tmp_path / "out")


def test_what_is_written_wins_over_the_preset(tmp_path: Path) -> None:
    root = make_fleurs(tmp_path / "fleurs")
    own = {"preset": "fleurs", "columns": {"text": "transcription", "translation": "language"}}
    assert next((u.text, u.translation) for u in prepared(root, tmp_path / "out", **own)) == (
        "es sentence 1 lower",
        "es",
    )
    shutil.rmtree(root / "en_us")
    assert (
        len(prepared(root, tmp_path / "out", preset="fleurs", name="es_419", columns={"translation": "language"})) == 4
    )
    with pytest.raises(ConfigError, match="no configuration 'en_us'"):
        described(root, preset="fleurs")
    with pytest.raises(ConfigError, match="no split 'other'"):
        described(root, splits={"train": "other"}, **own)


def test_covost2(tmp_path: Path) -> None:
    rows = [
        {
            "client_id": f"c{n}",
            "file": f"/x/common_voice_sv-SE_{n}.mp3",
            "audio": {"bytes": spoken(n), "path": f"common_voice_sv-SE_{n}.mp3"},
            "sentence": f"Hej {n}",
            "translation": f"Hi {n}",
            "id": f"common_voice_sv-SE_{n}",
        }
        for n in range(2)
    ]
    write(tmp_path / "all" / "sv-SE_en" / "train-00000-of-00001.parquet", rows)
    card = "---\nconfigs:\n- config_name: sv-SE_en\n  data_files:\n  - split: train\n    path: sv-SE_en/train-*\n---\n"
    (tmp_path / "all" / "README.md").write_text(card)
    [first, _] = prepared(tmp_path / "all", tmp_path / "out", "sv", preset="covost2")
    assert (first.id, first.text, first.translation) == ("common_voice_sv-SE_0", "Hej 0", "Hi 0")
    assert first.speaker == "c0"
    without = [{name: value for name, value in row.items() if name != "client_id"} for row in rows]
    write(tmp_path / "all" / "sv-SE_en" / "train-00000-of-00001.parquet", without)
    assert [u.speaker for u in prepared(tmp_path / "all", tmp_path / "out", "sv", preset="covost2")] == [None, None]
    with pytest.raises(ConfigError, match="preset covost2 has no en: choose from ar, ca"):
        described(tmp_path / "all", "en", preset="covost2")


def test_mls(tmp_path: Path) -> None:
    rows = [
        {
            "audio": {"bytes": spoken(n), "path": f"10367_{n}.flac"},
            "original_path": "http://x/y.mp3",
            "begin_time": 1.5,
            "end_time": 2.0,
            "transcript": f"dos {n}",
            "audio_duration": 0.5,
            "speaker_id": "10367",
            "chapter_id": "10282",
            "file": f"10367_{n}.flac",
            "id": f"10367_10282_{n:06d}",
        }
        for n in range(2)
    ]
    write(tmp_path / "mls" / "spanish" / "dev-00000-of-00001.parquet", rows)
    found = prepared(tmp_path / "mls", tmp_path / "out", "es", "validation", preset="mls")
    assert [(u.id, u.text, u.speaker) for u in found] == [
        ("10367_10282_000000", "dos 0", "10367"),
        ("10367_10282_000001", "dos 1", "10367"),
    ]
    with pytest.raises(ConfigError, match="preset mls has no sv: choose from de, es, fr, it, nl, pl, pt, or"):
        described(tmp_path / "mls", "sv", preset="mls")


def test_voxpopuli(tmp_path: Path) -> None:
    rows = [
        {
            "audio_id": f"2018_hr_{n}",
            "language": 11,
            "audio": {"bytes": spoken(n), "path": f"2018_hr_{n}.wav"},
            "raw_text": "",
            "normalized_text": f"poast {n}",
            "gender": "female",
            "speaker_id": who,
            "is_gold_transcript": True,
            "accent": "None",
        }
        for n, who in enumerate(["119431", "None"])
    ]
    write(tmp_path / "vox" / "hr" / "partial-train" / "0000.parquet", rows)
    found = prepared(tmp_path / "vox", tmp_path / "out", "hr", preset="voxpopuli")
    assert [(u.id, u.text, u.speaker) for u in found] == [
        ("2018_hr_0", "poast 0", "119431"),
        ("2018_hr_1", "poast 1", None),
    ]


def test_every_preset_names_a_configuration_for_codes_of_whisper() -> None:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    for name, preset in PRESETS.items():
        assert preset.names.keys() <= LANGUAGES.keys(), name
        experiment = {
            "base": "starter",
            "languages": sorted(preset.names),
            "corpora": {"source": "datasets"},
            "output": "o",
        }
        experiment["corpora"] = {"source": "datasets", "preset": name}
        assert len(parse_experiment(experiment).languages) == len(preset.names)
    assert [PRESETS["fleurs"].names[code] for code in ("es", "zh", "no", "sv")] == [
        "es_419",
        "cmn_hans_cn",
        "nb_no",
        "sv_se",
    ]
    assert [PRESETS["covost2"].names[code] for code in ("es", "zh", "sv")] == ["es_en", "zh-CN_en", "sv-SE_en"]


# The hub


def refused(kind: type[Exception], status: int) -> Exception:
    client = __import__(hub_errors.Response.__module__)  # that this release of the library uses
    response = client.Response(status, request=client.Request("GET", "https://x/y"))
    return kind("a line\nmore", response=response)  # type: ignore[call-arg]


class Hub:
    """Answers as the hub would; the files of `folder` are what it has."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.gated = folder, list[str | None](), False
        self.error: Exception | None = None
        self.denied: Exception | None = None

    def dataset_info(self, path: str, revision: str | None = None) -> Any:
        self.asked.append(revision)
        if self.error:
            raise self.error
        files = [SimpleNamespace(rfilename=f.relative_to(self.folder).as_posix()) for f in self.folder.rglob("*.*")]
        sha = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else SHA
        return SimpleNamespace(sha=sha, siblings=files, gated=self.gated)

    def auth_check(self, path: str, repo_type: str) -> None:
        assert repo_type == "dataset"
        if self.denied:
            raise self.denied

    def download(self, path: str, file: str, repo_type: str, revision: str) -> str:
        assert re.fullmatch("[0-9a-f]{40}", revision)
        if self.error:
            raise self.error
        return str(self.folder / file)


@pytest.fixture
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    write(tmp_path / "hub" / "es" / "train-00000-of-00001.parquet", [row(n) for n in range(3)])
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: es\n  data_files:\n  - {split: train, path: es/train-*}\n---\n"
    )
    played = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: played)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", played.download)
    hub._info.cache_clear()
    yield played
    hub._info.cache_clear()


def test_a_hub_data_set_is_read_at_one_commit(the_hub: Hub, tmp_path: Path) -> None:
    source = described("who/set", revision="v1", streaming=False)
    assert source.outside == {"hub": f"who/set@{SHA}"}
    assert the_hub.asked == ["v1"]
    report_of(source, tmp_path / "out")
    assert [u.id for u in read_split(tmp_path / "out/train.parquet")] == ["clip0", "clip1", "clip2"]
    assert the_hub.asked == ["v1"]  # the files are known already
    streamed = described("who/set", revision="v1")
    assert hub._fetched(streamed.places) == [[f"hf://datasets/who/set@{SHA}/es/train-00000-of-00001.parquet"]]
    assert (streamed.settings, streamed.outside) == (source.settings, source.outside)
    with pytest.raises(ConfigError, match=r"the data set who/set has no split 'test' in es; it has train"):
        described("who/set", split="test")
    with pytest.raises(ConfigError, match="the data set who/set has no configuration 'fr'"):
        described("who/set", name="fr")


def test_a_missing_column_of_the_hub_is_named_when_it_is_read(the_hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="who/set has no column 'words' for the text; it has: audio, text"):
        report_of(described("who/set", columns={"text": "words"}, streaming=False), tmp_path)


def test_without_a_network_the_last_commit_is_planned_with(the_hub: Hub, tmp_path: Path) -> None:
    memo = Memo(tmp_path / "memo.json")
    online = described("who/set", memo=memo, streaming=False)
    memo.save()
    hub._info.cache_clear()
    the_hub.error = hub_errors.OfflineModeIsEnabled("offline mode is enabled")
    offline = described("who/set", memo=Memo(tmp_path / "memo.json"), streaming=False)
    assert (offline.outside, offline.places) == (online.outside, online.places)
    with pytest.raises(
        CorpusError, match=r"who/set cannot be read now \(offline mode is enabled\); connect .*HF_HUB_OFF"
    ):
        described("who/set", memo={})
    with pytest.raises(CorpusError, match=r"who/set cannot be read now \(offline mode is enabled\)"):
        report_of(offline, tmp_path / "out")
    the_hub.error = None
    report_of(offline, tmp_path / "out")  # from the hub's cache


def test_offline_mode_of_the_real_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub._info.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="who/set cannot be read now"):
        described("who/set")
    source = described("who/set", revision=SHA)  # a commit needs no network to be planned with
    assert source.outside == {"hub": f"who/set@{SHA}"}
    with pytest.raises(CorpusError, match="who/set cannot be read now"):
        report_of(source, tmp_path)
    hub._info.cache_clear()


def test_a_commit_is_taken_as_it_is(the_hub: Hub, tmp_path: Path) -> None:
    other = "f" * 40
    memo: dict[str, str] = {}
    assert described("who/set", memo=memo, revision=other).outside == {"hub": f"who/set@{other}"}
    hub._info.cache_clear()
    described("who/set", memo=memo, revision=other)
    assert the_hub.asked == [other]
    the_hub.error = hub_errors.OfflineModeIsEnabled("offline")
    unknown = described("who/set", revision="e" * 40, streaming=False)
    assert unknown.places["files"] is None
    the_hub.error = None
    hub._info.cache_clear()
    assert report_of(unknown, tmp_path / "out").utterances == 3


def test_a_new_commit_is_another_key(the_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    memo: dict[str, str] = {}
    first = described("who/set", memo=memo).outside
    monkeypatch.setattr(f"{__name__}.SHA", "a" * 40)
    hub._info.cache_clear()
    assert described("who/set", memo=memo).outside != first


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            hub_errors.GatedRepoError,
            403,
            r"who/set is gated: accept its terms at https://huggingface\.co/datasets/who/set",
        ),
        (
            hub_errors.RepositoryNotFoundError,
            401,
            "no data set who/set that may be read .*private, set HF_TOKEN or run",
        ),
        (hub_errors.RevisionNotFoundError, 404, "who/set has no revision v2"),
        (hub_errors.DisabledRepoError, 403, r"the hub refuses the data set who/set \(a line\)"),
        (hub_errors.HfHubHTTPError, 429, r"who/set cannot be read now \(a line\)"),
        (hub_errors.HfHubHTTPError, 503, r"who/set cannot be read now \(a line\)"),
    ],
)
def test_what_the_hub_refuses_ends_in_a_sentence(
    the_hub: Hub, tmp_path: Path, error: type[Exception], status: int, message: str
) -> None:
    source = described("who/set", streaming=False)
    the_hub.error = refused(error, status)
    with pytest.raises(InputError, match=message):
        described("who/set", revision="v2")
    if error is not hub_errors.RevisionNotFoundError:
        with pytest.raises(InputError, match=message):
            report_of(source, tmp_path / "out")


def test_a_gated_data_set_is_refused_before_anything_runs(the_hub: Hub) -> None:
    the_hub.gated, the_hub.denied = True, refused(hub_errors.GatedRepoError, 403)
    with pytest.raises(CorpusError, match=r"is gated: accept its terms at .* then set HF_TOKEN or run `hf auth login`"):
        described("who/set")
    hub._info.cache_clear()
    the_hub.denied = None
    described("who/set")


def test_a_loading_script_is_refused(the_hub: Hub) -> None:
    shutil.rmtree(the_hub.folder / "es")
    (the_hub.folder / "set.py").write_text("raise SystemExit")
    with pytest.raises(CorpusError, match=r"the data set who/set is a loading script \(set\.py\), which is never run"):
        described("who/set")


# What the real client does with a hub that speaks HTTP; it reads its settings when it is imported.
CLIENT = """
import json, sys
from pathlib import Path
from lors.errors import InputError
from lors.speech.corpora.settings import DatasetsCorpora
from lors.speech.corpora.sources import candidates, describe
from lors.speech.corpus import read_split, write_split

out, memo = Path(sys.argv[1]), json.loads(sys.argv[2])
for streaming in (flag == "1" for flag in sys.argv[3]):
    data = {"source": "datasets", "path": "who/set", "revision": "refs/convert/parquet", "streaming": streaming}
    try:
        source = describe(DatasetsCorpora(**data), "es", "train", memo)
        settings = {"source": "datasets", "language": "es", "split": "train", **source.settings}
        write_split(candidates(settings, source.places), out / "train.parquet", language="es", limit=3)
    except InputError as error:
        print(json.dumps(str(error)))
    else:
        print(json.dumps([u.id for u in read_split(out / "train.parquet")]))
print(json.dumps(memo))
"""


def run_client(server: HubServer, folder: Path, streaming: list[bool], memo: Any = None, **env: str) -> list[Any]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder / "home"), "NO_PROXY": "*"}
    flags = "".join(str(int(value)) for value in streaming)
    command = [sys.executable, "-c", CLIENT, str(folder / "out"), json.dumps(memo or {}), flags]
    done = subprocess.run(command, env=own | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    for shard in range(2):
        write(tmp_path / f"hub/es/train/000{shard}.parquet", [row(n) for n in range(shard * 40, shard * 40 + 40)])
    with HubServer(tmp_path / "hub") as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_the_real_client_streams_and_downloads(server: HubServer, tmp_path: Path) -> None:
    first, second, memo = run_client(server, tmp_path, [True, False])
    assert first == second == ["clip0", "clip1", "clip2"]
    files = [line for line in server.requests if line.startswith("GET") and ".parquet" in line]
    streamed, downloaded = files[:-2], files[-2:]
    assert streamed
    assert all("0000.parquet" in line for line in streamed)  # the limit needs no more
    assert ["0000.parquet" in line for line in downloaded] == [True, False]
    # What was downloaded serves without a network, what would be streamed ends in a sentence.
    served = len(server.requests)
    refused, offline, _ = run_client(server, tmp_path, [True, False], memo, HF_HUB_OFFLINE="1")
    assert offline == ["clip0", "clip1", "clip2"]
    assert refused.startswith("the data set who/set cannot be read now")
    assert len(server.requests) == served


def test_the_real_client_meets_a_gate(server: HubServer, tmp_path: Path) -> None:
    server.gated = True
    refused, _ = run_client(server, tmp_path, [True])
    assert refused.startswith("the data set who/set is gated: accept its terms at https://huggingface.co/datasets/who")


def test_the_real_client_asks_a_busy_hub_again(server: HubServer, tmp_path: Path) -> None:
    server.busy = 2
    found, _ = run_client(server, tmp_path, [False])
    assert found == ["clip0", "clip1", "clip2"]
    assert server.busy == 0


def test_a_hub_that_stays_away_may_answer_later(the_hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "_DELAYS", (0.0, 0.0))
    source = described("who/set", streaming=False)
    the_hub.asked.clear()
    the_hub.error = refused(hub_errors.HfHubHTTPError, 503)
    with pytest.raises(UnreachableError, match=r"who/set cannot be read now \(a line\); check the network and run"):
        described("who/set", revision="v2")
    assert the_hub.asked == ["v2"] * 3
    with pytest.raises(UnreachableError):
        report_of(source, tmp_path / "out")
