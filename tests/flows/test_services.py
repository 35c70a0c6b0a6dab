"""What `lors down` does with services that do not end when they are asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows import cli, services

DEAF = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(3600)"


def test_an_idle_worker_that_misses_its_signal_is_not_waited_for_as_a_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORS_HOME", str(tmp_path))
    monkeypatch.setattr(services, "_STOP_SECONDS", 3600.0)
    monkeypatch.setattr(services, "_IDLE_SECONDS", 0.2)
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        about = {"pid": worker.pid, "created": psutil.Process(worker.pid).create_time(), "log": ""}
        (tmp_path / "services.json").write_text(json.dumps({"url": "http://x", "services": {"lors-cpu-0": about}}))
        assert cli.main(["down"]) == 0
        assert not psutil.pid_exists(worker.pid)
    assert capsys.readouterr().out == "Stopped lors-cpu-0.\n"
