"""A lock on a file that outlives neither a dead holder nor a hung one, between processes and machines of one disk.

The kernel frees the lock of a holder that dies (`flock`; on NFS the server does, when the machine's own lease ends).
A holder that hangs keeps it, so a holder also rewrites the file every few seconds, and who waits takes the lock over
when nothing was written for LEASE_SECONDS of his own clock: no two machines' clocks are compared, and one that is set
to another time changes nothing. A holder that wakes up afterwards finds another file in the place of his own.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lors.errors import InputError, LorsError, StepFailedError

__all__ = ["BEAT_SECONDS", "LEASE_SECONDS", "Lease", "hold"]

LEASE_SECONDS = 60.0
"""A holder that did not write for so long has lost the lock to the next who wants it."""
BEAT_SECONDS = 10.0
"""How often a holder writes."""
_POLL_SECONDS = 0.1

_logger = logging.getLogger(__name__)


class Lease:
    """A lock that is held, until somebody takes it over."""

    def __init__(self, path: Path, descriptor: int, what: str, taken_over: bool) -> None:
        self._path, self._descriptor, self._what = path, descriptor, what
        self.taken_over = taken_over
        """Whether the holder before hangs: he may wake up and write on."""
        self._beats = 0
        self._done = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._keep, name=f"lease of {what}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StepFailedError where another process has taken the lock over."""
        if not _same_file(self._descriptor, self._path):
            raise StepFailedError(
                f"This process gave no sign for {LEASE_SECONDS:g} s and lost {self._what} to another one, which makes "
                "it now; run the same command again."
            )

    def release(self) -> None:
        """Free the lock, or do nothing where it is lost."""
        self._done.set()
        self._thread.join()
        os.close(self._descriptor)

    def _keep(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        self._beats += 1
        content = {"pid": os.getpid(), "host": socket.gethostname(), "beat": self._beats, "id": uuid.uuid4().hex}
        with suppress(OSError):  # a full disk: the next beat may find room; the lock itself needs none
            line = json.dumps(content).encode()
            os.pwrite(self._descriptor, line.ljust(os.fstat(self._descriptor).st_size), 0)


@contextmanager
def hold(
    path: Path,
    what: str,  # such as "the fine_tune step 0123"
    *,
    timeout: float | None = None,  # seconds; None waits for ever
    on_wait: Callable[[str], None] = _logger.info,  # called once with a sentence that names the holder
) -> Iterator[Lease]:
    """Hold the lock of a path, whose folder is made.

    LorsError after `timeout`; InputError where the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = _acquire(path, what, timeout, on_wait)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(path: Path, what: str, timeout: float | None, on_wait: Callable[[str], None]) -> Lease:
    started = seen_at = time.monotonic()
    seen, told = b"", False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _lock(descriptor, path, wait=False):
            if _same_file(descriptor, path):
                return Lease(path, descriptor, what, taken_over=False)
            os.close(descriptor)  # it was taken over between the two calls
            continue
        content = os.pread(descriptor, 4096, 0)  # of a fresh descriptor, which NFS has to look up anew
        os.close(descriptor)
        now = time.monotonic()
        if content != seen:
            seen, seen_at = content, now
        who = _holder(content)
        if not told:
            told = True
            on_wait(f"Waiting for {what}: {who} is making it.")
        if now - seen_at >= LEASE_SECONDS and (lease := _take_over(path, content, what)) is not None:
            _logger.warning("%s was silent for %g s and lost %s to this process.", who, LEASE_SECONDS, what)
            return lease
        if timeout is not None and now - started >= timeout:
            raise LorsError(
                f"{who.capitalize()} was still making {what} after {timeout:g} s; run the same command again later."
            )
        time.sleep(_POLL_SECONDS)


def _take_over(path: Path, content: bytes, what: str) -> Lease | None:
    """Put a file of our own in the place of a hung holder's; None where somebody else was faster."""
    guard = os.open(path.with_name(f"{path.name}.takeover"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(guard, path, wait=True)
        if path.read_bytes() != content:
            return None
        new = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(descriptor, path, wait=True)
        new.rename(path)
        return Lease(path, descriptor, what, taken_over=True)
    finally:
        os.close(guard)


def _lock(descriptor: int, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        os.close(descriptor)
        raise InputError(
            f"The folder {path.parent} cannot be locked ({error.strerror}); put it on a disk that has flock."
        ) from error


def _same_file(descriptor: int, path: Path) -> bool:
    own = os.fstat(descriptor)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, TypeError, KeyError):
        return "another process"
