from __future__ import annotations

import hashlib
import io
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_sounds import sound

from lors.errors import ConfigError, CorpusError
from lors.speech.corpus import (
    SAMPLE_RATE,
    Candidate,
    Utterance,
    encode_flac,
    read_audio,
    read_split,
    write_split,
)

SPOKEN = sound(0.5)


def row(identity: str = "a", text: str | None = "hola", **changes: Any) -> Candidate:
    fields: dict[str, Any] = {"translation": None, "speaker": None, "load": lambda: (SPOKEN, SAMPLE_RATE)}
    return Candidate(identity, text, **(fields | {"source": f"{identity}.wav"} | changes))


def gives(samples: np.ndarray, rate: int = SAMPLE_RATE) -> Callable[[], tuple[np.ndarray, int]]:
    return lambda: (samples, rate)


def rejects(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = [
        row("a", "  hola,\n mun\u0303eca ", translation="hello, doll", speaker="ana", load=gives(sound(1.0))),
        row("b", "sí", translation=" ", speaker="ana", load=gives(sound(2.0, seed=1))),
        row("c", "no", speaker="eva", load=gives(sound(0.25, seed=2))),
    ]
    seen: list[tuple[int, int | None]] = []
    path = tmp_path / "new" / "train.parquet"
    report = write_split(rows, path, language="es", on_progress=lambda *state: seen.append(state))
    found = read_split(path)
    assert [(u.id, u.text, u.translation, u.speaker, u.seconds) for u in found] == [
        ("a", "hola, muñeca", "hello, doll", "ana", 1.0),
        ("b", "sí", None, "ana", 2.0),
        ("c", "no", None, "eva", 0.25),
    ]
    assert (report.utterances, report.seconds, report.speakers) == (3, 3.25, 2)
    assert (report.characters, report.translations, report.rejected) == (16, 1, {})
    assert seen == [(1, None), (2, None), (3, None)]
    assert rejects(path.parent) == []
    assert [file.name for file in path.parent.iterdir() if "partial" in file.name] == []
    np.testing.assert_allclose(found[0].audio(), sound(1.0), atol=1 / 65536)
    assert (found[0].target("transcribe"), found[0].target("translate")) == ("hola, muñeca", "hello, doll")
    with soundfile.SoundFile(io.BytesIO(found[1].flac)) as file:
        assert (file.format, file.subtype, file.samplerate, file.channels) == ("FLAC", "PCM_16", 16_000, 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=400))
def test_flac_keeps_16_bit_audio_exactly(values: list[int]) -> None:
    pcm = np.array(values, dtype=np.int16)
    kept = Utterance("a", "a", None, None, 1.0, encode_flac(pcm.astype(np.float32) / 32768)).audio()
    np.testing.assert_array_equal(kept * 32768, pcm)


def test_flac_clips_what_is_too_loud_instead_of_wrapping() -> None:
    kept = Utterance("a", "a", None, None, 1.0, encode_flac(np.array([1.5, -1.5, 1.0], dtype=np.float32))).audio()
    np.testing.assert_array_equal(kept * 32768, [32767, -32768, 32767])


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "PCM_24"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44100, 2), (48000, 2), (16000, 1)])
def test_every_format_rate_and_channel_count_gives_the_same_tone(
    tmp_path: Path, format: str, subtype: str | None, rate: int, channels: int
) -> None:
    time = np.arange(rate) / rate
    tone = np.stack([0.4 * np.sin(2 * np.pi * 440 * time)] * channels, axis=1)
    file = tmp_path / f"tone.{format.lower()}"
    soundfile.write(file, tone, rate, format=format, subtype=subtype)
    write_split([row(load=lambda: read_audio(file))], tmp_path / "test.parquet", language="es")
    [found] = read_split(tmp_path / "test.parquet")
    assert found.seconds == pytest.approx(1.0, abs=0.08)  # lossy coders pad to whole frames
    middle = found.audio()[4000:12000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() * SAMPLE_RATE / len(middle) == pytest.approx(440, abs=2)
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.4 / np.sqrt(2), rel=0.05)


def raises(error: Exception) -> Callable[[], tuple[np.ndarray, int]]:
    def load() -> tuple[np.ndarray, int]:
        raise error

    return load


BAD = {
    "missing file": row(load=lambda: read_audio(Path("/nowhere/at/all.wav"))),
    "unreadable audio": row(load=lambda: read_audio(io.BytesIO(b"RIFF and then nothing"))),
    "silent audio": row(load=gives(np.zeros(8000, dtype=np.float32))),
    "audio too long": row(load=gives(sound(10.1))),
    "audio too short": row(load=gives(sound(0.19))),
    "empty text": row(text=" \u00a0\n"),
    "wrong encoding": row(text="ma\udcf1ana"),
    "text without letters": row(text="1999 - ?!"),
    "malformed line": row(fault=("malformed line", "line 3 is not JSON")),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_named_and_the_run_goes_on(tmp_path: Path, reason: str) -> None:
    rows = [row("first"), BAD[reason], row("last")]
    report = write_split(
        rows, tmp_path / "train.parquet", language="es", max_seconds=10, min_seconds=0.2, max_rejected=0.4
    )
    assert report.rejected == {reason: 1}
    assert [u.id for u in read_split(tmp_path / "train.parquet")] == ["first", "last"]
    [named] = rejects(tmp_path)
    assert named | {"detail": ""} == {
        "language": "es", "split": "train", "row": 2, "id": "a", "audio": "a.wav", "reason": reason, "detail": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"load": gives(np.full(8000, np.nan, dtype=np.float32))}, "unreadable audio"),
        ({"load": gives(SPOKEN, 0)}, "unreadable audio"),
        ({"load": raises(IsADirectoryError("a folder"))}, "unreadable audio"),
        ({"load": gives(np.zeros(0, dtype=np.float32))}, "audio too short"),
        ({"load": gives(np.stack([SPOKEN, -SPOKEN], axis=1))}, "silent audio"),
        ({"text": None}, "empty text"),
        ({"text": "ma\ufffdana"}, "wrong encoding"),
        ({"text": "maÃ±ana"}, "wrong encoding"),
        ({"text": "hola", "translation": "it\x92s"}, "wrong encoding"),
        ({"identity": "ma\udcf1ana"}, "wrong encoding"),
    ],
)
def test_further_bad_rows(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    report = write_split([row("ok"), row(**changes)], tmp_path / "t.parquet", language="es", max_rejected=0.5)
    assert report.rejected == {reason: 1}


# Sentences whose accented letters and signs stand side by side, as they do in print.
PRINTED = [
    "« Voilà … le café », dit-elle.", "le café\u00a0…", "CAFÉ»", "À «l'été»", "NÃO É AMANHÃ", "AMANHû",
    "São João, 1º ato", "Größe Ärger Übel", "Ñandú ÑOÑO", "mañana — niño", "Ðað er gott", "на улице", "かな漢字",
    "हिन्दी भाषा", "l·l col·legi", "Ångström Ø 5",
]  # fmt: skip


@pytest.mark.parametrize("text", PRINTED)
def test_printed_text_is_not_taken_for_a_wrong_encoding(tmp_path: Path, text: str) -> None:
    write_split([row(text=text)], tmp_path / "t.parquet", language="es")
    assert read_split(tmp_path / "t.parquet")[0].text == " ".join(text.split())


@pytest.mark.parametrize("text", ["mañana", "¿Qué tal?", "Größe", "на улице", "हिन्दी भाषा", "it’s", "São João"])
@pytest.mark.parametrize("misread", ["cp1252", "latin-1"])
def test_utf8_misread_as_a_western_code_page_is_found(tmp_path: Path, text: str, misread: str) -> None:
    wrong = "".join(  # as browsers do: the five bytes that Windows-1252 leaves open stay control characters
        bytes([byte]).decode(misread if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else "latin-1")
        for byte in text.encode()
    )
    assert wrong != text
    report = write_split([row("ok"), row(text=wrong)], tmp_path / "t.parquet", language="es", max_rejected=0.5)
    assert report.rejected == {"wrong encoding": 1}


def test_only_accepted_rows_claim_an_id(tmp_path: Path) -> None:
    rows = [row("a", ""), row("a", "first"), row("a", "second"), row("b")]
    report = write_split(rows, tmp_path / "train.parquet", language="es", max_rejected=0.5)
    assert [u.text for u in read_split(tmp_path / "train.parquet")] == ["first", "hola"]
    assert report.rejected == {"duplicate id": 1, "empty text": 1}
    assert [(r["row"], r["reason"]) for r in rejects(tmp_path)] == [(1, "empty text"), (3, "duplicate id")]


def test_too_many_bad_rows_fail_and_are_still_named(tmp_path: Path) -> None:
    rows = [row("a"), row("b", ""), row("c", ""), BAD["silent audio"]]
    with pytest.raises(CorpusError) as caught:
        write_split(rows, tmp_path / "train.parquet", language="es", max_rejected=0.74)
    for part in ("3 of 4 rows", "train split of es", "empty text (2)", str(tmp_path / "rejects.jsonl")):
        assert part in str(caught.value)
    assert [r["row"] for r in rejects(tmp_path)] == [2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["rejects.jsonl"]
    assert write_split(rows, tmp_path / "train.parquet", language="es", max_rejected=0.75).utterances == 1


def test_nothing_left_or_nothing_there_fails(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="the validation split of fr is empty"):
        write_split([], tmp_path / "validation.parquet", language="fr")
    with pytest.raises(CorpusError, match=r"1 of 1 rows .* all of them"):
        write_split([row(text="")], tmp_path / "validation.parquet", language="fr", max_rejected=1.0)
    with pytest.raises(ConfigError, match="max_seconds 31"):
        write_split([row()], tmp_path / "validation.parquet", language="fr", max_seconds=31)
    assert not (tmp_path / "validation.parquet").exists()


def test_rejects_of_the_other_splits_stay_and_a_rerun_replaces_its_own(tmp_path: Path) -> None:
    for split in ("train", "test", "train"):
        rows = [row("x", "\u2028"), row("ok"), BAD["silent audio"]]
        write_split(rows, tmp_path / f"{split}.parquet", language="es", max_rejected=1)
    assert [(r["split"], r["row"]) for r in rejects(tmp_path)] == [("test", 1), ("test", 3), ("train", 1), ("train", 3)]


@settings(max_examples=20, deadline=None)
@given(
    bad=st.lists(st.booleans(), max_size=12),
    limit=st.integers(1, 8),
    workers=st.sampled_from([1, 3]),
)
def test_the_limit_takes_the_first_valid_rows_and_reads_no_more(
    tmp_path_factory: pytest.TempPathFactory, bad: list[bool], limit: int, workers: int
) -> None:
    folder = tmp_path_factory.mktemp("limit")
    read: list[int] = []

    def rows() -> Iterator[Candidate]:
        for number in itertools.count():
            read.append(number)
            yield row(str(number), "" if number < len(bad) and bad[number] else "hola")

    write_split(rows(), folder / "t.parquet", language="es", limit=limit, max_rejected=1, workers=workers)
    good = [number for number in range(len(bad) + limit) if number >= len(bad) or not bad[number]][:limit]
    assert [u.id for u in read_split(folder / "t.parquet")] == [str(number) for number in good]
    assert read == list(range(good[-1] + 1))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0.2, 0.5, 1.0, 0.0]), min_size=1, max_size=12),
    seconds=st.floats(0.1, 6),
    limit=st.none() | st.integers(1, 6),
)
def test_the_hours_take_the_first_valid_rows_that_last_so_long(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[float], seconds: float, limit: int | None
) -> None:
    folder = tmp_path_factory.mktemp("hours")
    lengths = [*lengths, *[1.0] * 8]
    expected, total = [], 0.0
    for number, length in enumerate(lengths):
        if length:
            expected.append(str(number))
            total += length
        if total >= seconds or len(expected) == limit:
            break
    for workers in (1, 3):
        read: list[str] = []
        rows = (
            read.append(str(number)) or row(str(number), load=gives(sound(length)))  # type: ignore[func-returns-value]
            for number, length in enumerate(lengths)
        )
        report = write_split(
            rows, folder / "t.parquet", language="es", limit=limit, hours=seconds / 3600, max_rejected=1,
            max_seconds=1.0, workers=workers,
        )  # fmt: skip
        assert [u.id for u in read_split(folder / "t.parquet")] == expected
        assert report.seconds == pytest.approx(total)
        assert read == [str(number) for number in range(int(expected[-1]) + 1)]


def test_bytes_do_not_depend_on_threads_or_time(tmp_path: Path) -> None:
    threads: set[int] = set()

    def slow(number: int) -> Callable[[], tuple[np.ndarray, int]]:
        def load() -> tuple[np.ndarray, int]:
            threads.add(threading.get_ident())
            time.sleep(0.002 * (number % 3))
            return sound(0.2, 48000, 2, seed=number), 48000

        return load

    digests = set()
    for workers in (1, 4):
        rows = [row(f"r{n}", "hola" if n % 7 else "", speaker=f"s{n % 5}", load=slow(n)) for n in range(300)]
        write_split(rows, tmp_path / "t.parquet", language="es", workers=workers, max_rejected=0.2)
        digests.add(hashlib.sha256((tmp_path / "t.parquet").read_bytes()).hexdigest())
        assert (len(threads) == 1) == (workers == 1)
    assert len(digests) == 1
    file = pq.ParquetFile(tmp_path / "t.parquet")
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [128, 128, 1]


def test_a_failure_of_the_source_leaves_no_split_behind(tmp_path: Path) -> None:
    def rows() -> Iterator[Candidate]:
        yield row()
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write_split(rows(), tmp_path / "t.parquet", language="es")
    assert list(tmp_path.iterdir()) == []


def test_a_long_recording_is_not_decoded_to_its_end(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(8000 * 60, dtype=np.int16), 8000)
    samples, rate = read_audio(tmp_path / "long.wav")
    assert (samples.shape, rate) == ((31 * 8000, 1), 8000)


def test_utterances_are_views_that_can_be_compared_and_replaced(tmp_path: Path) -> None:
    write_split([row("a"), row("b", load=gives(sound(0.5, seed=1)))], tmp_path / "t.parquet", language="es")
    first, second = read_split(tmp_path / "t.parquet")
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".jsonl"] == ["t.parquet"]
    (tmp_path / "t.parquet").unlink()
    assert first.flac == encode_flac(SPOKEN) != second.flac
    assert first != second
    assert len({first, replace(first), second}) == 2
    np.testing.assert_array_equal(replace(first).audio(), first.audio())
    with pytest.raises(TypeError):
        first.flac[0] = 0  # type: ignore[index]


def test_audio_is_not_held_in_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 30 * SAMPLE_RATE).astype(np.float32)
    rows = (row(str(number), load=gives(np.roll(noise, number))) for number in range(160))
    write_split(rows, tmp_path / "t.parquet", language="es")
    assert (tmp_path / "t.parquet").stat().st_size > 120 << 20
    code = """
import re, sys
from pathlib import Path
from lors.speech.corpus import read_split

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

before = anonymous()
utterances = read_split(Path(sys.argv[1]))
assert sum(len(utterance.flac) for utterance in utterances) > 120 << 20
assert anonymous() - before < 90, anonymous() - before  # MiB; a row group is read at once
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.parquet")], check=True)


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split([row("a")], tmp_path / "t.parquet", language="es")
    original = tempfile.TemporaryFile

    def refuse(dir: Path | None = None) -> Any:
        if dir is not None:
            raise PermissionError(dir)
        return original()

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert [u.id for u in read_split(tmp_path / "t.parquet")] == ["a"]


def test_read_split_refuses_what_is_no_split(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is missing"):
        read_split(tmp_path / "train.parquet")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CorpusError, match="not a readable Parquet file"):
        read_split(tmp_path / "train.parquet")
    pq.write_table(pa.table({"id": ["a"], "audio": ["a.wav"]}), tmp_path / "train.parquet")
    with pytest.raises(CorpusError, match="no column audio, text, translation, speaker, seconds"):
        read_split(tmp_path / "train.parquet")


def test_datasets_sees_an_audio_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_split([row()], tmp_path / "train.parquet", language="es")
    features = datasets.Features.from_arrow_schema(pq.read_schema(tmp_path / "train.parquet"))
    assert features["audio"] == datasets.Audio(sampling_rate=16_000)
    table = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    first = table.cast_column("audio", datasets.Audio(decode=False))[0]
    assert soundfile.read(io.BytesIO(first["audio"]["bytes"]))[1] == 16_000
    assert first["audio"]["path"] == "a.flac"
