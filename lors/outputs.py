"""What a run leaves under `output`: the merged model, compact experts, results, hypotheses, the summary."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lors.config import Experiment
from lors.errors import InputError
from lors.model_folder import read_json
from lors.pipeline import Step
from lors.speech.corpus import SPLITS
from lors.store import Artifact, Store, file_digest, storage_errors, write_json

__all__ = ["publish", "require_writable"]

_PACKAGES = tuple("lors torch transformers prefect datasets safetensors jiwer sacrebleu numpy scipy".split())


def require_writable(folder: Path) -> None:
    """Raises InputError, before anything is computed, where `folder` cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be written ({error.strerror}): choose another one or change its permissions"
        ) from error


def publish(
    experiment: Experiment,
    steps: Mapping[str, Step],
    artifacts: Mapping[str, Artifact],
    computed: Collection[str],
    store: Store,
) -> dict[str, Any]:
    """Write everything of DESIGN's output from the store; returns the content of summary.json, written last.

    `computed` names the steps that this run computed. Files that are there already with the right
    content are left alone. The table is in `table.md` too.
    """
    output, method = experiment.output, experiment.merge.method
    scores = store.path(artifacts["score systems"])
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for name in artifacts["score systems"].files:
            if name.startswith("hypotheses-"):
                _copy(scores / name, output / "hypotheses" / name.removeprefix("hypotheses-"), store)
            elif name != "summary.json":
                _copy(scores / name, output / name, store)
        _prune_folder(output / "hypotheses", {f"{s}.parquet" for s in read_json(scores / "summary.json")["systems"]})
        experts = {
            f"{expert.id}.safetensors": f"prune {expert.id}"
            for expert in experiment.experts
            if f"prune {expert.id}" in steps
        }
        for name, step in experts.items():
            _copy(store.path(artifacts[step]) / "task_vector.safetensors", output / "experts" / name, store)
        _prune_folder(output / "experts", set(experts))
        _publish_model(store, artifacts[f"write {method}"], output / "model", (scores / "table.md").read_text("utf-8"))
        summary = {
            **read_json(scores / "summary.json"),
            "model": f"{method}, in model/",
            "scaling": artifacts[f"select scaling {method}"].summary["scaling"],
            "curves": {
                system: read_json(store.path(artifacts[f"select scaling {system}"]) / "scaling.json")
                for system in experiment.systems
            },
            "corpora": {
                language: {
                    split: artifacts[step].summary
                    for split in SPLITS
                    if (step := f"prepare {language} {split}") in artifacts
                }
                for language in experiment.spoken
            },
            "steps": [
                {
                    "name": name,
                    "stage": step.stage,
                    "key": artifacts[name].key,
                    "state": "run" if name in computed else "cached",
                    "seconds": store.manifest(artifacts[name])["seconds"],
                }
                for name, step in steps.items()
            ],
            "seeds": {"finetune": experiment.finetune.seed, "corpora": getattr(experiment.corpora, "seed", None)},
            "digests": {name: artifacts[name].digest for name in steps},
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "experiment": experiment.model_dump(mode="json"),
        }
        write_json(output / "summary.json", summary)
        store.memo.save()
    return summary


def _copy(source: Path, target: Path, store: Store) -> None:
    same_size = target.is_file() and target.stat().st_size == source.stat().st_size
    if same_size and file_digest(target, store.memo) == file_digest(source, store.memo):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def _prune_folder(folder: Path, wanted: set[str]) -> None:
    """Remove what an earlier run with other languages or methods left, so that the folder is this run's."""
    for path in folder.glob("*") if folder.is_dir() else ():
        if path.name not in wanted and path.is_file():
            path.unlink()


def _publish_model(store: Store, artifact: Artifact, model: Path, table: str) -> None:
    """The model's folder in one rename, its card with the results; the old one is there until then."""
    source = store.path(artifact)
    card = (source / "README.md").read_text("utf-8")
    head, mark, rest = card.partition("## Provenance")
    card = f"{head}## Results\n\n{table.strip()}\n\n{mark}{rest}"
    if model.is_dir() and (model / "README.md").is_file():
        names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
        same = names == set(artifact.files) and all(
            file_digest(model / name, store.memo) == sha256
            for name, sha256 in artifact.files.items()
            if name != "README.md"
        )
        if same:
            (model / "README.md").write_text(card, "utf-8")
            return
    # Names of their own, so that what a killed run left is cleared away here.
    partial, old = model.with_name(".model.partial"), model.with_name(".model.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, partial)
    (partial / "README.md").write_text(card, "utf-8")
    if model.exists():
        model.rename(old)
    partial.rename(model)
    shutil.rmtree(old, ignore_errors=True)
