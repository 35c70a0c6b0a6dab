"""Copies of an unfinished step's checkpoints in a bucket, for when its machine is lost."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lors import lease as timing
from lors.errors import LorsError
from lors.files import brief, is_safe, sync_to_disk, write_bytes
from lors.s3_bucket import Bucket, interference

__all__ = ["Mirror"]

_logger = logging.getLogger(__name__)
_CHECKPOINT = "checkpoint.safetensors"
_MIRRORED = ("training/*", "*.jsonl")
"""What a step goes on from: the folder of a training (`lors.training.checkpoint`) and the finished lines of others."""


class Mirror:
    """Copies of an unfinished step's checkpoints in the bucket: its state names objects that no later copy changes.

    `mirror.json` is written after the objects it names, and only over the state that this process knows; so a reader
    has one moment's files, and a process that lost the step cannot bring its old ones back.
    """

    def __init__(self, bucket: Bucket, folder: str, work: Path, check: Callable[[], None]) -> None:
        self._bucket, self._folder, self._work, self._check = bucket, folder, work, check
        self._files: dict[str, dict[str, Any]] = {}  # name -> object and bytes, as in mirror.json
        self._stamps: dict[str, str] = {}
        self._etag: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"mirror of {work.name}", daemon=True)

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if kind is not None and issubclass(kind, Exception):  # tried again, maybe elsewhere
            self._try()

    def _keep(self) -> None:
        took = 0.0
        while not self._done.wait(max(timing.BEAT_SECONDS, took)):
            started = time.monotonic()
            self._try()
            took = time.monotonic() - started

    def _try(self) -> None:
        try:
            self._sync()
        except (LorsError, OSError) as error:
            _logger.info("The checkpoints in %s were not copied to the bucket: %s", self._work, error)

    def fetch(self) -> None:
        """Put the bucket's files into the work folder, unless its own are as new; StepFailedError where S3 fails."""
        found = self._bucket.get(f"{self._folder}/mirror.json")
        if found is None:
            return
        self._etag = found[1]
        try:
            state = json.loads(found[0])
            identity, files = str(state["id"]), dict(state["files"])
            for name, entry in files.items():
                if not (_is_mirrored(name) and is_safe(entry["object"]) and isinstance(entry["bytes"], int)):
                    raise ValueError(f"{name!r} is no checkpoint")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _logger.warning("%s/%s/mirror.json is not usable (%s).", self._bucket.url, self._folder, brief(error))
            return
        self._files = files
        kept = {entry["object"] for entry in files.values()} | {"mirror.json"}
        listed = self._bucket.list(self._folder)
        for leftover in listed.keys() - kept:
            self._bucket.delete(f"{self._folder}/{leftover}")
        fetched, note = self._work / ".fetched", self._work / ".mirrored"
        if not fetched.exists() and note.exists() and identity in note.read_text("utf-8").split():
            return
        if any(e["object"] not in listed or listed[e["object"]].size != e["bytes"] for e in files.values()):
            _logger.warning("The checkpoints in %s/%s are damaged and not used.", self._bucket.url, self._folder)
            return
        shutil.rmtree(fetched, ignore_errors=True)
        for name, entry in files.items():
            (fetched / name).parent.mkdir(parents=True, exist_ok=True)
            self._bucket.download(f"{self._folder}/{entry['object']}", fetched / name)
            sync_to_disk(fetched / name)
        for name in _mirrored(self._work):
            (self._work / name).unlink()
        for name in files:
            (self._work / name).parent.mkdir(parents=True, exist_ok=True)
            (fetched / name).replace(self._work / name)
            self._stamps[name] = _stamp(self._work / name)
        write_bytes(note, identity.encode(), sync=True)
        shutil.rmtree(fetched)

    def _sync(self) -> None:
        self._check()
        identity = uuid.uuid4().hex
        pinned = self._work / ".mirror"
        shutil.rmtree(pinned, ignore_errors=True)
        try:
            stamps = {name: _pin(self._work / name, pinned / name) for name in _mirrored(self._work)}
            if stamps == self._stamps:
                return
            files = {name: self._files[name] for name, stamp in stamps.items() if self._stamps.get(name) == stamp}
            for name in stamps.keys() - files.keys():
                self._check()
                self._bucket.upload(pinned / name, f"{self._folder}/{identity}/{name}")
                files[name] = {"object": f"{identity}/{name}", "bytes": (pinned / name).stat().st_size}
        finally:
            shutil.rmtree(pinned, ignore_errors=True)
        note = self._work / ".mirrored"
        before = note.read_text("utf-8").split()[-1:] if note.exists() else []
        write_bytes(note, " ".join([*before, identity]).encode(), sync=True)
        self._check()
        content = json.dumps({"id": identity, "files": files}).encode()
        condition = {"IfNoneMatch": "*"} if self._etag is None else {"IfMatch": self._etag}
        etag = self._bucket.put(f"{self._folder}/mirror.json", content, **condition)
        if etag is None:
            there = self._bucket.get(f"{self._folder}/mirror.json")
            if there is None or there[0] != content:
                raise interference(f"{self._bucket.url}/{self._folder}")
            etag = there[1]
        old = {entry["object"] for entry in self._files.values()} - {entry["object"] for entry in files.values()}
        self._etag, self._files, self._stamps = etag, files, stamps
        for name in old:
            self._bucket.delete(f"{self._folder}/{name}")

    def remove(self) -> None:
        """Delete the copies, the state first; what a failure leaves is no harm."""
        try:
            for name in sorted(self._bucket.list(self._folder), key=lambda name: name != "mirror.json"):
                self._bucket.delete(f"{self._folder}/{name}")
        except LorsError as error:
            _logger.info("The checkpoints in %s/%s were not deleted: %s", self._bucket.url, self._folder, error)


def _mirrored(work: Path) -> list[str]:
    """The names of the files to mirror, the checkpoint first: what others it needs was written before it."""
    found = {
        path.relative_to(work).as_posix() for pattern in _MIRRORED for path in work.glob(pattern) if path.is_file()
    }
    return sorted(filter(_is_mirrored, found), key=lambda name: (not name.endswith(_CHECKPOINT), name))


def _is_mirrored(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    kept = folder == "training" or (not folder and last.endswith(".jsonl"))
    return kept and is_safe(name) and not last.startswith(".") and not last.endswith(".partial")


def _pin(path: Path, pinned: Path) -> str:
    """Keep a file as it is now; its stamp. What is replaced atomically takes a link, what grows a copy."""
    pinned.parent.mkdir(parents=True, exist_ok=True)
    stamp = _stamp(path)
    try:
        if path.suffix != ".safetensors":
            raise OSError
        pinned.hardlink_to(path)
        return _stamp(pinned)
    except OSError:
        shutil.copyfile(path, pinned)
        return stamp


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
