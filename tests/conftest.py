"""Prefect reads its settings when it is imported, so they are set here, before any test module is."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("lors", deadline=None)
settings.load_profile("lors")

# What a shell runs in the background ignores Ctrl-C, and so would the commands that the tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)

_HOME = Path(tempfile.mkdtemp(prefix="lors-tests-prefect-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    {
        "PREFECT_HOME": str(_HOME),
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(_HOME / "results"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
)
for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "LORS_CHECKPOINT_SECONDS"):
    os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side (`pytest -n 2 --dist loadgroup`), a file's tests share a process, and so do all that use `done`."""
    for item in items:
        group = "done" if "done" in getattr(item, "fixturenames", ()) else item.location[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The address of a Prefect API for this session, which flows of this process use."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        url = PREFECT_API_URL.value()
        assert url is not None
        yield url
