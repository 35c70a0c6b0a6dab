"""A folder of audio files with a table, as `datasets` lays out an audiofolder: metadata.csv, .tsv, .jsonl or .parquet.

The table has a column `file_name` (relative to the table, and not out of the folder) and the text. The splits are
folders (train, validation or dev, test) with a table each, or a column `split`, or drawn here by a hash, so that no
speaker (where speakers are named, else no sentence) is in two splits, and rows that are added move none of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lors.errors import CorpusError
from lors.scoring.normalise import normalise
from lors.settings import SPLITS
from lors.speech.corpora.manifest import Row, columns_of, open_table, rows_digest, text_of, to_candidates
from lors.speech.corpus import Candidate

__all__ = ["FolderSplit", "open_split"]

_TABLES = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
_TEXTS = ("text", "transcription", "sentence", "transcript")
_NAMES = {"dev": "validation", "val": "validation", "valid": "validation"} | {split: split for split in SPLITS}


@dataclass(frozen=True, slots=True)
class FolderSplit:
    """One split of a folder; `rows` are to be read once."""

    folder: Path
    table: Path
    mapping: Mapping[str, str]
    rows: Iterator[Row]

    def candidates(self) -> Iterator[Candidate]:
        """The rows, for `write_split`."""
        return to_candidates(self.rows, self.mapping, self.table.parent, self.table.name, self.folder)

    def content_digest(self, memo: MutableMapping[str, str] | None, count: int | None) -> str:
        """sha256 (hex) over the first `count` rows (None: all) and the bytes of their audio."""
        rows = islice(self.rows, count)
        return rows_digest(rows, self.mapping, self.table.parent, memo, within=self.folder)


def open_split(
    folder: Path,
    split: str,
    columns: Mapping[str, str],
    shares: Mapping[str, float],  # of validation and test, where they are drawn
    language: str,  # for the comparison of sentences
) -> FolderSplit:
    """The rows of one split; CorpusError where the folder, its table, a column or the split is not there."""
    if not folder.is_dir():
        raise CorpusError(f"the folder of audio {folder} does not exist; check the corpus' path")
    table, own = _table_of(folder, split)
    present = columns_of(table)
    columns = {"audio": "file_name", **columns}
    if "text" not in columns:
        columns["text"] = _text_column(table, present)
    opened = open_table(table, columns, more=["split"])
    if own:
        rows = opened.rows
    elif "split" in present:
        rows = _listed(table, opened.rows, split)
    else:
        rows = _drawn(table, list(opened.rows), opened.mapping, split, shares, language)
    return FolderSplit(folder, table, opened.mapping, rows)


def _table_of(folder: Path, split: str) -> tuple[Path, bool]:
    """The table that names a split's rows, and whether it is of that split alone."""
    apart = {name: found for name in _NAMES if (found := _tables(folder / name))}
    whole = _tables(folder)
    if whole and apart:
        raise CorpusError(
            f"{whole[0]} and {next(iter(apart.values()))[0]} both list the folder's audio; keep one or the other"
        )
    places = [name for name in apart if _NAMES[name] == split]
    found = whole or [table for name in places for table in apart[name]]
    if len(found) > 1:
        raise CorpusError(f"{found[0]} and {found[1]} both list the {split} split; keep one of them")
    if not found:
        where = f"folder {split}/ with a {_TABLES[0]} (it has {', '.join(apart)})" if apart else _TABLES[0]
        raise CorpusError(
            f"the folder of audio {folder} has no {where}; write that table, with the columns file_name and text"
        )
    return found[0], not whole


def _tables(folder: Path) -> list[Path]:
    return [folder / name for name in _TABLES if (folder / name).is_file()]


def _text_column(table: Path, present: list[str]) -> str:
    found = [name for name in _TEXTS if name in present]
    if len(found) != 1:
        said = f"has {' and '.join(found)}" if found else f"has no column named {', '.join(_TEXTS)}"
        raise CorpusError(
            f"{table} {said}, so which one holds the text is not known; name it, as in `columns: {{text: "
            f"{(found or ['COLUMN'])[0]}}}` (its columns: {', '.join(ascii(name)[1:-1] for name in present)})"
        )
    return found[0]


def _listed(table: Path, rows: Iterator[Row], split: str) -> Iterator[Row]:
    """The rows whose column `split` says so; those that could not be taken apart count as training's."""
    for number, row in enumerate(rows, start=1):
        named = "train" if isinstance(row, tuple) else str(row.get("split"))
        if named not in _NAMES:
            raise CorpusError(
                f"row {number} of {table} has the split {named!r}; write train, validation (or dev) or test there"
            )
        if _NAMES[named] == split:
            yield row


def _drawn(
    table: Path, rows: list[Row], mapping: Mapping[str, str], split: str, shares: Mapping[str, float], language: str
) -> Iterator[Row]:
    """The rows that a hash of their speaker (else their sentence) puts into a split; bad ones count as training's."""
    speakers = {text_of(row.get(mapping["speaker"])) or "" for row in rows if isinstance(row, dict)} - {""}
    named = len(speakers) > 1  # a single one would fill a single split

    def drawn(row: Row) -> str:
        if isinstance(row, tuple):
            return "train"
        speaker = text_of(row.get(mapping["speaker"])) if named else None
        sentence = text_of(row.get(mapping["text"])) or ""
        group = f"speaker {speaker}" if speaker else f"sentence {normalise(sentence, language) or sentence}"
        digest = hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for name, share in shares.items():
            if place < share:
                return name
            place -= share
        return "train"

    kept = [row for row in rows if drawn(row) == split]
    if rows and not kept:
        groups = f"{len(speakers)} speakers" if named else f"{len(rows)} sentences"
        raise CorpusError(
            f"no row of {table} was drawn for the {split} split, as it has only {groups}; add a column `split` with "
            "train, validation and test, or raise corpora.shares"
        )
    return iter(kept)
