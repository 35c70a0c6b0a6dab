"""Stores of several machines, each with a staging folder, over one bucket of a real S3 server on this machine."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from processes import within
from s3_server import aws_environment, make_bucket, s3_server

import lors
from lors import lease
from lors.config import Experiment, parse_experiment
from lors.doctor import _bucket
from lors.errors import ConfigError, InputError, LorsError, StepFailedError
from lors.s3_bucket import Bucket, check_url
from lors.s3_mirror import _CHECKPOINT, Mirror
from lors.s3_store import S3Store, open_store
from lors.store import Artifact, Store, step_key

STEP: dict[str, Any] = {"version": 1, "settings": {"rank_ratio": 0.1}, "inputs": {"base": "ab"}}
KEY = step_key("prune", **STEP)
FILES = {"model.safetensors": b"weights" * 100, "logs/a.json": b"{}", "empty": b""}
SECRET = "planted-and-never-to-be-seen"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def _environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in aws_environment(endpoint, SECRET).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)


@pytest.fixture
def url(endpoint: str) -> str:
    make_bucket(endpoint, "experiments")
    return f"s3://experiments/{os.urandom(6).hex()}"


@pytest.fixture
def a(url: str, tmp_path: Path) -> S3Store:
    return S3Store(url, tmp_path / "a")


@pytest.fixture
def b(url: str, tmp_path: Path) -> S3Store:
    return S3Store(url, tmp_path / "b")


def make(store: Store, files: Mapping[str, bytes] = FILES) -> Artifact:
    with store.produce("prune", KEY, **STEP) as production:
        if production.hit is not None:
            return production.hit
        for name, content in files.items():
            path = production.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return production.publish({"rank": 2}, 1.5)


def overwrite(bucket: Bucket, name: str, content: bytes) -> None:
    assert bucket.put(f"entries/prune/{KEY}/{name}", content)


@contextmanager
def program(store: S3Store, body: str) -> Iterator[subprocess.Popen[str]]:
    """Another process on the machine of a store's staging folder; it runs `body` and says what `say` is given."""
    code = f"""
import os, signal, sys, time
from lors import lease
from lors.s3_bucket import Bucket
from lors.s3_store import S3Store
lease.LEASE_SECONDS, lease.BEAT_SECONDS = 1.5, 0.1
STEP, KEY = {STEP!r}, {KEY!r}
store = S3Store({store.url!r}, {str(store.root)!r})
def say(line): print(line, flush=True)
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
{body}
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(lors.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str], expected: str) -> None:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line == expected, line or process.communicate()[1]


HOLDER = """
with store.produce("prune", KEY, **STEP) as production:
    (production.work / "training").mkdir()
    (production.work / "training" / "train.jsonl").write_text("1\\n2\\n")
    (production.work / "training" / "checkpoint.safetensors").write_text("step 2")
    (production.work / "training" / "checkpoint.partial").write_text("half of step 3")
    (production.out / "x").write_text("theirs")
    while store._bucket.get(f"work/prune/{KEY}/mirror.json") is None: time.sleep(0.02)
    say("held")
    time.sleep(%s)
    production.publish({}, 1.0)
    say("published")
"""


# Entries


def test_an_entry_of_one_machine_is_found_and_used_on_another(a: S3Store, b: S3Store) -> None:
    assert a.find("prune", KEY) is None
    assert a.why("prune", KEY) is None
    made = make(a)
    assert a._bucket.list("entries/prune").keys() == {f"{KEY}/{name}" for name in ("manifest.json", *FILES_THERE)}
    assert a._bucket.list("locks") == a._bucket.list("work") == {}
    for store in (a, b):
        for verify in (True, False):
            assert store.find("prune", KEY, verify) == made
    assert not (b.root / "entries").exists()
    assert b.manifest(made) == a.manifest(made)
    assert make(b, {"other": b"not written, since the step is a hit"}) == made
    assert {name: (b.path(made) / name).read_bytes() for name in FILES} == FILES
    assert b.find("prune", KEY, "full") == made
    assert Store(b.root).find("prune", KEY, "full") == made
    with pytest.raises(StepFailedError, match="Another process wrote"):  # as one that hung and goes on with an upload
        a._bucket.upload(a.root / "memo.json", f"entries/prune/{KEY}/files/empty")
    assert list((b.root / "downloads/prune").glob("*/")) == []


FILES_THERE = [f"files/{name}" for name in FILES]


def test_full_verification_reads_what_is_not_staged(a: S3Store, b: S3Store) -> None:
    make(a)
    overwrite(a._bucket, "files/logs/a.json", b"[]")
    assert b.find("prune", KEY) is not None
    assert "does not have the sha256" in str(b.why("prune", KEY, "full"))


def test_two_machines_make_a_key_once(a: S3Store, b: S3Store) -> None:
    body = """
say("ready")
sys.stdin.readline()
with store.produce("prune", KEY, **STEP) as production:
    if production.hit is None:
        time.sleep(0.5)
        (production.out / "pid").write_text(str(os.getpid()))
        production.publish({}, 1.0)
        say("made")
    else:
        say("hit")
"""
    with program(a, body) as one, program(b, body) as other:
        for process in (one, other):
            hear(process, "ready")
        said = [process.communicate("\n", timeout=30) for process in (one, other)]
    assert sorted(out.strip() for out, _ in said) == ["hit", "made"], said
    assert a.find("prune", KEY, "full") == b.find("prune", KEY, "full") is not None


def test_a_damaged_object_is_made_again_where_nobody_has_it_staged(a: S3Store, b: S3Store, tmp_path: Path) -> None:
    made = make(a)
    overwrite(a._bucket, "files/model.safetensors", b"short")
    assert b.find("prune", KEY) is None
    assert "model.safetensors has 5 bytes in the bucket, not 700" in str(b.why("prune", KEY))
    with pytest.raises(StepFailedError, match="does not have the sha256"):
        b.path(made)
    other = make(b, {"model.safetensors": b"again"})
    assert a.find("prune", KEY) == other  # the bucket is the truth
    assert (a.path(other) / "model.safetensors").read_bytes() == b"again"


def test_a_damaged_object_is_sent_again_from_where_it_is_staged(a: S3Store, b: S3Store) -> None:
    made = make(a)
    overwrite(a._bucket, "files/model.safetensors", b"short")
    assert make(a, {}) == made
    assert (b.path(made) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_an_object_that_was_changed_is_named_and_made_again(a: S3Store, b: S3Store) -> None:
    made = make(a)
    overwrite(a._bucket, "files/model.safetensors", b"another" * 100)
    assert b.find("prune", KEY) == made  # the size is right
    with pytest.raises(StepFailedError, match=rf"{a.url}/entries/prune/{KEY}/files/model.safetensors does not have"):
        b.path(made)
    assert not (b.root / "entries/prune" / KEY).exists()
    again = S3Store(b.url, b.root)
    assert again.find("prune", KEY) is None
    assert "sha256" in str(again.why("prune", KEY))
    time.sleep(1.01)  # S3 counts in seconds
    assert make(again).digest == made.digest
    assert again.find("prune", KEY, "full") is not None


def test_a_damaged_staged_file_is_downloaded_again(a: S3Store) -> None:
    made = make(a)
    (a.path(made) / "logs/a.json").write_text("[]")
    assert a.find("prune", KEY) == made
    assert (a.path(made) / "logs/a.json").read_bytes() == b"{}"


def test_what_the_bucket_lost_is_sent_again(a: S3Store, b: S3Store) -> None:
    made = make(a)
    a._bucket.delete(f"entries/prune/{KEY}/manifest.json")
    assert a.find("prune", KEY) is None
    assert b.find("prune", KEY) is None
    assert "is sent again from" in str(a.why("prune", KEY))
    assert make(a, {}) == made
    assert (b.path(made) / "logs/a.json").read_bytes() == b"{}"


@pytest.mark.parametrize("call", ["upload", "put"])
def test_a_killed_upload_leaves_no_manifest(a: S3Store, b: S3Store, call: str) -> None:
    killed = (
        "true = Bucket.put\n"
        "Bucket.put = lambda self, name, *r, **n: die() if name.endswith('t.json') else true(self, name, *r, **n)"
        if call == "put"
        else "uploads, true = [], Bucket.upload\n"
        "Bucket.upload = lambda *r: die() if uploads else (uploads.append(1), true(*r))"
    )
    body = f"""
{killed}
with store.produce("prune", KEY, **STEP) as production:
    for name in "ab": (production.out / name).write_text(name)
    production.publish({{}}, 1.0)
"""
    with program(a, body) as process:
        assert process.wait(30) == -signal.SIGKILL
    assert a._bucket.list(f"entries/prune/{KEY}")
    assert b.find("prune", KEY) is None
    staged = Store(a.root).find("prune", KEY)
    assert staged is not None
    assert make(a, {}) == staged  # at once: its holder was on this machine
    assert (b.path(staged) / "b").read_text() == "b"


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a\\b", "."])
def test_unsafe_names_in_the_buckets_manifest_are_refused(a: S3Store, b: S3Store, name: str) -> None:
    made = make(a)
    manifest = a.manifest(made)
    manifest["files"][name] = manifest["files"].pop("empty")
    overwrite(a._bucket, "manifest.json", json.dumps(manifest).encode())
    assert b.find("prune", KEY) is None
    assert "is not a plain relative one" in str(b.why("prune", KEY))
    with pytest.raises(StepFailedError):
        b.path(made)
    assert {path.name for path in b.root.rglob("*") if path.is_file()} <= {KEY, "memo.json"}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": 1}', b"\xff"])
def test_a_manifest_that_is_none_is_made_again(a: S3Store, b: S3Store, content: bytes) -> None:
    make(a)
    overwrite(a._bucket, "manifest.json", content)
    assert "not usable" in str(b.why("prune", KEY))
    assert make(b).digest == S3Store(a.url, a.root).find("prune", KEY).digest  # type: ignore[union-attr]


def test_downloads_of_one_entry_side_by_side(a: S3Store, b: S3Store) -> None:
    made, found, failed = make(a), [], []

    def read() -> None:
        try:
            found.append((S3Store(b.url, b.root).path(made) / "model.safetensors").read_bytes())
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert found == [FILES["model.safetensors"]] * 4


# Locks and checkpoints


def test_a_killed_holder_loses_the_step_and_another_machine_goes_on_from_its_checkpoint(a: S3Store, b: S3Store) -> None:
    with program(a, HOLDER % 60) as holder:
        hear(holder, "held")
        holder.kill()
        started = time.monotonic()
        with b.produce("prune", KEY, timeout=20, **STEP) as production:
            assert time.monotonic() - started >= 1
            assert production.hit is None
            training = production.work / "training"
            assert {path.name: path.read_text() for path in training.iterdir()} == {
                "checkpoint.safetensors": "step 2",
                "train.jsonl": "1\n2\n",
            }
            assert list(production.out.iterdir()) == []
            (production.out / "x").write_text("ours")
            production.publish({}, 1.0)
    assert a.find("prune", KEY, "full") == production.artifact
    assert a._bucket.list("work") == a._bucket.list("locks") == {}


def test_a_killed_holder_on_the_same_machine_is_known_to_be_gone(a: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with program(a, HOLDER % 60) as holder:
        hear(holder, "held")
        holder.kill()
        holder.wait()
        monkeypatch.setattr(lease, "LEASE_SECONDS", 30.0)
        with a.produce("prune", KEY, timeout=5, **STEP) as production:
            assert (production.work / "training/checkpoint.safetensors").read_text() == "step 2"
            production.publish({}, 1.0)


def test_a_hung_holder_publishes_nothing_when_it_wakes_up(a: S3Store, b: S3Store) -> None:
    with program(a, HOLDER % 0.5) as holder:
        hear(holder, "held")
        holder.send_signal(signal.SIGSTOP)
        with b.produce("prune", KEY, timeout=20, **STEP) as production:
            holder.send_signal(signal.SIGCONT)
            out, said = holder.communicate(timeout=20)
            assert (holder.returncode, out) == (1, "")
            assert "StepFailedError" in said
            assert a._bucket.list("entries") == {}
            (production.out / "x").write_text("ours")
            production.publish({}, 1.0)
    found = a.find("prune", KEY, "full")
    assert found is not None
    assert (a.path(found) / "x").read_text() == "ours"


def test_a_holder_that_lives_keeps_the_lock(a: S3Store, b: S3Store) -> None:
    told: list[str] = []
    with program(a, HOLDER % 3) as holder:
        hear(holder, "held")
        with pytest.raises(LorsError, match=f"Process {holder.pid} on .* was still making"):
            b.lock("prune", KEY, timeout=2, on_wait=told.append).__enter__()
        with b.produce("prune", KEY, timeout=20, **STEP) as production:
            assert production.hit is not None
    assert len(told) == 1


def test_a_machine_that_stops_before_it_asks_stops_no_other(a: S3Store) -> None:
    """Of the tests' server: a machine that is stopped in the next test may have connected and said nothing yet."""
    address = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    with socket.create_connection((address.hostname, address.port)), a.lock("prune", KEY, timeout=20) as held:
        held.check()


def test_of_many_machines_that_take_over_one_gets_the_lock(a: S3Store, tmp_path: Path) -> None:
    inside, worst, entered, guard = 0, 0, 0, threading.Lock()

    def work(number: int) -> None:
        nonlocal inside, worst, entered
        store = S3Store(a.url, tmp_path / f"machine-{number}")
        with store.lock("prune", KEY, timeout=30) as held:
            with guard:
                inside, entered = inside + 1, entered + 1
                worst = max(worst, inside)
            time.sleep(0.05)
            held.check()
            with guard:
                inside -= 1

    with program(a, HOLDER % 60) as holder:
        hear(holder, "held")
        holder.send_signal(signal.SIGSTOP)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (worst, entered) == (1, 5)


def test_a_failing_network_loses_no_young_lease(a: S3Store, b: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    true, down = Bucket.put, False

    def put(*arguments: Any, **named: Any) -> str | None:
        if down:
            raise StepFailedError("the network is down")
        return true(*arguments, **named)

    monkeypatch.setattr(Bucket, "put", put)
    with a.lock("prune", KEY) as held:
        down = True
        time.sleep(0.7)
        held.check()
        down = False
        time.sleep(1.2)
        held.check()
        down = True
        time.sleep(1.6)
        with pytest.raises(StepFailedError, match="could not renew its lock"):
            held.check()
        down = False
        time.sleep(0.5)
        held.check()  # nobody took it meanwhile
    with b.lock("prune", KEY, timeout=0.5):
        pass


def test_an_answer_that_was_lost_is_not_somebody_else(a: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    true = Bucket.put

    def put(self: Bucket, name: str, *arguments: Any, **named: Any) -> str | None:
        answer = true(self, name, *arguments, **named)
        if name.endswith(KEY):
            raise StepFailedError("written, but nobody was told")
        return answer

    monkeypatch.setattr(Bucket, "put", put)
    with a.lock("prune", KEY, timeout=5) as held:
        time.sleep(0.3)
        monkeypatch.undo()
        held.check()


def test_a_lock_that_is_deleted_is_lost(a: S3Store) -> None:
    with a.lock("prune", KEY) as held:
        a._bucket.delete(f"locks/prune/{KEY}")

        def lost() -> bool:
            try:
                held.check()
            except StepFailedError:
                return True
            return False

        assert within(20, lost)


def mirror(store: S3Store, work: Path) -> Mirror:
    return Mirror(store._bucket, f"work/prune/{KEY}", work, lambda: None)


def write(work: Path, step: int) -> None:
    (work / "training").mkdir(parents=True, exist_ok=True)
    (work / "training/checkpoint.safetensors").write_text(f"step {step}")
    with (work / "training/train.jsonl").open("a") as log:
        log.write(f"{step}\n")


def read(work: Path) -> tuple[str, str]:
    return tuple((work / "training" / name).read_text() for name in ("checkpoint.safetensors", "train.jsonl"))  # type: ignore[return-value]


def test_a_mirror_has_the_files_of_one_moment(a: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write(here, 1)
    for name in (".hidden", "half.partial"):
        (here / "training" / name).write_text("")
    (here / "out").mkdir()
    (here / "out/weights").write_text("")
    (here / "hypotheses.jsonl").write_text("{}\n")
    own = mirror(a, here)
    own._sync()
    write(here, 2)
    true = Bucket.upload
    monkeypatch.setattr(Bucket, "upload", lambda *r: None if r[2].endswith("safetensors") else true(*r))
    monkeypatch.setattr(Bucket, "put", lambda *r, **n: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        own._sync()  # some objects are there, but nothing names them
    monkeypatch.undo()
    there.mkdir()
    other = mirror(a, there)
    other.fetch()
    assert read(there) == ("step 1", "1\n")
    assert {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()} == {
        ".mirrored",
        "hypotheses.jsonl",
        "training/checkpoint.safetensors",
        "training/train.jsonl",
    }
    assert len(a._bucket.list(f"work/prune/{KEY}")) == 4  # what nothing named is gone
    write(there, 3)
    other._sync()
    with pytest.raises(StepFailedError, match="Another process wrote"):
        own._sync()  # a holder that woke up cannot bring its old files back
    mirror(a, tmp_path / "here").fetch()
    assert read(here) == ("step 3", "1\n3\n")
    other.remove()
    assert a._bucket.list("work") == {}


def test_a_machine_keeps_its_own_newer_checkpoint(a: S3Store, tmp_path: Path) -> None:
    work = tmp_path / "work"
    write(work, 1)
    mirror(a, work)._sync()
    write(work, 2)
    mirror(a, work).fetch()
    assert read(work) == ("step 2", "1\n2\n")
    (work / ".fetched").mkdir()  # an earlier fetch was killed half-way
    mirror(a, work).fetch()
    assert read(work) == ("step 1", "1\n")


@pytest.mark.parametrize("damage", ["size", "name", "json"])
def test_a_damaged_mirror_is_not_used(a: S3Store, tmp_path: Path, damage: str) -> None:
    write(tmp_path / "work", 1)
    mirror(a, tmp_path / "work")._sync()
    folder = f"work/prune/{KEY}"
    found = a._bucket.get(f"{folder}/mirror.json")
    assert found is not None
    state = json.loads(found[0])
    entry = state["files"]["training/checkpoint.safetensors"]
    if damage == "size":
        a._bucket.put(f"{folder}/{entry['object']}", b"")
    elif damage == "name":
        state["files"]["../../training/x"] = entry
        a._bucket.put(f"{folder}/mirror.json", json.dumps(state).encode())
    else:
        a._bucket.put(f"{folder}/mirror.json", b"{")
    (tmp_path / "other").mkdir()
    other = mirror(a, tmp_path / "other")
    other.fetch()
    assert not (tmp_path / "other/training").exists()
    write(tmp_path / "other", 5)
    other._sync()
    mirror(a, tmp_path / "work").fetch()
    assert read(tmp_path / "work") == ("step 5", "5\n")


def test_a_failed_step_leaves_its_last_checkpoint(a: S3Store, b: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), a.produce("prune", KEY, **STEP) as production:  # noqa: PT012
        monkeypatch.setattr(lease, "BEAT_SECONDS", 60.0)
        write(production.work, 7)
        raise ZeroDivisionError
    with b.produce("prune", KEY, timeout=1, **STEP) as production:
        assert read(production.work) == ("step 7", "7\n")
        production.publish({}, 1.0)


def test_the_mirror_knows_a_trainings_files() -> None:
    from lors.training import checkpoint

    assert checkpoint._CHECKPOINT == _CHECKPOINT


# Errors, secrets, settings


def test_no_secret_is_written_anywhere(a: S3Store, b: S3Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    b.path(make(a))
    written = [path.read_bytes() for store in (a, b) for path in store.root.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not any(SECRET.encode() in content for content in written)
    assert SECRET not in caplog.text


def test_a_bucket_that_is_missing_is_the_users_error(url: str, tmp_path: Path) -> None:
    store = S3Store("s3://nobody-made-this/here", tmp_path)
    for call in (lambda: store.find("prune", KEY), store.probe, lambda: make(store)):
        with pytest.raises(InputError, match="The bucket of s3://nobody-made-this/here does not exist"):
            call()


def test_missing_credentials_are_the_users_error(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError, match=r"There are no credentials for s3://.*: set AWS_ACCESS_KEY_ID"):
        S3Store(url, tmp_path).find("prune", KEY)


def test_wrong_credentials_are_the_users_error(a: S3Store, endpoint: str) -> None:
    def checked(after: str) -> None:
        text = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset-auth", after.encode(), text)).close()

    checked("0")
    try:
        with pytest.raises(InputError, match=r"refuses s3://.* to these credentials \(InvalidAccessKeyId\)") as caught:
            a.find("prune", KEY)
        assert SECRET not in str(caught.value)
    finally:
        checked("inf")


def test_a_server_that_is_away_can_come_back(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = S3Store(url, tmp_path)
    with pytest.raises(StepFailedError, match=r"could not be used \(EndpointConnectionError\): check the network"):
        store._bucket.get("x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no url")
    with pytest.raises(InputError, match="AWS_ENDPOINT_URL is not a URL"):
        S3Store(url, tmp_path)


def experiment(store: Any) -> Experiment:
    corpora = {"source": "synthetic"}
    return parse_experiment(
        {"base": "starter", "languages": ["es"], "corpora": corpora, "output": "out", "store": store}
    )


def test_a_server_without_conditional_writes_is_refused(endpoint: str, tmp_path: Path) -> None:
    make_bucket(endpoint, "careless")
    with pytest.raises(InputError, match=r"ignores If-None-Match or If-Match .* two workers could train one expert"):
        make(S3Store("s3://careless", tmp_path))


def test_doctor_tries_the_bucket(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORS_STAGING", str(tmp_path))
    assert [check.ok for check in _bucket(experiment(url))] == [True]
    assert list(_bucket(experiment(str(tmp_path)))) == []
    for place, said in (("s3://careless", "conditional writes"), ("s3://nobody-made-this", "does not exist")):
        (check,) = _bucket(experiment(place))
        assert not check.ok
        assert said in check.found


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")  # no clients were made for this one
    with pytest.raises(InputError, match=r"pip install 'lors\[s3\]'"):
        open_store("s3://experiments")


def test_a_store_is_a_folder_or_a_url(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment("there").store == Path("there")
    assert type(open_store(experiment("there").store)) is Store
    found = experiment(f"{url}/")
    assert found.store == url
    assert parse_experiment(found.model_dump(mode="json")) == found
    monkeypatch.setenv("LORS_STAGING", str(tmp_path))
    store = open_store(url)
    assert isinstance(store, S3Store)
    assert store.root == tmp_path / url.removeprefix("s3://")
    assert check_url("s3://bucket.of-ours/a/b=c/") == "s3://bucket.of-ours/a/b=c"


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (f"s3://me:{SECRET}@bucket/x", "credentials and the endpoint belong to the environment"),
        (f"s3://bucket/x?token={SECRET}", "credentials and the endpoint belong to the environment"),
        ("s3://bucket:9000/x", "credentials and the endpoint belong to the environment"),
        ("s3://", "is not s3://bucket"),
        ("s3://b", "is not s3://bucket"),
        ("s3://bucket/../x", "is not s3://bucket"),
        ("s3://bucket//x", "is not s3://bucket"),
        ("S3://bucket", "is not s3://bucket"),
        ("s3:/bucket", "is not s3://bucket"),
        (Path("s3://bucket/x"), "given as text"),
    ],
)
def test_a_url_that_is_none_is_refused(store: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        experiment(store)
    assert SECRET not in str(caught.value)
