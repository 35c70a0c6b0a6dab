"""How services are started."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from flows.services import _State


def test_a_service_that_a_background_job_starts_hears_sigint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORS_HOME", str(tmp_path))
    state = _State()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `lors up &` of a script
    try:
        log = state.start("x", [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT))"], {})
    finally:
        signal.signal(signal.SIGINT, before)
    psutil.Process(state.services["x"]["pid"]).wait(60)
    assert "default_int_handler" in log.read_text()
