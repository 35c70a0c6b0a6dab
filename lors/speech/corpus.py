"""A prepared split: validated utterances as 16 kHz mono FLAC and text in one Parquet file.

Everything downstream reads this one form, whatever source it came from. Preparation streams: row groups of bounded
size, at most a few decoded recordings in memory, the same bytes for the same input.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import tempfile
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import soxr

from lors.errors import ConfigError, CorpusError

__all__ = [
    "LONGEST_SECONDS",
    "SAMPLE_RATE",
    "SPLITS",
    "Candidate",
    "SplitReport",
    "Utterance",
    "encode_flac",
    "read_audio",
    "read_split",
    "write_split",
]

SPLITS = ("train", "validation", "test")
SAMPLE_RATE = 16_000
LONGEST_SECONDS = 30.0  # Whisper's window: nothing after it would be heard (Radford et al. 2022, section 2.2)

SILENT_PEAK = 1e-3  # -60 dB of full scale: below it a recording holds hiss, not speech
ROW_GROUP = 128  # rows; about 20 MB of FLAC at 5 s an utterance

Progress = Callable[[int, "int | None"], None]

# The metadata by which `datasets` recognises the column as audio.
_FEATURES = {name: {"dtype": "string", "_type": "Value"} for name in ("id", "text", "translation", "speaker")} | {
    "audio": {"sampling_rate": SAMPLE_RATE, "_type": "Audio"},
    "seconds": {"dtype": "float64", "_type": "Value"},
}
_COLUMNS = [
    ("id", pa.string()),
    ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ("text", pa.string()),
    ("translation", pa.string()),
    ("speaker", pa.string()),
    ("seconds", pa.float64()),
]
_SCHEMA = pa.schema(
    _COLUMNS, metadata={"huggingface": json.dumps({"info": {"features": {n: _FEATURES[n] for n, _ in _COLUMNS}}})}
)


@dataclass(frozen=True, slots=True)
class Utterance:
    """One validated recording with its text; `flac` is 16 kHz, mono, 16 bit."""

    id: str
    text: str
    translation: str | None
    speaker: str | None
    seconds: float
    flac: bytes | memoryview

    def audio(self) -> np.ndarray:
        """The samples, (samples,) float32 in [-1, 1) at 16 kHz."""
        samples, _ = soundfile.read(io.BytesIO(self.flac), dtype="float32")
        return np.asarray(samples, dtype=np.float32)

    def target(self, task: str) -> str | None:
        """What a model should write for `task`: the text (transcribe) or the translation (translate; None: unknown)."""
        return {"transcribe": self.text, "translate": self.translation}[task]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of a source, before validation.

    `load` gives the samples, (samples,) or (samples, channels) float32, and their rate in Hz; it raises where the
    audio cannot be read. `source` says where the audio lies, for the rejects file. `fault` is a (reason, detail)
    that the source itself already found; such a row is never loaded.
    """

    id: str
    text: str | None
    translation: str | None
    speaker: str | None
    load: Callable[[], tuple[np.ndarray, int]]
    source: str = ""
    fault: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What a prepared split holds. `rejected`: reason -> rows; `speakers`: distinct ones among rows that name one."""

    utterances: int
    seconds: float
    speakers: int
    characters: int
    translations: int
    rejected: dict[str, int]


class _RejectedError(Exception):
    """A row is bad: (reason, detail)."""


def read_audio(source: Path | BinaryIO) -> tuple[np.ndarray, int]:
    """Samples, (samples, channels) float32, and the rate in Hz, of a wav, flac, mp3 or ogg file.

    Reads just past `LONGEST_SECONDS`, so that a whole broadcast listed by mistake costs no memory.
    """
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(source)
    with soundfile.SoundFile(source) as file:
        return file.read(int((LONGEST_SECONDS + 1) * file.samplerate), dtype="float32", always_2d=True), file.samplerate


def encode_flac(samples: np.ndarray) -> bytes:
    """FLAC, 16 bit, of (samples,) float32 at 16 kHz; exact where the samples were 16 bit integers over 32768."""
    pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def read_split(path: Path) -> list[Utterance]:
    """All utterances of a prepared split, in the file's order; raises CorpusError if it is missing or not one.

    Their audio is mapped from a temporary file that has no name, so that it takes memory only while it is used.
    """
    if not path.is_file():
        raise CorpusError(f"the prepared split {path} is missing; prepare the corpus again")
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise CorpusError(f"{path} is not a readable Parquet file ({error}); prepare the corpus again") from error
    rows: list[dict[str, Any]] = []
    with file, _spool(path.parent) as spool:
        schema = file.schema_arrow
        missing = [name for name, kind in _COLUMNS if name not in schema.names or schema.field(name).type != kind]
        if missing:
            raise CorpusError(
                f"{path} is not a prepared split: it has no column {', '.join(missing)} of the right type"
            )
        for group in range(file.num_row_groups):  # iter_batches over all of them would keep each one's buffers
            for row in file.read_row_group(group, columns=[name for name, _ in _COLUMNS]).to_pylist():
                flac = row.pop("audio")["bytes"]
                rows.append(row | {"flac": slice(spool.tell(), spool.tell() + len(flac))})
                spool.write(flac)
        pa.default_memory_pool().release_unused()
        spool.flush()
        audio = memoryview(mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) if rows else b"")
    return [Utterance(**row | {"flac": audio[row["flac"]]}) for row in rows]


def _spool(folder: Path) -> IO[bytes]:
    try:  # beside the split, as the system's folder for temporary files may lie in memory
        return tempfile.TemporaryFile(dir=folder)
    except OSError:  # where this user may not write
        return tempfile.TemporaryFile()


def write_split(
    candidates: Iterable[Candidate],
    path: Path,
    *,
    language: str,
    max_seconds: float = LONGEST_SECONDS,
    min_seconds: float = 0.1,
    max_rejected: float = 0.05,
    limit: int | None = None,
    hours: float | None = None,
    workers: int = 1,
    on_progress: Progress | None = None,
) -> SplitReport:
    """Validate, resample (soxr HQ), mix to mono and write the split `path.stem` to `path`; atomically.

    Bad rows are listed in `rejects.jsonl` beside `path` (language, split, row counted from 1, id, audio, reason,
    detail), where they replace those of an earlier run of the same split, and the run goes on.

    Args:
        limit: stop reading once so many utterances are valid; None takes all.
        hours: stop reading once the valid ones last so long; None takes all.
        max_rejected: the share of the rows read that may be bad, in [0, 1].
        workers: threads that call `Candidate.load`; 1 calls it in this thread. Order and bytes do not depend on it.
        on_progress: called with (utterances written so far, `limit`).

    Raises:
        CorpusError: more than `max_rejected` is bad, or nothing is left; `path` is then not written.
        ConfigError: `max_seconds` is more than Whisper hears.
    """
    if not 0 < max_seconds <= LONGEST_SECONDS:
        raise ConfigError(
            f"max_seconds {max_seconds:g} is outside (0, {LONGEST_SECONDS:g}], what Whisper hears at once"
        )
    split, rejects_path = path.stem, path.parent / "rejects.jsonl"
    rejects: list[dict[str, Any]] = []
    ids: set[str] = set()
    speakers: set[str] = set()
    read = characters = translations = samples = 0

    def needed() -> int:  # the least number of further utterances
        by_count = inf if limit is None else limit - len(ids)
        by_time = inf if hours is None else ceil((hours * 3600 - samples / SAMPLE_RATE) / max_seconds)
        return int(max(0, min(by_count, by_time, 2 * workers)))

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with _writer(partial) as writer:
            group: list[dict[str, Any]] = []
            results = _prepared(candidates, min_seconds, max_seconds, workers, needed)
            for read, (candidate, outcome) in enumerate(results, start=1):
                if not isinstance(outcome, _RejectedError) and candidate.id in ids:
                    outcome = _RejectedError("duplicate id", "an earlier row has it")
                if isinstance(outcome, _RejectedError):
                    reason, detail = outcome.args
                    rejects.append(
                        {"language": language, "split": split, "row": read, "id": candidate.id}
                        | {"audio": candidate.source, "reason": reason, "detail": detail}
                    )
                    continue
                ids.add(candidate.id)
                group.append(outcome)
                speakers |= {outcome["speaker"]} - {None}
                characters += len(outcome["text"])
                translations += outcome["translation"] is not None
                samples += round(outcome["seconds"] * SAMPLE_RATE)
                if len(group) == ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
                    group.clear()
                if on_progress:
                    on_progress(len(ids), limit)
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
        _write_rejects(rejects_path, split, rejects)
        counts = dict(sorted(Counter(reject["reason"] for reject in rejects).items()))
        if not read:
            raise CorpusError(f"the {split} split of {language} is empty: its source has no rows; check its path")
        if len(rejects) > max_rejected * read or not ids:
            reason, number = max(counts.items(), key=lambda item: item[1])
            allowed = "all of them" if not ids else f"more than the share of {max_rejected:g} that may be"
            raise CorpusError(
                f"{len(rejects)} of {read} rows of the {split} split of {language} are bad, {allowed}, "
                f"most often: {reason} ({number}); each one is named in {rejects_path}"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return SplitReport(len(ids), samples / SAMPLE_RATE, len(speakers), characters, translations, counts)


def _writer(path: Path) -> Any:
    # Dictionaries and statistics of FLAC bytes would only cost memory.
    plain = ["id", "text", "translation", "speaker", "seconds"]
    compression = dict.fromkeys(plain, "zstd") | {"audio.bytes": "none", "audio.path": "zstd"}
    return pq.ParquetWriter(path, _SCHEMA, compression=compression, use_dictionary=["speaker"], write_statistics=plain)


def _write_rejects(path: Path, split: str, rejects: list[dict[str, Any]]) -> None:
    others = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    lines = [line for line in others if line and json.loads(line)["split"] != split]
    lines += [json.dumps(reject, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() for reject in rejects]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def _prepared(
    candidates: Iterable[Candidate],
    min_seconds: float,
    max_seconds: float,
    workers: int,
    needed: Callable[[], int],
) -> Iterator[tuple[Candidate, dict[str, Any] | _RejectedError]]:
    """Every candidate with its row or the reason against it, in order; reads only rows that are needed."""
    if workers == 1:
        for candidate in candidates:
            yield candidate, _row(candidate, min_seconds, max_seconds)
            if not needed():
                return
        return
    source = iter(candidates)
    ahead: deque[tuple[Candidate, Future[dict[str, Any] | _RejectedError]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            for candidate in islice(source, max(0, needed() - len(ahead))):
                ahead.append((candidate, pool.submit(_row, candidate, min_seconds, max_seconds)))
            if not ahead or not needed():
                return
            candidate, future = ahead.popleft()
            yield candidate, future.result()


def _row(candidate: Candidate, min_seconds: float, max_seconds: float) -> dict[str, Any] | _RejectedError:
    try:
        if candidate.fault:
            raise _RejectedError(*candidate.fault)
        for name, value in (("id", candidate.id), ("speaker", candidate.speaker)):
            _checked_text(value, name)
        text = _checked_text(candidate.text, "text")
        if not text:
            raise _RejectedError("empty text", "")
        if not any(character.isalpha() for character in text):
            raise _RejectedError("text without letters", text)
        translation = _checked_text(candidate.translation, "translation") or None
        audio = _checked_audio(candidate.load, min_seconds, max_seconds)
    except _RejectedError as rejected:
        return rejected
    return {
        "id": candidate.id,
        "audio": {"bytes": encode_flac(audio), "path": f"{candidate.id}.flac"},
        "text": text,
        "translation": translation,
        "speaker": candidate.speaker,
        "seconds": len(audio) / SAMPLE_RATE,
    }


def _checked_audio(
    load: Callable[[], tuple[np.ndarray, int]], min_seconds: float, max_seconds: float
) -> np.ndarray:  # (samples,) float32 at 16 kHz
    try:
        samples, rate = load()
        samples = np.asarray(samples, dtype=np.float32)
        seconds = len(samples) / rate
    except FileNotFoundError as error:
        raise _RejectedError("missing file", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder raises: the row is named, the run goes on
        raise _RejectedError("unreadable audio", f"{type(error).__name__}: {error}") from error
    if seconds > max_seconds:
        raise _RejectedError("audio too long", f"more than {max_seconds:g} s")
    if seconds < min_seconds:
        raise _RejectedError("audio too short", f"{seconds:.3f} s, less than {min_seconds:g} s")
    if not np.isfinite(samples).all():
        raise _RejectedError("unreadable audio", "samples that are not finite")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    if np.abs(mono).max(initial=0.0) < SILENT_PEAK:
        raise _RejectedError("silent audio", f"peak below {SILENT_PEAK:g}")
    return mono if rate == SAMPLE_RATE else np.asarray(soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ"))


# UTF-8 read as Windows-1252 or Latin-1: its continuation bytes then show as these signs, and not as the spaces,
# quotes and dashes that may rightly follow an accented letter ("voilà …", "CAFÉ»").
_SIGNS = re.sub("[\xa0«»‘’“”–—…]", "", bytes(set(range(0x80, 0xC0)) - {0x81, 0x8D, 0x8F, 0x90, 0x9D}).decode("cp1252"))
_MISREAD = re.compile(f"[ÂÃÐÑØÙ][{re.escape(_SIGNS)}]|â€|([à-ï][{re.escape(_SIGNS)}]{{2}}.*){{2}}", re.DOTALL)


def _checked_text(text: str | None, name: str) -> str:
    """NFC, white space single; raises where the characters cannot be what was meant."""
    text = text or ""
    if any(unicodedata.category(character) in {"Cc", "Cs"} and character not in "\t\n\r" for character in text):
        raise _RejectedError("wrong encoding", f"the {name} holds control characters or bytes that are not UTF-8")
    if "\ufffd" in text:
        raise _RejectedError("wrong encoding", f"the {name} holds replacement characters")
    if _MISREAD.search(text) and _fits_utf8(text):
        raise _RejectedError("wrong encoding", f"the {name} is UTF-8 that was read as Windows-1252: {text[:60]}")
    return " ".join(unicodedata.normalize("NFC", text).split())


def _fits_utf8(text: str) -> bool:
    try:
        text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return False
    return True
