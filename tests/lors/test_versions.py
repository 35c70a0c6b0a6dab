"""Versions of an output: small fakes with real weights files, and kills at every rename, link and removal."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lors import versions
from lors.errors import CheckpointError, InputError, LorsError
from lors.lease import hold
from lors.versions import describe, history, keep_current, record_current, rollback, swap_folder

_UNFINISHED = ".version.json."  # what a kill leaves of an atomic write


def summary_of(digest: str, languages: str, wer: float = 30.0) -> dict[str, Any]:
    experts = [f"{language}-transcribe" for language in languages.split()]
    return {
        "model": "lors, in model/",
        "scaling": 0.3,
        "systems": {"lors": {"recovery": 0.5, "wer": wer, "cer": 10.0, "bleu": None, "chrf": None}},
        "recovery_of": {"lors": {"es transcribe": {"value": 0.5, "low": 0.4, "high": 0.6}}},
        "steps": [{"name": f"prune {expert}", "key": f"key of {expert}"} for expert in experts],
        "digests": {f"prune {expert}": f"digest of {expert}" for expert in experts} | {"write lors": digest},
        "versions": {"lors": "0.1.0"},
        "experiment": {
            "base": "starter",
            "languages": languages.split(),
            "tasks": ["transcribe"],
            "merge": {"method": "lors"},
        },
    }


def publish(
    output: Path,
    digest: str,
    languages: str = "es fr",
    *,
    how: str = "run",
    wer: float = 30.0,
    extra: tuple[str, ...] = (),
) -> None:
    """As `lors.outputs.publish` does it; the weights are the digest's characters."""
    keep_current(output, digest)
    weights = {"weight": np.frombuffer(digest.encode(), dtype=np.uint8)}
    (output / "experts").mkdir(parents=True, exist_ok=True)
    wanted = {f"{language}-transcribe.safetensors" for language in languages.split()}
    for name in wanted:
        save_file(weights, output / "experts" / f".{name}.partial")
        (output / "experts" / f".{name}.partial").replace(output / "experts" / name)
    for path in (output / "experts").iterdir():
        if path.name not in wanted:
            path.unlink()
    partial = output / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(weights, partial / "model.safetensors")
    (partial / "README.md").write_text(f"card of {digest}")
    swap_folder(partial, output / "model")
    (output / "experiment.yaml").write_text(f"languages: [{languages}]")
    (output / "diagnosis.json").unlink(missing_ok=True)
    for name in ("table.md", *extra):
        (output / name).write_text(f"{name} of {digest}")
    (output / "summary.json").write_text(json.dumps(summary_of(digest, languages, wer)))
    record_current(output, how)


def model_of(folder: Path) -> str:
    return bytes(load_file(folder / "model" / "model.safetensors")["weight"]).decode()


def files_of(folder: Path, *, but: tuple[str, ...] = ("version.json", "files.json")) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    found = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        n: p.read_bytes() for n, p in found.items() if not n.startswith(("versions/", _UNFINISHED)) and n not in but
    }


def names(output: Path) -> list[tuple[str, str, bool]]:
    return [(version["name"], version["how"], version["current"]) for version in history(output)]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """With a first version of es and fr."""
    publish(tmp_path / "out", "aaaa", extra=("diagnosis.json",))
    return tmp_path / "out"


class Killed(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, call: Callable[[], object]) -> bool:
    """Run `call` but for its operation `number` on names of files, where it ends as by kill -9."""
    count = itertools.count(1)

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            if next(count) >= number:  # and nothing after it, such as the tidying of a temporary file
                raise Killed
            return real(*arguments, **named)

        return operation

    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "link", "unlink", "rmdir", "mkdir"):
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            call()
        except Killed:
            return True
    return False


def every_kill(
    monkeypatch: pytest.MonkeyPatch, start: Path, call: Callable[[Path], object]
) -> Iterator[tuple[int, Path]]:
    """A copy of `start` after each of the kills that `call` can meet."""
    for number in itertools.count(1):
        copy = start.parent / f"killed-{number}"
        shutil.copytree(start, copy)
        if not killed_at(monkeypatch, number, lambda copy=copy: call(copy)):  # type: ignore[misc]
            assert number > 10
            return
        yield number, copy


def test_a_version_is_described_from_the_summary_alone() -> None:
    found = describe(summary_of("aaaa", "es fr"), name="v3", how="add-language fr", created="2026-01-02T03:04:05+00:00")
    assert found == {
        "name": "v3",
        "created": "2026-01-02T03:04:05+00:00",
        "how": "add-language fr",
        "model": "aaaa",
        "method": "lors",
        "touched_up": False,
        "scaling": 0.3,
        "base": "starter",
        "languages": ["es", "fr"],
        "tasks": ["transcribe"],
        "experts": {
            f"{language}-transcribe": {
                "step": f"prune {language}-transcribe",
                "key": f"key of {language}-transcribe",
                "digest": f"digest of {language}-transcribe",
            }
            for language in ("es", "fr")
        },
        "scores": {
            "recovery": 0.5,
            "recovery_low": None,
            "recovery_high": None,
            "wer": 30.0,
            "cer": 10.0,
            "bleu": None,
            "recovery_of": {"es transcribe": 0.5},
        },
        "lors": "0.1.0",
    }


@pytest.mark.parametrize(
    ("steps", "used"),
    [(["prune es-transcribe as ties", "prune es-transcribe"], "as ties"), (["prune es-transcribe"], "extract")],
)
def test_the_experts_of_a_version_are_those_that_its_method_merged(steps: list[str], used: str) -> None:
    summary = summary_of("aaaa", "es")
    summary["experiment"]["merge"]["method"] = "ties"
    summary["digests"] = dict.fromkeys([*steps, "extract es-transcribe", "write ties"], "d")
    assert used in describe(summary, name="v1", how="run", created="")["experts"]["es-transcribe"]["step"]


def test_another_model_is_another_version_and_the_one_before_is_kept(output: Path) -> None:
    before = files_of(output)
    weights = (output / "model" / "model.safetensors").stat().st_ino
    publish(output, "bbbb", "es fr it", how="add-language it")
    assert names(output) == [("v2", "add-language it", True), ("v1", "run", False)]
    assert model_of(output) == "bbbb"
    kept = output / "versions" / "v1"
    assert files_of(kept) == before
    assert (kept / "model" / "model.safetensors").stat().st_ino == weights  # no second copy on the disk
    assert (kept / "model" / "README.md").stat().st_nlink == 1  # which a run writes in place
    assert json.loads((output / "version.json").read_text())["languages"] == ["es", "fr", "it"]
    assert [path for path in output.rglob(".*") if path.is_file() or path.is_dir()] == []


def test_the_same_model_is_the_same_version_refreshed(output: Path) -> None:
    (recorded,) = history(output)
    publish(output, "aaaa", how="remove-language it", wer=20.0)
    (refreshed,) = history(output)
    assert refreshed["scores"]["wer"] == 20.0
    unchanged = ("name", "created", "how", "model", "current")
    assert [refreshed[field] for field in unchanged] == [recorded[field] for field in unchanged]
    assert not (output / "versions").exists()


def test_an_output_from_before_there_were_versions_is_v1(output: Path) -> None:
    for name in ("version.json", "experiment.yaml"):
        (output / name).unlink()
    os.utime(output / "summary.json", (0, 0))
    (only,) = history(output)
    assert (only["name"], only["how"], only["created"]) == ("v1", "run", "1970-01-01T00:00:00+00:00")
    assert not (output / "version.json").exists()
    publish(output, "bbbb")
    assert names(output) == [("v2", "run", True), ("v1", "run", False)]
    assert history(output)[1]["created"] == only["created"]
    assert "starter" in (output / "versions" / "v1" / "experiment.yaml").read_text()


def test_a_rollback_brings_every_file_back_and_is_a_version(output: Path) -> None:
    first = files_of(output)
    publish(output, "bbbb", "es fr it", extra=("robustness.md",))
    second = files_of(output)
    version = rollback(output, "v1")
    assert files_of(output) == first
    assert (version["name"], version["how"], version["model"]) == ("v3", "rollback to v1", "aaaa")
    assert names(output) == [("v3", "rollback to v1", True), ("v2", "run", False), ("v1", "run", False)]
    rollback(output, "v2")
    assert files_of(output) == second
    assert [version["name"] for version in history(output)] == ["v4", "v3", "v2", "v1"]
    assert [path.name for path in output.rglob(".*")] == [".lock"]


def test_a_run_after_a_rollback_leaves_what_is_kept_alone(output: Path) -> None:
    first = files_of(output)
    publish(output, "bbbb")
    rollback(output, "v1")
    publish(output, "aaaa", how="again", wer=1.0)  # the card and the tables are written in place
    (output / "model" / "README.md").write_text("another card")
    assert names(output)[0] == ("v3", "rollback to v1", True)
    assert files_of(output / "versions" / "v1") == first
    publish(output, "cccc")
    assert rollback(output, "v1")["name"] == "v5"
    assert files_of(output) == first


def test_a_rollback_to_the_model_that_is_there_makes_no_version(output: Path) -> None:
    publish(output, "bbbb")
    assert rollback(output, "v1") == rollback(output, "v1")
    assert [version["name"] for version in history(output)] == ["v3", "v2", "v1"]


def test_a_rollback_waits_a_moment_for_a_run_and_says_whose(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_PATIENCE", 0.2)
    publish(output, "bbbb")
    with (
        hold(output / ".lock", "the output"),
        pytest.raises(LorsError, match=f"Process {os.getpid()} on .* was still making the output {output} after 0.2 s"),
    ):
        rollback(output, "v1")
    assert model_of(output) == "bbbb"
    assert rollback(output, "v1")["name"] == "v3"


def test_what_is_no_part_of_a_version_stays(output: Path) -> None:
    for place in ("store/entries/a", "seed=0/model/b", ".hidden"):
        (output / place).parent.mkdir(parents=True, exist_ok=True)
        (output / place).write_text("mine")
    publish(output, "bbbb")
    (output / "notes.txt").write_text("mine")
    rollback(output, "v1")
    for place in ("store/entries/a", "seed=0/model/b", ".hidden", "notes.txt"):
        assert (output / place).exists() or (output / "versions" / "v2" / place).exists()
    assert not {"store", "seed=0", ".hidden"} & {path.name for path in (output / "versions" / "v1").iterdir()}


def test_the_oldest_versions_are_removed_but_not_before_a_rollback(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "KEEP", 2)
    for digest in ("bbbb", "cccc", "dddd"):
        publish(output, digest)
    assert [version["name"] for version in history(output)] == ["v4", "v3", "v2"]
    rollback(output, "v2")
    assert model_of(output) == "bbbb"
    assert [version["name"] for version in history(output)] == ["v5", "v4", "v3"]
    assert len(list((output / "versions").iterdir())) == 2


@pytest.mark.parametrize("name", ["v9", "v0", "../out", "v1/../../out", "/etc", "", "latest", ".v1.partial", "v1 "])
def test_an_unknown_version_is_refused(name: str, output: Path) -> None:
    publish(output, "bbbb")
    before = files_of(output.parent)
    with pytest.raises(InputError, match="keeps no version"):
        rollback(output, name)
    assert files_of(output.parent) == before


def test_the_nearest_version_and_the_current_one_are_named(output: Path) -> None:
    publish(output, "bbbb")
    with pytest.raises(InputError, match="did you mean 'v1'"):
        rollback(output, "V1")
    with pytest.raises(InputError, match=r"v2 is the current version of .* already"):
        rollback(output, "v2")


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    for call in (history, lambda folder: rollback(folder, "v1")):
        with pytest.raises(InputError, match="there is no folder"):
            call(tmp_path / "missing")
        with pytest.raises(InputError, match="of a run with a merged model"):
            call(tmp_path)
    sweep = summary_of("aaaa", "es") | {"model": None}
    for content in ("{", "[]", '{"systems": {}}', '{"experiment": 1}', json.dumps(sweep)):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(InputError, match="of a run with a merged model"):
            history(tmp_path)
        keep_current(tmp_path, "bbbb")
        assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("file", ["model/model.safetensors", "table.md", "files.json", "version.json", "extra.md"])
def test_a_damaged_version_is_refused_before_anything_changes(file: str, output: Path) -> None:
    publish(output, "bbbb")
    damaged = output / "versions" / "v1" / file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!" if damaged.exists() else b"!")
    before = files_of(output, but=())
    with pytest.raises(CheckpointError, match=r"the kept version v1 is damaged \(.*/v1/.*: remove the folder"):
        rollback(output, "v1")
    assert files_of(output, but=()) == before


def test_a_version_file_from_elsewhere_names_no_folder_of_its_choice(output: Path) -> None:
    recorded = json.loads((output / "version.json").read_text())
    (output / "version.json").write_text(json.dumps(recorded | {"name": "../../elsewhere"}))
    publish(output, "bbbb")
    assert {path.name for path in output.parent.iterdir()} == {"out"}
    assert [version["name"] for version in history(output)] == ["v2", "v1"]


def test_where_links_are_refused_weights_are_copied(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    before = files_of(output)
    publish(output, "bbbb")
    assert files_of(output / "versions" / "v1") == before
    rollback(output, "v1")
    assert files_of(output) == before


def test_a_full_disk_is_said_and_the_current_version_stays(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Any, target: Any, **_: Any) -> None:
        raise OSError(28, "No space left on device", str(target))

    before = files_of(output)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(LorsError, match="is full"):
            keep_current(output, "bbbb")
    assert files_of(output) == before
    publish(output, "bbbb")
    assert files_of(output / "versions" / "v1") == before


def test_a_half_made_version_is_made_again(output: Path) -> None:
    leftover = output / "versions" / ".v1.partial"
    (leftover / "model").mkdir(parents=True)
    (leftover / "model" / "stray.safetensors").write_text("half")
    before = files_of(output)
    publish(output, "bbbb")
    assert files_of(output / "versions" / "v1") == before
    assert not leftover.exists()


def test_a_publication_killed_anywhere_loses_no_version(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = files_of(output)
    for number, killed in every_kill(monkeypatch, output, lambda folder: publish(folder, "bbbb", "es it", how="add")):
        kept = killed / "versions" / "v1"
        if kept.exists():
            assert files_of(kept) == first, number
            back = killed.parent / "back"  # instead of running again
            shutil.copytree(killed, back)
            rollback(back, "v1")
            restored = files_of(back)
            assert {n: c for n, c in restored.items() if n in first} == first, number
            assert set(restored) == set(first), number
            shutil.rmtree(back)
        else:
            assert model_of(killed) == "aaaa", number
        publish(killed, "bbbb", "es it", how="add")
        assert names(killed) == [("v2", "add", True), ("v1", "run", False)], number
        assert (model_of(killed), files_of(kept)) == ("bbbb", first), number
        assert [path for path in killed.rglob(".*") if not path.name.startswith(_UNFINISHED)] == [], number


def test_a_killed_publication_then_the_old_experiment_again(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, killed in every_kill(monkeypatch, output, lambda folder: publish(folder, "bbbb", "es it")):
        publish(killed, "aaaa", extra=("diagnosis.json",))
        current = history(killed)[0]
        assert (current["model"], current["current"], model_of(killed)) == ("aaaa", True, "aaaa"), number
        assert len({version["name"] for version in history(killed)}) == len(history(killed))
        publish(killed, "cccc")
        assert model_of(killed / "versions" / current["name"]) == "aaaa", number


def test_a_rollback_killed_anywhere_goes_on(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = files_of(output)
    publish(output, "bbbb", "es it", extra=("robustness.md",))
    second = files_of(output)
    expected = [("v3", "rollback to v1", True), ("v2", "run", False), ("v1", "run", False)]
    for number, killed in every_kill(monkeypatch, output, lambda folder: rollback(folder, "v1")):
        assert files_of(killed / "versions" / "v1") == first, number
        rollback(killed, "v1")
        assert files_of(killed) == first, number
        assert names(killed) == expected, number
        assert files_of(killed / "versions" / "v2") == second, number
        assert {path.name for path in killed.rglob(".*") if not path.name.startswith(_UNFINISHED)} == {".lock"}, number
