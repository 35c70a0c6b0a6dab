"""The versions of a run's output: the current one is the folder itself, earlier ones lie whole in `versions/NAME`.

A version is one merged model (the digest of what `write METHOD` made). It is kept before another model replaces it:

    versions/v1/            what the folder held: weights as hard links, everything else as copies
    versions/v1/files.json  sha256 by file; a version is put back only where they all agree
    version.json            what the current version is, written last
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from lors.errors import CheckpointError, InputError
from lors.files import file_digest, storage_errors, sync_to_disk, write_json
from lors.lease import hold
from lors.merging.settings import TOUCHED_UP
from lors.settings import nearest

__all__ = [
    "KEEP",
    "describe",
    "history",
    "keep_current",
    "product_of",
    "record_current",
    "rollback",
    "swap_folder",
]

KEEP = 10
"""Versions kept beside the current one; older ones are removed."""
_PATIENCE = 5.0
"""Seconds that a rollback waits for a run to be done with the output."""

_NAME = re.compile(r"v[1-9][0-9]{0,8}")
# By name, since the output may also hold what is nobody's version: the store, the folders of a sweep's variants.
_FOLDERS = ("model", "experts", "hypotheses")
_EXPERIMENT, _FILES, _SUMMARY, _VERSION = "experiment.yaml", "files.json", "summary.json", "version.json"
_SCORES = ("recovery", "recovery_low", "recovery_high", "wer", "cer", "bleu")


def product_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """The `system` whose model was written, and the `step` that made it, by summary.json."""
    method = summary["experiment"]["merge"]["method"]  # of outputs from before there were others
    found: dict[str, str] = summary.get("product") or {"system": method, "step": f"write {method}"}
    return found


def describe(
    summary: Mapping[str, Any],  # of summary.json
    *,
    name: str,
    how: str,  # what made it: "run", "add-language it", "rollback to v1"
    created: str,  # ISO 8601, UTC
) -> dict[str, Any]:
    """The content of version.json. `recovery_of` has the recovery by language and task, `experts` what was merged."""
    experiment, digests = summary["experiment"], summary["digests"]
    method, keys = experiment["merge"]["method"], {step["name"]: step["key"] for step in summary["steps"]}
    experts = {}
    for language in experiment["languages"]:
        for task in experiment["tasks"]:
            expert = f"{language}-{task}"
            pruned = f"prune {expert}" if method == "lors" else f"prune {expert} as {method}"
            step = pruned if pruned in digests else f"extract {expert}"
            experts[expert] = {"step": step, "key": keys.get(step), "digest": digests.get(step)}
    product = product_of(summary)
    own = summary["systems"].get(product["system"], {})
    recovery_of = summary.get("recovery_of", {}).get(product["system"], {})
    return {
        "name": name,
        "created": created,
        "how": how,
        "model": digests[product["step"]],
        "method": method,
        "touched_up": product["system"] == TOUCHED_UP,
        "scaling": summary["scaling"],
        "base": experiment["base"],
        "languages": experiment["languages"],
        "tasks": experiment["tasks"],
        "experts": experts,
        "scores": {score: own.get(score) for score in _SCORES}
        | {"recovery_of": {pair: found["value"] for pair, found in recovery_of.items()}},
        "lors": summary.get("versions", {}).get("lors"),
    }


def history(output: Path) -> list[dict[str, Any]]:
    """Every version as `describe` has it, newest first, each with `current`; InputError where `output` has none."""
    with storage_errors(output):
        current = _required(output)
        kept = [_kept_version(output, name) for name in _kept(output) if name != current["name"]]
    versions = [version | {"current": version is current} for version in (current, *kept)]
    return sorted(versions, key=lambda version: _number(version["name"]), reverse=True)


def keep_current(output: Path, model: str) -> None:
    """Keep the current version, before the model with the digest `model` takes its place; nothing where it is that one.

    It appears in `versions/` by one rename, complete; LorsError and InputError as in `storage_errors`.
    """
    with storage_errors(output):
        current = _current(output)
        if current is None:
            return
        if current["model"] != model or not (output / _VERSION).exists():
            write_json(output / _VERSION, current)  # missing or behind: from before there were versions, or a kill
        kept = output / "versions" / current["name"]
        if current["model"] == model or kept.exists() or not (output / "model").is_dir():
            return
        partial = kept.with_name(f".{kept.name}.partial")
        _clear(partial)
        for name in _files(output):
            _put(output / name, partial / name)
        if not (partial / _EXPERIMENT).exists():
            experiment = json.loads((output / _SUMMARY).read_text("utf-8"))["experiment"]
            (partial / _EXPERIMENT).write_text(yaml.safe_dump(experiment, sort_keys=False), "utf-8")
        write_json(partial / _VERSION, current)
        write_json(partial / _FILES, {name: file_digest(partial / name) for name in _files(partial)})
        partial.rename(kept)
        sync_to_disk(kept.parent)


def record_current(output: Path, how: str) -> dict[str, Any]:
    """Write version.json, last, after all else is published; returns its content.

    The same model as before is the same version: its name, time and `how` stay. The oldest beyond `KEEP` are removed.
    """
    with storage_errors(output):
        summary, recorded = _summary(output), _recorded(output)
        assert summary is not None, "a model was published"
        version = describe(
            summary, name=_next(output), how=how, created=datetime.now(UTC).isoformat(timespec="seconds")
        )
        if recorded is not None and recorded["model"] == version["model"]:
            version |= {field: recorded[field] for field in ("name", "created", "how")}
        write_json(output / _VERSION, version)
        # The current one is there as well where an earlier replacement of it was killed.
        others = [name for name in _kept(output) if name != version["name"]]
        for name in set(_kept(output)) - set(others[-KEEP:]):
            partial = output / "versions" / f".{name}.partial"
            _clear(partial)
            (output / "versions" / name).rename(partial)
        for leftover in (output / "versions").glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
    return version


def rollback(output: Path, name: str) -> dict[str, Any]:
    """Put a kept version back as the current one, which is kept before; returns the new version.

    After a kill the same call goes on. Raises InputError: `output` is none of a run, there is no such version, it is
    the current one, or what was kept of it is damaged; LorsError: a run is writing it. Then nothing is changed.
    """
    with storage_errors(output):
        _require_kept(output, name)  # before there is a lock's file
        with hold(output / ".lock", f"the output {output}", timeout=_PATIENCE):
            return _rollback(output, name)


def _require_kept(output: Path, name: str) -> None:
    current, known = _required(output), _kept(output)
    if name not in known:
        if name == current["name"]:
            raise InputError(f"{name} is the current version of {output} already: give an earlier one's name")
        raise InputError(
            f"{output} keeps no version {name!r}{nearest(name, known)}: `lors history {output}` lists those it has"
        )


def _rollback(output: Path, name: str) -> dict[str, Any]:
    _require_kept(output, name)
    kept = output / "versions" / name
    wanted, model = _checked(output, name), _kept_version(output, name)["model"]
    keep_current(output, model)
    partial = output / ".model.partial"
    _clear(partial)
    for file in wanted:
        if file.startswith("model/"):
            _put(kept / file, partial / file.removeprefix("model/"))
        elif file not in (_SUMMARY, _VERSION):
            _put(kept / file, output / file)
    swap_folder(partial, output / "model")
    _remove_others(output, wanted)
    _put(kept / _SUMMARY, output / _SUMMARY)
    return record_current(output, f"rollback to {name}")


def swap_folder(partial: Path, folder: Path) -> None:
    """Put the complete folder `partial` in the place of `folder`, by renames; the old one is there until then."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _summary(output: Path) -> dict[str, Any] | None:
    """The summary of a run with a merged model; None where there is none, as after a sweep or `lors evaluate`."""
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        summary: dict[str, Any] = json.loads((output / _SUMMARY).read_text("utf-8"))
        describe(summary, name="", how="", created="")
        return summary if summary["model"] else None
    return None


def _recorded(output: Path) -> dict[str, Any] | None:
    """What version.json says; None where it is missing or is none."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        version: dict[str, Any] = json.loads((output / _VERSION).read_text("utf-8"))
        fields = [version[field] for field in ("name", "created", "how", "model")]
        if all(isinstance(value, str) for value in fields) and _NAME.fullmatch(version["name"]):
            return version
    return None


def _current(output: Path) -> dict[str, Any] | None:
    summary, recorded = _summary(output), _recorded(output)
    if summary is None:
        return None
    written = datetime.fromtimestamp((output / _SUMMARY).stat().st_mtime, UTC)
    version = describe(summary, name=_next(output), how="run", created=written.isoformat(timespec="seconds"))
    if recorded is not None and recorded["model"] == version["model"]:
        version |= {field: recorded[field] for field in ("name", "created", "how")}
    return version


def _required(output: Path) -> dict[str, Any]:
    if not output.is_dir():
        raise InputError(f"there is no folder {output}: name the `output` of a run")
    if (current := _current(output)) is None:
        raise InputError(
            f"{output} has no {_SUMMARY} of a run with a merged model: name the `output` of a run, or with `seeds` the "
            "folder of one seed in it"
        )
    return current


def _kept(output: Path) -> list[str]:
    """The names of the kept versions, oldest first."""
    folder = output / "versions"
    names = [path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(names, key=_number)


def _number(name: str) -> int:
    return int(name.removeprefix("v"))


def _next(output: Path) -> str:
    recorded = _recorded(output)
    taken = [*_kept(output), *([recorded["name"]] if recorded else [])]
    return f"v{1 + max(map(_number, taken), default=0)}"


def _kept_version(output: Path, name: str) -> dict[str, Any]:
    version = _recorded(output / "versions" / name)
    if version is None or version["name"] != name:
        raise _damaged(output, name, _VERSION)
    return version


def _checked(output: Path, name: str) -> list[str]:
    """The files of a kept version, relative; CheckpointError where one is not as it was kept."""
    kept = output / "versions" / name
    try:
        digests = json.loads((kept / _FILES).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        digests = None
    if not isinstance(digests, dict):
        raise _damaged(output, name, _FILES)
    files = [file for file in _files(kept) if file != _FILES]
    for file in sorted({*digests, *files}):
        if file not in files or file_digest(kept / file) != digests.get(file):
            raise _damaged(output, name, file)
    return files


def _damaged(output: Path, name: str, file: str) -> CheckpointError:
    kept = output / "versions" / name
    return CheckpointError(
        f"the kept version {name} is damaged ({kept / file} is not as it was kept): remove the folder {kept} and take "
        "another version, or run the experiment of this one again"
    )


def _files(folder: Path) -> list[str]:
    """What belongs to a version, relative to its folder; hidden files are what a killed run left."""
    found = [*folder.iterdir(), *(path for name in _FOLDERS for path in (folder / name).rglob("*"))]
    files = (path for path in found if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _clear(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _put(source: Path, target: Path) -> None:
    """The file under another name: weights, which are replaced by renames alone, as a hard link, others as a copy."""
    if target.exists() and target.samefile(source):  # a rename of one link onto another would leave both
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    linked = source.suffix == ".safetensors"
    if linked:
        try:
            partial.hardlink_to(source)
        except OSError:  # another disk, or one without links
            linked = False
    if not linked:
        shutil.copyfile(source, partial)
        sync_to_disk(partial)
    partial.replace(target)


def _remove_others(output: Path, wanted: list[str]) -> None:
    """Remove what a run left in its folders, and what the version before has in `versions/`, where not wanted."""
    recorded = _recorded(output)
    before = output / "versions" / recorded["name"] if recorded else None
    kept = _files(before) if before is not None and before.is_dir() else []
    others = [path for folder in _FOLDERS for path in (output / folder).rglob("*") if path.is_file()]
    for path in [*others, *(output / name for name in kept if "/" not in name)]:
        if path.relative_to(output).as_posix() not in (*wanted, _FILES, _VERSION):
            path.unlink(missing_ok=True)
