"""Files that survive a crash: atomic writes, digests that are remembered, names that stay in their folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError

from lors.errors import InputError, LorsError

__all__ = [
    "SETTLED_NS",
    "Memo",
    "brief",
    "file_digest",
    "is_safe",
    "new_folder",
    "storage_errors",
    "sync_to_disk",
    "to_json",
    "write_bytes",
    "write_json",
    "write_text",
    "writing",
]

# A file changed twice within a tick of the kernel's clock (at most 10 ms on Linux) keeps its mtime; memoise older ones.
SETTLED_NS = 20_000_000
HASHED_AT_ONCE = 2**24  # bytes; a thread that hashes waits for Python's lock between two such pieces


class Memo(MutableMapping[str, str]):
    """sha256 by file and stat, kept in one JSON file (see `file_digest`); thread-safe. Losing it costs time alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._lines: dict[str, str] | None = None
        self._changed: dict[str, str] = {}

    def _loaded(self) -> dict[str, str]:
        if self._lines is None:
            self._lines = self._read()
        return self._lines

    def _read(self) -> dict[str, str]:
        try:
            lines = json.loads(self._path.read_bytes())
            return {k: v for k, v in lines.items() if isinstance(v, str)}
        except (OSError, ValueError, AttributeError):
            return {}

    def __getitem__(self, key: str) -> str:
        with self._lock:
            return self._loaded()[key]

    def __setitem__(self, key: str, value: str) -> None:
        with self._lock:
            self._loaded()[key] = self._changed[key] = value

    def __delitem__(self, key: str) -> None:
        with self._lock:
            del self._loaded()[key]
            self._changed.pop(key, None)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._loaded()))

    def __len__(self) -> int:
        with self._lock:
            return len(self._loaded())

    def save(self) -> None:
        """Add what is new to the file, beside what other processes added; a disk that cannot take it is no error."""
        with self._lock:
            if not self._changed:
                return
            self._lines = self._read() | self._loaded()
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self._path, json.dumps(self._lines).encode(), sync=False)
                self._changed.clear()


def file_digest(path: Path, memo: MutableMapping[str, str] | None = None) -> str:
    """sha256 of a file, in hexadecimal; OSError where it cannot be read.

    `memo` (a dict, or `Memo` to keep it) spares the reading while size, mtime, ctime and inode are as they were.
    """
    if memo is None:
        digest, buffer = hashlib.sha256(), bytearray(min(HASHED_AT_ONCE, path.stat().st_size + 1))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
        return digest.hexdigest()
    name, started, before = str(path), time.time_ns(), path.stat()
    known = memo.get(name, "")
    if known.startswith(f"{_stamp(before)} "):
        return known.rpartition(" ")[2]
    sha256 = file_digest(path)
    if _stamp(path.stat()) == _stamp(before) and started - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED_NS:
        memo[name] = f"{_stamp(before)} {sha256}"
    return sha256


def _stamp(status: os.stat_result) -> str:
    # ctime too: a program can set the mtime back after a change, but not the ctime.
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader, or a crash, meets the old file or the whole new one.

    Mappings of any kind, tuples and paths are accepted; NaN and infinities raise ValueError.
    """
    write_bytes(path, to_json(value, indent=2).encode() + b"\n", sync=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as atomically as `write_json`."""
    write_bytes(path, text.encode(), sync=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of what `write_json` accepts."""

    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        raise TypeError(f"{type(item).__name__} is not a JSON value")

    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=plain)


def write_bytes(path: Path, content: bytes, *, sync: bool) -> None:
    """Write a file atomically; with `sync` it survives a loss of power, too."""
    # Not mkstemp: its files are private, and the store may be shared between users.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_to_disk(path.parent)


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into LorsError and a folder that cannot be written into InputError, each with the next step.

    A full disk is also known by the words of other libraries and of child processes, whose errors are no OSError.
    """
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
            raise LorsError(
                f"The disk of {folder} is full ({free} bytes are free): free space and run the same command again; "
                "finished steps are kept."
            ) from error
        if isinstance(error, OSError) and _touches(folder, error.filename):
            if code in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise InputError(
                    f"The folder {folder} cannot be used ({error.strerror}: {error.filename}); "
                    "change its permissions or choose another one."
                ) from error
            if code == errno.ENOENT and folder.is_relative_to(error.filename):
                raise InputError(f"The folder {folder} cannot be made here; choose another one.") from error
            if code in (errno.ENOTDIR, errno.EEXIST):
                raise InputError(
                    f"{error.filename} is in the way of the folder {folder}; choose another one."
                ) from error
        raise


def _touches(folder: Path, name: object) -> bool:
    """Whether the file that an OSError names is the folder, in it, or above it."""
    if not isinstance(name, str | os.PathLike):
        return False
    path = Path(name).absolute()
    return path.is_relative_to(folder) or folder.is_relative_to(path)


def is_safe(name: str) -> bool:
    """Whether a file's name stays in the folder that it is relative to, on every system; no lone surrogates either."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and name not in ("", ".") and path.as_posix() == name
    plain = plain and name.isprintable() and "\\" not in name and not PureWindowsPath(name).drive
    return plain and all(len(part.encode()) <= 255 for part in path.parts)


def sync_to_disk(path: Path) -> None:
    """Make a file, or a folder's list of names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def brief(error: Exception) -> str:
    """An error in a few words, for the middle of a sentence."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{Path(error.filename).name}: {error.strerror}"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def new_folder(out: Path) -> Path:
    """The place of a folder that is not there yet, links followed: what is renamed to it becomes `out`.

    Raises InputError: something is there, or nothing can be renamed to it.
    """
    place = Path(out).resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"{out} is already there and not empty; choose another output folder or remove it")
    if os.path.ismount(place):
        raise InputError(f"{out} is a disk of its own, which no folder can be renamed to; name a folder inside it")
    if not place.name.isprintable():
        raise InputError(f"{place.name!r} is no name that can be printed; choose another output folder")
    return place


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns a failed write into the user's InputError naming `out`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, FileExistsError) or "No space left" in reason:
            in_the_way = f"{error.filename} is a file, not a folder" if isinstance(error, FileExistsError) else ""
            reason = in_the_way or "No space left on device"
        raise InputError(f"cannot write {out} ({reason}); choose a place that is writable and has room") from error
