"""Prefect's settings for a run on this machine; to be called before anything imports Prefect."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from uuid import UUID

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
        # A transaction an event, the default, is slow on SQLite and makes other requests fail and wait for 2 s.
        settings["PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE"] = "500"
        settings["PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL"] = "0.5"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def settle(
    flow_run: UUID,
    submitted: int,  # task runs
    patience: float = 5.0,  # seconds
) -> None:
    """Wait until the run's own API has recorded how every task run ended, since it is killed with this process."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    ended = {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}, "name": {"any_": ["NotReady"]}}
    ours = {"flow_run_id": {"any_": [str(flow_run)]}, "state": {"operator": "or_", **ended}}
    limit = time.monotonic() + patience
    with get_client(sync_client=True) as client:
        while client.request("POST", "/task_runs/count", json={"task_runs": ours}).json() < submitted:
            if time.monotonic() > limit:
                return
            time.sleep(0.05)
