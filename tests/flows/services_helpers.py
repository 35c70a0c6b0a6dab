"""`lors up` in a folder of its own, for the tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def own_environment(folder: Path) -> dict[str, str]:
    """This process's environment with a LORS_HOME and a PREFECT_HOME in the folder, and no server named."""
    environment = {**os.environ, "LORS_HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    return environment


@dataclass
class Services:
    """What `lors up` starts, by its state in `folder`."""

    folder: Path
    environment: dict[str, str]
    port: int
    posted: list[dict[str, Any]] = field(default_factory=list)

    def lors(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        environment = {**self.environment, **more}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    def processes(self) -> dict[str, psutil.Process]:
        found = json.loads((self.folder / "home" / "services.json").read_text())["services"]
        return {name: psutil.Process(own["pid"]) for name, own in found.items()}

    def everything(self) -> list[psutil.Process]:
        """The services and all processes below them."""
        services = self.processes().values()
        return [child for process in services for child in (process, *process.children(recursive=True))]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api{path}", data, method=method)
        request.add_header("content-type", "application/json")
        for last in (False, False, True):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or last:  # SQLite was busy for too long
                    raise
            time.sleep(1)
        raise AssertionError("not reached")

    def trainings(self) -> list[dict[str, Any]]:
        """The runs of train-expert."""
        found: list[dict[str, Any]] = self.ask(
            "POST", "/flow_runs/filter", {"flows": {"name": {"any_": ["train-expert"]}}}
        )
        return found


def digests(output: Path) -> dict[str, str]:
    """Of all that a run made, from its summary."""
    found: dict[str, str] = json.loads((output / "summary.json").read_text())["digests"]
    return found


def ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
