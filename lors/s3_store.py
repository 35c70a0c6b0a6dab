"""A store in an S3 bucket, staged in a local folder: workers on different machines share only the bucket.

The bucket has what `lors.store` has on a disk, under the same names:

    entries/<stage>/<key>/files/         what the step made
    entries/<stage>/<key>/manifest.json  sent last: its existence means that the step is complete
    locks/<stage>/<key>                  the lease of who makes a key; each write of it names the one that it replaces
    work/<stage>/<key>/                  checkpoints of an unfinished step, for when its machine is lost

The staging folder is a store of its own, in which steps are made, and a cache of what was read. The bucket is the
truth: a staged entry that it has lost is sent again. Endpoint, region and credentials are those of the AWS variables
and files (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_PROFILE, ...), and stand nowhere else.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lors import lease as timing
from lors.errors import InputError, LorsError, StepFailedError
from lors.files import brief, file_digest, storage_errors, sync_to_disk, write_bytes
from lors.s3_bucket import Bucket, check_url, interference
from lors.s3_lease import RemoteLease, acquire, owner_of
from lors.s3_mirror import Mirror
from lors.store import Artifact, Held, Production, Store, read_manifest

__all__ = ["S3Store", "open_store"]

_logger = logging.getLogger(__name__)


def open_store(
    place: str | os.PathLike[str],  # a folder, or s3://bucket/prefix
) -> Store:
    """The store of an experiment; InputError where it is a URL that is wrong, or the extra `s3` is not installed."""
    return S3Store(place) if isinstance(place, str) and place.startswith("s3://") else Store(place)


class S3Store(Store):
    """A store in a bucket; its `root` is the staging folder, LORS_STAGING/<bucket>/<prefix> (~/.cache/lors/s3/...).

    Any call may raise InputError (a wrong bucket, credentials or region) or StepFailedError (what can pass).
    """

    def __init__(self, url: str, staging: str | os.PathLike[str] | None = None) -> None:
        try:
            self.url = check_url(url)
        except ValueError as error:
            raise InputError(f"store: {error}.") from error
        parent = Path(os.environ.get("LORS_STAGING") or "~/.cache/lors/s3")
        super().__init__(parent / self.url.removeprefix("s3://") if staging is None else staging)
        self._bucket = Bucket(self.url)
        self._leases: dict[tuple[str, str], RemoteLease] = {}
        self._known: dict[tuple[str, str], _Known] = {}
        self._conditional = False

    def probe(self) -> None:
        """Write, list, read and delete a small object; InputError where the server ignores conditions on a write."""
        bucket, name = self._bucket, f"locks/.probe-{uuid.uuid4().hex}"
        try:
            first = bucket.put(name, b"1", IfNoneMatch="*")
            again = bucket.put(name, b"2", IfNoneMatch="*")
            second = bucket.put(name, b"3", IfMatch=first)
            stale = bucket.put(name, b"4", IfMatch=first)
            if first is None or second is None or again is not None or stale is not None:
                raise InputError(
                    f"The server of {self.url} ignores If-None-Match or If-Match when it writes, so two workers could "
                    "train one expert: use a server that has conditional writes."
                )
            if bucket.get(name) != (b"3", second) or name.removeprefix("locks/") not in bucket.list("locks"):
                raise InputError(f"{self.url} does not give back what was just written: use a consistent S3 server.")
        finally:
            with suppress(LorsError):
                bucket.delete(name)
        self._conditional = True

    def why(self, stage: str, key: str, verify: bool | Literal["full"] = True) -> str | None:
        """As in `Store`; also that an entry is staged and will be sent to the bucket again."""
        found = self._examine(stage, key, verify)
        if isinstance(found, str):
            return found
        if found is None and isinstance(super()._examine(stage, key, verify), Artifact):
            return f"{self.url} has lost the {stage} step {key}, which is sent again from {self.root}"
        return None

    def _examine(self, stage: str, key: str, verify: bool | Literal["full"]) -> Artifact | str | None:
        if isinstance(damaged := super()._examine(stage, key, verify), str):
            _logger.warning("%s; it is dropped from the staging folder.", damaged)
            with self._staging(stage, key):
                self._drop(stage, key)
        found = self._look(stage, key)
        if verify == "full" and isinstance(found, Artifact):
            try:
                self.path(found)
            except StepFailedError as error:
                return str(error).rstrip(".")
        return found

    def _look(self, stage: str, key: str) -> Artifact | str | None:
        """The bucket's manifest, where it passes and each file is there in its size; else why not, or None."""
        listed = self._bucket.list(_entry(stage, key))
        if "manifest.json" not in listed:
            return None
        stamp = listed["manifest.json"].stamp
        try:
            known = self._known.get((stage, key))
            if known is None or known.stamp != stamp:
                read = self._bucket.get(f"{_entry(stage, key)}/manifest.json")
                if read is None:
                    return None
                known = _Known(stamp, read[0], *read_manifest(read[0], stage, key))
                self._known[stage, key] = known
            for name, size in known.sizes.items():
                there = listed.get(f"files/{name}")
                if there is None or there.size != size:
                    raise ValueError(f"{name} has {there.size if there else 'no'} bytes in the bucket, not {size}")
            if self._note(stage, key).exists() and self._note(stage, key).read_text("utf-8") == stamp:
                raise ValueError("a file did not have the sha256 that its manifest records")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, LorsError):
                raise
            return f"The {stage} step {key} in {self.url} is not usable ({brief(error)})"
        return known.artifact

    def path(self, artifact: Artifact) -> Path:
        """The folder with an artifact's files, downloaded where they are not staged.

        StepFailedError where the bucket no longer has them, or an object is damaged; its step is then made again.
        """
        entry = super().path(artifact)
        if not self._is_staged(artifact):
            with self._staging(artifact.stage, artifact.key):
                if not self._is_staged(artifact):
                    self._download(artifact)
        return entry

    def manifest(self, artifact: Artifact) -> dict[str, Any]:
        """As in `Store`, without a download of the files."""
        if self._is_staged(artifact):
            return super().manifest(artifact)
        value: dict[str, Any] = json.loads(self._same(artifact).content)
        return value

    def _same(self, artifact: Artifact) -> _Known:
        """The bucket's manifest of an artifact, read unless it is known; StepFailedError where it is another's."""
        address = artifact.stage, artifact.key
        known = self._known.get(address)
        if known is None or known.artifact.digest != artifact.digest:
            found = self._look(*address)
            if not isinstance(found, Artifact) or found.digest != artifact.digest:
                raise StepFailedError(
                    f"{self.url} no longer has the {artifact.stage} step {artifact.key} as this run found it; run the "
                    "same command again, and it will be made again."
                )
            known = self._known[address]
        return known

    def _is_staged(self, artifact: Artifact) -> bool:
        found = super()._examine(artifact.stage, artifact.key, False)
        return isinstance(found, Artifact) and found.digest == artifact.digest

    @contextmanager
    def _staging(self, stage: str, key: str) -> Iterator[None]:
        """One process of this machine changes what is staged of a key outside its lock."""
        with storage_errors(self.root):
            lock = self.root / "downloads" / stage / key
            with timing.hold(lock, f"the download of the {stage} step {key}"):
                yield

    def _drop(self, stage: str, key: str) -> None:
        """Take a staged entry away in one rename."""
        aside = self.root / "downloads" / stage / f"{key}.{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            self._entry(stage, key).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _download(self, artifact: Artifact) -> None:
        stage, key = artifact.stage, artifact.key
        known, entry = self._same(artifact), self._entry(stage, key)
        new = self.root / "downloads" / stage / f"{key}.{uuid.uuid4().hex}"
        for leftover in new.parent.glob(f"{key}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
        hashes: dict[str, str] = {}
        try:
            (new / "files").mkdir(parents=True)
            for name, sha256 in artifact.files.items():
                target, source = new / "files" / name, f"{_entry(stage, key)}/files/{name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                self._bucket.download(source, target)
                sync_to_disk(target)
                if file_digest(target, hashes) != sha256:
                    self._note(stage, key).parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(self._note(stage, key), known.stamp.encode(), sync=True)
                    raise StepFailedError(
                        f"The object {self.url}/{source} does not have the sha256 that its manifest records; run the "
                        "same command again, and its step will be made again."
                    )
            write_bytes(new / "manifest.json", known.content, sync=True)
            self._drop(stage, key)
            entry.parent.mkdir(parents=True, exist_ok=True)
            new.rename(entry)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        sync_to_disk(entry.parent)
        for name in artifact.files:
            if line := hashes.get(str(new / "files" / name)):
                self.memo[str(entry / "files" / name)] = line
        self.memo.save()

    def _note(self, stage: str, key: str) -> Path:
        """Names the manifest whose files were found damaged."""
        return self.root / "damaged" / stage / key

    @contextmanager
    def lock(
        self,
        stage: str,
        key: str,
        *,
        timeout: float | None = None,
        on_wait: Callable[[str], None] = _logger.info,
    ) -> Iterator[Held]:
        """As in `Store`, and between all machines that share the bucket."""
        started = time.monotonic()
        with super().lock(stage, key, timeout=timeout, on_wait=on_wait) as local:
            if not self._conditional:
                self.probe()
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - started))
            what = f"the {stage} step {key}"
            lease = acquire(self._bucket, f"locks/{stage}/{key}", what, local, owner_of(self.root), left, on_wait)
            self._leases[stage, key] = lease
            try:
                yield lease
            finally:
                del self._leases[stage, key]
                lease.release()

    @contextmanager
    def produce(
        self,
        stage: str,
        key: str,
        *,
        version: int,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        timeout: float | None = None,
        on_wait: Callable[[str], None] = _logger.info,
    ) -> Iterator[Production]:
        """As in `Store`; a hit takes no lock, and checkpoints of another machine are fetched into `work`."""
        described: dict[str, Any] = {"version": version, "settings": settings, "inputs": inputs}
        if (hit := self.find(stage, key)) is not None:
            work = self.root / "work" / stage / key
            yield Production(hit, work, work / "out", lambda: None, lambda summary, seconds: hit, hit)
            return
        with super().produce(stage, key, timeout=timeout, on_wait=on_wait, **described) as production:
            if production.hit is not None:
                yield production
                return
            mirror = Mirror(self._bucket, f"work/{stage}/{key}", production.work, production.check)
            mirror.fetch()
            with mirror:
                yield production
            mirror.remove()

    def _hit(self, stage: str, key: str) -> Artifact | None:
        if (hit := self.find(stage, key)) is not None:
            return hit
        if not isinstance(staged := super()._examine(stage, key, True), Artifact):
            return None
        _logger.info("The bucket has lost the %s step %s; it is sent again from %s.", stage, key, self.root)
        self._send(stage, key)
        return staged

    def _publish(self, *arguments: Any, **named: Any) -> Artifact:
        artifact = super()._publish(*arguments, **named)
        self._send(artifact.stage, artifact.key)
        return artifact

    def _send(self, stage: str, key: str) -> None:
        """Upload a staged entry under its lock, the manifest last.

        Only names that are free are written, so that a process that hung and wakes up here cannot change what another
        has published meanwhile.
        """
        held, bucket, entry = self._leases[stage, key], self._bucket, self._entry(stage, key)
        content = (entry / "manifest.json").read_bytes()
        held.confirm()
        leftovers = bucket.list(_entry(stage, key))
        for name in sorted(leftovers, key=lambda name: name != "manifest.json"):
            bucket.delete(f"{_entry(stage, key)}/{name}")
        for name in read_manifest(content, stage, key)[0].files:
            held.check()
            bucket.upload(entry / "files" / name, f"{_entry(stage, key)}/files/{name}")
        held.confirm()
        if bucket.put(f"{_entry(stage, key)}/manifest.json", content, IfNoneMatch="*") is None:
            raise interference(f"{self.url}/{_entry(stage, key)}")


def _entry(stage: str, key: str) -> str:
    return f"entries/{stage}/{key}"


@dataclass(frozen=True, slots=True)
class _Known:
    """A manifest of the bucket that has passed."""

    stamp: str
    content: bytes
    artifact: Artifact
    sizes: Mapping[str, int]
