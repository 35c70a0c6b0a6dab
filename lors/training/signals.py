"""SIGTERM as a question that a loop asks, so that it ends where it can be taken up again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ["stop_on_sigterm"]


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM only makes the function that this yields return True; outside the main thread it never does."""
    asked: list[int] = []  # no lock in a signal handler
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
