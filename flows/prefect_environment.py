"""Prefect's settings for a run on this machine; to be called before anything imports Prefect."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["prepare", "settle"]


def prepare(store: Path) -> None:
    """Zero set-up: an API of its own for the run unless PREFECT_API_URL names a server. The user's settings win."""
    assert "prefect" not in sys.modules, "Prefect reads its settings when it is imported"
    settings = {
        # Beside the artifacts they vouch for, so that deleting the store forgets both.
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(store / "prefect"),
        # It needs 20 to 30 s on a busy machine; the default gives up after 20.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # The command line shows progress and errors itself; Prefect's log of each step goes to the API and its UI.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    }
    if not os.environ.get("PREFECT_API_URL"):
        # The ephemeral server is stopped with its last writes under way and would print their tracebacks.
        settings["PREFECT_LOGGING_SERVER_LEVEL"] = "CRITICAL"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def settle() -> None:
    """Let Prefect's last events reach its API, so that no finished step stays "running" in the UI."""
    from prefect.events.worker import EventsWorker

    EventsWorker.drain_all(timeout=5)
