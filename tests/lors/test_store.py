from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lors
from lors import store as module
from lors.errors import InputError, LorsError
from lors.files import SETTLED_NS, file_digest
from lors.store import Artifact, Store, step_key

STEP: dict[str, Any] = {"version": 1, "settings": {"rank_ratio": 0.1}, "inputs": {"base": "ab"}}
KEY = step_key("prune", **STEP)
FILES = {"model.safetensors": b"weights" * 100, "logs/a.json": b"{}", "empty": b""}


def make(store: Store, files: Mapping[str, bytes] = FILES, summary: Mapping[str, Any] | None = None) -> Artifact:
    with store.produce("prune", KEY, **STEP) as production:
        if production.hit is not None:
            return production.hit
        for name, content in files.items():
            path = production.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return production.publish(summary or {"rank": (1, 2)}, 1.5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# Keys

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
settings_ = st.dictionaries(st.text(), values, max_size=4)


def same(a: Any, b: Any) -> bool:
    """The documented equality: Python's, but for booleans, which are no numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def rewritten(value: Any) -> Any:
    """The same value in other words: reversed keys, tuples, floats for integers."""
    if isinstance(value, dict):
        return {k: rewritten(v) for k, v in reversed(value.items())}
    if isinstance(value, list):
        return tuple(map(rewritten, value))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    return value


@given(settings_)
def test_a_key_does_not_depend_on_how_the_settings_are_written(settings: dict[str, Any]) -> None:
    key = step_key("a", 1, settings, {})
    assert key == step_key("a", 1, rewritten(settings), {})
    assert key == step_key("a", 1, json.loads(json.dumps(settings)), {})


@given(settings_, settings_)
def test_keys_are_equal_exactly_where_settings_are(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (step_key("a", 1, a, {}) == step_key("a", 1, b, {})) == same(a, b)


def test_keys_by_example() -> None:
    def key(value: Any) -> str:
        return step_key("a", 1, {"x": value}, {})

    assert key(0.1) == key(1e-1)
    assert key(1) == key(1.0) != key(True)
    assert key(0.0) == key(-0.0)
    assert key("1") != key(1)
    assert key(None) != key("null")
    assert key([1, [2]]) != key([[1], 2])
    assert len({step_key("a", 1, {}, {}), step_key("b", 1, {}, {}), step_key("a", 2, {}, {})}) == 3
    assert step_key("a", 1, {"x": "y"}, {}) != step_key("a", 1, {}, {"x": "y"})
    # A golden value: a change of the canonical form would silently make every store stale.
    assert (
        step_key("prune", 1, {"rank_ratio": 0.1, "density": 1.0}, {"base": "ab"}) == "1d9e6efc447ab3590e7d2264220cf20b"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(value: float) -> None:
    with pytest.raises(InputError, match=r"finetune\.rates\[1\]\.x"):
        step_key("finetune", 1, {"rates": [0.1, {"x": value}]}, {})


@pytest.mark.parametrize("value", [{1, 2}, b"a", Path("a"), {1: "a"}])
def test_values_that_are_not_json_are_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        step_key("a", 1, {"x": value}, {})


# Artifacts


def test_a_step_is_made_once_and_found(store: Store) -> None:
    assert store.find("prune", KEY) is None
    assert store.why("prune", KEY) is None
    made = make(store)
    assert made.summary == {"rank": [1, 2]}
    assert list(made.files) == sorted(FILES)
    for other in (store, Store(store.root)):
        for verify in (True, False, "full"):
            assert other.find("prune", KEY, verify=verify) == made  # type: ignore[arg-type]
    assert (store.path(made) / "logs/a.json").read_bytes() == b"{}"
    assert make(store, {"other": b"not written, since the step is a hit"}) == made
    assert not (store.root / "work/prune" / KEY).exists()
    manifest = store.manifest(made)
    assert (manifest["seconds"], manifest["settings"], manifest["inputs"]) == (1.5, STEP["settings"], STEP["inputs"])
    assert manifest["created"].endswith("+00:00")


def test_the_stores_other_users_can_read_what_a_private_file_held(store: Store) -> None:
    with store.produce("prune", KEY, **STEP) as production:
        weights = production.out / "model.safetensors"
        weights.write_bytes(b"x")
        weights.chmod(0o600)  # as safetensors leaves it
        artifact = production.publish({}, 0.0)
    umask = os.umask(0)
    os.umask(umask)
    assert (store.path(artifact) / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_artifact_crosses_json(store: Store) -> None:
    made = make(store)
    assert Artifact.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../../etc"},
        {"stage": ".."},
        {"digest": "0" * 64},
        {"files": {"../a": "0" * 64}},
        {"files": {"/a": "0" * 64}},
        {"files": {"a": "zz"}},
        {"files": [1]},
        {"summary": 1},
        {"key": 3},
    ],
)
def test_an_artifact_that_is_not_one_is_refused(store: Store, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Artifact.from_json({**make(store).to_json(), **change})


def test_the_digest_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    first = make(Store(tmp_path / "a"))
    time.sleep(0.01)
    reordered = make(Store(tmp_path / "b"), dict(reversed(FILES.items())), {"other": 1})
    assert first.digest == reordered.digest
    assert first.digest != make(Store(tmp_path / "c"), {**FILES, "empty": b"x"}).digest
    renamed = {("void" if n == "empty" else n): c for n, c in FILES.items()}
    assert first.digest != make(Store(tmp_path / "d"), renamed).digest


def test_the_digest_of_some_files(tmp_path: Path) -> None:
    a = make(Store(tmp_path / "a"))
    b = make(Store(tmp_path / "b"), {**FILES, "logs/a.json": b"[]"})
    assert a.digest_of("*") == a.digest
    assert a.digest_of("model.safetensors", "emp*") == b.digest_of("empty", "*.safetensors") != a.digest
    assert a.digest_of("logs/*") != b.digest_of("logs/*")
    with pytest.raises(LorsError, match=r"no file '\*\.wav'"):
        a.digest_of("empty", "*.wav")


def test_a_name_with_glob_characters_is_itself(store: Store) -> None:
    made = make(store, {"a[1].json": b"x", "a1.json": b"y"})
    assert made.digest_of("a[1].json") == made.digest


# Entries that are no hit


def edit_manifest(entry: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    change(manifest)
    (entry / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename_file(entry: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("empty")
        files = {n: e["sha256"] for n, e in manifest["files"].items()}
        manifest["digest"] = module._digest(files)

    edit_manifest(entry, change)


def link_out(entry: Path) -> None:
    outside = entry.parents[3] / "outside"
    (entry / "files/model.safetensors").rename(outside)
    (entry / "files/model.safetensors").symlink_to(outside)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda e: flip(e / "files/model.safetensors"), "model.safetensors does not have the sha256"),
    "other size": (lambda e: (e / "files/empty").write_bytes(b"x"), "empty has 1 bytes, not 0"),
    "missing file": (lambda e: (e / "files/logs/a.json").unlink(), "a.json: No such file"),
    "folder for a file": (lambda e: ((e / "files/empty").unlink(), (e / "files/empty").mkdir()), "empty has"),
    "link that leaves": (link_out, "model.safetensors is a link that leaves"),
    "no manifest": (lambda e: (e / "manifest.json").unlink(), "manifest.json: No such file"),
    "truncated manifest": (lambda e: os.truncate(e / "manifest.json", 150), "manifest.json is not JSON"),
    "empty manifest": (lambda e: os.truncate(e / "manifest.json", 0), "manifest.json is not JSON"),
    "list for a manifest": (lambda e: (e / "manifest.json").write_text("[]"), "list indices"),
    "other format": (lambda e: edit_manifest(e, lambda m: m.update(format=99)), "format 99"),
    "no digest": (lambda e: edit_manifest(e, lambda m: m.pop("digest")), "'digest' is missing"),
    "other digest": (lambda e: edit_manifest(e, lambda m: m.update(digest="0" * 64)), "digest is not that of"),
    "other settings": (lambda e: edit_manifest(e, lambda m: m["settings"].update(a=1)), "another step"),
    "other stage": (lambda e: edit_manifest(e, lambda m: m.update(stage="merge")), "another step"),
    "parent folder": (lambda e: rename_file(e, "../empty"), "'../empty' is not a plain relative"),
    "absolute name": (lambda e: rename_file(e, "/etc/hostname"), "'/etc/hostname' is not a plain relative"),
    "dot name": (lambda e: rename_file(e, "./empty"), "'./empty' is not a plain relative"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_no_hit_says_why_and_is_made_again(
    store: Store, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[name]
    made = make(store)
    assert store.find("prune", KEY) == made
    damage(store.path(made).parent)
    for other in (store, Store(store.root)):
        caplog.clear()
        assert other.find("prune", KEY) is None
        assert reason in caplog.text
        assert reason in (other.why("prune", KEY) or "")
    assert make(store) == made
    assert store.find("prune", KEY, verify="full") == made
    assert [path.name for path in (store.root / "entries/prune").iterdir()] == [KEY]
    assert not (store.root / "work/prune" / KEY).exists()


def test_a_step_that_writes_a_link_is_refused(store: Store) -> None:
    with (  # noqa: PT012
        pytest.raises(LorsError, match=r"cache is a link or a special file"),
        store.produce("prune", KEY, **STEP) as production,
    ):
        (production.out / "cache").symlink_to("/etc")
        production.publish({}, 1.0)
    assert store.find("prune", KEY) is None


@pytest.mark.parametrize("address", [("prune", "../x"), ("../prune", KEY), ("prune", KEY.upper() + "G"), ("", KEY)])
def test_an_address_that_leaves_the_store_is_refused(store: Store, address: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="is no stage and key"):
        store.find(*address)


# Memo


def test_the_memo_spares_the_reading_and_a_full_check_does_not_trust_it(store: Store) -> None:
    made = make(store)
    path = store.path(made) / "model.safetensors"
    time.sleep(2 * SETTLED_NS / 1e9)  # a file younger than that is not memoised
    assert store.find("prune", KEY) == made
    # A lie in the memo shows that it is read, in this process and in the next; a full check finds the truth.
    stamp = store.memo[str(path)].rpartition(" ")[0]
    store.memo[str(path)] = f"{stamp} {'0' * 64}"
    store.memo.save()
    assert store.find("prune", KEY) is None
    other = Store(store.root)
    assert other.find("prune", KEY) is None
    assert other.find("prune", KEY, verify="full") == made
    assert other.find("prune", KEY) == made
    assert Store(store.root).find("prune", KEY) == made


# Crashes, locks, two processes


def program(store: Store, body: str) -> subprocess.Popen[str]:
    """A Python process with `store`, `STEP` and `KEY`; `say` prints a line that `hear` reads."""
    code = (
        "import os, signal, sys, time\nfrom lors.store import Store\n"
        f"STEP, KEY, store = {STEP!r}, {KEY!r}, Store({str(store.root)!r})\n"
        "def say(line): print(line, flush=True)\n" + body
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lors.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_work_survives_kill_9_and_out_is_emptied(store: Store) -> None:
    with program(
        store,
        "with store.produce('prune', KEY, **STEP) as p:\n"
        "    (p.work / 'checkpoint').write_text('step 7')\n"
        "    (p.out / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
    ) as process:
        assert process.wait(20) == -signal.SIGKILL
    assert store.find("prune", KEY) is None
    with store.produce("prune", KEY, timeout=0, **STEP) as production:  # the kernel freed the lock
        assert (production.work / "checkpoint").read_text() == "step 7"
        assert list(production.out.iterdir()) == []
        (production.out / "whole").write_text("whole")
        made = production.publish({}, 1.0)
    assert list(made.files) == ["whole"]
    assert not production.work.exists()


@pytest.mark.parametrize("call", ["os.fsync", "Path.rename", "Path.replace"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_kill_9_while_publishing_leaves_the_old_state_or_the_whole_new_one(store: Store, call: str, nth: int) -> None:
    owner, name = call.split(".")
    with program(
        store,
        "from pathlib import Path\n"
        f"true, count = {owner}.{name}, 0\n"
        "def deadly(*args):\n"
        "    global count\n"
        "    count += 1\n"
        f"    if count == {nth}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return true(*args)\n"
        f"{owner}.{name} = deadly\n"
        "with store.produce('prune', KEY, **STEP) as p:\n"
        "    (p.out / 'a').write_text('a'); (p.out / 'b').write_text('b')\n"
        "    p.publish({}, 1.0)\n",
    ) as process:
        killed = process.wait(20) == -signal.SIGKILL
    found = store.find("prune", KEY)
    assert killed or found is not None
    assert store.why("prune", KEY) is None  # never half an entry
    assert found is None or list(found.files) == ["a", "b"]
    assert make(store, {"a": b"a", "b": b"b"}).digest == module._digest(
        {n: file_digest(store.root / "entries/prune" / KEY / "files" / n) for n in "ab"}
    )


def test_two_processes_on_one_key_make_it_once(store: Store) -> None:
    body = (
        "sys.stdin.readline()\n"
        "with store.produce('prune', KEY, **STEP) as p:\n"
        "    if p.hit is None:\n"
        "        time.sleep(0.3)\n"
        "        (p.out / 'pid').write_text(str(os.getpid()))\n"
        "        p.publish({}, 1.0)\n"
        "        say('made')\n"
        "    else:\n"
        "        say('hit')\n"
    )
    processes = [program(store, body) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert sorted(process.communicate(timeout=20)[0].strip() for process in processes) == ["hit", "made"]
    assert [process.returncode for process in processes] == [0, 0]


def test_a_lock_says_who_holds_it_and_is_freed_by_kill_9(store: Store) -> None:
    told: list[str] = []
    with program(store, "with store.lock('prune', KEY):\n    say('held')\n    time.sleep(60)\n") as process:
        assert hear(process) == "held"
        with (
            pytest.raises(LorsError, match=rf"(?i)process {process.pid} on .* was still making"),
            store.lock("prune", KEY, timeout=0.2, on_wait=told.append),
        ):
            pytest.fail("the lock is held twice")
        process.kill()
        process.wait(10)
        with store.lock("prune", KEY, timeout=1):
            pass
    assert len(told) == 1
    assert f"process {process.pid} on {os.uname().nodename}" in told[0]
    assert KEY in told[0]


def test_a_lock_keeps_threads_apart_and_keys_do_not_meet(store: Store) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def job() -> None:
        nonlocal inside, most
        with store.lock("prune", KEY):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=job) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == 1
    with store.lock("prune", KEY), store.lock("prune", "0" * 32, timeout=0), store.lock("merge", KEY, timeout=0):
        pass


def test_an_exception_keeps_the_work_and_publishes_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.produce("prune", KEY, **STEP) as production:  # noqa: PT012
        (production.work / "checkpoint").write_text("step 7")
        raise ZeroDivisionError
    assert store.find("prune", KEY) is None
    with store.produce("prune", KEY, timeout=0, **STEP) as production:
        assert (production.work / "checkpoint").read_text() == "step 7"
        production.publish({}, 0.0)


def test_the_key_must_be_that_of_the_step(store: Store) -> None:
    with pytest.raises(AssertionError, match="not that of"), store.produce("prune", "0" * 32, **STEP):
        pass


def test_a_step_must_publish(store: Store) -> None:
    with pytest.raises(AssertionError, match="without publishing"), store.produce("prune", KEY, **STEP):
        pass


# Disks and permissions


def full_disk(text: bool) -> Exception:
    if text:  # as safetensors, pyarrow and a child process say it
        return RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("text", [False, True])
def test_a_full_disk_is_one_sentence_with_the_next_step(store: Store, text: bool) -> None:
    with pytest.raises(LorsError) as caught, store.produce("prune", KEY, **STEP) as production:  # noqa: PT012
        (production.work / "checkpoint").write_text("step 7")
        raise full_disk(text)
    assert type(caught.value) is LorsError
    assert str(store.root) in str(caught.value)
    assert "bytes are free): free space and run the same command again; finished steps are kept." in str(caught.value)
    assert (production.work / "checkpoint").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_write_that_the_kernel_refuses_is_told_as_a_full_disk(store: Store) -> None:
    with (  # noqa: PT012
        pytest.raises(LorsError, match="is full"),
        store.produce("prune", KEY, **STEP),
        Path("/dev/full").open("wb") as file,
    ):
        file.write(b"x")
        file.flush()


def test_a_step_that_fails_at_the_manifest_leaves_no_entry(store: Store) -> None:
    # Files may grow to 300 bytes here, which the manifest exceeds: a real failed write after the files are there.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="large"), store.produce("prune", KEY, **STEP) as production:  # noqa: PT012
            (production.out / "a").write_bytes(b"a" * 200)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
            production.publish({}, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.find("prune", KEY) is None
    assert store.why("prune", KEY) is None
    assert list(make(store).files) == sorted(FILES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_store_without_permission_is_the_users_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be used"):
        make(Store(tmp_path / "store"))


@pytest.mark.parametrize("root", ["file", "file/store"])
def test_a_file_in_the_way_of_the_store_is_the_users_error(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="in the way"):
        make(Store(tmp_path / root))


def test_a_store_on_a_file_system_without_writes_is_the_users_error() -> None:
    with pytest.raises(InputError, match="/proc/lors-store"):
        make(Store("/proc/lors-store"))
