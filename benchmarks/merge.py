"""Time and memory of `lors merge` and of LoRS pruning beside the peers': see benchmarks/README.md.

    python benchmarks/merge.py --work bench --peers peers --sizes base small large-v3

Every command runs as a process of its own. The last line printed is one JSON object of ratios and counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LORS = str(Path(sys.executable).with_name("lors"))
SIZES = ("mini", "base", "small", "large-v3")
DENSITY, RANK_RATIO = 0.2, 0.1
SCALING = {"task_arithmetic": 0.3}  # 1 for the others
MERGEKIT = ("task_arithmetic", "ties", "dare_ties")
FUSION_BENCH: dict[str, tuple[str, dict[str, Any]]] = {
    "tsv_m": ("TaskSingularVectorMerging", {"alpha": 1.0}),
    "iso_c": ("ISO_C_Merge", {"scaling_factor": 1.0}),
}
PEERS = ("mergekit", "fusion-bench")
MANY = (2, 4, 8, 16)  # experts, for memory
POLL_SECONDS = 0.02
BLOCK = 2**24

Command = Callable[[Path], Sequence[str]]
"""Given where the output goes, the words of a command."""


@dataclass(frozen=True)
class Row:
    """What is compared: our command first, then the peer's, if any."""

    name: str
    sides: dict[str, Command]
    inputs: Sequence[Path]
    check: Command | None = None  # run on our last output; prints a JSON object
    out: str = "out"


@dataclass
class Runs:
    """What the repetitions of one command took; memory in bytes, the largest of them."""

    seconds: list[float] = field(default_factory=list)
    resident: int = 0
    anonymous: int = 0
    error: str = ""
    printed: str = ""  # the last line


class Watch(threading.Thread):
    """Samples the memory of a process and its descendants until it is told to stop; kills it after `limit` seconds."""

    def __init__(self, process: subprocess.Popen[bytes], limit: float) -> None:
        super().__init__(daemon=True)
        self.process, self.limit = process, limit
        self.resident = self.anonymous = 0
        self.late = False
        self.over = threading.Event()

    def run(self) -> None:
        end = time.monotonic() + self.limit
        while not self.over.wait(POLL_SECONDS):
            memory = [rss_of(pid) for pid in tree_of(self.process.pid)]
            self.resident = max(self.resident, sum(resident for resident, _ in memory))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in memory))
            if time.monotonic() > end and not self.late:
                self.late = True
                self.process.kill()


def tree_of(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in children:
            yield from tree_of(int(child))


def rss_of(pid: int) -> tuple[int, int]:
    """(resident, anonymous) bytes of a process now, 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS:", "RssAnon:")))
    resident, anonymous = (int(found.get(key, "0").split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))
    return resident, anonymous


def run(command: Sequence[str], log: Path, runs: Runs, limit: float) -> None:
    """Run a command once, its output into `log`, and add what it took to `runs`."""
    os.sync()  # nobody waits for what another one wrote
    with log.open("wb") as stream:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        except OSError as error:
            runs.error = str(error)
            return
        watch = Watch(process, limit)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    watch.over.set()
    watch.join()
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    runs.printed = lines[-1] if lines else ""
    if process.returncode:
        runs.error = f"stopped after {limit:.0f} s" if watch.late else runs.printed or f"exit {process.returncode}"
        return
    runs.seconds.append(seconds)
    # This process stays small, so that the kernel's figure, which starts at the parent's, is the child's own.
    runs.resident = max(runs.resident, usage.ru_maxrss * 1024, watch.resident)
    runs.anonymous = max(runs.anonymous, watch.anonymous)


def measure(row: Row, work: Path, repeat: int, limit: float) -> tuple[dict[str, Runs], dict[str, Any]]:
    """Run the sides of a row in turn, `repeat` times; returns what they took, and what the check printed."""
    for file in {file.resolve() for folder in row.inputs for file in folder.glob("*.safetensors")}:
        with file.open("rb") as stream:  # into the page cache, for both
            while stream.read(BLOCK):
                pass
    results = {side: Runs() for side in row.sides}
    checked: dict[str, Any] = {}
    log = work / "log.txt"
    for turn in range(repeat):
        for number, (side, command) in enumerate(row.sides.items()):
            out = work / row.out
            remove(out)
            if not results[side].error:
                run(command(out), log, results[side], limit)
            if row.check and number == 0 and turn == repeat - 1 and out.exists():
                check = Runs()
                run(row.check(out), log, check, limit)
                checked = {"check failed": check.error} if check.error else json.loads(check.printed)
            remove(out)
    return results, checked


def remove(out: Path) -> None:
    """Take away a folder or a file, where there is one."""
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def rows_for(
    size: str,
    models: Sequence[Path],  # the base, then the experts
    peers: dict[str, Path],  # those that are there: the bin folder of each
    work: Path,
    memory: bool,  # whether memory is measured against the number of experts
) -> list[Row]:
    """Everything that is measured on one size."""
    base, experts = models[0], models[1:]
    rows = []
    for method in (*MERGEKIT, *FUSION_BENCH):
        like = "mergekit" if method in MERGEKIT else "fusionbench"
        sides: dict[str, Command] = {"lors": partial(lors_merge, method, base, experts, like=like)}
        if method in MERGEKIT and "mergekit" in peers:
            sides["mergekit"] = partial(mergekit, method, base, experts, peers["mergekit"], work)
        if method in FUSION_BENCH and "fusion-bench" in peers:
            sides["fusion-bench"] = partial(fusion_bench, method, base, experts, peers["fusion-bench"])
        rows.append(Row(f"{size} {method}", sides, models))
    one = {"base": str(base), "expert": str(experts[0]), "rank_ratio": RANK_RATIO}
    settings = one | {"density": DENSITY}
    rows.append(
        Row(
            f"{size} lors_pruning",
            {
                "lors": partial(lors_prune, base, experts[0]),
                "full svd": partial(driver, sys.executable, "svd_prune", settings),
            },
            (base, experts[0]),
            check=partial(driver, sys.executable, "distance", one),
            out="out.safetensors",
        )
    )
    for method in ("task_arithmetic", "ties") if memory else ():
        for count in MANY:
            many = [experts[number % len(experts)] for number in range(count)]
            only: dict[str, Command] = {"lors": partial(lors_merge, method, base, many, like="mergekit")}
            rows.append(Row(f"{size} memory {method} {count}", only, models))
    return rows


def lors_merge(method: str, base: Path, experts: Sequence[Path], out: Path, *, like: str) -> list[str]:
    """`lors merge` with the settings of a peer."""
    words = [LORS, "merge", "--base", str(base), "--out", str(out), "--method", method]
    words += [word for number, expert in enumerate(experts) for word in ("--expert", f"e{number:02}={expert}")]
    words += ["--scaling", str(SCALING.get(method, 1.0))]
    if method != "task_arithmetic":  # which is the same everywhere
        words += ["--like", like]
    return [*words, "--set", f"density={DENSITY}"] if method in ("ties", "dare_ties") else words


def lors_prune(base: Path, expert: Path, out: Path) -> list[str]:
    """`lors prune`, float32, additive."""
    words = [LORS, "prune", "--base", str(base), "--expert", str(expert), "--out", str(out)]
    return [*words, "--rank-ratio", str(RANK_RATIO), "--density", str(DENSITY)]


def mergekit(method: str, base: Path, experts: Sequence[Path], binaries: Path, work: Path, out: Path) -> list[str]:
    """`mergekit-pytorch`, whose configuration is written on the way (JSON is YAML)."""
    models = [
        {"model": str(expert / "model.safetensors"), "parameters": {"weight": 1.0, "density": DENSITY}}
        for expert in experts
    ]
    settings = {
        "merge_method": method,
        "base_model": str(base / "model.safetensors"),
        "models": models,
        "parameters": {"lambda": SCALING.get(method, 1.0)},
    }
    config = work / "mergekit.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")
    return [str(binaries / "mergekit-pytorch"), str(config), str(out)]


def fusion_bench(method: str, base: Path, experts: Sequence[Path], binaries: Path, out: Path) -> list[str]:
    """fusion-bench's class through a driver that loads, merges and saves."""
    name, settings = FUSION_BENCH[method]
    arguments = {"method": name, "settings": settings, "base": str(base), "experts": list(map(str, experts))}
    return driver(str(binaries / "python"), "fusion_bench", arguments, out)


def driver(python: str, name: str, arguments: dict[str, Any], out: Path) -> list[str]:
    """A function of drivers.py as a command."""
    return [python, str(HERE / "drivers.py"), name, json.dumps(arguments | {"out": str(out)})]


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def report(row: Row, results: dict[str, Runs], checked: dict[str, Any]) -> dict[str, float]:
    """Print a row; returns its ratios, by name."""
    for side, runs in results.items():
        label = f"{row.name:<36}{side:<14}"
        if runs.error:
            print(f"{label}FAILED: {runs.error}", flush=True)
            continue
        times = [min(runs.seconds), statistics.median(runs.seconds), max(runs.seconds)]
        shown = " / ".join(f"{seconds:.2f}" for seconds in times)
        memory = f"peak RSS {gigabytes(runs.resident)}, anonymous {gigabytes(runs.anonymous)}"
        parts = f"  {runs.printed}" if side == "fusion-bench" else ""
        print(f"{label}{shown} s (min / median / max of {len(runs.seconds)}), {memory}{parts}", flush=True)
    ratios: dict[str, float] = {}
    if len(results) == 2 and not any(runs.error for runs in results.values()):
        (_, ours), (peer, theirs) = results.items()
        ratios["times_faster"] = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
        ratios["rss_share"] = ours.resident / theirs.resident
        said = (
            f"lors is {ratios['times_faster']:.1f} times as fast as {peer}, with {ratios['rss_share']:.0%} of its RSS"
        )
        print(f"{row.name:<36}{said}", flush=True)
    if checked:
        print(f"{row.name:<36}{json.dumps(checked)}", flush=True)
        ratios |= {key: value for key, value in checked.items() if isinstance(value, float)}
    return {f"{row.name} {key}": value for key, value in ratios.items()}


def growth(done: dict[str, dict[str, Runs]]) -> dict[str, float]:
    """Memory with the most experts over that with the fewest, by method."""
    found = {}
    for name in done:
        if not name.endswith(f" {MANY[-1]}"):
            continue
        stem = name.removesuffix(str(MANY[-1]))
        least, most = done.get(f"{stem}{MANY[0]}", {}).get("lors"), done[name]["lors"]
        if least and least.resident and most.resident:
            found[f"{stem}anonymous_growth"] = most.anonymous / max(1, least.anonymous)
            found[f"{stem}rss_growth"] = most.resident / least.resident
    return found


def machine() -> str:
    """The processor, its cores and threads, and how busy it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = (
        f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.machine()}",
        gigabytes(total),
        f"Python {platform.python_version()}",
        f"torch {version('torch')}",
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
        f"load {os.getloadavg()[0]:.1f}",
    )
    return ", ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models (kept, used again) and outputs")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base"])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--peers", type=Path, help="folder of the virtual environments mergekit and fusion-bench")
    parser.add_argument("--only", default="", help="only the rows whose name holds this, as in 'ties' or 'base memory'")
    parser.add_argument("--repeat", type=int, help="runs of each command (default: 3 of base, 1 of the others)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a command is stopped")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    peers = {peer: options.peers.absolute() / peer / "bin" for peer in PEERS} if options.peers else {}
    for peer in PEERS:
        if peer not in peers or not (peers[peer] / "python").exists():
            peers.pop(peer, None)
            print(f"{peer} is not under --peers, so nothing is compared with it; see benchmarks/README.md", flush=True)
    done: dict[str, dict[str, Runs]] = {}
    ratios: dict[str, float] = {}
    for size in options.sizes:
        models = [work / size / name for name in ("base", *(f"e{number}" for number in range(options.experts)))]
        build = [sys.executable, str(HERE / "models.py"), str(work), size, str(options.experts)]
        if not all(model.exists() for model in models) and subprocess.run(build).returncode:
            print(f"{size} is left out: its models could not be written", flush=True)
            continue
        for row in rows_for(size, models, peers, work, memory=size == options.sizes[0]):
            if options.only in row.name:
                repeat = options.repeat or (3 if size == "base" and "memory" not in row.name else 1)
                done[row.name], checked = measure(row, work, repeat, options.limit)
                ratios |= report(row, done[row.name], checked)
    failed = sum(bool(runs.error) for results in done.values() for runs in results.values())
    counts = {"rows": len(done), "failed": failed}
    print(json.dumps({name: round(value, 9) for name, value in (ratios | growth(done)).items()} | counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
