from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_sounds import sound

from lors.errors import CorpusError
from lors.speech.corpora.folder import open_split
from lors.speech.corpora.settings import FolderCorpora
from lors.speech.corpora.sources import candidates, describe
from lors.speech.corpus import read_split, write_split

SHARES = {"validation": 0.1, "test": 0.1}
ROWS = [
    {"file_name": "uno.wav", "transcription": 'uno, "dos"', "speaker": "ana"},
    {"file_name": "clips/dos.mp3", "transcription": "dos", "speaker": "eva"},
    {"file_name": "clips/tres.flac", "transcription": "tres", "speaker": "ana"},
]


def write(folder: Path, rows: list[dict[str, Any]], kind: str = "csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"metadata.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    elif kind == "tsv":
        table.write_text("\n".join("\t".join(line) for line in [list(rows[0]), *(list(r.values()) for r in rows)]))
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return table


def record(folder: Path, rows: list[dict[str, Any]]) -> None:
    for seed, row in enumerate(rows):
        path = folder / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound(0.4, 22050, 2, seed), 22050)


def prepared(corpora: FolderCorpora, split: str, out: Path) -> list[tuple[str, str, str | None]]:
    source = describe(corpora, "es", split)
    everything = {"source": "folder", "language": "es", "split": split, **source.settings}
    assert json.loads(json.dumps([everything, source.places])) == [everything, source.places]
    write_split(candidates(everything, source.places), out / f"{split}.parquet", language="es")
    return [(u.id, u.text, u.speaker) for u in read_split(out / f"{split}.parquet")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("dev", ["dev", "validation", "val"])
def test_split_folders_with_a_table_each(tmp_path: Path, kind: str, dev: str) -> None:
    for split, row in zip(("train", dev, "test"), ROWS, strict=True):
        write(tmp_path / "es" / split, [row], kind)
        record(tmp_path / "es" / split, [row])
    corpora = FolderCorpora(source="folder", path=f"{tmp_path}/{{language}}")
    assert [prepared(corpora, split, tmp_path / "out") for split in ("train", "validation", "test")] == [
        [("uno", 'uno, "dos"', "ana")],
        [("dos", "dos", "eva")],
        [("tres", "tres", "ana")],
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_column_names_the_split(tmp_path: Path, kind: str) -> None:
    write(tmp_path, [row | {"split": split} for row, split in zip(ROWS, ("train", "dev", "train"), strict=True)], kind)
    record(tmp_path, ROWS)
    corpora = FolderCorpora(source="folder", path=str(tmp_path))
    assert [identity for identity, *_ in prepared(corpora, "train", tmp_path / "out")] == ["uno", "tres"]
    assert [identity for identity, *_ in prepared(corpora, "validation", tmp_path / "out")] == ["dos"]
    with pytest.raises(CorpusError, match="the test split of es is empty"):
        prepared(corpora, "test", tmp_path / "out")


def test_a_split_of_another_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [row | {"split": "eval"} for row in ROWS])
    with pytest.raises(CorpusError, match=r"row 1 of .* has the split 'eval'; write train"):
        list(open_split(tmp_path, "train", {}, SHARES, "es").rows)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_bad_rows_are_named_once(tmp_path: Path, kind: str) -> None:
    table = write(tmp_path, [row | {"split": "test"} for row in ROWS], kind)
    record(tmp_path, ROWS)
    table.write_text(table.read_text() + ("{" if kind == "jsonl" else "a,b\n"))
    faults = {
        split: [c.fault for c in open_split(tmp_path, split, {}, SHARES, "es").candidates()]
        for split in ("train", "test")
    }
    assert faults["test"] == [None] * 3
    assert [fault[0] for fault in faults["train"] if fault] == ["malformed line"]


def test_what_is_missing_or_ambiguous(tmp_path: Path) -> None:
    def opened(folder: Path, columns: dict[str, str] | None = None, split: str = "train") -> None:
        open_split(folder, split, columns or {}, SHARES, "es")

    with pytest.raises(CorpusError, match="nowhere does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(
        CorpusError, match=r"has no metadata\.csv; write that table, with the columns file_name and text"
    ):
        opened(tmp_path)
    write(tmp_path / "split" / "train", ROWS)
    with pytest.raises(CorpusError, match=r"has no folder test/ with a metadata\.csv \(it has train\)"):
        opened(tmp_path / "split", split="test")
    write(tmp_path / "split", ROWS)
    with pytest.raises(CorpusError, match=r"metadata\.csv and .*train/metadata\.csv both list"):
        opened(tmp_path / "split")
    write(tmp_path / "two", ROWS)
    write(tmp_path / "two", ROWS, "jsonl")
    with pytest.raises(CorpusError, match=r"metadata\.csv and .*metadata\.jsonl both list the train split"):
        opened(tmp_path / "two")
    write(tmp_path / "texts", [{"file_name": "a.wav", "text": "a", "sentence": "b", "split": "train"}])
    with pytest.raises(
        CorpusError, match=r"has text and sentence, so .*`columns: \{text: text\}` \(its columns: file_"
    ):
        opened(tmp_path / "texts")
    opened(tmp_path / "texts", {"text": "sentence"})
    write(tmp_path / "none", [{"file_name": "a.wav", "words": "a"}])
    with pytest.raises(CorpusError, match="has no column named text, transcription, sentence, transcript, so which"):
        opened(tmp_path / "none")
    write(tmp_path / "files", [{"path": "a.wav", "text": "a"}])
    with pytest.raises(CorpusError, match="no column 'file_name' for the audio; it has: path, text"):
        opened(tmp_path / "files")


_SENTENCES = st.sampled_from(["Hola.", "hola", "¿Qué tal?", "qué tal", "tres", "cuatro", "cinco", "1", ""])


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["", "ana", "eva", "luz", "sol"]), _SENTENCES), min_size=1, max_size=30),
    shares=st.fixed_dictionaries({"validation": st.floats(0.01, 0.49), "test": st.floats(0.01, 0.49)}),
)
def test_a_drawn_split_shares_no_speaker_or_no_sentence(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], shares: dict[str, float]
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    write(folder, [{"file_name": f"{n}.wav", "text": text, "speaker": who} for n, (who, text) in enumerate(rows)])
    found: dict[str, list[Any]] = {}
    for split in ("train", "validation", "test"):
        try:
            found[split] = list(open_split(folder, split, {}, shares, "es").candidates())
        except CorpusError as error:
            assert f"drawn for the {split} split" in str(error)  # noqa: PT017
            found[split] = []
    drawn = [candidate for part in found.values() for candidate in part]
    assert sorted(candidate.id for candidate in drawn) == sorted(str(number) for number in range(len(rows)))
    named = len({who for who, _ in rows} - {""}) > 1
    for group in ("speaker", "sentence"):
        places: dict[str, set[str]] = {}
        for split, part in found.items():
            for candidate in part:
                by_speaker = named and candidate.speaker
                if (group == "speaker") == bool(by_speaker):
                    key = candidate.speaker if by_speaker else "".join(filter(str.isalnum, candidate.text.casefold()))
                    places.setdefault(key, set()).add(split)
        assert all(len(splits) == 1 for splits in places.values())


def test_drawn_shares_are_about_right_and_further_rows_move_none(tmp_path: Path) -> None:
    def drawn(count: int) -> dict[str, set[str]]:
        write(
            tmp_path, [{"file_name": f"{n}.wav", "text": f"frase {n}", "speaker": f"s{n // 2}"} for n in range(count)]
        )
        return {
            split: {c.id for c in open_split(tmp_path, split, {}, {"validation": 0.2, "test": 0.1}, "es").candidates()}
            for split in ("train", "validation", "test")
        }

    few, many = drawn(1000), drawn(2000)
    assert {split: len(ids) for split, ids in many.items()} == pytest.approx(
        {"train": 1400, "validation": 400, "test": 200}, rel=0.25
    )
    assert all(few[split] <= many[split] for split in few)


def test_a_single_speaker_is_split_by_sentence(tmp_path: Path) -> None:
    write(tmp_path, [{"file_name": f"{n}.wav", "text": f"frase {n}", "speaker": "ana"} for n in range(100)])
    assert all(list(open_split(tmp_path, split, {}, SHARES, "es").rows) for split in ("train", "validation", "test"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_speakers_that_are_numbers_are_in_one_split_each(tmp_path: Path, kind: str) -> None:
    write(tmp_path, [{"file_name": f"{n}.wav", "text": f"frase {n}", "speaker": n % 40} for n in range(400)], kind)
    found = [
        {
            candidate.speaker
            for candidate in open_split(tmp_path, split, {}, dict.fromkeys(SHARES, 0.3), "es").candidates()
        }
        for split in ("train", "validation", "test")
    ]
    assert sorted(speaker for speakers in found for speaker in speakers) == sorted(map(str, range(40)))


def test_the_digest_is_of_the_split_and_of_what_the_limit_can_read(tmp_path: Path) -> None:
    rows = [row | {"split": split} for row, split in zip(ROWS, ("train", "train", "test"), strict=True)]
    write(tmp_path, rows)
    record(tmp_path, ROWS)

    def digest(split: str, **limits: int) -> dict[str, str]:
        data = {"source": "folder", "path": str(tmp_path), "limits": limits, "max_rejected": 0}
        return describe(FolderCorpora.model_validate(data), "es", split).outside

    train, test, one = digest("train"), digest("test"), digest("train", train=1)
    (tmp_path / "clips/tres.flac").write_bytes(b"other")
    assert (digest("train"), digest("train", train=1)) == (train, one)
    assert digest("test") != test
    write(tmp_path, rows[:1])
    assert digest("train") != train
