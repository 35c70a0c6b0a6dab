"""Prefect reads its settings when it is imported, so they are set here, before any test module is."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


_THREADS = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """Steps that a test computes in this process set its threads. With more of them than free cores, all that comes
    after would spin in OpenMP's barriers, ten times as slow."""
    yield
    if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != _THREADS:
        torch.set_num_threads(_THREADS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Side by side, a file's tests share a process, and so do all files that use `done`, which takes long to make.

    (xdist 3.8's own groups are suffixes of test names, which pytest 9.2 does not take.)
    """
    from xdist.scheduler import LoadScopeScheduling

    tests = Path(__file__).parent
    done = {file for file in tests.rglob("test_*.py") if "done: Done" in file.read_text("utf-8")}

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "done" if tests.parent / file in done else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """The address of a Prefect API for this session, which flows of this process use."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        url = PREFECT_API_URL.value()
        assert url is not None
        yield url
