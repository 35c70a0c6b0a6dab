"""Any models on any speech, without an experiment: `lors evaluate`. No torch and no Prefect here."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from lors.config import Experiment, parse_experiment, put
from lors.errors import ConfigError, CorpusError, InputError, LorsError
from lors.files import write_json
from lors.isolate import Slots
from lors.outputs import publish_scores, require_writable
from lors.pipeline import decoding_settings, model_digest, prepare_step, resolve_base, scoring_steps
from lors.resources import shares
from lors.s3_store import open_store
from lors.speech.base_model import check_base
from lors.steps import Source, Step, Workspace, plan, run_step
from lors.store import Artifact, Store
from lors.yaml_text import read_yaml

__all__ = ["corpora_of", "evaluate", "name_models", "request"]

Listener = Callable[[str, Mapping[str, Any]], None]
Progress = Callable[[int, int], AbstractContextManager[Listener]]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_TAKEN = ("languages", "tasks", "corpora", "corpora_of", "evaluate", "store", "resources")
_PRESETS = ("fleurs", "covost2", "mls", "voxpopuli")


def name_models(given: Sequence[str]) -> dict[str, str]:
    """The models of `MODEL` and `NAME=MODEL` by name; without a name, by the last part of a folder or hub id.

    Raises InputError for a name that is no plain word, and for two models of one name.
    """
    named: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals or "/" in name:  # a folder may have a = in it
            name, model = Path(text).name, text
        if not _NAME.fullmatch(name) or not model:
            raise InputError(f"{text!r} names no model: give a folder or hub id, or NAME=MODEL, NAME a plain word")
        if name in named:
            raise InputError(f"two models are called {name}: give them names, as in first={named[name]} other={model}")
        named[name] = model
    return named


def corpora_of(text: str) -> dict[str, Any]:
    """The setting `corpora` for what `--corpus` says: `synthetic`, a preset, a manifest or folder, or a hub id.

    A path with {split} in it and a single table are manifests, another path is a folder, as in docs/data.md.
    """
    if text == "synthetic":
        return {"source": "synthetic"}
    if text in _PRESETS:
        return {"source": "datasets", "preset": text}
    if "{split}" in text or _is_table(text):
        return {"source": "manifest", "path": text if "{split}" in text else _ONE_FILE}
    if "{language}" in text or Path(text).is_dir():
        return {"source": "folder", "path": text}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not Path(text).exists():
        return {"source": "datasets", "path": text}
    raise InputError(
        f"--corpus {text!r} is neither an experiment's YAML file, a folder, a manifest with {{split}} in its path, a "
        f"hub id nor one of synthetic, {', '.join(_PRESETS)}: see docs/data.md"
    )


_ONE_FILE = "{language} {split}"  # stands for a manifest that does not say its split in its name


def _is_table(text: str) -> bool:
    return Path(text).suffix in (".csv", ".tsv", ".jsonl", ".parquet") and Path(text).is_file()


def request(
    models: Mapping[str, str],
    corpus: str,
    *,
    languages: Sequence[str] = (),
    tasks: Sequence[str] = (),
    split: str = "test",
    limit: int | None = None,
    changes: Sequence[str] = (),
    output: Path | None = None,
    store: Path | None = None,
) -> Experiment:
    """What to evaluate as an experiment of which only the speech and the decoding count.

    With a YAML file as `corpus`, its languages, tasks, speech and decoding are taken where they are not given. `limit`
    is the most utterances a language, the first ones.

    Raises ConfigError and InputError that name what is wrong.
    """
    data: dict[str, Any] = {}
    if Path(corpus).suffix in (".yaml", ".yml"):
        try:
            data = read_yaml(Path(corpus).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"the experiment file {corpus} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"the experiment file {corpus} is not a mapping of settings")
        data = {key: data[key] for key in _TAKEN if key in data}
        if languages:
            data["languages"] = list(languages)
            if isinstance(own := data.get("evaluate") or {}, dict):
                data["evaluate"] = {**own, "guard": []}
            data["corpora_of"] = _only(languages, data.get("corpora_of"))
            if isinstance(data.get("corpora"), dict) and "overrides" in data["corpora"]:
                data["corpora"]["overrides"] = _only(languages, data["corpora"]["overrides"])
    else:
        if not languages:
            raise InputError("give the language that is spoken, as in --language es (several times for several)")
        data = {"languages": list(languages), "tasks": ["transcribe"], "corpora": corpora_of(corpus)}
    if limit is not None:
        _limit(data, split, limit)
    if tasks:
        data["tasks"] = list(tasks)
    data |= {"base": next(iter(models.values())), "output": str(output or "outputs/evaluation")}
    if store is not None:
        data["store"] = str(store)
    for change in changes:
        put(data, change)
    experiment = parse_experiment(data, "lors evaluate")
    if getattr(experiment.corpora, "path", None) == _ONE_FILE:
        if len(experiment.spoken) > 1:
            raise InputError(f"{corpus} is one table for {', '.join(experiment.spoken)}: give one --language")
        path = corpus.replace("{", "{{").replace("}", "}}")
        return experiment.model_copy(update={"corpora": experiment.corpora.model_copy(update={"path": path})})
    return experiment


# What is no mapping where there should be one stays, and is refused with its key when all is parsed.
def _only(languages: Sequence[str], settings: Any) -> Any:
    return {k: own for k, own in settings.items() if k in languages} if isinstance(settings, dict) else settings or {}


def _sections(settings: Any) -> list[dict[str, Any]]:
    return [own for own in settings.values() if isinstance(own, dict)] if isinstance(settings, dict) else []


def _limit(data: dict[str, Any], split: str, limit: int) -> None:
    for own in (*_sections({"corpora": data.get("corpora")}), *_sections(data.get("corpora_of"))):
        synthetic = own.get("source") == "synthetic"
        put(own, f"{'utterances' if synthetic else 'limits'}.{split}={limit}")
        for override in _sections(own.get("overrides")):
            for counts in [override] if synthetic else _sections({"limits": override.get("limits")}):
                counts.pop(split, None)


def evaluate(
    experiment: Experiment,
    models: Mapping[str, str],  # a folder, hub id or `starter` by the name of the system
    *,
    split: str = "test",
    progress: Progress,
) -> dict[str, Any]:
    """Decode the split with every model, score them side by side, and write the experiment's output folder; returns its
    summary. Everything is kept in the store, so a call again goes on where it was stopped.

    p-values and recovery are relative to the systems called `base` and `experts`, where there are such.

    Raises:
        InputError: a model, the speech or a setting is wrong, or the output is that of a run of the pipeline.
        CorpusError: the speech of a language has no translations, and translate is a task.
    """
    if (experiment.output / "model").is_dir():
        raise InputError(f"{experiment.output} holds a run's model and its results; give another folder with --out")
    store, started = open_store(experiment.store), time.monotonic()
    for folder in (experiment.output, store.root):
        require_writable(folder)
    steps = _steps(experiment, models, split, store)
    cached = {planned.step.name for planned in plan(steps, store) if planned.cached}
    with progress(len(steps), len(cached)) as listener:
        artifacts, computed = _run(steps, cached, experiment, store, listener)
    seconds = round(time.monotonic() - started, 1)
    summary = publish_scores(experiment.output, steps, artifacts, computed, store, seconds=seconds)
    summary |= {"models": dict(models), "evaluate": experiment.evaluate.model_dump(mode="json")}
    write_json(experiment.output / "summary.json", summary)
    store.memo.save()
    return summary


def _steps(experiment: Experiment, models: Mapping[str, str], split: str, store: Store) -> dict[str, Step]:
    folders = {name: resolve_base(model) for name, model in models.items()}
    native = min(
        check_base(folder, models[name], experiment.spoken, experiment.tasks) for name, folder in folders.items()
    )
    steps: dict[str, Step] = {}
    for language in experiment.spoken:
        step = prepare_step(experiment, language, split, native, store)
        steps[step.name] = step
    evaluations = {}
    for name, folder in folders.items():
        digest = model_digest(folder, store.memo)
        for language in experiment.spoken:
            step = Step(
                f"evaluate {name} {language}",
                "evaluate_model",
                decoding_settings(experiment.evaluate, language, experiment.tasks, split),
                inputs={"corpus": Source(f"prepare {language} {split}", (f"{split}.parquet",))},
                outside={"base": digest},
                places={"base": str(folder)},
                language=language,
            )
            steps[step.name] = step
            evaluations[f"{name}/{language}"] = step.name
    steps |= scoring_steps(evaluations, experiment, store.memo)
    store.memo.save()
    return steps


def _run(
    steps: Mapping[str, Step], cached: set[str], experiment: Experiment, store: Store, listener: Listener
) -> tuple[dict[str, Artifact], set[str]]:
    """The artifact of every step, and the names of those that were computed."""
    count, threads, devices = shares(experiment)
    futures: dict[str, Future[tuple[Artifact, bool]]] = {}

    def compute(step: Step) -> tuple[Artifact, bool]:
        inputs = {role: futures[source.step].result()[0] for role, source in step.inputs.items()}
        try:
            artifact, hit = run_step(step, inputs, workspace, lambda event: listener(step.name, event))
        except LorsError as error:
            raise type(error)(f"{step.name}: {error}") from error
        if step.stage == "prepare_split" and "translate" in experiment.tasks and not artifact.summary["translations"]:
            raise CorpusError(
                f"the speech of {step.language} has no translation to compare with: leave out the task translate, or "
                "name the column that has it, as in --set corpora.columns.translation=english"
            )
        if step.name not in cached:
            seconds = None if hit else float(store.manifest(artifact)["seconds"])
            listener(step.name, {"finished": True, "seconds": seconds})
        return artifact, hit

    # A thread a step, most of which wait; the slots hold as many processes as this machine can work with.
    with ThreadPoolExecutor(len(steps)) as pool, Slots(count, threads, devices) as slots:
        workspace = Workspace(store, slots, threads)
        for name, step in steps.items():
            futures[name] = pool.submit(compute, step)
        found = {name: future.result() for name, future in futures.items()}
    return {name: artifact for name, (artifact, _) in found.items()}, {n for n, (_, hit) in found.items() if not hit}
