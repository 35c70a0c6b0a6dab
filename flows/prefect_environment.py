"""Prefect's settings for a run on this machine; to be called before anything imports Prefect."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from lors.errors import LorsError
from lors.network import lost_connection

__all__ = ["FEWER_TRANSACTIONS", "HEARTBEAT_SECONDS", "connect", "outlast", "prepare", "settle"]

FEWER_TRANSACTIONS = {
    # A transaction an event, the default, is slow on SQLite and makes other requests fail and wait for 2 s.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "500",
    # Whole seconds: Prefect cuts a fraction to 0 and then spins, on half a core.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}
"""A server's settings."""
HEARTBEAT_SECONDS = "30"
"""How often a run tells a server that it lives; `lors up` has the server end those that have not for three times as
long."""


def prepare(store: Path) -> None:
    """Zero set-up: an API of its own for the run unless PREFECT_API_URL names a server. The user's settings win."""
    assert "prefect" not in sys.modules, "Prefect reads its settings when it is imported"
    settings = {
        # Beside the artifacts they vouch for, so that deleting the store forgets both.
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(store / "prefect"),
        # Reading a pickle runs what is in it, and the store may be shared.
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        # It needs 20 to 30 s on a busy machine; the default gives up after 20.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # The command line shows progress and errors itself; Prefect's log of each step goes to the API and its UI.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        # Its own services have a handler of their own, and tracebacks where a server goes away.
        "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    }
    if not os.environ.get("PREFECT_API_URL"):
        # The ephemeral server is stopped with its last writes under way and would print their tracebacks.
        settings["PREFECT_LOGGING_SERVER_LEVEL"] = "CRITICAL"
        settings |= FEWER_TRANSACTIONS
    else:
        settings["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = HEARTBEAT_SECONDS
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def connect() -> None:
    """Reach the API that PREFECT_API_URL names, or start one of the run's own. Raises LorsError.

    That one ends with this process, by whatever signal: Prefect would leave it running for ever after a kill.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    try:
        if url:
            with get_client(sync_client=True) as client:
                client.hello()
            return
        from prefect.server.api.server import SubprocessASGIServer

        server = SubprocessASGIServer()  # the one that every client of this process then takes
        threading.Thread(target=_guard, args=(server,), daemon=True).start()
        server.start()
    except Exception as error:  # of the HTTP client, or Prefect's RuntimeError
        if url:
            what, advice = f"the Prefect API {url} does not answer", "start it, or unset PREFECT_API_URL to do without"
        else:
            what, advice = (
                "the run's own Prefect API did not start",
                "look with `lors doctor`, or set PREFECT_API_URL",
            )
        raise LorsError(f"{what} ({error}): {advice}") from error


def outlast(flow: Callable[[], _T], say: Callable[[str], None], seconds: float = 600.0) -> _T:
    """What the flow returns; where Prefect's API goes away meanwhile and comes back, the flow is run again, which goes
    on from what is finished. Raises LorsError where it stays away for so long.

    Prefect's client waits for an API that it has reached before, but each new client's first request does not.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    for _ in range(_RETURNS):
        try:
            return flow()
        except LorsError:  # which may come from another connection, such as the hub's
            raise
        except Exception as error:
            if (lost := lost_connection(error)) is None:
                raise
            if not url:
                raise LorsError(
                    f"the run's own Prefect API is gone ({lost!r}): finished steps are kept, run the same command again"
                ) from error
            say(f"the Prefect API {url} does not answer ({lost!r}): waiting for it")
            started = time.monotonic()
            if not _back(url, seconds):
                raise LorsError(
                    f"the Prefect API {url} went away and was not there again after {seconds:g} s: finished steps are "
                    "kept, start it and run the same command again"
                ) from error
            say(f"the Prefect API is there again after {time.monotonic() - started:.0f} s: going on")
    return flow()


_RETURNS = 10
_T = TypeVar("_T")


def _back(url: str, seconds: float) -> bool:
    """Whether the API answers within so many seconds."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        with suppress(Exception):
            from prefect.client.orchestration import get_client

            with get_client(sync_client=True) as client:
                client.hello()
            return True
        time.sleep(1)
    return False


def _guard(server: Any) -> None:
    """Have the server killed when this process is gone, from its first moment: its start takes seconds."""
    while server.server_process is None:
        time.sleep(0.02)
    watch = ["sh", "-c", 'cat >/dev/null; kill -9 "$0"', str(server.server_process.pid)]
    watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    atexit.register(watcher.kill)


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
