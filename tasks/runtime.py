"""What the Prefect tasks of one flow run work with: the store, the child processes, where Prefect keeps its records."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from lors.errors import StepFailedError
from lors.secrets import redact
from lors.steps import Workspace
from lors.store import Artifact
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
    check: Callable[[], None] = lambda: None
    """Raises StepFailedError where another run has taken this one's output over."""
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, step: str, event: Mapping[str, Any]) -> None:
        """Pass an event of the named step on."""
        for listener in LISTENERS:
            listener(step, event)

    def keep_only(self, key: str, artifact: Artifact | None) -> None:
        """Drop Prefect's record of a key unless it is this artifact, in plain JSON.

        A record says itself how it is to be read, as a pickle or as a call of any function, and Prefect does so: in a
        store that others write to, one who may write files could run code. So it is compared before it is read.
        """
        record = self.records / key
        try:
            found = json.loads(record.read_bytes())
            plain = found["metadata"]["serializer"]["type"] == "json" and json.loads(found["result"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            plain = None
        if artifact is None or plain != artifact.to_json():
            record.unlink(missing_ok=True)


class _Redacting(logging.Filter):
    """Replaces secrets in what Prefect logs, tracebacks of other libraries' errors among it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if (text := record.getMessage()) != (shown := redact(text)):
            record.msg, record.args = shown, ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        return True


_redacting = _Redacting()
# Those of Prefect that have handlers: to the console and to the API.
_LOGGERS = ("prefect", "prefect.flow_runs", "prefect.task_runs", "")
_runtimes: dict[UUID | None, Runtime] = {}


@contextmanager
def use(flow_run: UUID | None, runtime: Runtime) -> Iterator[Runtime]:
    """Give `runtime` to the tasks of a flow run; they run in threads, and other flow runs may be in this process."""
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_redacting)  # once, however often
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
