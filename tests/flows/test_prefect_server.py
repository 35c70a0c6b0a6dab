"""The server's process and its garbage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys, threading, time
finalised = []
class Cursor:
    def __init__(self): self.itself = self
    def __del__(self): finalised.append(threading.current_thread().name)
for _ in range(10): Cursor()
kept = [[] for _ in range(10 ** 5)]  # Python would collect here, in the main thread
end = time.monotonic() + 20
while len(finalised) < 10 and time.monotonic() < end: time.sleep(0.05)
print(json.dumps({"name": __name__, "arguments": sys.argv[1:], "threads": finalised}))
"""


def test_a_thread_of_its_own_collects_the_garbage(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "flows.prefect_server", "program", "--port", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "name": "__main__",
        "arguments": ["--port", "1"],
        "threads": ["garbage"] * 10,
    }
