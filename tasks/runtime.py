"""What the Prefect tasks of one flow run work with: the store, the child processes, where Prefect keeps its records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from lors.errors import StepFailedError
from lors.pipeline import Workspace
from tasks.dispatch import Order, cancel

__all__ = ["LISTENERS", "Runtime", "runtime_of", "use"]

LISTENERS: list[Callable[[str, Mapping[str, Any]], None]] = []
"""Called with the step's name and every event of it in this process: the command line's progress joins here."""


@dataclass
class Runtime:
    """One flow run's surroundings; never a parameter of a task, since it is not data."""

    workspace: Workspace
    records: Path
    """Prefect's result storage, a file a cache key."""
    computed: set[str] = field(default_factory=set)
    """The steps that this run computed, by name; every other was cached."""
    submitted: int = 0
    """Task runs so far."""
    orders: Mapping[str, Order] = field(default_factory=dict)
    """The steps that workers do, by name."""
    ordered: set[UUID] = field(default_factory=set)
    """The workers' runs that this run waits for."""
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, step: str, event: Mapping[str, Any]) -> None:
        """Pass an event of the named step on."""
        for listener in LISTENERS:
            listener(step, event)

    def forget(self, key: str) -> None:
        """Drop Prefect's record of a result that the store no longer vouches for."""
        (self.records / key).unlink(missing_ok=True)


_runtimes: dict[UUID | None, Runtime] = {}


@contextmanager
def use(flow_run: UUID | None, runtime: Runtime) -> Iterator[Runtime]:
    """Give `runtime` to the tasks of a flow run; they run in threads, and other flow runs may be in this process."""
    _runtimes[flow_run] = runtime
    try:
        yield runtime
    finally:
        del _runtimes[flow_run]
        runtime.stopping.set()
        if runtime.ordered:
            cancel(runtime.ordered)


def runtime_of(task_run: Any) -> Runtime:
    """The runtime of a task run's flow run. Raises StepFailedError where that is ending."""
    try:
        return _runtimes[task_run.flow_run_id]
    except KeyError:
        raise StepFailedError(
            f"{task_run.name} was not done, because the run is ending; run the same command again."
        ) from None
