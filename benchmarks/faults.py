"""Break a small experiment in every way that production does, for real, and see that it ends right.

    python benchmarks/faults.py                  every fault, at least 60 kills; about half an hour on 2 cores
    python benchmarks/faults.py --only run,child --kills 4

Each trial has an empty store. Something is killed at random moments, or broken; the same command is then repeated until
it completes, and its digests, those of the merged model's files among them, must be those of an undisturbed run. What a
user has to mend (a full disk, a read-only folder) must end in one sentence, and in the same digests after mending.
Nothing that a trial started may be left running. Prints a table; its last line is one JSON object. Exit code 1 where a
result was wrong. A row that this machine cannot do (mounts need root, the clock needs libfaketime) says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

LORS = [sys.executable, "-m", "flows.cli"]
EXPERIMENT: dict[str, Any] = {
    "base": "starter",
    "languages": ["es", "fr"],
    "tasks": ["transcribe"],
    "corpora": {"source": "synthetic", "utterances": {"train": 24, "validation": 2, "test": 3}},
    "finetune": {"steps": 60, "learning_rate": 1e-3, "batch_seconds": 24},
    "merge": {"scaling": {"search": [0.3, 0.6], "metric": "loss"}},
    "evaluate": {"batch_seconds": 20},
    "resources": {"parallel": 2, "threads": 1},
}
PATIENCE = 400.0
"""Seconds that one command may take."""


@dataclass
class Row:
    """What one kind of fault did."""

    fault: str
    times: int = 0
    kills: int = 0
    completed: int = 0
    sentences: int = 0
    wrong: list[str] = field(default_factory=list)
    unnoticed: list[float] = field(default_factory=list)
    note: str = ""


class Run:
    """One `lors` command; its standard error is read as it comes."""

    def __init__(self, arguments: list[str], mark: str, **environment: str) -> None:
        self.lines: list[tuple[float, str]] = []
        own = {**os.environ, "LORS_FAULTS": mark, "LORS_CHECKPOINT_SECONDS": "0.2", **environment}
        self.process = subprocess.Popen(
            [*LORS, *arguments], env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code, or None where it still runs."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(5)
        return code

    def said(self, *words: str, after: float = 0.0) -> float | None:
        """When it first said a line with one of the words."""
        return next((at for at, line in self.lines if at >= after and any(word in line for word in words)), None)

    def until(self, reached: Callable[[], bool], seconds: float = 120.0) -> bool:
        """Wait until something is reached; False where the run ended before it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if reached():
                return True
            time.sleep(0.02)
        return False

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


class Trial:
    """An experiment with a store of its own."""

    def __init__(self, bench: Bench, **changes: Any) -> None:
        self.bench = bench
        self.folder = Path(tempfile.mkdtemp(prefix="trial-", dir=bench.folder))
        self.mark = self.folder.name
        self.file = self.folder / "e.yaml"
        self.store, self.output = self.folder / "store", self.folder / "out"
        self.write(**changes)

    def write(self, **changes: Any) -> None:
        own = {**EXPERIMENT, "output": str(self.output), "store": str(self.store), **changes}
        self.file.write_text(yaml.safe_dump(own))

    def start(self, on: str = "local", **environment: str) -> Run:
        return Run(["run", str(self.file), "--on", on], self.mark, PREFECT_API_URL=self.bench.url, **environment)

    def training(self) -> bool:
        """Whether a training is under way that has a checkpoint."""
        return any((self.store / "work" / "fine_tune").glob("*/training/checkpoint.safetensors"))

    def digests(self) -> dict[str, Any]:
        summary = json.loads((self.output / "summary.json").read_text("utf-8"))
        weights = hashlib.sha256((self.output / "model" / "model.safetensors").read_bytes()).hexdigest()
        return {**summary["digests"], "output": weights}

    def finish(self, row: Row, on: str = "local", run: Run | None = None) -> None:
        """Repeat the command until it completes, at most five times, and look at what it made."""
        for _ in range(5):
            run = run or self.start(on)
            code = run.wait()
            if code == 0:
                break
            if "Traceback" in run.text:
                row.wrong.append(f"{self.mark}: a traceback: {run.text[-600:]}")
            if code is None:
                run.process.kill()
                row.wrong.append(f"{self.mark}: no end after {PATIENCE:g} s: {run.text[-600:]}")
                return
            run = None
        else:
            row.wrong.append(f"{self.mark}: five attempts did not complete")
            return
        if self.digests() != self.bench.expected:
            row.wrong.append(f"{self.mark}: other digests")
        else:
            row.completed += 1
        left = self.bench.left(self.mark)
        if left:
            row.wrong.append(f"{self.mark}: left running: {left}")

    def sentence(self, row: Row, run: Run) -> None:
        """See that a command ended in one sentence, with a code other than 0."""
        code = run.wait()
        said = [line for _, line in run.lines if line.startswith("lors: ")]
        if code in (None, 0) or len(said) != 1 or "Traceback" in run.text:
            row.wrong.append(f"{self.mark}: exit code {code}: {run.text[-600:]}")
        else:
            row.sentences += 1
            row.note = said[0].removeprefix("lors: ").replace(str(self.folder), "...")[:160]


class Bench:
    """The server, the workers and the digests of an undisturbed run."""

    def __init__(self, folder: Path, port: int, rng: random.Random) -> None:
        self.folder, self.port, self.rng = folder, port, rng
        self.url = f"http://127.0.0.1:{port}/api"
        os.environ.update(LORS_HOME=str(folder / "home"), PREFECT_HOME=str(folder / "prefect"))
        os.environ.pop("PREFECT_API_URL", None)
        self.expected: dict[str, Any] = {}
        self.rows: list[Row] = []

    def up(self) -> None:
        command = [*LORS, "up", "--port", str(self.port), "--workers", "2"]
        # A worker's run writes its checkpoints as often as the others here.
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "LORS_CHECKPOINT_SECONDS": "0.2"}
        )
        if done.returncode:
            raise SystemExit(done.stderr)

    def down(self) -> None:
        subprocess.run([*LORS, "down"], capture_output=True)

    def service(self, name: str) -> psutil.Process:
        services = json.loads((self.folder / "home" / "services.json").read_text())["services"]
        return psutil.Process(services[name]["pid"])

    def worker_runs(self) -> list[psutil.Process]:
        """The processes of flow runs, children of the workers."""
        found = []
        for name in ("lors-gpu-0", "lors-gpu-1"):
            try:
                found += self.service(name).children()
            except psutil.Error:
                continue
        return found

    def left(self, mark: str) -> list[str]:
        """Processes of a trial that still run, a moment after its end."""
        for _ in range(50):
            found = []
            for process in psutil.process_iter():
                try:
                    if process.environ().get("LORS_FAULTS") == mark and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(_command(process)[:100])
                except psutil.Error:
                    continue
            if not found:
                return []
            time.sleep(0.2)
        return found

    def learn(self) -> float:
        """The digests, and the seconds, of an undisturbed run."""
        trial, started = Trial(self), time.monotonic()
        run = trial.start()
        if run.wait() != 0:
            raise SystemExit(run.text)
        self.expected = trial.digests()
        return time.monotonic() - started

    # The faults

    def run(self, row: Row, kills: int) -> None:
        while row.kills < kills:
            trial = Trial(self)
            for _ in range(5):
                run = trial.start()
                if run.wait(self.rng.uniform(2.0, 14.0)) is not None:
                    break
                run.process.kill()
                run.wait()
                row.kills += 1
            row.times += 1
            trial.finish(row)
            print(f"  {row.fault}: {row.kills} kills", file=sys.stderr, flush=True)

    def child(self, row: Row, kills: int) -> None:
        while row.kills < kills:
            trial, run = Trial(self), None
            run = trial.start()
            for _ in range(4):
                if not run.until(trial.training):
                    break
                time.sleep(self.rng.uniform(0.0, 1.0))
                children = [c for c in psutil.Process(run.process.pid).children() if "lors.isolate" in _command(c)]
                if not children:
                    break
                at = time.monotonic()
                with suppress(psutil.Error):
                    self.rng.choice(children).kill()
                    row.kills += 1
                if run.until(lambda run=run, at=at: run.said("trying again", "lors:", after=at) is not None, 30):
                    row.unnoticed.append((run.said("trying again", "lors:", after=at) or at) - at)
            row.times += 1
            trial.finish(row, run=run)
            print(f"  {row.fault}: {row.kills} kills", file=sys.stderr, flush=True)

    def worker_run(self, row: Row, kills: int) -> None:
        while row.kills < kills:
            trial = Trial(self)
            run = trial.start("workers")
            for _ in range(2):
                if not run.until(lambda: bool(self.worker_runs())):
                    break
                time.sleep(self.rng.uniform(0.0, 14.0))
                found = self.worker_runs()
                if not found or run.process.poll() is not None:
                    break
                at = time.monotonic()
                with suppress(psutil.Error):
                    self.rng.choice(found).kill()
                    row.kills += 1
                if run.until(lambda run=run, at=at: run.said("trying again", after=at) is not None, 60):
                    row.unnoticed.append((run.said("trying again", after=at) or at) - at)
            row.times += 1
            trial.finish(row, "workers", run)
            print(f"  {row.fault}: {row.kills} kills", file=sys.stderr, flush=True)

    def worker(self, row: Row, kills: int) -> None:
        while row.kills < kills:
            trial = Trial(self)
            run = trial.start("workers")
            run.until(lambda: bool(self.worker_runs()))
            time.sleep(self.rng.uniform(0.0, 12.0))
            name = self.rng.choice(["lors-gpu-0", "lors-gpu-1"])
            self.service(name).kill()
            row.kills += 1
            self.up()
            row.times += 1
            trial.finish(row, "workers", run)
            print(f"  {row.fault}: {row.kills} kills", file=sys.stderr, flush=True)

    def server(self, row: Row, kills: int) -> None:
        for number in range(kills):
            trial = Trial(self)
            on = ("workers", "local")[number % 2]
            run = trial.start(on)
            time.sleep(self.rng.uniform(4.0, 16.0))
            self._stop_server(signal.SIGKILL)
            row.kills += 1
            time.sleep(self.rng.uniform(0.0, 5.0))
            self.up()
            row.times += 1
            trial.finish(row, on, run)
            print(f"  {row.fault}: {row.kills} kills", file=sys.stderr, flush=True)

    def restart(self, row: Row, kills: int) -> None:
        trial = Trial(self)
        run = trial.start("workers")
        run.until(lambda: bool(self.worker_runs()))
        self._stop_server(signal.SIGTERM)
        self.up()
        row.times += 1
        trial.finish(row, "workers", run)

    def _stop_server(self, number: signal.Signals) -> None:
        server = self.service("server")
        tree = [server, *server.children(recursive=True)]
        for process in tree:
            process.send_signal(number)
        psutil.wait_procs(tree, timeout=30)

    def hang(self, row: Row, kills: int) -> None:
        trial = Trial(self)
        run = trial.start("workers")
        run.until(trial.training)
        stopped = []
        for process in self.worker_runs():
            stopped += [process, *process.children(recursive=True)]
        at = time.monotonic()
        for process in stopped:
            with suppress(psutil.Error):
                process.suspend()
        if run.until(lambda: run.said("trying again", after=at) is not None, 300):
            row.unnoticed.append((run.said("trying again", after=at) or at) - at)
        # The hung runs hold their workers' places, as a hung GPU would: what a person does is to end them, later.
        time.sleep(5)
        for process in stopped:
            with suppress(psutil.Error):
                process.resume()
        row.times += 1
        trial.finish(row, "workers", run)

    def stop(self, row: Row, kills: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT) * 2:
            trial = Trial(self)
            on = "workers" if row.times >= 2 else "local"
            run = trial.start(on)
            run.until(trial.training)
            run.process.send_signal(number)
            code = run.wait(60)
            if code != (143 if number == signal.SIGTERM else 130):
                row.wrong.append(f"{trial.mark}: exit code {code} after {number.name}: {run.text[-400:]}")
            if left := self.left(trial.mark):
                row.wrong.append(f"{trial.mark}: left running after {number.name}: {left}")
            end = time.monotonic() + 60
            while self.worker_runs() and time.monotonic() < end:
                time.sleep(0.5)
            if self.worker_runs():
                row.wrong.append(f"{trial.mark}: a worker trains on after {number.name}")
            row.times += 1
            trial.finish(row, on)

    def disk(self, row: Row, kills: int) -> None:
        for which, sizes in (("store", ("3m", "9m", "14m")), ("out", ("1m", "6m"))):
            for size in sizes:
                trial = Trial(self)
                place = trial.folder / which
                with mounted(place, f"size={size}"):
                    trial.sentence(row, trial.start())
                    subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)
                    row.times += 1
                    trial.finish(row)

    def readonly(self, row: Row, kills: int) -> None:
        trial = Trial(self)
        with mounted(trial.output, "ro"):
            trial.sentence(row, trial.start())
            subprocess.run(["mount", "-o", "remount,rw", str(trial.output)], check=True)
            row.times += 1
            trial.finish(row)

    def flip(self, row: Row, kills: int) -> None:
        trial = Trial(self)
        trial.finish(Row(""))
        entries = sorted(path for path in (trial.store / "entries").glob("*/*/files/*") if path.stat().st_size)
        for path in self.rng.sample(entries, 6):
            data, at = bytearray(path.read_bytes()), self.rng.randrange(path.stat().st_size)
            data[at] ^= 1
            path.write_bytes(data)
            row.times += 1
            trial.finish(row)

    def manifest(self, row: Row, kills: int) -> None:
        trial = Trial(self)
        trial.finish(Row(""))
        manifests = sorted((trial.store / "entries").glob("*/*/manifest.json"))
        for path in self.rng.sample(manifests, 4):
            data = path.read_bytes()
            path.write_bytes(data[: self.rng.randrange(len(data))])
            row.times += 1
            trial.finish(row)

    def two(self, row: Row, kills: int) -> None:
        for on in ("local", "workers"):
            trial = Trial(self)
            other = Run(
                ["run", str(trial.file), "--on", on, "--set", f"output={trial.folder / 'other'}"],
                trial.mark,
                PREFECT_API_URL=self.url,
            )
            run = trial.start(on)
            row.times += 1
            code = other.wait()
            trial.finish(row, on, run)
            if code != 0:
                row.wrong.append(f"{trial.mark}: the other run, exit code {code}: {other.text[-1500:]}")
                continue
            made = list((trial.store / "entries" / "fine_tune").iterdir())
            if len(made) != 2:
                row.wrong.append(f"{trial.mark}: {len(made)} trainings")
            summaries = [json.loads((trial.folder / name / "summary.json").read_text()) for name in ("out", "other")]
            states = [{s["name"]: s["state"] for s in one["steps"]} for one in summaries]
            twice = [n for n in states[0] if n.startswith("fine-tune") and states[0][n] == states[1][n] == "run"]
            if twice and on == "local":  # of workers both say so, who waited for one training
                row.wrong.append(f"{trial.mark}: trained twice: {twice}")

    def clock(self, row: Row, kills: int) -> None:
        libraries = [*Path("/usr/lib").glob("**/faketime/libfaketime.so.1")]
        if not libraries:
            row.note = "not done: libfaketime is not installed"
            return
        for shift in ("+3d", "-400d"):
            trial = Trial(self)
            moved = trial.folder / "faketime"
            moved.write_text("+0\n")
            run = trial.start(
                LD_PRELOAD=str(libraries[0]), FAKETIME_TIMESTAMP_FILE=str(moved), FAKETIME_NO_CACHE="1",
                FAKETIME_DONT_FAKE_MONOTONIC="1", DONT_FAKE_MONOTONIC="1",
            )  # fmt: skip
            run.until(trial.training)
            moved.write_text(shift + "\n")
            row.times += 1
            trial.finish(row, run=run)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own, of the given size or read-only; needs root."""
    if os.geteuid() != 0:
        raise PermissionError("not done: mounts need root")
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"not done: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


FAULTS = {
    "run": ("kill -9 of `lors run`", 24),
    "child": ("kill -9 of a training's process", 16),
    "worker_run": ("kill -9 of a worker's run", 12),
    "worker": ("kill -9 of a worker", 4),
    "server": ("kill -9 of the server", 6),
    "restart": ("the server restarted", 0),
    "hang": ("a worker's run hangs", 0),
    "stop": ("SIGTERM and Ctrl-C", 0),
    "disk": ("full disk, store and output", 0),
    "readonly": ("read-only output", 0),
    "flip": ("a flipped byte in the store", 0),
    "manifest": ("a truncated manifest", 0),
    "two": ("two full runs at once", 0),
    "clock": ("the clock is set", 0),
}


def main() -> int:
    """Run the faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {','.join(FAULTS)}")
    parser.add_argument("--kills", type=int, help="of each kind, in place of the default")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--port", type=int, default=4299, help="of the trials' server")
    options = parser.parse_args()
    # What a shell runs in the background ignores Ctrl-C, and so would the commands that are started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = options.only.split(",") if options.only else list(FAULTS)
    with tempfile.TemporaryDirectory(prefix="lors-faults-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), options.port, random.Random(options.seed))
        try:
            bench.up()
            print(f"an undisturbed run takes {bench.learn():.0f} s", file=sys.stderr, flush=True)
            for name in wanted:
                title, kills = FAULTS[name]
                row = Row(title)
                bench.rows.append(row)
                print(title, file=sys.stderr, flush=True)
                try:
                    getattr(bench, name)(row, kills if options.kills is None else options.kills)
                except PermissionError as error:
                    row.note = str(error)
                except Exception as error:  # the other rows are still worth their time
                    row.wrong.append(f"the trial itself stumbled: {error!r}")
                for wrong in row.wrong:
                    print(f"  WRONG {wrong}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("stopped; the table has what was done", file=sys.stderr, flush=True)
            for wrong in bench.rows[-1].wrong if bench.rows else []:
                print(f"  WRONG {wrong}", file=sys.stderr, flush=True)
        finally:
            bench.down()
    print("| fault | trials | kills | right at the end | ended in a sentence | wrong | unnoticed, s | |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in bench.rows:
        times = row.unnoticed
        seconds = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})" if times else ""
        cells = [row.fault, row.times, row.kills, row.completed, row.sentences, len(row.wrong), seconds, row.note]
        print(f"| {' | '.join(str(cell) for cell in cells)} |")
    wrong = sum(len(row.wrong) for row in bench.rows)
    print(
        json.dumps(
            {"kills": sum(row.kills for row in bench.rows), "trials": sum(r.times for r in bench.rows), "wrong": wrong}
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
