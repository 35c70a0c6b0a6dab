from __future__ import annotations

import csv
import json
import math
import shutil
import time
from collections.abc import Callable
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

from lors.errors import CorpusError
from lors.files import Memo
from lors.speech.corpora.manifest import candidates, content_digest
from lors.speech.corpus import Candidate, read_split, write_split

ROWS = [
    {"audio": "clips/uno.wav", "text": "hola, mundo", "translation": "hello", "id": "u1", "speaker": "ana"},
    {"audio": "clips/dos.flac", "text": 'el "niño"', "translation": "the child", "id": "u2", "speaker": "eva"},
    {"audio": "clips/tres.ogg", "text": "tres", "translation": None, "id": "u3", "speaker": None},
    {"audio": "clips/cuatro.mp3", "text": "cuatro", "translation": None, "id": "u4", "speaker": "ana"},
]


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = (json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) for row in rows)
    path.with_suffix(".jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path.with_suffix(".jsonl")


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.with_suffix(".csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path.with_suffix(".csv")


def as_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = ["\t".join(rows[0]), *("\t".join(row[k] or "" for k in rows[0]) for row in rows)]
    path.with_suffix(".tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.with_suffix(".tsv")


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


Writer = Callable[[Path, list[dict[str, Any]]], Path]
WRITERS = [as_jsonl, as_csv, as_tsv, as_parquet]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for seed, (name, rate, channels) in enumerate(
        [("uno.wav", 8000, 1), ("dos.flac", 44100, 2), ("tres.ogg", 48000, 2), ("cuatro.mp3", 16000, 1)]
    ):
        soundfile.write(tmp_path / "clips" / name, sound(0.5, rate, channels, seed), rate)
    return tmp_path


def fields(found: list[Candidate]) -> list[tuple[Any, ...]]:
    return [(c.source, c.text, c.translation or None, c.id, c.speaker) for c in found]


@pytest.mark.parametrize("write", WRITERS)
def test_every_form_gives_the_same_rows_and_audio(folder: Path, write: Writer) -> None:
    manifest = write(folder / "train", ROWS)
    assert fields(list(candidates(manifest))) == [tuple(row.values()) for row in ROWS]
    report = write_split(candidates(manifest), folder / "out" / "train.parquet", language="es")
    assert (report.utterances, report.speakers, report.rejected) == (4, 2, {})
    for found in read_split(folder / "out" / "train.parquet"):
        assert found.seconds == pytest.approx(0.5, abs=0.08)
        assert np.abs(found.audio()).max() > 0.1


@pytest.mark.parametrize("write", WRITERS)
def test_columns_are_mapped(folder: Path, write: Writer) -> None:
    rows = [{"path": row["audio"], "sentence": row["text"], "text": "not this"} for row in ROWS]
    found = list(candidates(write(folder / "m", rows), {"audio": "path", "text": "sentence"}))
    assert [(c.source, c.text) for c in found] == [(row["audio"], row["text"]) for row in ROWS]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "sentense"}, "no column 'sentense' for the text; it has: path, sentence"),
        (None, "no column 'audio' for the audio; it has: path, sentence"),
        ({"audio": "path", "text": "sentence", "speaker": "client"}, "no column 'client' for the speaker"),
        ({"sentence": "text"}, "maps 'sentence', which is no field"),
    ],
)
def test_a_missing_column_is_named_beside_those_present(
    folder: Path, write: Writer, columns: dict[str, str] | None, message: str
) -> None:
    manifest = write(folder / "m", [{"path": "clips/uno.wav", "sentence": "uno"}])
    columns = {"audio": "path", **columns} if columns and "text" in columns else columns
    with pytest.raises(CorpusError, match=message):
        candidates(manifest, columns)
    with pytest.raises(CorpusError, match=message):
        content_digest(manifest, columns)


def test_manifests_that_are_none(folder: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.jsonl does not exist"):
        candidates(folder / "nowhere.jsonl")
    (folder / "m.xlsx").write_bytes(b"PK")
    with pytest.raises(CorpusError, match=r"none of \.jsonl, \.csv, \.tsv, \.parquet"):
        candidates(folder / "m.xlsx")
    (folder / "m.parquet").write_bytes(b"no")
    with pytest.raises(CorpusError, match="not a readable Parquet file"):
        candidates(folder / "m.parquet")
    for name in ("m.jsonl", "m.csv"):
        (folder / name).write_bytes(b"")
        with pytest.raises(CorpusError, match="the test split of es is empty"):
            write_split(candidates(folder / name), folder / "out" / "test.parquet", language="es")
    (folder / "m.csv").write_text("audio,text\nclips/uno.wav,uno\n", encoding="utf-16")
    with pytest.raises(CorpusError, match="no column 'audio'"):
        candidates(folder / "m.csv")


def prepared(manifest: Path, max_rejected: float = 0.9) -> tuple[list[str], list[tuple[int, str]]]:
    out = manifest.parent / "out"
    write_split(candidates(manifest), out / "train.parquet", language="es", max_rejected=max_rejected)
    lines = (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return (
        [u.id for u in read_split(out / "train.parquet")],
        [(r["row"], r["reason"]) for r in map(json.loads, lines)],
    )


def test_bad_json_lines_are_rejected_rows(folder: Path) -> None:
    good = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    bad = [
        b'{"audio": "clips/uno.wav", "text": ',
        b"[1, 2]",
        '{"audio": "clips/uno.wav", "text": "mañana"}'.encode("latin-1"),
        b'{"audio": "clips/cinco.wav", "text": "cinco"}',
        b'{"text": "sin audio"}',
        b'{"audio": "clips/uno.wav"}',
        b'{"audio": {"path": 3}, "text": 3}',
        b'{"audio": "clips/uno.wav", "text": ["uno"]}',
        b'{"audio": "' + b"x" * 5000 + b'", "text": "largo"}',
    ]
    manifest = folder / "m.jsonl"
    manifest.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good[0], *bad, b"", *good[1:]]))
    ids, rejects = prepared(manifest)
    assert ids == ["u1", "u2", "u3", "u4"]
    malformed, missing = "malformed line", "missing file"
    assert [reason for _, reason in rejects] == [
        malformed, malformed, "wrong encoding", missing, missing, "empty text", missing, malformed, "unreadable audio",
    ]  # fmt: skip
    assert [row for row, _ in rejects] == list(range(2, 11))
    assert content_digest(manifest) == content_digest(manifest)


@pytest.mark.parametrize("write", [as_jsonl, as_parquet])
def test_a_value_that_is_no_number_is_missing(folder: Path, write: Writer) -> None:
    path = write(folder / "list", [{"audio": "clips/uno.wav", "text": "uno"} | dict.fromkeys(MAY_MISS, math.nan)])
    (found,) = candidates(path)
    assert (found.id, found.text, found.translation, found.speaker) == ("uno", "uno", None, None)
    assert content_digest(path) == content_digest(write(folder / "other", [{"audio": "clips/uno.wav", "text": "uno"}]))


MAY_MISS = ("translation", "id", "speaker")


def test_bad_csv_lines_are_rejected_rows(folder: Path) -> None:
    manifest = folder / "m.csv"
    manifest.write_bytes(
        b"audio,text\n"
        b"clips/uno.wav,uno\n"
        b"clips/dos.flac\n"
        b"clips/dos.flac,dos,2\n"
        b"clips/tres.ogg,ma\xf1ana\n"
        b"clips/dos.flac," + b"x" * 200_000 + b"\n"
        b'clips/cuatro.mp3,"cuatro,\n4"\n'
    )
    ids, rejects = prepared(manifest)
    assert ids == ["uno", "cuatro"]
    malformed = "malformed line"
    assert rejects == [(2, malformed), (3, malformed), (4, "wrong encoding"), (5, malformed)]
    assert read_split(folder / "out" / "train.parquet")[1].text == "cuatro, 4"


def test_a_bad_string_in_parquet_is_a_rejected_row(folder: Path) -> None:
    raw = pa.array([b"uno", b"ma\xf1ana", None, b"cuatro"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"audio": [row["audio"] for row in ROWS], "text": text}), folder / "m.parquet")
    assert prepared(folder / "m.parquet") == (["uno", "cuatro"], [(2, "wrong encoding"), (3, "empty text")])


def test_ids_default_to_the_file_name_and_stay_apart(folder: Path) -> None:
    (folder / "more").mkdir()
    shutil.copy(folder / "clips/uno.wav", folder / "more/uno.wav")
    audios = ["clips/uno.wav", "more/uno.wav", str(folder / "clips/dos.flac"), "clips/uno.wav"]
    manifest = as_jsonl(folder / "m", [{"audio": audio, "text": "uno"} for audio in audios])
    assert [c.id for c in candidates(manifest)] == ["uno", "uno-2", "dos", "uno"]
    assert prepared(manifest) == (["uno", "uno-2", "dos"], [(4, "duplicate id")])


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_audio_inside_parquet(folder: Path, kind: str) -> None:
    data = [(folder / row["audio"]).read_bytes() for row in ROWS]
    table = [{"audio": d if kind == "bytes" else {"bytes": d, "path": row["audio"]}, "text": row["text"]}
             for d, row in zip(data, ROWS, strict=True)]  # fmt: skip
    manifest = as_parquet(folder / "m", table)
    shutil.rmtree(folder / "clips")
    expected = ["uno", "dos", "tres", "cuatro"] if kind == "struct" else ["row-1", "row-2", "row-3", "row-4"]
    assert prepared(manifest) == (expected, [])
    first = content_digest(manifest)
    assert content_digest(as_parquet(folder / "m", table)) == first
    table[0], table[1] = ({**table[0], "audio": table[1]["audio"]}, {**table[1], "audio": table[0]["audio"]})
    assert content_digest(as_parquet(folder / "m", table)) != first


def test_a_struct_that_only_names_files(folder: Path) -> None:
    table = [{"audio": {"bytes": None, "path": row["audio"]}, "text": row["text"]} for row in ROWS]
    schema = pa.schema([("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())])
    manifest = folder / "m.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=schema), manifest)
    assert prepared(manifest) == (["uno", "dos", "tres", "cuatro"], [])
    before = content_digest(manifest)
    (folder / "clips/tres.ogg").unlink()
    assert content_digest(manifest) != before


@pytest.mark.parametrize("write", WRITERS)
def test_digest_follows_contents_and_reads_no_audio_twice(folder: Path, write: Writer) -> None:
    manifest = write(folder / "m", ROWS)
    time.sleep(0.05)  # younger files are not memoised
    memo = Memo(folder / "memo.json")
    first = content_digest(manifest, memo=memo)
    memo.save()
    memo = Memo(folder / "memo.json")
    assert sorted(Path(path).name for path in memo) == ["cuatro.mp3", "dos.flac", "tres.ogg", "uno.wav"]
    assert content_digest(manifest) == content_digest(manifest, memo=memo) == first
    # A memo that lies shows that the file was not read.
    memo[str(folder / "clips/uno.wav")] += "0"
    assert content_digest(manifest, memo=memo) != first
    audio = folder / "clips/uno.wav"
    audio.write_bytes(audio.read_bytes())
    assert content_digest(manifest, memo=memo) == first
    audio.write_bytes(audio.read_bytes()[:-1])
    changed = content_digest(manifest, memo=memo)
    audio.unlink()
    assert len({first, changed, content_digest(manifest, memo=memo)}) == 3


def test_digest_ignores_the_place_and_columns_nobody_uses(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = content_digest(as_jsonl(folder / "m", ROWS))
    moved = tmp_path_factory.mktemp("moved") / "corpus"
    shutil.copytree(folder, moved)
    assert content_digest(moved / "m.jsonl") == first
    assert content_digest(as_jsonl(folder / "m", [row | {"license": "CC0"} for row in ROWS])) == first
    assert content_digest(as_jsonl(folder / "m", ROWS[::-1])) != first


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
    other=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
)
def test_texts_survive_and_digests_differ_as_the_texts_do(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], other: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("texts")

    def manifest(values: list[str]) -> Path:
        return as_jsonl(folder / "m", [{"audio": "missing.wav", "text": text} for text in values])

    assert [c.text for c in candidates(manifest(texts))] == texts
    first = content_digest(folder / "m.jsonl")
    assert (content_digest(manifest(other)) == first) == (texts == other)
