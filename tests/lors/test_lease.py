"""Locks of dead, hung and late holders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import within

from lors import lease
from lors.errors import LorsError, StepFailedError
from lors.store import Store, step_key

KEY = step_key("prune", 1, {}, {})
STEP = {"version": 1, "settings": {}, "inputs": {}}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)


@contextmanager
def producer(root: Path, before_publish: str) -> Iterator[subprocess.Popen[str]]:
    """A process that makes the step and says `held` when it has the lock."""
    code = f"""
import time
from lors import lease
from lors.store import Store
lease.LEASE_SECONDS, lease.BEAT_SECONDS = 1.0, 0.1
with Store({str(root)!r}).produce("prune", {KEY!r}, version=1, settings={{}}, inputs={{}}) as production:
    (production.work / "checkpoint").write_text("step 7")
    (production.out / "x").write_text("theirs")
    print("held", flush=True)
    {before_publish}
    production.publish({{}}, 1.0)
print("published", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_hung_holder_loses_the_lock_and_publishes_nothing_when_it_wakes_up(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with producer(store.root, "time.sleep(0.5)") as holder:
        holder.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with store.produce("prune", KEY, timeout=20, **STEP) as production:
            assert time.monotonic() - started >= 1
            assert production.hit is None
            assert (production.work / "checkpoint").read_text() == "step 7"
            assert not (production.out / "x").exists()
            holder.send_signal(signal.SIGCONT)
            time.sleep(1)  # it tries to publish
            (production.out / "x").write_text("ours")
            production.publish({}, 1.0)
        assert holder.wait(20) == 1
        assert holder.stderr is not None
        said = holder.stderr.read()
        assert "StepFailedError" in said
        assert "lost the prune step" in said
    found = store.find("prune", KEY, verify="full")
    assert found is not None
    assert (store.path(found) / "x").read_text() == "ours"
    assert list((store.root / "work" / "prune").iterdir()) == []


def test_a_holder_that_lives_keeps_the_lock(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with producer(store.root, "time.sleep(3)") as holder:
        with pytest.raises(LorsError, match=f"Process {holder.pid} on .* was still making"):
            store.lock("prune", KEY, timeout=2).__enter__()
        with store.produce("prune", KEY, timeout=20, **STEP) as production:
            assert production.hit is not None  # what it made


def test_a_lost_lease_is_seen_between_events(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lease.hold(path, "the step") as held:
        held.check()
        path.unlink()
        with pytest.raises(StepFailedError, match="lost the step to another one"):
            held.check()


def test_of_many_who_take_over_one_gets_the_lock(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    inside, worst, guard = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, worst
        with store.lock("prune", KEY, timeout=30):
            with guard:
                inside += 1
                worst = max(worst, inside)
            time.sleep(0.05)
            with guard:
                inside -= 1

    with producer(store.root, "time.sleep(60)") as holder:
        holder.send_signal(signal.SIGSTOP)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert worst == 1


def test_a_clock_that_is_set_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    with producer(store.root, "time.sleep(60)"):
        monkeypatch.setattr(time, "time", lambda: 4e9)
        locks = list((store.root / "locks" / "prune").iterdir())
        os.utime(locks[0], (0, 0))
        with pytest.raises(LorsError, match="was still making"):
            store.lock("prune", KEY, timeout=0.5).__enter__()


def test_a_dead_holder_frees_the_lock_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with producer(store.root, "time.sleep(60)") as holder:
        holder.send_signal(signal.SIGKILL)
        assert within(5, lambda: holder.poll() is not None)
        with store.produce("prune", KEY, timeout=0.2, **STEP) as production:
            assert (production.work / "checkpoint").read_text() == "step 7"
            production.publish({}, 1.0)
