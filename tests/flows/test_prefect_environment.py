"""The settings that a run gives Prefect, in a process of its own, since Prefect reads them when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EVENT_FOR_NOBODY = """
import sys
from pathlib import Path
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
