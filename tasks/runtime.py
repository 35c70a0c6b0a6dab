"""What the Prefect tasks of one process work with: the store, the child processes, where Prefect keeps its records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors.pipeline import Step, Workspace

__all__ = ["LISTENERS", "Runtime", "current", "use"]

LISTENERS: list[Callable[[Step, Mapping[str, Any]], None]] = []
"""Called with every event of every step in this process: the command line's progress joins here."""


@dataclass
class Runtime:
    """One run's surroundings; never a parameter of a task, since it is not data."""

    workspace: Workspace
    records: Path
    """Prefect's result storage, a file a cache key."""
    computed: dict[str, float] = field(default_factory=dict)
    """Seconds of the steps that this run computed, by name; every other was cached."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, step: Step, event: Mapping[str, Any]) -> None:
        """Pass a step's event on."""
        for listener in LISTENERS:
            listener(step, event)

    def forget(self, key: str) -> None:
        """Drop Prefect's record of a result that the store no longer vouches for."""
        (self.records / key).unlink(missing_ok=True)


_current: list[Runtime] = []


@contextmanager
def use(runtime: Runtime) -> Iterator[Runtime]:
    """Make `runtime` the current one of this process; tasks run in threads, so it is not thread-local."""
    _current.append(runtime)
    try:
        yield runtime
    finally:
        _current.remove(runtime)


def current() -> Runtime:
    """The runtime in use."""
    assert _current, "a flow sets the runtime up before it submits tasks"
    return _current[-1]
