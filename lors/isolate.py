"""Heavy steps in child processes: their memory and their crash are their own, and the parent needs no torch.

A child is `python -m lors.isolate`. It reads jobs from its standard input, a JSON object a line, and answers with
events and one result or error, a JSON object a line too. What libraries print goes to the job's log.
"""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import importlib
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from lors import errors
from lors.errors import LorsError, StepFailedError
from lors.secrets import redact

__all__ = ["Slots", "perform"]

# Schedulers that send SIGTERM wait 30 s before they kill.
_GRACE_SECONDS = 20.0
_CALL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


class Slots:
    """Runs jobs in at most `count` child processes at once; use it as a context manager, which ends them all.

    A slot keeps its child warm for its next job, since importing torch and transformers takes seconds.
    """

    def __init__(
        self,
        count: int,
        threads: int,  # of the numeric libraries, in each child
        devices: Sequence[str] = (),  # CUDA_VISIBLE_DEVICES by slot, in turn; () leaves the environment as it is
        packages: Sequence[str] = ("lors",),  # whose functions may be called
    ) -> None:
        assert min(count, threads) >= 1, "at least one slot and one thread"
        self._packages = tuple(packages)
        self._turn = threading.Condition()
        self._waiting: deque[object] = deque()
        self._closed = False
        self._slots = [
            _Slot(_environment(threads, devices[i % len(devices)] if devices else None)) for i in range(count)
        ]
        self._free = list(reversed(self._slots))

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every child: their jobs raise StepFailedError, and resume when run again.

        Busy ones get SIGTERM first and some seconds, in which a training writes its checkpoint; most die of it at once.
        """
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            try:
                for slot in self._slots:
                    if slot not in self._free:
                        slot.stop()
                self._turn.wait_for(lambda: len(self._free) == len(self._slots), _GRACE_SECONDS)
            finally:
                for slot in self._slots:
                    slot.end(idle=slot in self._free)

    def run(
        self,
        call: str,  # "package.module:function"
        arguments: Mapping[str, Any],  # JSON values
        on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
        on_start: Callable[[], None] = lambda: None,  # called once a slot is free, which may take hours
        fresh: bool = False,  # a child of its own, ended with the job
        log: Path | None = None,  # gets what the job prints, and tracebacks; None is the parent's standard error
        patience: float | None = None,  # seconds without an event after which the child is ended, as dead
    ) -> dict[str, Any]:
        """Call `function(**arguments, report=report)` in a child and return the JSON mapping that it returns.

        `report(mapping)` in the job calls `on_event` in this thread. Callable from many threads, served in order.
        An error of `lors.errors` is raised again as itself; any other, and the child's death, is StepFailedError.
        """
        package = call.partition(":")[0].partition(".")[0]
        if not _CALL.fullmatch(call) or package not in self._packages:
            raise ValueError(
                f"{call!r} is not a function in {', '.join(self._packages)}; write package.module:function"
            )
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        job = {"call": call, "arguments": dict(arguments), "log": None if log is None else str(log.absolute())}
        line = json.dumps(job).encode() + b"\n"
        with self._slot(call) as slot:
            on_start()
            child = slot.start(fresh, log)
            if self._closed:  # close() may have passed this slot before its child was there
                child.end()
            keep = False
            try:
                answer = child.work(line, on_event, patience)
                keep = "result" in answer or answer["kind"] is not None
            finally:
                if fresh or self._closed or not keep:
                    child.discard()
        if "result" in answer:
            result: dict[str, Any] = answer["result"]
            return result
        if answer["kind"] is not None:
            raise getattr(errors, answer["kind"])(answer["message"])
        where = "" if log is None else f" (log: {log})"
        if self._closed:
            raise StepFailedError(f"{call} was stopped before it ended; run the same command again to resume.")
        raise StepFailedError(f"{call} {answer['message']}{where}; run the same command again to resume.")

    @contextmanager
    def _slot(self, call: str) -> Iterator[_Slot]:
        me = object()
        with self._turn:
            self._waiting.append(me)
            try:
                self._turn.wait_for(lambda: self._closed or (self._free and self._waiting[0] is me))
                if self._closed:
                    raise StepFailedError(
                        f"{call} was not started, because the run is ending; run the same command again."
                    )
                slot = self._free.pop()
            finally:
                self._waiting.remove(me)
                self._turn.notify_all()
        try:
            yield slot
        finally:
            with self._turn:
                self._free.append(slot)
                self._turn.notify_all()


class _Slot:
    """A place for one job at a time: its environment and its children."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._warm: _Child | None = None
        self._current: _Child | None = None

    def start(self, fresh: bool, log: Path | None) -> _Child:
        if self._warm is not None and (
            not self._warm.alive() or (fresh and "CUDA_VISIBLE_DEVICES" in self._environment)
        ):
            self._warm.discard()  # an idle child would hold memory of the device that the fresh one needs
            self._warm = None
        if fresh:
            self._current = _Child(self._environment, log)
        else:
            self._current = self._warm = self._warm or _Child(self._environment, log)
        return self._current

    def stop(self) -> None:
        if self._current is not None:
            self._current.send(signal.SIGTERM)

    def end(self, idle: bool) -> None:
        for child in (self._current, self._warm):
            if child is not None:
                (child.discard if idle else child.end)()


class _Child:
    """One child process, seen from the parent."""

    def __init__(self, environment: Mapping[str, str], log: Path | None) -> None:
        with Path(os.devnull if log is None else log).open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lors.isolate"],  # -P: nothing in the working folder shadows a module
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if log is None else file,
                bufsize=0,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal reaches the parent alone, which ends its children
            )
        self._lock = threading.Lock()

    def alive(self) -> bool:
        """Whether the child runs; a dead one is not reaped, since `end` still needs its number."""
        with self._lock:
            if self._process.returncode is not None:
                return False
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the child and every process that it started."""
        with self._lock:
            if self._process.returncode is None:
                # Even where the child is dead already: until it is waited for, its process group's number is its own.
                with _gone():
                    os.killpg(self._process.pid, number)

    def end(self) -> None:
        """Kill the child and every process that it started; safe at any moment, from any thread, twice."""
        self.send(signal.SIGKILL)
        with self._lock:
            if self._process.returncode is None:
                self._process.wait()

    def discard(self) -> None:
        """End the child and close its pipes, which nobody may be reading."""
        self.end()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def work(
        self, line: bytes, on_event: Callable[[Mapping[str, Any]], None], patience: float | None
    ) -> dict[str, Any]:
        """Send a job; the answer has "result", or "message" and "kind" (a class of lors.errors, None for any other)."""
        stdin = self._process.stdin
        assert stdin is not None
        with _gone():
            view = memoryview(line)
            while view:
                view = view[stdin.write(view) :]
        silent = False

        def give_up() -> None:
            nonlocal silent
            silent = True
            self.end()

        for answer in self._lines(patience, give_up):
            if "event" not in answer:
                return answer
            on_event(answer["event"])
        self.end()
        if silent:
            assert patience is not None
            return {"message": f"said nothing for {patience / 60:g} minutes and was ended", "kind": None}
        return {"message": _ending(self._process.returncode), "kind": None}

    def _lines(self, patience: float | None, give_up: Callable[[], None]) -> Iterator[dict[str, Any]]:
        stdout = self._process.stdout
        assert stdout is not None
        pending, heard = b"", time.monotonic()
        while True:
            # A process that the child forked may hold its end of the pipe open, so the child's death is looked for too.
            dead = not self.alive()
            if not select.select([stdout], [], [], 0 if dead else 0.5)[0]:
                if dead:
                    return
                if patience is not None and time.monotonic() - heard > patience:
                    give_up()
                continue
            heard = time.monotonic()
            block = os.read(stdout.fileno(), 1 << 16)
            if not block:
                return
            *lines, pending = (pending + block).split(b"\n")
            yield from map(json.loads, lines)


@contextmanager
def _gone() -> Iterator[None]:
    """A child that is gone already is found by its reader, which knows how it ended."""
    with suppress(BrokenPipeError, ProcessLookupError):
        yield


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by signal {-code} ({name})" + (": out of memory?" if -code == signal.SIGKILL else "")


def _environment(threads: int, device: str | None) -> dict[str, str]:
    environment = dict(os.environ)
    environment |= dict.fromkeys(_THREAD_VARIABLES, str(threads))
    # The order of a set of strings must not differ between two children of one run.
    environment["PYTHONHASHSEED"] = "0"
    # A checkout or a test helper may be on the parent's path alone; this package's own folder goes before all others.
    folders = [Path(errors.__file__).parents[1], *map(Path, sys.path)]
    environment["PYTHONPATH"] = os.pathsep.join(str(folder.absolute()) for folder in folders if folder.is_dir())
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = environment[_DEVICES] = device
    return environment


_DEVICES = "LORS_DEVICES"
_TELL_SECONDS = 15.0


@contextmanager
def _devices(names: str, report: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Hold this machine's lock of each device: one job a GPU, whoever started it, an orphan of a dead worker too."""
    with ExitStack() as held:
        for name in sorted(filter(None, names.split(","))):
            path = Path(tempfile.gettempdir()) / f"lors-device-{re.sub(r'[^0-9A-Za-z-]', '-', name)}.lock"
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
            held.callback(os.close, descriptor)
            told = -_TELL_SECONDS
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() - told >= _TELL_SECONDS:
                    told = time.monotonic()
                    report({"message": f"waiting for GPU {name}, which another process of this machine uses"})
                time.sleep(0.2)
        yield


def _serve() -> NoReturn:
    """The child: takes jobs until its standard input ends, which is also how it learns that its parent is dead."""
    gc.set_threshold(10_000)  # looking among the 400,000 objects of torch and transformers is a tenth of the start
    jobs_file = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    first_log = os.dup(2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    faulthandler.enable(2)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    sending = threading.Lock()

    def watch() -> None:
        for line in jobs_file:
            jobs.put(json.loads(line))
        # The parent closed the pipe or died: nothing of this job is wanted, nor any process that it started.
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def send(answer: Mapping[str, Any]) -> None:
        with sending:
            answers.write(json.dumps(answer) + "\n")

    threading.Thread(target=watch, daemon=True).start()
    while True:
        job = jobs.get()
        log = first_log if job["log"] is None else os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        if log != first_log:
            os.close(log)
        with _devices(os.environ.get(_DEVICES, ""), lambda event: send({"event": event})):
            answer = perform(job, lambda event: send({"event": event}))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        send(answer)


def perform(job: Mapping[str, Any], report: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Call what `job` names in this process: its "result", or its error's "message" and "kind" (see `_Child.work`)."""
    try:
        module, _, name = job["call"].partition(":")
        result = getattr(importlib.import_module(module), name)(**job["arguments"], report=report)
        if not isinstance(result, Mapping):
            raise TypeError(f"{job['call']} returned {type(result).__name__}, not a mapping")
        return {"result": json.loads(json.dumps(dict(result)))}
    except LorsError as error:
        kind = next(k.__name__ for k in type(error).__mro__ if getattr(errors, k.__name__, None) is k)
        return {"kind": kind, "message": str(error)}
    except BaseException as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        summary = redact(" ".join(traceback.format_exception_only(error)[-1].split()))
        return {"kind": None, "message": f"failed with {summary[:500]}"}


if __name__ == "__main__":
    _serve()
