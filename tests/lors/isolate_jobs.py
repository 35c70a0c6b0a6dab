"""Jobs for test_isolate.py; only the standard library, so that a child is up in a moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lors import errors

Report = Callable[[Mapping[str, Any]], None]


def describe(report: Report, value: Any = None) -> dict[str, Any]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    environment = {name: os.environ.get(name) for name in names}
    report(environment)
    return {"pid": os.getpid(), "value": value, "environment": environment, "torch": "torch" in sys.modules}


def steps(report: Report, count: int) -> dict[str, Any]:
    for step in range(count):
        report({"step": step, "text": "é\n"})
    return {"steps": count}


def chatter(report: Report) -> dict[str, Any]:
    print('{"result": {"forged": true}}')
    os.write(1, b'{"error": "raw bytes on descriptor 1"}\n')
    subprocess.run(["sh", "-c", "echo from a program; echo on stderr >&2"], check=True)
    return {"stdin": sys.stdin.read()}


def raises(report: Report, name: str) -> dict[str, Any]:
    if hasattr(errors, name):
        raise getattr(errors, name)("The thing is wrong: do this.")
    if name == "subclass":
        raise type("Own", (errors.CorpusError,), {})("The thing is wrong: do this.")
    if name == "exit":
        sys.exit(3)
    raise RuntimeError("it broke\nin two lines")


def odd(report: Report, what: str) -> Any:
    return {"list": [1], "object": {"value": object()}}[what]


def dies(report: Report, how: str) -> dict[str, Any]:
    report({"pid": os.getpid()})
    if how == "exit":
        os._exit(7)
    if how == "forked":  # the fork holds the pipes of its parent open
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        report({"fork": pid})
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def busy(report: Report, seconds: float = 60.0) -> dict[str, Any]:
    """Computes in Python, so that it never waits, beside a program that it started."""
    program = subprocess.Popen(["sleep", "60"])
    report({"pid": os.getpid(), "program": program.pid})
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
    program.kill()
    return {"waited": program.wait()}


def overlap(report: Report, folder: str, name: str) -> dict[str, Any]:
    """How many such jobs run at once, itself included."""
    mark = Path(folder) / name
    mark.touch()
    time.sleep(0.15)
    count = len(list(Path(folder).iterdir()))
    mark.unlink()
    return {"count": count}


def parent() -> None:
    """A program that runs `busy` in a child; for the tests that end it."""
    from lors.isolate import Slots

    with Slots(1, threads=1, packages=("isolate_jobs",)) as slots:
        slots.run("isolate_jobs:busy", {}, lambda event: print(json.dumps(event), flush=True))


if __name__ == "__main__":
    parent()
