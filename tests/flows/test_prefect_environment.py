"""The settings that a run gives Prefect, in a process of its own, since Prefect reads them when it is imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EVENT_FOR_NOBODY = """
import sys
from pathlib import Path

import pytest
from flows.prefect_environment import prepare
prepare(Path(sys.argv[1]))
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.logging.configuration import setup_logging
setup_logging()  # as a flow does
emit_event("lors.test", {"prefect.resource.id": "lors.test"})
EventsWorker.drain_all(timeout=60)
print("drained")
"""


def test_a_server_that_is_gone_leaves_no_traceback_of_lost_events(tmp_path: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_API_URL": "http://127.0.0.1:9/api",  # nothing listens there
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_CLIENT_MAX_RETRIES": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", EVENT_FOR_NOBODY, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "drained\n"
    assert done.stderr == ""


FLOWS_WITHOUT_A_SERVER = """
import json, sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from flows.prefect_environment import outlast, prepare
from lors.errors import LorsError, StepFailedError
prepare(Path(sys.argv[1]))
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

port, comes_back, seconds, kind = int(sys.argv[2]), sys.argv[3] == "back", float(sys.argv[4]), sys.argv[5]
calls, asked, missed = [], [], threading.Event()

class Hello(BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(1)
        self.send_response(503 if kind == "busy" and len(asked) == 1 else 200)
        self.end_headers()
        self.wfile.write(b'"hello"')

    def log_message(self, *_):
        pass

def serve():
    if kind != "busy":
        missed.wait()
        time.sleep(1)
    HTTPServer(("127.0.0.1", port), Hello).serve_forever()

def flow():
    calls.append(1)
    if kind == "wrong":
        raise ValueError("of our own")
    try:
        with get_client(sync_client=True) as client:
            client.hello().raise_for_status()
    except Exception as error:
        missed.set()
        if kind == "of the hub":
            raise StepFailedError("the hub is away") from error
        raise PrefectException("as Prefect wraps it") from error
    return "done"

if comes_back:
    threading.Thread(target=serve, daemon=True).start()
    time.sleep(1)
try:
    print(outlast(flow, lambda text: print("said", text), seconds), len(calls))
except Exception as error:
    print(type(error).__name__, error, len(calls))
"""


def without_a_server(tmp_path: Path, *, comes_back: bool, seconds: float, kind: str = "prefect") -> list[str]:
    """What a flow comes to whose API is away at first."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_CLIENT_MAX_RETRIES": "0",
    }
    arguments = [str(tmp_path), str(port), "back" if comes_back else "away", str(seconds), kind]
    command = [sys.executable, "-c", FLOWS_WITHOUT_A_SERVER, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.stdout.replace(str(port), "PORT").splitlines()


def test_a_server_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    away, there, result = without_a_server(tmp_path, comes_back=True, seconds=60)
    assert away.startswith("said the Prefect API http://127.0.0.1:PORT/api does not answer (ConnectError(")
    assert there.startswith("said the Prefect API is there again after ")
    assert result == "done 2"


def test_a_server_that_is_too_busy_is_asked_again(tmp_path: Path) -> None:
    away, _, result = without_a_server(tmp_path, comes_back=True, seconds=60, kind="busy")
    assert "does not answer (PrefectHTTPStatusError(" in away
    assert "503" in away
    assert result == "done 2"


def test_a_server_that_stays_away_is_a_sentence(tmp_path: Path) -> None:
    *_, last = without_a_server(tmp_path, comes_back=False, seconds=0.5)
    assert last == (
        "LorsError the Prefect API http://127.0.0.1:PORT/api went away and was not there again after 0.5 s: finished "
        "steps are kept, start it and run the same command again 1"
    )


@pytest.mark.parametrize(
    ("kind", "expected"), [("of the hub", "StepFailedError the hub is away 1"), ("wrong", "ValueError of our own 1")]
)
def test_what_is_not_the_server_s_is_raised_as_it_is(kind: str, expected: str, tmp_path: Path) -> None:
    assert without_a_server(tmp_path, comes_back=False, seconds=60, kind=kind) == [expected]
