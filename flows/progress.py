"""Progress of a run on the command line: bars in a terminal, lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lors.secrets import redact

__all__ = ["RunProgress"]

_LINE_SECONDS = 15.0


class RunProgress:
    """Listens to the events of steps (see `tasks.runtime.LISTENERS`), from any thread."""

    def __init__(self, steps: int, cached: int, known: Collection[str] = ()) -> None:
        """`cached` of the `steps` are in the store already, `known` by name; the bar counts the others."""
        self._console = Console(stderr=True)
        self._lock = threading.Lock()
        self._steps, self._finished, self._known = steps - cached, 0, frozenset(known)
        self._told: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        self.say(f"{steps} steps, {cached} of them cached")

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=self._console)
            self._progress.start()
            self._all = self._progress.add_task("all steps", total=self._steps, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, step: str, event: Mapping[str, Any]) -> None:
        """Take one event of a step."""
        with self._lock:
            if "finished" in event:
                self._finish(step, event["seconds"])
            elif "message" in event:
                self.say(f"{step}: {event['message']}")
            else:
                self._advance(step, event)

    def _finish(self, step: str, seconds: float | None) -> None:
        # One that the plan has as cached says so too where Prefect has no record of it, as after another machine's run.
        if seconds is not None or step not in self._known:
            self._finished += 1
        if self._progress is not None:
            self._progress.update(self._all, completed=self._finished)
            if step in self._bars:
                self._progress.remove_task(self._bars.pop(step))
        if seconds is not None:
            self.say(f"[{self._finished}/{self._steps}] {step}: done in {seconds:.1f} s")

    def _advance(self, step: str, event: Mapping[str, Any]) -> None:
        note = ", ".join(_shown(name, value) for name, value in event.items() if name not in _COUNTERS)
        if self._progress is not None:
            if step not in self._bars:
                self._bars[step] = self._progress.add_task(step, total=event["total"], note="")
            self._progress.update(self._bars[step], completed=event["done"], total=event["total"], note=note)
        elif time.monotonic() - self._told.setdefault(step, time.monotonic()) >= _LINE_SECONDS:
            self._told[step] = time.monotonic()
            total = "" if event["total"] is None else f"/{event['total']}"
            self.say(f"{step}: {event['done']}{total} {event['unit']}" + (f", {note}" if note else ""))

    def say(self, text: str) -> None:
        """Print a line, above the bars."""
        text = redact(text)
        stamp = time.strftime("%H:%M:%S")
        if self._progress is not None:
            self._progress.console.print(f"{stamp} {text}", markup=False, highlight=False)
        else:
            print(f"{stamp} {text}", file=sys.stderr, flush=True)


_COUNTERS = ("done", "total", "unit", "step")


def _shown(name: str, value: Any) -> str:
    if name == "note":
        return str(value)
    return f"{name.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
