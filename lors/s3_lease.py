"""A lease between machines: an object that its holder rewrites, each write conditional on the one before.

Who waits takes the lock over when the object has not changed for LEASE_SECONDS of his own clock, by a write over just
the content that he saw; so one of many gets it, and the holder's next write tells him. No two clocks are compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lors import lease as timing
from lors.errors import LorsError, StepFailedError
from lors.s3_bucket import Bucket
from lors.store import Held

__all__ = ["RemoteLease", "acquire", "owner_of"]

_POLL_SECONDS = 2.0

_logger = logging.getLogger(__name__)


class RemoteLease:
    """A lock in the bucket that is held, until somebody takes it over; the local one is held around it."""

    def __init__(
        self, bucket: Bucket, name: str, what: str, local: Held, content: dict[str, Any], etag: str, renewed: float
    ) -> None:
        self._bucket, self._name, self._what, self._local = bucket, name, what, local
        self._content, self._etag, self._renewed, self._lost = content, etag, renewed, False
        self.taken_over = local.taken_over
        self._guard, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {what}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StepFailedError where another process has taken the lock over, or may have."""
        self._local.check()
        if self._lost or time.monotonic() - self._renewed >= timing.LEASE_SECONDS:
            raise StepFailedError(
                f"This process could not renew its lock for {timing.LEASE_SECONDS:g} s and lost {self._what} to "
                "others, who may make it now; run the same command again."
            )

    def confirm(self) -> None:
        """As `check`, after asking the bucket: a machine that was suspended has no clock that says so."""
        self._renew()
        self.check()

    def release(self) -> None:
        """Free the lock, or do nothing where it is lost."""
        self._done.set()
        self._thread.join()
        self._renew()
        if not self._lost:
            try:
                self._bucket.delete(self._name, IfMatch=self._etag)
            except LorsError as error:  # who wants it next waits until it is stale
                _logger.warning("The lock of %s was not freed: %s", self._what, error)

    def _keep(self) -> None:
        while not self._done.wait(timing.BEAT_SECONDS):
            self._renew()

    def _renew(self) -> None:
        with self._guard:
            if self._lost:
                return
            started = time.monotonic()
            self._content["beat"] += 1
            content = json.dumps(self._content).encode()
            try:
                etag = self._bucket.put(self._name, content, IfMatch=self._etag)
                if etag is None:
                    there = self._bucket.get(self._name)
                    if there is None or not _is_of(there[0], self._content["id"]):
                        self._lost = True
                        return
                    etag = there[1]  # a write whose answer was lost on its way
                    if there[0] != content:
                        started = self._renewed
            except LorsError as error:  # the next beat may get through, while the lease is young
                _logger.info("The lock of %s was not renewed: %s", self._what, error)
                return
            self._etag, self._renewed = etag, started


def acquire(
    bucket: Bucket,
    name: str,
    what: str,
    local: Held,
    owner: str | None,  # of this staging folder: who holds its local lock may take over from another of it
    timeout: float | None,
    on_wait: Callable[[str], None],
) -> RemoteLease:
    identity = uuid.uuid4().hex
    content = {"pid": os.getpid(), "host": socket.gethostname(), "id": identity, "owner": owner, "beat": 0}
    body = json.dumps(content).encode()
    started = answered = tried = time.monotonic()
    seen: tuple[bytes, str] | None = None
    seen_at, told = started, False
    while True:
        local.check()
        began = time.monotonic()
        try:
            there = bucket.get(name)
            if there is not None and there != seen:
                seen, seen_at = there, time.monotonic()
            etag = None
            if there is None:
                tried = began
                etag = bucket.put(name, body, IfNoneMatch="*")
            elif _is_of(there[0], identity):  # a write whose answer was lost on its way
                etag, began = there[1], tried
            elif began - seen_at >= timing.LEASE_SECONDS or (owner and _field(there[0], "owner") == owner):
                tried = began
                etag = bucket.put(name, body, IfMatch=there[1])
                if etag is not None:
                    _logger.warning("%s is gone and lost %s to this process.", timing._holder(there[0]), what)
            if etag is not None:
                return RemoteLease(bucket, name, what, local, content, etag, began)
            answered = began
        except StepFailedError:
            if began - answered >= timing.LEASE_SECONDS or (timeout is not None and began - started >= timeout):
                raise
            there = seen
        if there is not None:
            who = timing._holder(there[0])
            if not told:
                told = True
                on_wait(f"Waiting for {what}: {who} is making it.")
            if timeout is not None and time.monotonic() - started >= timeout:
                raise LorsError(
                    f"{who.capitalize()} was still making {what} after {timeout:g} s; run the same command again later."
                )
        time.sleep(min(_POLL_SECONDS, timing.BEAT_SECONDS))


def owner_of(root: Path) -> str | None:
    """This staging folder on this machine since it was started; None where that cannot be told."""
    try:
        boot, status = Path("/proc/sys/kernel/random/boot_id").read_text(), root.stat()
    except OSError:
        return None
    return hashlib.sha256(f"{boot} {socket.gethostname()} {status.st_dev} {status.st_ino}".encode()).hexdigest()[:32]


def _is_of(content: bytes, identity: str) -> bool:
    return bool(_field(content, "id") == identity)


def _field(content: bytes, name: str) -> Any:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value.get(name) if isinstance(value, dict) else None
