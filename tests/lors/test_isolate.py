from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import isolate_jobs
import pytest
from processes import gone, within

import lors
from lors import errors
from lors.errors import LorsError, StepFailedError
from lors.isolate import Slots

PACKAGES = ("isolate_jobs",)


@pytest.fixture
def slots() -> Iterator[Slots]:
    with Slots(1, threads=1, packages=PACKAGES) as value:
        yield value


def test_a_child_stays_warm_and_gets_its_environment() -> None:
    with Slots(1, threads=3, devices=["5"], packages=PACKAGES) as slots:
        first = slots.run("isolate_jobs:describe", {"value": [1, {"a": None}, "é"]})
        second = slots.run("isolate_jobs:describe", {})
    assert first["value"] == [1, {"a": None}, "é"]
    assert first["pid"] == second["pid"] != os.getpid()
    assert first["environment"] == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "5"}
    assert not first["torch"]
    assert gone(first["pid"])


def test_a_fresh_child_is_its_own_and_ends_with_its_job(slots: Slots) -> None:
    warm = slots.run("isolate_jobs:describe", {})["pid"]
    fresh = slots.run("isolate_jobs:describe", {}, fresh=True)["pid"]
    assert fresh != warm
    assert gone(fresh)
    assert slots.run("isolate_jobs:describe", {})["pid"] == warm


def test_a_fresh_child_has_the_device_to_itself() -> None:
    with Slots(1, threads=1, devices=["0"], packages=PACKAGES) as slots:
        warm = slots.run("isolate_jobs:describe", {})["pid"]
        slots.run("isolate_jobs:describe", {}, lambda event: None, fresh=True)
        assert gone(warm)


def test_slots_take_the_devices_in_turn() -> None:
    seen: list[str] = []
    barrier = threading.Barrier(2)  # both slots are taken before either job ends

    def on_event(event: Any) -> None:
        seen.append(event["CUDA_VISIBLE_DEVICES"])
        barrier.wait(20)

    with Slots(2, threads=1, devices=["0", "1"], packages=PACKAGES) as slots:
        threads = [threading.Thread(target=slots.run, args=("isolate_jobs:describe", {}, on_event)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(seen) == ["0", "1"]


def test_events_come_in_order_and_in_the_calling_thread(slots: Slots) -> None:
    events: list[tuple[Any, int]] = []
    result = slots.run("isolate_jobs:steps", {"count": 500}, lambda e: events.append((e, threading.get_ident())))
    assert result == {"steps": 500}
    assert [e["step"] for e, _ in events] == list(range(500))
    assert {(e["text"], ident) for e, ident in events} == {("é\n", threading.get_ident())}


def test_a_large_argument_and_result_pass(slots: Slots) -> None:
    value = "x" * 3_000_000
    assert slots.run("isolate_jobs:describe", {"value": value})["value"] == value


def test_what_a_job_prints_goes_to_its_log(slots: Slots, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    assert slots.run("isolate_jobs:chatter", {}, log=log) == {"stdin": ""}
    lines = log.read_text().splitlines()
    assert {"from a program", "on stderr", '{"result": {"forged": true}}'} <= set(lines)
    slots.run("isolate_jobs:chatter", {}, log=tmp_path / "b.log")
    assert log.read_text().splitlines() == lines
    assert "from a program" in (tmp_path / "b.log").read_text()


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_of_lors_are_raised_as_themselves(slots: Slots, name: str) -> None:
    with pytest.raises(LorsError) as caught:
        slots.run("isolate_jobs:raises", {"name": name})
    assert type(caught.value) is getattr(errors, name)
    assert str(caught.value) == "The thing is wrong: do this."


def test_a_subclass_is_raised_as_its_class_of_lors_errors(slots: Slots) -> None:
    with pytest.raises(LorsError) as caught:
        slots.run("isolate_jobs:raises", {"name": "subclass"})
    assert type(caught.value) is errors.CorpusError


@pytest.mark.parametrize(
    ("call", "arguments", "words"),
    [
        ("raises", {"name": "other"}, "RuntimeError: it broke"),
        ("raises", {"name": "exit"}, "SystemExit: 3"),
        ("odd", {"what": "list"}, "returned list, not a mapping"),
        ("odd", {"what": "object"}, "not JSON serializable"),
        ("absent", {}, "AttributeError"),
        ("describe", {"unknown": 1}, "unexpected keyword argument 'unknown'"),
        ("dies", {"how": "exit"}, "exit code 7"),
        ("dies", {"how": "kill"}, "killed by signal 9 (SIGKILL): out of memory?"),
    ],
)
def test_other_failures_name_the_cause_the_log_and_the_next_step(
    slots: Slots, tmp_path: Path, call: str, arguments: dict[str, Any], words: str
) -> None:
    log = tmp_path / "job.log"
    with pytest.raises(StepFailedError) as caught:
        slots.run(f"isolate_jobs:{call}", arguments, log=log)
    message = str(caught.value)
    assert words in message
    assert f"isolate_jobs:{call}" in message
    assert str(log) in message
    assert "run the same command again" in message
    assert "\n" not in message
    assert ("Traceback" in log.read_text()) == (call != "dies")
    assert slots.run("isolate_jobs:steps", {"count": 1}) == {"steps": 1}


def test_a_child_killed_from_outside_fails_its_job_alone(slots: Slots) -> None:
    def kill(event: Any) -> None:
        os.kill(event["pid"], signal.SIGKILL)

    with pytest.raises(StepFailedError, match="SIGKILL"):
        slots.run("isolate_jobs:busy", {}, kill)
    assert slots.run("isolate_jobs:steps", {"count": 2}) == {"steps": 2}


def test_a_child_that_died_while_idle_is_replaced(slots: Slots) -> None:
    pid = slots.run("isolate_jobs:describe", {})["pid"]
    os.kill(pid, signal.SIGKILL)
    assert within(2, lambda: gone(pid))
    assert slots.run("isolate_jobs:describe", {})["pid"] != pid


def test_a_dead_child_is_seen_though_its_fork_holds_the_pipe(slots: Slots) -> None:
    seen: dict[str, int] = {}
    started = time.monotonic()
    with pytest.raises(StepFailedError, match="SIGKILL"):
        slots.run("isolate_jobs:dies", {"how": "forked"}, seen.update)
    assert time.monotonic() - started < 10
    assert within(2, lambda: gone(seen["fork"]))


def test_an_error_in_the_callback_ends_the_child_and_passes(slots: Slots) -> None:
    seen: list[int] = []

    def stop(event: Any) -> None:
        seen.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slots.run("isolate_jobs:busy", {}, stop)
    assert gone(seen[0])
    assert slots.run("isolate_jobs:steps", {"count": 1}) == {"steps": 1}


def test_close_ends_busy_children_and_those_who_wait() -> None:
    failures: list[BaseException] = []
    events: list[Any] = []
    slots = Slots(1, threads=1, packages=PACKAGES)

    def job() -> None:
        try:
            slots.run("isolate_jobs:busy", {}, events.append)
        except StepFailedError as error:
            failures.append(error)

    threads = [threading.Thread(target=job) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert within(20, lambda: bool(events))
    slots.close()
    for thread in threads:
        thread.join(5)
    assert sorted("was stopped" in str(e) for e in failures) == [False, True]
    assert sorted("was not started" in str(e) for e in failures) == [False, True]
    assert gone(events[0]["pid"])
    assert within(2, lambda: gone(events[0]["program"]))
    with pytest.raises(StepFailedError, match="is ending"):
        slots.run("isolate_jobs:steps", {"count": 1})


def test_jobs_are_served_in_order_and_no_more_than_count_at_once(tmp_path: Path) -> None:
    served: list[int] = []
    counts: list[int] = []
    with Slots(2, threads=1, packages=PACKAGES) as slots:

        def job(index: int) -> None:
            slots.run("isolate_jobs:steps", {"count": 1}, lambda event: served.append(index))
            arguments = {"folder": str(tmp_path), "name": str(index)}
            counts.append(slots.run("isolate_jobs:overlap", arguments)["count"])

        threads = [threading.Thread(target=job, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(counts) == 6
    assert max(counts) == 2
    assert sorted(served) == list(range(6))


def test_waiting_jobs_are_served_first_come_first_served() -> None:
    served: list[int] = []
    with Slots(1, threads=1, packages=PACKAGES) as slots:
        release = threading.Event()

        def job(index: int) -> None:
            def on_event(event: Any) -> None:
                served.append(index)
                release.wait(20)

            slots.run("isolate_jobs:steps", {"count": 1}, on_event)

        threads = []
        for index in range(6):
            threads.append(threading.Thread(target=job, args=(index,)))
            threads[-1].start()
            assert within(20, lambda waiting=index: len(slots._waiting) == waiting and bool(served))
        release.set()
        for thread in threads:
            thread.join(20)
    assert served == list(range(6))


@pytest.mark.parametrize("call", ["os:system", "lorsx.a:b", "isolate_jobs", "isolate_jobs:a.b", "isolate_jobs:", ""])
def test_only_functions_of_the_packages_are_called(slots: Slots, call: str) -> None:
    with pytest.raises(ValueError, match="is not a function in"):
        slots.run(call, {})


def start_parent() -> tuple[subprocess.Popen[str], dict[str, int]]:
    script = Path(isolate_jobs.__file__)
    folders = [str(Path(lors.__file__).parents[1]), str(script.parent)]
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_is_gone_after_its_parent(number: signal.Signals) -> None:
    process, event = start_parent()
    assert not gone(event["pid"])
    process.send_signal(number)
    process.communicate()
    assert within(2, lambda: gone(event["pid"]) and gone(event["program"]))


def test_ctrl_c_ends_the_child_without_a_traceback_of_its_own() -> None:
    process, event = start_parent()
    os.killpg(process.pid, signal.SIGINT)  # what the terminal does: the whole foreground group
    _, stderr = process.communicate(timeout=10)
    assert within(2, lambda: gone(event["pid"]) and gone(event["program"]))
    assert stderr.count("Traceback") == 1
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert ", in busy\n" not in stderr


def test_neither_module_imports_torch() -> None:
    code = "import sys, lors.store, lors.isolate; sys.exit('torch' in sys.modules or 'prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_silent_child_is_ended_after_its_patience() -> None:
    with Slots(1, 1, packages=PACKAGES) as slots:
        started = time.monotonic()
        with pytest.raises(StepFailedError, match=r"said nothing for 0\.0\d* minutes and was ended"):
            slots.run("isolate_jobs:busy", {}, patience=2.0)
        assert time.monotonic() - started < 30


def test_one_job_a_gpu_whoever_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    told: list[str] = []
    with (tmp_path / "lors-device-GPU-7.lock").open("w") as other, Slots(1, 1, ["GPU-7"], packages=PACKAGES) as slots:
        fcntl.flock(other, fcntl.LOCK_EX)

        def on_event(event: Mapping[str, Any]) -> None:
            if "message" in event:
                told.append(event["message"])
                fcntl.flock(other, fcntl.LOCK_UN)

        slots.run("isolate_jobs:describe", {}, on_event)
    assert told == ["waiting for GPU GPU-7, which another process of this machine uses"]
