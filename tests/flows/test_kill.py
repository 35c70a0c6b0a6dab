"""Whatever is killed, the next `lors run` goes on and ends in the same digests; and nothing is left running."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flows_helpers import tiny, written
from processes import gone, within
from safetensors import safe_open

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")

STEPS = 60


def experiment(folder: Path) -> Path:
    folder.mkdir()
    changes: dict[str, Any] = {"languages": ["es"], "tasks": ["transcribe"], "merge": {"scaling": 0.5}}
    changes["finetune"] = {"steps": STEPS, "learning_rate": 1e-3, "batch_seconds": 24}
    corpora = {"source": "synthetic", "utterances": {"train": 24, "validation": 2, "test": 2}}
    return written(folder / "e.yaml", tiny(folder, corpora=corpora, **changes))


def start(file: Path, api: str | None) -> subprocess.Popen[str]:
    environment = {**os.environ, "LORS_CHECKPOINT_SECONDS": "0.2"}
    if api is not None:
        environment["PREFECT_API_URL"] = api
    command = [sys.executable, "-m", "flows.cli", "run", str(file), "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def descendants(pid: int) -> dict[int, str]:
    """The processes that a process started, and those that they started: number to command line."""
    parents, found = {}, {pid: ""}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    while new := {child for child, parent in parents.items() if parent in found and child not in found}:
        for child in new:
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
            except OSError:
                found[child] = ""
    del found[pid]
    return found


def trained_steps(folder: Path) -> int:
    logs = list((folder / "store" / "work" / "fine_tune").glob("*/training/train.jsonl"))
    return len(logs[0].read_bytes().splitlines()) if logs else 0


def checkpointed_step(folder: Path) -> int:
    (file,) = (folder / "store" / "work" / "fine_tune").glob("*/training/checkpoint.safetensors")
    with safe_open(file, framework="np") as checkpoint:
        step: int = json.loads(checkpoint.metadata()["progress"])["step"]
        return step


def trainer(run: subprocess.Popen[str]) -> int:
    """The child that trains: it holds the training's log open."""
    for pid in descendants(run.pid):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if str(descriptor.readlink()).endswith("training/train.jsonl"):
                return pid
    raise AssertionError("no child trains")


def finished(run: subprocess.Popen[str], folder: Path, *said: str) -> dict[str, Any]:
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert "Traceback" not in errors
    assert [words for words in said if words not in errors] == []
    summary: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return summary


def test_whatever_is_killed_the_next_run_ends_in_the_same_digests(prefect_api: str, tmp_path: Path) -> None:
    undisturbed, file = tmp_path / "undisturbed", experiment(tmp_path / "disturbed")
    expected = finished(start(experiment(undisturbed), prefect_api), undisturbed)["digests"]
    seed = random.randrange(10**6)
    print(f"moments of seed {seed}")  # shown where the test fails
    rng, folder = random.Random(seed), file.parent

    def reached(run: subprocess.Popen[str], first: int) -> int:
        """Wait for a random step after `first` of the training."""
        moment = rng.randint(first + 1, first + (STEPS - first) // 2)
        assert within(120, lambda: trained_steps(folder) >= moment or run.poll() is not None)
        assert run.poll() is None, run.communicate()[1]
        return moment

    # kill -9 with an API of the run's own, which has to go as well.
    run = start(file, None)
    reached(run, 0)
    children = descendants(run.pid)
    assert any("uvicorn" in command for command in children.values())
    assert any("lors.isolate" in command for command in children.values())
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert within(5, lambda: all(map(gone, children))), children
    run.communicate()

    # What a scheduler or Ctrl-C sends: the training writes the checkpoint of the step that it is at, and ends.
    number, code = rng.choice([(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    run = start(file, prefect_api)
    moment = reached(run, trained_steps(folder))
    children = descendants(run.pid)
    run.send_signal(number)
    assert within(30, lambda: run.poll() is not None)
    errors = run.communicate()[1]
    assert run.returncode == code
    assert errors.endswith("lors: stopped; finished steps are kept, the same command goes on from here\n")
    assert "Traceback" not in errors
    assert checkpointed_step(folder) >= moment
    assert within(5, lambda: all(map(gone, children))), children

    run = start(file, prefect_api)
    reached(run, trained_steps(folder))
    os.kill(trainer(run), signal.SIGKILL)  # the run itself starts another and goes on
    summary = finished(run, folder, "fine-tune es-transcribe: trying again after: ", "SIGKILL")
    assert summary["digests"] == expected
    states = {step["name"]: step["state"] for step in summary["steps"]}
    assert states["prepare es train"] == "cached"
    assert states["fine-tune es-transcribe"] == "run"
    assert list((folder / "store" / "work" / "fine_tune").glob("*/*")) == []
