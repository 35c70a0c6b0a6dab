"""Several processes that train one model together, each with its share of every batch: `torchrun` and DDP.

`launch` starts them; each is `python -m lors.training.distributed JOB.json` under torchrun. They answer through a
named pipe: JSON lines, the events and the result of the first process, and the error of whichever fails.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from lors import errors
from lors.errors import ConfigError, StepFailedError
from lors.isolate import perform
from lors.training.signals import stop_on_sigterm

__all__ = ["Team", "launch", "rank", "team"]

_CALL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_POLL_SECONDS = 0.5
# Others wait while the first one validates; a process that died is found by torchrun, not by this.
_WAIT = datetime.timedelta(days=7)


def rank() -> int:
    """The number of this process among those of its training; 0 where it trains alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def team(device: torch.device) -> Team:
    """The processes of this training; `device` is what this one computes on."""
    return Team(rank(), dist.get_world_size() if dist.is_initialized() else 1, device)


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one training, all of which call each of these functions at the same step."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes, reports and validates."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum of each one's value."""
        return self._reduced([value], dist.ReduceOp.SUM)[0]

    def largest(self, *values: float) -> list[float]:
        """The largest of each one's values."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def of_first(self, compute: Callable[[], float]) -> float:
        """What the first process computes, while the others wait."""
        return self.sum(compute() if self.first else 0.0)

    def model(self, model: Any, unused: bool) -> Any:
        """`model`, whose gradients will be the mean over the processes; `unused`: an update may leave some out."""
        if self.size == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=unused
        )

    def alone(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Inside, gradients of what `model` made of a model are only added up here, not over the processes."""
        if self.size == 1:
            return contextlib.nullcontext()
        apart: contextlib.AbstractContextManager[None] = model.no_sync()
        return apart

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        reduced: list[float] = tensor.tolist()
        return reduced


def launch(
    call: str,  # "package.module:function"
    arguments: Mapping[str, Any],  # JSON values
    processes: int,
    report: Callable[[Mapping[str, Any]], None],
    work: Path,
    packages: Sequence[str] = ("lors",),  # whose functions may be called
) -> dict[str, Any]:
    """Call `function(**arguments, report=report)` in so many processes; the mapping that the first one returns.

    On GPUs each process has one of its own. SIGTERM is passed on, so that the function can stop where it may go on
    later (`stop_on_sigterm`). Where one process fails or dies, all are ended.

    Raises the error of `lors.errors` that a process raised, StepFailedError for any other error or death, ConfigError
    where there are fewer GPUs than processes.
    """
    if not _CALL.fullmatch(call) or call.partition(":")[0].partition(".")[0] not in packages:
        raise ValueError(f"{call!r} is not a function in {', '.join(packages)}; write package.module:function")
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise ConfigError(
            f"{processes} processes train together, but {torch.cuda.device_count()} GPUs are visible: set "
            "resources.processes to the number of GPUs"
        )
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="processes-", dir=work) as folder:
        pipe, job = Path(folder) / "answers", Path(folder) / "job.json"
        os.mkfifo(pipe)
        job.write_text(json.dumps({"call": call, "arguments": dict(arguments), "pipe": str(pipe.absolute())}))
        # Its own end to write to, so that the pipe does not end before the first process opened it.
        answers = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        try:
            with stop_on_sigterm() as stop:
                answer = _follow(_torchrun(job, processes), processes, answers, stop, report)
        finally:
            os.close(answers)  # which ends the processes that are left
    if "result" in answer:
        result: dict[str, Any] = answer["result"]
        return result
    if answer["kind"] is not None:
        raise getattr(errors, answer["kind"])(answer["message"])
    raise StepFailedError(f"{call} {answer['message']}; run the same command again to resume.")


def _torchrun(job: Path, processes: int) -> subprocess.Popen[bytes]:
    folders = [Path(errors.__file__).parents[1], *map(Path, sys.path)]
    environment = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(folder.absolute()) for folder in folders if folder.is_dir()),
    }
    runner = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*runner, "-m", "lors.training.distributed", str(job.absolute())],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        env=environment,
        start_new_session=True,  # a signal to this process's group would have torchrun end them at once
    )


def _follow(
    process: subprocess.Popen[bytes],
    processes: int,
    answers: int,
    stop: Callable[[], bool],
    report: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """The result of the first process, or the first error of any; passes events and SIGTERM on."""
    first: int | None = None
    silent, found = set(range(processes)), None
    stopped = False
    try:
        for line in _lines(process, answers):
            if stop() and not stopped:
                # They agree on when to stop, so it is enough that one knows.
                os.kill(process.pid if first is None else first, signal.SIGTERM)
                stopped = True
            if "process" in line:
                first = line["process"]
            elif "event" in line:
                report(line["event"])
            elif line:
                silent.discard(line["rank"])
                if found is None and (line["rank"] == 0 or "result" not in line):
                    found = line
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    if found is None:
        return {"kind": None, "message": f"ended its processes with exit code {process.returncode}"}
    if "result" not in found and found["kind"] is None and silent:
        lost = f"lost process {min(silent) + 1} of {processes} (killed: out of memory?)"
        return {"kind": None, "message": f"{lost}, and process {found['rank'] + 1} {found['message'][:200]}"}
    return found


def _lines(process: subprocess.Popen[bytes], answers: int) -> Iterator[dict[str, Any]]:
    """What the processes write, until they ended; an empty mapping now and then, where they write nothing."""
    pending = b""
    while True:
        ended = process.poll() is not None
        if select.select([answers], [], [], 0 if ended else _POLL_SECONDS)[0]:
            *lines, pending = (pending + os.read(answers, 1 << 16)).split(b"\n")
            yield from map(json.loads, lines)
        elif ended:
            return
        yield {}


def _serve(job: Path) -> NoReturn:
    """One of the processes."""
    content = json.loads(job.read_text())
    # Fails where nobody reads: the launching process is gone.
    pipe = os.open(content["pipe"], os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(pipe, True)
    threading.Thread(target=_end_with_the_reader, args=(pipe,), daemon=True).start()
    number = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(number)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_WAIT)

    def send(answer: Mapping[str, Any]) -> None:
        line = memoryview(json.dumps(answer).encode() + b"\n")
        with job.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the others may write too
            while line:
                line = line[os.write(pipe, line) :]

    def report(event: Mapping[str, Any]) -> None:
        if number == 0:
            send({"event": event})

    if number == 0:
        send({"process": os.getpid()})
    answer = perform(content, report)
    send({"rank": number, **answer})
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0 if "result" in answer else 1)  # not held up by the process group, which others may have left


def _end_with_the_reader(pipe: int) -> None:
    poll = select.poll()
    poll.register(pipe, 0)
    poll.poll()
    os._exit(1)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
