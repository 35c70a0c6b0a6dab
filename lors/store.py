"""Content-addressed artifacts: files under a step's key, the manifest last, digests checked on a hit.

Layout under the root, which may be on a disk shared by several workers:

    entries/<stage>/<key>/files/         what the step made
    entries/<stage>/<key>/manifest.json  its existence means that the step is complete
    work/<stage>/<key>/                  checkpoints of an unfinished step; survives a crash
    locks/<stage>/<key>                  one process makes a key (`lors.lease`)
    memo.json                            sha256 by file and its stat, so that a check does not read GBs again
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, Protocol

from lors.errors import InputError, LorsError
from lors.lease import hold

__all__ = [
    "Artifact",
    "Held",
    "Memo",
    "Production",
    "Store",
    "file_digest",
    "read_manifest",
    "step_key",
    "storage_errors",
    "sync_to_disk",
    "write_json",
    "write_text",
]

FORMAT = 1
# A file changed twice within a tick of the kernel's clock (at most 10 ms on Linux) keeps its mtime; memoise older ones.
SETTLED_NS = 20_000_000
HASHED_AT_ONCE = 2**24  # bytes; a thread that hashes waits for Python's lock between two such pieces

_logger = logging.getLogger(__name__)
_STAGE = re.compile(r"[a-z0-9][a-z0-9_-]*")
_KEY = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def step_key(
    stage: str,
    version: int,  # of the algorithm; raised when the same settings and inputs would give another result
    settings: Mapping[str, Any],  # JSON values; tuples count as lists
    inputs: Mapping[str, str],  # name -> digest of what the step reads
) -> str:  # 32 hexadecimal digits
    """The key of a step: sha256 of its canonical JSON.

    The order of keys does not matter and numbers count by value: 0.1 and 1e-1, 1 and 1.0, 0.0 and -0.0 are equal
    (YAML and pydantic write either); true and 1 are not. NaN and infinities raise InputError, since no two runs
    could agree on them; values that are not JSON raise TypeError.
    """
    content = [stage, version, _canonical(settings, stage), _canonical(inputs, stage)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _canonical(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"The setting {where} is {value}, which is not a finite number; give one.")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{where}: keys must be strings, not {name!r}")
        return {name: _canonical(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where}: {type(value).__name__} is not a JSON value")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A reference to what a step made: all that crosses a Prefect task's boundary."""

    stage: str
    key: str
    digest: str  # of the files' names and contents alone: neither time nor place changes it
    files: Mapping[str, str]  # relative POSIX name -> sha256
    summary: Mapping[str, Any]  # small JSON

    def to_json(self) -> dict[str, Any]:
        """The artifact as a JSON mapping; `from_json` is its inverse."""
        return {
            "stage": self.stage,
            "key": self.key,
            "digest": self.digest,
            "files": dict(self.files),
            "summary": dict(self.summary),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Artifact:
        """Read `to_json` back; InputError where a field is missing or not what it must be."""
        try:
            return cls._parse(value)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"A stored artifact cannot be read ({_brief(error)}); delete it and run again.") from error

    @classmethod
    def _parse(cls, value: Mapping[str, Any]) -> Artifact:
        artifact = cls(*(value[name] for name in ("stage", "key", "digest", "files", "summary")))
        _check_address(artifact.stage, artifact.key)
        if not isinstance(artifact.summary, Mapping):
            raise ValueError("its summary is not a mapping")
        for name, sha256 in artifact.files.items():
            if not _is_safe(name):
                raise ValueError(f"the file name {name!r} is not a plain relative one")
            if not _SHA256.fullmatch(sha256):
                raise ValueError(f"{name} has no sha256")
        if artifact.digest != _digest(artifact.files):
            raise ValueError("its digest is not that of its files")
        return artifact

    def digest_of(self, *patterns: str) -> str:
        """The digest of files that match a name or glob pattern (`*` matches `/` too), for steps that read those alone.

        LorsError where a pattern matches no file.
        """
        chosen: dict[str, str] = {}
        for pattern in patterns:
            found = {n: sha for n, sha in self.files.items() if n == pattern or fnmatchcase(n, pattern)}
            if not found:
                raise LorsError(
                    f"The {self.stage} step {self.key} made no file {pattern!r}; it has {', '.join(self.files)}."
                )
            chosen |= found
        return _digest(chosen)


@dataclass(slots=True)
class Production:
    """A step being made under its lock: either `hit`, or folders to work in and then `publish`."""

    hit: Artifact | None
    work: Path  # survives a crash: checkpoints go here
    out: Path  # inside `work`, empty at the start: the files to publish go here
    check: Callable[[], None]  # raises StepFailedError where another process has taken the step over
    _publish: Callable[[Mapping[str, Any], float], Artifact] = field(repr=False)
    artifact: Artifact | None = None  # the hit, or what was published

    def publish(self, summary: Mapping[str, Any], seconds: float) -> Artifact:
        """Hash and sync what is in `out`, write the manifest last, and move both into the store in one rename."""
        assert self.artifact is None, "published twice, or on a hit"
        self.artifact = self._publish(summary, seconds)
        return self.artifact


class Held(Protocol):
    """A lock that is held, such as `lors.lease.Lease`."""

    taken_over: bool
    """Whether a holder before hangs here: he may wake up and write on."""

    def check(self) -> None:
        """Raises StepFailedError where another process has taken the lock over."""


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
                _replace(self._path, json.dumps(self._lines).encode(), sync=False)
                self._changed.clear()


class Store:
    """The artifacts under a root folder, which need not exist before the first is made."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.memo = Memo(self.root / "memo.json")

    def find(self, stage: str, key: str, verify: bool | Literal["full"] = True) -> Artifact | None:
        """The artifact of a key, or None where the store has none that passes.

        `verify`: True checks each file's sha256, by the memo where the file's stat is unchanged; "full" reads every
        byte; False checks presence and size alone. An entry that fails is logged as a warning; `why` says the reason.
        """
        found = self._examine(stage, key, verify)
        if isinstance(found, Artifact):
            return found
        if found is not None:
            _logger.warning("%s; it will be made again.", found)
        return None

    def why(self, stage: str, key: str, verify: bool | Literal["full"] = True) -> str | None:
        """Why an entry is not a hit, with the name of the failing file; None where it is a hit or does not exist."""
        found = self._examine(stage, key, verify)
        return found if isinstance(found, str) else None

    def _examine(self, stage: str, key: str, verify: bool | Literal["full"]) -> Artifact | str | None:
        _check_address(stage, key)
        with storage_errors(self.root):
            if not self._entry(stage, key).exists():
                return None
        try:
            return self._checked(stage, key, verify)
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            return f"The stored {stage} step {key} is not usable ({_brief(error)})"
        finally:
            self.memo.save()

    def _checked(self, stage: str, key: str, verify: bool | Literal["full"]) -> Artifact:
        folder = self._entry(stage, key) / "files"
        artifact, sizes = read_manifest((folder.parent / "manifest.json").read_bytes(), stage, key)
        inside = folder.resolve()
        for name, sha256 in artifact.files.items():
            path = folder / name
            if not path.resolve().is_relative_to(inside):
                raise ValueError(f"{name} is a link that leaves the entry")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != sizes[name]:
                raise ValueError(f"{name} has {status.st_size} bytes, not {sizes[name]}")
            if verify == "full":
                self.memo.pop(str(path), None)
            if verify and file_digest(path, self.memo) != sha256:
                raise ValueError(f"{name} does not have the sha256 that its manifest records")
        return artifact

    def path(self, artifact: Artifact) -> Path:
        """The folder with an artifact's files."""
        _check_address(artifact.stage, artifact.key)
        return self._entry(artifact.stage, artifact.key) / "files"

    def manifest(self, artifact: Artifact) -> dict[str, Any]:
        """What was recorded when the artifact was made: version, settings, inputs, seconds, created and more."""
        value: dict[str, Any] = json.loads((self.path(artifact).parent / "manifest.json").read_bytes())
        return value

    @contextmanager
    def lock(
        self,
        stage: str,
        key: str,
        *,
        timeout: float | None = None,  # seconds; None waits for ever
        on_wait: Callable[[str], None] = _logger.info,  # called once with a sentence that names the holder
    ) -> Iterator[Held]:
        """Hold a step's lock, which frees itself when its holder dies or hangs (see `lors.lease`).

        LorsError after `timeout`; InputError where the file system has no locks.
        """
        _check_address(stage, key)
        with ExitStack() as stack:
            with storage_errors(self.root):
                path, what = self.root / "locks" / stage / key, f"the {stage} step {key}"
                lease = stack.enter_context(hold(path, what, timeout=timeout, on_wait=on_wait))
            yield lease

    @contextmanager
    def produce(
        self,
        stage: str,
        key: str,  # step_key(stage, version, settings, inputs)
        *,
        version: int,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        timeout: float | None = None,
        on_wait: Callable[[str], None] = _logger.info,
    ) -> Iterator[Production]:
        """Make a step under its lock, unless another process made it meanwhile (`hit`).

        On an exception the work folder is kept and nothing is published. A full disk raises LorsError, a store that
        cannot be written InputError.
        """
        assert key == step_key(stage, version, settings, inputs), "the key is not that of these settings and inputs"
        with self.lock(stage, key, timeout=timeout, on_wait=on_wait) as lease:
            hit = self._hit(stage, key)
            work = self._work(stage, key, anew=lease.taken_over)
            out, staged, aside = work / "out", work / ".entry", work / ".invalid"

            def publish(summary: Mapping[str, Any], seconds: float) -> Artifact:
                described = {"stage": stage, "key": key, "version": version, "settings": settings, "inputs": inputs}
                lease.check()
                return self._publish(described, summary, seconds, out, staged, aside)

            production = Production(hit, work, out, lease.check, publish, hit)
            with storage_errors(self.root):
                if hit is None:
                    for leftover in (out, staged, aside):
                        if leftover.exists():
                            shutil.rmtree(leftover)
                    out.mkdir(parents=True)
                yield production
            assert production.artifact is not None, f"the {stage} step ended without publishing"
            shutil.rmtree(work, ignore_errors=True)

    def _hit(self, stage: str, key: str) -> Artifact | None:
        """What `find` says under the lock."""
        return self.find(stage, key)

    def _work(self, stage: str, key: str, anew: bool) -> Path:
        """The work folder of a key, by another name where a hung process may wake up and write by the old one."""
        work = self.root / "work" / stage / key
        found = next(iter(sorted(work.parent.glob(f"{key}*"))), work)
        if not anew:
            return found
        other = work.with_name(f"{key}.{uuid.uuid4().hex[:8]}")
        with storage_errors(self.root):
            if found.exists():
                found.rename(other)
        return other

    def _publish(
        self,
        described: dict[str, Any],
        summary: Mapping[str, Any],
        seconds: float,
        out: Path,
        staged: Path,
        aside: Path,
    ) -> Artifact:
        sizes = {path.relative_to(out).as_posix(): path.stat().st_size for path in _regular_files(out)}
        # safetensors writes files that only their owner may read; the store's other users need them too.
        mode = out.stat().st_mode & 0o666
        for name in sizes:
            (out / name).chmod(mode)
            sync_to_disk(out / name)
        hashes: dict[str, str] = {}
        files = {name: file_digest(out / name, hashes) for name in sorted(sizes)}
        artifact = Artifact(described["stage"], described["key"], _digest(files), files, json.loads(_json(summary)))
        staged.mkdir()
        out.rename(staged / "files")
        for folder, _, _ in os.walk(staged / "files"):
            sync_to_disk(Path(folder))
        manifest = {
            "format": FORMAT,
            **described,
            "files": {name: {"sha256": sha256, "bytes": sizes[name]} for name, sha256 in files.items()},
            "digest": artifact.digest,
            "summary": artifact.summary,
            "seconds": round(seconds, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(staged / "manifest.json", manifest)
        entry = self._entry(artifact.stage, artifact.key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        if entry.exists():  # it was examined under this lock and did not pass
            entry.rename(aside)
        staged.rename(entry)
        sync_to_disk(entry.parent)
        for name in files:
            if line := hashes.get(str(out / name)):
                self.memo[str(entry / "files" / name)] = line
        self.memo.save()
        return artifact

    def _entry(self, stage: str, key: str) -> Path:
        return self.root / "entries" / stage / key


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


def read_manifest(
    content: bytes,  # of a manifest.json
    stage: str,
    key: str,
) -> tuple[Artifact, dict[str, int]]:  # and the bytes of each file
    """Raises KeyError, TypeError, AttributeError or ValueError where it is not the manifest of that step."""
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ValueError(f"manifest.json is not JSON: {error}") from error
    if manifest["format"] != FORMAT:
        raise ValueError(f"manifest.json has format {manifest['format']!r}, not {FORMAT}")
    recorded = step_key(manifest["stage"], manifest["version"], manifest["settings"], manifest["inputs"])
    if (manifest["stage"], manifest["key"], recorded) != (stage, key, key):
        raise ValueError("manifest.json belongs to another step")
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return Artifact._parse({**manifest, "files": files}), {n: entry["bytes"] for n, entry in manifest["files"].items()}


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader, or a crash, meets the old file or the whole new one.

    Mappings of any kind, tuples and paths are accepted; NaN and infinities raise ValueError.
    """
    _replace(path, _json(value, indent=2).encode() + b"\n", sync=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as atomically as `write_json`."""
    _replace(path, text.encode(), sync=True)


def _json(value: Any, indent: int | None = None) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, os.PathLike):
            return os.fspath(item)
        raise TypeError(f"{type(item).__name__} is not a JSON value")

    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=plain)


def _replace(path: Path, content: bytes, *, sync: bool) -> None:
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


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _check_address(stage: str, key: str) -> None:
    if not (_STAGE.fullmatch(stage) and _KEY.fullmatch(key)):
        raise ValueError(f"{stage}/{key} is no stage and key")


def _is_safe(name: str) -> bool:
    """Whether a file's name stays in the folder that it is relative to, on every system; no lone surrogates either."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and name not in ("", ".") and path.as_posix() == name
    plain = plain and name.isprintable() and "\\" not in name and not PureWindowsPath(name).drive
    return plain and all(len(part.encode()) <= 255 for part in path.parts)


def _regular_files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise LorsError(
                f"{path} is a link or a special file, which the store does not keep; write a plain file there."
            )
        if path.is_file():
            yield path


def sync_to_disk(path: Path) -> None:
    """Make a file, or a folder's list of names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _brief(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{Path(error.filename).name}: {error.strerror}"
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
