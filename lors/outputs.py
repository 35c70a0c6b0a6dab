"""What a run leaves under `output`: the merged model, compact experts, results, hypotheses, the summary."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lors.config import Experiment
from lors.errors import InputError, LorsError
from lors.files import file_digest, storage_errors, write_json
from lors.merging.settings import TOUCHED_UP
from lors.model_folder import read_json
from lors.pipeline import product_step, scaling_step, split_name
from lors.scaling import chosen_value
from lors.steps import Step
from lors.store import Artifact, Store
from lors.sweep import Variant, sweep_table
from lors.training.settings import LOG
from lors.versions import keep_current, record_current, swap_folder

__all__ = ["publish", "publish_scores", "publish_sweep", "require_no_run", "require_writable", "touch_up_advice"]

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


def require_no_run(variants: Sequence[Variant], output: Path) -> None:
    """Raises InputError, before anything is computed, where the tables of several variants would replace those of a
    run's one model in `output`, and the model would stay.
    """
    if variants[0].experiment.output != output and (output / "summary.json").is_file():
        raise InputError(
            f"the folder {output} holds a run of one model, whose tables a sweep or `seeds` would replace: name "
            "another folder with --set output=FOLDER"
        )


def publish(
    experiment: Experiment,
    steps: Mapping[str, Step],
    artifacts: Mapping[str, Artifact],
    computed: Collection[str],
    store: Store,
    *,
    seconds: float | None = None,
    models: bool = True,
    how: str = "run",
) -> dict[str, Any]:
    """Write everything of DESIGN's output from the store; returns the content of summary.json, written last but for
    version.json.

    `computed` names the steps that this run computed, in `seconds` by the clock; of several names of one key, the first
    is said to have run. Files that are there already with the right content are left alone; where another model is
    there, it is kept as an earlier version (`lors.versions`), and `how` says what made the new one. Without `models`,
    no merged model, no compact experts and no version.
    """
    output, product = experiment.output, artifacts[product_step(experiment)]
    if models:
        keep_current(output, product.digest)
    scores = store.path(artifacts["score systems"])
    common = publish_scores(output, steps, artifacts, computed, store, seconds=seconds)
    with storage_errors(output):
        experts = {
            f"{expert.id}.safetensors": store.path(artifacts[step]) / "task_vector.safetensors"
            for expert in experiment.experts
            if (step := f"prune {expert.id}") in steps
        }
        written = store.path(product)
        sizes = {
            "model": sum(path.stat().st_size for path in written.glob("*.safetensors")),
            "experts": {name.removesuffix(".safetensors"): path.stat().st_size for name, path in experts.items()},
        }
        kept = experts if models else {}
        for name, path in kept.items():
            _copy(path, output / "experts" / name, store)
        _prune_folder(output / "experts", set(kept))
        if models:
            _publish_model(store, product, output / "model", _card(experiment, scores))
        selects = {experiment.merge.method: scaling_step(experiment)}
        selects |= {system: f"select scaling {system}" for system in experiment.systems}
        curves = {system: read_json(store.path(artifacts[step]) / "scaling.json") for system, step in selects.items()}
        validation = {system: chosen_value(curve) for system, curve in curves.items()}
        untouched = False
        if experiment.merge.touch_up is not None:
            validation[TOUCHED_UP] = artifacts[product_step(experiment)].summary.get("best_value")
            untouched = "kept" in artifacts["touch up"].summary
        settings = yaml.safe_dump(experiment.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        (output / "experiment.yaml").write_text(settings, "utf-8")
        (output / "training.csv").write_text(_training(steps, artifacts, store), "utf-8")
        if experiment.diagnose:
            _copy(store.path(artifacts["diagnose experts"]) / "diagnosis.json", output / "diagnosis.json", store)
        else:
            (output / "diagnosis.json").unlink(missing_ok=True)
        summary = {
            **common,
            "model": f"{experiment.product}, in model/" if models else None,
            "product": {"system": experiment.product, "step": product_step(experiment)},
            "sizes": sizes,
            "scaling": artifacts[scaling_step(experiment, untouched)].summary["scaling"],
            "curves": curves,
            "validation": validation,
            "seeds": {"finetune": experiment.finetune.seed, "corpora": getattr(experiment.corpora, "seed", None)},
            "experiment": experiment.model_dump(mode="json"),
        }
        write_json(output / "summary.json", summary)
        if models:
            record_current(output, how)
        store.memo.save()
    return summary


def publish_scores(
    output: Path,
    steps: Mapping[str, Step],
    artifacts: Mapping[str, Artifact],
    computed: Collection[str],
    store: Store,
    *,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Write the tables and the hypotheses of the step `score systems`; returns the part of summary.json that does not
    depend on what the systems are. Arguments as in `publish`.
    """
    scores = store.path(artifacts["score systems"])
    summary = read_json(scores / "summary.json")
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / "sweep.json").unlink(missing_ok=True)  # the report would be of the sweep that was here
        for name in artifacts["score systems"].files:
            if "/" in name:  # "hypotheses-/etc/x" would leave the folder; the step makes no folders
                raise LorsError(
                    f"the stored {artifacts['score systems'].stage} step {artifacts['score systems'].key} has the file "
                    f"{name!r}, which it did not make; delete its entry in {store.root} and run again"
                )
            if name.startswith("hypotheses-"):
                _copy(scores / name, output / "hypotheses" / name.removeprefix("hypotheses-"), store)
            elif name != "summary.json":
                _copy(scores / name, output / name, store)
        _prune_folder(output / "hypotheses", {f"{system}.parquet" for system in summary["systems"]})
    corpora: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        if step.stage == "prepare_split":
            language, split = step.settings["language"], step.settings["split"]
            if name == split_name(language, split):
                corpora.setdefault(language, {})[split] = artifacts[name].summary
    ran = {artifacts[name].key: name for name in reversed([*steps]) if name in computed}
    return {
        **summary,
        "seconds": seconds,
        "corpora": corpora,
        "steps": [
            {
                "name": name,
                "stage": step.stage,
                "key": artifacts[name].key,
                "state": "run" if ran.get(artifacts[name].key) == name else "cached",
                "seconds": store.manifest(artifacts[name])["seconds"],
            }
            for name, step in steps.items()
        ],
        "digests": {name: artifacts[name].digest for name in steps},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def publish_sweep(output: Path, found: Sequence[tuple[Variant, Mapping[str, Any]]]) -> None:
    """What several variants, published already, have side by side: one tidy table of results, one of means."""
    import pandas as pd

    from lors.scoring.files import load_results, write_results

    frames = []
    for variant, _ in found:
        frame = load_results(variant.experiment.output)
        for place, (name, value) in enumerate(variant.columns.items()):
            frame.insert(place, name, value if isinstance(value, str | int | float) else json.dumps(value))
        frames.append(frame)
    rows, table = sweep_table(found)
    listed = [
        {"name": v.name, "folder": v.folder, "changes": v.changes, "seed": v.seed, "summary": summary["systems"]}
        for v, summary in found
    ]
    with storage_errors(output):
        write_results(pd.concat(frames, ignore_index=True), output)
        (output / "table.md").write_text(table, "utf-8")
        write_json(output / "sweep.json", {"variants": listed, "means": rows})


def touch_up_advice(experiment: Experiment, touched: Mapping[str, Any]) -> str | None:
    """What to change where touching up made the merged model no better on validation; None where it did, or where
    nothing tells. `touched` is the summary of the step `touch up`.
    """
    own = experiment.merge.touch_up
    if own is None or touched.get("best_step") != 0:
        return None
    scaling = "" if own.scaling is None else "lower merge.touch_up.scaling, or "
    return (
        f"Touching up made the model no better on validation ({touched['best_value']:.3g} without), so the merged "
        f"model is kept as it is: {scaling}give merge.touch_up more steps or a lower learning_rate, or leave it out."
    )


_TRAINING = ("step", "loss", "learning_rate", "validation_loss", "validation_score")


def _training(steps: Mapping[str, Step], artifacts: Mapping[str, Artifact], store: Store) -> str:
    """The logs of all trainings as one CSV table; one that makes several experts has the names of all."""
    names: dict[str, list[str]] = {}
    for name, step in steps.items():
        if step.stage in ("fine_tune", "touch_up"):
            names.setdefault(artifacts[name].key, []).append(name)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("model", *_TRAINING))
    for own in names.values():
        model = " and ".join(name.removeprefix("fine-tune ") for name in own)
        log = (store.path(artifacts[own[0]]) / LOG).read_text("utf-8")
        for entry in map(json.loads, log.splitlines()):
            table.writerow((model, *(entry.get(column) for column in _TRAINING)))
    return text.getvalue()


def _card(experiment: Experiment, scores: Path) -> Callable[[str], str]:
    """What puts the results into a model card."""
    from lors.model_card import card_with_results
    from lors.scoring.files import load_results

    summary, results = read_json(scores / "summary.json"), load_results(scores)
    corpus = {language: experiment.speech_of(language).source for language in experiment.spoken}
    product = experiment.product
    return lambda card: card_with_results(card, summary, results, model_name=product, corpus=corpus)


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


def _publish_model(store: Store, artifact: Artifact, model: Path, with_results: Callable[[str], str]) -> None:
    """The model's folder in one rename, its card with the results; the old one is there until then."""
    source = store.path(artifact)
    card = with_results((source / "README.md").read_text("utf-8"))
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
    # A name of its own, so that what a killed run left is cleared away here.
    partial = model.with_name(".model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in artifact.files:  # and nothing else, such as a link that somebody put there
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, partial / name)
    (partial / "README.md").write_text(card, "utf-8")
    swap_folder(partial, model)
