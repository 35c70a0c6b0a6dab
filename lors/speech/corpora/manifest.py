"""Speech listed in a manifest: one row an utterance, in JSONL, CSV, TSV or Parquet.

Fields: `audio` (a path relative to the manifest, or absolute; in Parquet also the bytes, or a struct of bytes and
path as `datasets` writes it) and `text`; optional `translation`, `id`, `speaker` and `seconds` (accepted, but the
duration is always measured). A field is read from the column of its own name unless `columns` names another.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lors.errors import CorpusError
from lors.files import file_digest
from lors.speech.corpus import Candidate, read_audio

__all__ = [
    "FIELDS",
    "Row",
    "Table",
    "candidates",
    "check_columns",
    "columns_of",
    "content_digest",
    "open_table",
    "rows_digest",
    "rows_to_read",
    "text_of",
    "to_candidates",
    "values",
]

FIELDS = ("audio", "text", "translation", "id", "speaker", "seconds")
_REQUIRED = ("audio", "text")

Row = dict[str, Any] | tuple[str, str]
"""One row: its values by column, or (reason, detail) where it could not be taken apart. Bytes that are not UTF-8
arrive as lone surrogates, which validation reports as a wrong encoding."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of utterances."""

    mapping: dict[str, str]
    """Field to column, for all FIELDS."""
    rows: Iterator[Row]
    """To be read once."""


def candidates(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[Candidate]:
    """The rows of the manifest at `path`, for `write_split`; `columns` maps a field to the column that holds it.

    A row without an id takes its audio file's name without the suffix (with the row's number where another file of
    the manifest has the same name), or `row-N`. A row that cannot be parsed becomes a candidate with a fault.

    Raises CorpusError at once where the manifest is missing, unreadable or lacks a column.
    """
    table = open_table(path, columns)
    return to_candidates(table.rows, table.mapping, path.parent, path.name)


def content_digest(
    path: Path,
    columns: Mapping[str, str] | None = None,
    memo: MutableMapping[str, str] | None = None,
    count: int | None = None,  # of the rows that are read (`rows_to_read`); None is all
) -> str:
    """sha256 (hex) over the mapped values of the rows and the bytes of their audio; a missing file counts as such.

    Audio inside a Parquet manifest is covered by the manifest's own bytes. `memo` is that of `lors.files.file_digest`:
    with it, a file that did not change is not read again. Where the manifest lies does not enter, so a moved corpus
    keeps its digest.
    """
    table = open_table(path, columns, with_audio=False)
    embeds = path.suffix == ".parquet" and _embeds(_parquet_schema(path), table.mapping["audio"])
    return rows_digest(islice(table.rows, count), table.mapping, path.parent, memo, [path] if embeds else [])


def rows_digest(
    rows: Iterable[Row],
    mapping: Mapping[str, str],
    root: Path,  # of the paths in the rows
    memo: MutableMapping[str, str] | None,
    files: Iterable[Path] = (),  # further ones that count
    within: Path | None = None,  # as in `to_candidates`
) -> str:
    """sha256 (hex) over the mapped values of rows and the bytes of the audio files that they name."""
    total = hashlib.sha256()
    for row in rows:
        values: list[Any] = list(row) if isinstance(row, tuple) else [text_of(row.get(mapping[f])) for f in FIELDS[:5]]
        audio = row.get(mapping["audio"]) if isinstance(row, dict) else None
        data = audio.get("bytes") if isinstance(audio, dict) else audio
        audio = audio.get("path") if isinstance(audio, dict) else audio
        if isinstance(audio, str):
            values.append(_digest(root / audio, memo) if _is_within(root / audio, within) else "outside")
        if isinstance(data, bytes):
            values.append(hashlib.sha256(data).hexdigest())
        total.update(json.dumps(values).encode() + b"\n")
    for file in files:
        total.update(_digest(file, memo).encode())
    return total.hexdigest()


def rows_to_read(limit: int | None, max_rejected: float) -> int | None:
    """The most rows that `write_split` reads without failing: later ones have no part in what it writes."""
    return None if limit is None or max_rejected >= 1 else int(limit / (1 - max_rejected)) + 1


def columns_of(path: Path) -> list[str]:
    """The columns of a table, none where it is empty; CorpusError where it is no table."""
    return _reader(path)(path, {"audio": ""}, False)[0] or []


def open_table(
    path: Path,
    columns: Mapping[str, str] | None,
    *,
    with_audio: bool = True,  # False leaves out the audio inside Parquet
    more: Iterable[str] = (),  # further columns of the rows
) -> Table:
    """A JSONL, CSV, TSV or Parquet file; CorpusError where it is missing, damaged or lacks a column."""
    mapping = {field: field for field in FIELDS} | dict(columns or {})
    if unknown := sorted(set(mapping) - set(FIELDS)):
        raise CorpusError(
            f"columns maps {unknown[0]!r}, which is no field of a manifest; those are {', '.join(FIELDS)}"
        )
    present, rows = _reader(path)(path, mapping | {name: name for name in more}, with_audio)
    if present is not None:
        check_columns(f"the manifest {path}", present, mapping, columns or ())
    return Table(mapping, rows)


def check_columns(what: str, present: Sequence[str], mapping: Mapping[str, str], named: Container[str] = ()) -> None:
    """CorpusError where `what` lacks the column of a field that is required or was `named` by the user."""
    for field, column in mapping.items():
        if column not in present and (field in _REQUIRED or field in named):
            raise CorpusError(
                f"{what} has no column {column!r} for the {field}; it has: "
                f"{', '.join(ascii(name)[1:-1] for name in present)}; map the right one under columns"
            )


_Reader = Callable[[Path, dict[str, str], bool], tuple[list[str] | None, Iterator[Row]]]


def _reader(path: Path) -> _Reader:
    if not path.is_file():
        raise CorpusError(f"the manifest {path} does not exist; check the corpus' path")
    if path.suffix not in _READERS:
        raise CorpusError(f"the manifest {path} is none of {', '.join(_READERS)}; convert it to one of them")
    return _READERS[path.suffix]


def _json_lines(path: Path, mapping: dict[str, str], with_audio: bool) -> tuple[list[str] | None, Iterator[Row]]:
    def rows() -> Iterator[Row]:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield "malformed line", f"line {number} is not JSON: {error}"
                        continue
                    yield row if isinstance(row, dict) else ("malformed line", f"line {number} is not a JSON object")

    # Any row may leave out what it has not got, so the columns are those of all rows.
    present = dict.fromkeys(name for row in rows() if isinstance(row, dict) for name in row)
    return list(present) or None, rows()


def _delimited(path: Path, mapping: dict[str, str], with_audio: bool) -> tuple[list[str] | None, Iterator[Row]]:
    # Tab-separated corpora (Common Voice, CoVoST) quote nothing: a quotation mark in them is text.
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}

    def rows() -> Iterator[list[str] | tuple[str, str]]:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, **style)
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield "malformed line", f"line {reader.line_num}: {error}"
                    continue
                if row:
                    yield row

    def named(lines: Iterator[list[str] | tuple[str, str]], header: list[str]) -> Iterator[Row]:
        for row in lines:
            if isinstance(row, tuple):
                yield row
            elif len(row) != len(header):
                yield "malformed line", f"{len(row)} values for {len(header)} columns: {' | '.join(row)[:80]}"
            else:
                yield dict(zip(header, row, strict=True))

    lines = rows()
    header = next(lines, [])
    if isinstance(header, tuple):
        raise CorpusError(
            f"the first line of the manifest {path} names no columns ({header[1]}); save it as UTF-8 text"
        )
    return header or None, named(lines, header)


def _parquet(path: Path, mapping: dict[str, str], with_audio: bool) -> tuple[list[str] | None, Iterator[Row]]:
    schema = _parquet_schema(path)

    def rows() -> Iterator[Row]:
        wanted = [column for column in dict.fromkeys(mapping.values()) if column in schema.names]
        audio = mapping["audio"]
        leaves = wanted
        if not with_audio and _embeds(schema, audio):  # of a struct, the path alone; of bytes, nothing
            leaves = [f"{audio}.path" if column == audio else column for column in wanted]
        for batch in _batches(path, leaves):
            named = {name: values(batch.column(name)) for name in batch.schema.names}
            yield from (dict(zip(named, row, strict=True)) for row in zip(*named.values(), strict=True))

    return schema.names, rows()


def _parquet_schema(path: Path) -> Any:
    try:
        return pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"the manifest {path} is not a readable Parquet file ({error}); write it again") from error


def _batches(path: Path, columns: list[str]) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):  # all at once, the reader would keep each one's buffers
                yield from file.iter_batches(batch_size=32, row_groups=[group], columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"the manifest {path} is damaged ({error}); write it again") from error


def _embeds(schema: Any, column: str) -> bool:
    kind = schema.field(column).type
    return bool(pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def values(column: Any) -> list[Any]:
    """An Arrow column as Python values; bytes that are not UTF-8 as lone surrogates."""
    # Arrow refuses a whole batch for one string that is not UTF-8; as bytes, only its row is bad.
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()).to_pylist()
        return [value if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    plain: list[Any] = column.to_pylist()
    return plain


_READERS: dict[str, _Reader] = {
    ".jsonl": _json_lines,
    ".csv": _delimited,
    ".tsv": _delimited,
    ".parquet": _parquet,
}


def to_candidates(
    rows: Iterable[Row],
    mapping: Mapping[str, str],  # field -> column, for all FIELDS
    root: Path,  # of the paths in the rows
    name: str,  # of the table, in the rejects
    within: Path | None = None,  # what no path in the rows may leave, links aside; None: they may be anywhere
) -> Iterator[Candidate]:
    """Rows as `write_split` takes them; see `candidates`."""
    owners: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, tuple):
            yield Candidate(f"row-{number}", None, None, None, _nothing, name, row)
            continue
        field = {key: row.get(column) for key, column in mapping.items()}
        source, load = _audio(field["audio"], root)
        identity = text_of(field["id"])
        if not identity:
            identity = Path(source).stem or f"row-{number}"
            if owners.setdefault(identity, source) != source:
                identity = f"{identity}-{number}"
        text, translation, speaker = (text_of(field[name]) for name in ("text", "translation", "speaker"))
        fault = ("missing file", "the row names no audio") if load is _nothing else None
        if isinstance(load, partial) and not _is_within(root / source, within):
            fault = ("path outside the corpus", f"it leaves {within}")
        if nested := [name for name in FIELDS[1:] if isinstance(field[name], dict | list)]:
            fault = ("malformed line", f"the {nested[0]} is not a string")
        yield Candidate(identity, text, translation, speaker or None, load, source, fault)


def _audio(value: Any, root: Path) -> tuple[str, Callable[[], tuple[np.ndarray, int]]]:
    data, name = value, ""
    if isinstance(value, dict):
        name = value["path"] if isinstance(value.get("path"), str) else ""
        data = value.get("bytes") or name
    if isinstance(data, bytes):
        return name, lambda: read_audio(io.BytesIO(data))
    if isinstance(data, str) and data:
        return data, partial(read_audio, root / data)
    return name, _nothing


def _is_within(path: Path, folder: Path | None) -> bool:
    return folder is None or Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))


def _nothing() -> tuple[np.ndarray, int]:
    raise FileNotFoundError("the row names no audio")


def text_of(value: Any) -> str | None:
    """A value as text; None where there is none, which pandas and `json.dumps` write as NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else str(value)


def _digest(path: Path, memo: MutableMapping[str, str] | None) -> str:
    try:
        # A row may name a device or a pipe, which has no end.
        return file_digest(path.absolute(), memo) if path.is_file() else "missing"
    except (OSError, ValueError):  # a name that no file can have
        return "missing"
