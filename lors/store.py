"""Content-addressed artifacts: files under a step's key, the manifest last, digests checked on a hit.

Layout under the root, which may be on a disk shared by several workers:

    entries/<stage>/<key>/files/         what the step made
    entries/<stage>/<key>/manifest.json  its existence means that the step is complete
    work/<stage>/<key>/                  checkpoints of an unfinished step; survives a crash
    locks/<stage>/<key>                  one process makes a key (`lors.lease`)
    memo.json                            sha256 by file and its stat, so that a check does not read GBs again
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol

from lors.errors import InputError, LorsError
from lors.files import Memo, brief, file_digest, is_safe, storage_errors, sync_to_disk, to_json, write_json
from lors.lease import hold

__all__ = [
    "Artifact",
    "Held",
    "Production",
    "Store",
    "read_manifest",
    "step_key",
]

FORMAT = 1

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
            raise InputError(f"A stored artifact cannot be read ({brief(error)}); delete it and run again.") from error

    @classmethod
    def _parse(cls, value: Mapping[str, Any]) -> Artifact:
        artifact = cls(*(value[name] for name in ("stage", "key", "digest", "files", "summary")))
        _check_address(artifact.stage, artifact.key)
        if not isinstance(artifact.summary, Mapping):
            raise ValueError("its summary is not a mapping")
        for name, sha256 in artifact.files.items():
            if not is_safe(name):
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
            return f"The stored {stage} step {key} is not usable ({brief(error)})"
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
        artifact = Artifact(described["stage"], described["key"], _digest(files), files, json.loads(to_json(summary)))
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


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _check_address(stage: str, key: str) -> None:
    if not (_STAGE.fullmatch(stage) and _KEY.fullmatch(key)):
        raise ValueError(f"{stage}/{key} is no stage and key")


def _regular_files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise LorsError(
                f"{path} is a link or a special file, which the store does not keep; write a plain file there."
            )
        if path.is_file():
            yield path
