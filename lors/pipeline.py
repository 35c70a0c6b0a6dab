"""The pipeline as data: every step of an experiment, its key, and what is cached. No torch and no Prefect here.

    prepare (language, split) ──► fine-tune (expert) ──► extract (expert) ──► prune (expert)
                                                                                 │
    combine (system) ◄───────────────────────────────────────────────────────────┘
        └──► score scaling (system, coefficient) ──► select ──► write model ──► evaluate (system, language) ──► score

A step's key is the hash of its own settings, the digests of its inputs and the version of its algorithm (`VERSIONS`).
Files that a step does not read are no part of its key, so a new test split, say, trains nothing again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors.config import Experiment, Expert, ScalingSearch
from lors.errors import CheckpointError, ConfigError
from lors.isolate import Slots
from lors.merging.recipe import Recipe
from lors.merging.registry import METHODS
from lors.model_folder import folder_digest, read_json, resolve_folder
from lors.prune_settings import PruneSettings
from lors.speech.corpora.settings import ManifestCorpora, SyntheticCorpora
from lors.speech.corpus import SPLITS
from lors.starter import MODEL_FOLDER
from lors.store import Artifact, Memo, Store, file_digest, step_key

__all__ = ["VERSIONS", "PlannedStep", "Source", "Step", "Workspace", "build_steps", "plan", "resolve_base", "run_step"]

VERSIONS = {
    "prepare_split": 1,
    "fine_tune": 1,
    "extract_task_vector": 2,
    "prune_task_vector": 2,
    "combine_task_vectors": 2,
    "score_scaling": 2,
    "select_scaling": 1,
    "write_model": 2,
    "evaluate_model": 1,
    "score_systems": 1,
}
"""Raised when the same settings and inputs would give another result."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a step reads of an earlier one: some of its files, or all."""

    step: str
    files: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class Step:
    """One cached unit of work."""

    name: str
    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Source] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)
    """Digests of what the step reads that is not in the store."""
    places: Mapping[str, Any] = field(default_factory=dict)
    """Where that lies; not part of the key, so a corpus or a base can move."""
    language: str | None = None
    task: str | None = None

    def key(self, artifacts: Mapping[str, Artifact]) -> str:
        """The step's key, from the artifact of each input (by the input's name)."""
        return step_key(self.stage, VERSIONS[self.stage], self.settings, self.input_digests(artifacts))

    def input_digests(self, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
        """The digest of each input: of the files that the step reads, not of their neighbours."""
        read = {name: artifacts[name].digest_of(*source.files) for name, source in self.inputs.items()}
        return {**self.outside, **read}


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step and what a run would do with it."""

    step: Step
    cached: bool
    reason: str
    """Why it has to run; empty where it is cached."""
    seconds: float | None
    """What it took when it ran, where it is cached."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """What steps run in: the store, and the child processes that compute them."""

    store: Store
    slots: Slots
    threads: int


def resolve_base(name: str) -> Path:
    """The folder of `starter`, of a Hugging Face id or of a folder; raises CheckpointError."""
    return MODEL_FOLDER if name == "starter" else resolve_folder(name)


def build_steps(experiment: Experiment, store: Store) -> dict[str, Step]:
    """Every step by name, each after those it reads; reads the base's config and the sources' contents, no more.

    Raises InputError: the base is missing or no multilingual Whisper, it lacks a language, a corpus is missing.
    """
    base = resolve_base(experiment.base)
    native = _check_base(base, experiment)
    builder = _Builder(experiment, str(base), _base_digest(base, store.memo), native, store)
    builder.build()
    store.memo.save()
    return builder.steps


def _check_base(base: Path, experiment: Experiment) -> float:
    """The base's native window in seconds."""
    config = read_json(base / "config.json")
    if config.get("model_type") != "whisper":
        raise CheckpointError(f"the base {base} is of type {config.get('model_type')!r}: LoRS works on Whisper models")
    known = read_json(base / "generation_config.json").get("lang_to_id")
    if not known:
        raise CheckpointError(f"the base {base} is not multilingual: its generation_config.json has no lang_to_id")
    for language in experiment.languages:
        if f"<|{language}|>" not in known:
            codes = ", ".join(sorted(token.strip("<|>") for token in known))
            raise ConfigError(
                f"languages: the base {experiment.base} has no token for {language!r}, choose another language or "
                f"base (it has {codes})"
            )
    return float(config.get("max_source_positions", 1500)) / 50


# What `from_pretrained` reads of a Whisper beside the weights and config.json.
_TEXT_SIDE = (
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def _base_digest(base: Path, memo: Memo) -> str:
    """Of all that shapes an expert: the weights, and the tokenizer, the features and the way of decoding."""
    digests = [folder_digest(base, memo)]
    digests += [f"{name} {file_digest(base / name, memo)}" for name in _TEXT_SIDE if (base / name).is_file()]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


Corpus = Mapping[str, str]
"""The step that makes each split of a language."""


def _parquet(corpus: Corpus, split: str) -> Source:
    return Source(corpus[split], (f"{split}.parquet",))


@dataclass
class _Builder:
    experiment: Experiment
    base: str
    base_digest: str
    native: float
    store: Store
    steps: dict[str, Step] = field(default_factory=dict)

    def add(self, name: str, stage: str, settings: Mapping[str, Any], **rest: Any) -> str:
        self.steps[name] = Step(name, stage, settings, **rest)
        return name

    @property
    def on_base(self) -> dict[str, Any]:
        return {"outside": {"base": self.base_digest}, "places": {"base": self.base}}

    def build(self) -> None:
        experiment = self.experiment
        corpora = {language: self.prepare(language) for language in experiment.languages}
        vectors = {expert: self.expert(expert, corpora[expert.language]) for expert in experiment.experts}
        evaluations = {f"base-{language}": self.evaluate("base", language, corpora) for language in corpora}
        for expert in experiment.experts:
            evaluations[f"experts-{expert.id}"] = self.evaluate_expert(expert, corpora)
        for method in experiment.systems:
            recipe = experiment.recipe(method)
            if settings := recipe.pruning:
                pruned = {expert: self.prune(expert, vector, method, settings) for expert, vector in vectors.items()}
                self.merge(recipe, pruned, corpora)
            else:
                self.merge(recipe, vectors, corpora)
            for language in corpora:
                evaluations[f"{method}-{language}"] = self.evaluate(method, language, corpora)
        self.add(
            "score systems",
            "score_systems",
            {"normaliser": experiment.evaluate.normaliser, "order": list(evaluations)},
            inputs={role: Source(step, ("hypotheses.parquet",)) for role, step in evaluations.items()},
        )

    def prepare(self, language: str) -> Corpus:
        """The steps that make a language's splits."""
        return {split: self.prepare_split(language, split) for split in SPLITS}

    def prepare_split(self, language: str, split: str) -> str:
        corpora = self.experiment.speech_of(language)
        settings: dict[str, Any] = {
            "language": language,
            "split": split,
            "source": corpora.source,
            "min_seconds": corpora.min_seconds,
            "max_seconds": min(corpora.max_seconds, self.native),
            "max_rejected": corpora.max_rejected,
        }
        rest: dict[str, Any] = {"language": language}
        if isinstance(corpora, SyntheticCorpora):
            from lors.speech.corpora.synthetic import LANGUAGES, generator_versions

            if language not in LANGUAGES:
                raise ConfigError(
                    f"languages: the synthetic corpus does not speak {language!r}, choose from {', '.join(LANGUAGES)} "
                    "or give a manifest"
                )
            settings |= {"limit": getattr(corpora.utterances, split), "seed": corpora.seed}
            rest["outside"] = generator_versions()
        else:
            from lors.speech.corpora.manifest import content_digest

            assert isinstance(corpora, ManifestCorpora)
            path = Path(corpora.path.format(language=language, split=split))
            settings |= {"columns": corpora.columns, "limit": getattr(corpora.limits, split)}
            rest["outside"] = {"manifest": content_digest(path, corpora.columns, self.store.memo)}
            rest["places"] = {"manifest": str(path.absolute())}
        return self.add(f"prepare {language} {split}", "prepare_split", settings, **rest)

    def expert(self, expert: Expert, corpus: Corpus) -> str:
        about = {"language": expert.language, "task": expert.task}
        trained = self.add(
            f"fine-tune {expert.id}",
            "fine_tune",
            {**about, **self.experiment.finetune.model_dump()},
            inputs={split: _parquet(corpus, split) for split in ("train", "validation")},
            **self.on_base,
            **about,
        )
        return self.add(
            f"extract {expert.id}",
            "extract_task_vector",
            {},
            inputs={"expert": Source(trained, ("*.safetensors", "*.json"))},
            **self.on_base,
            **about,
        )

    def prune(self, expert: Expert, vector: str, method: str, settings: PruneSettings) -> str:
        return self.add(
            f"prune {expert.id}" if method == "lors" else f"prune {expert.id} as {method}",
            "prune_task_vector",
            settings.model_dump(mode="json"),
            inputs={"task_vector": Source(vector)},
            language=expert.language,
            task=expert.task,
        )

    def merge(self, recipe: Recipe, vectors: Mapping[Expert, str], corpora: Mapping[str, Corpus]) -> None:
        experiment, method = self.experiment, recipe.method
        combining = recipe.model_dump(mode="json", exclude={"scaling"})
        scales = {"groups": combining["groups"]}
        combined = self.add(
            f"combine {method}",
            "combine_task_vectors",
            {"recipe": combining, "weights": {expert.id: experiment.weight(expert) for expert in vectors}},
            inputs={expert.id: Source(step) for expert, step in vectors.items()},
            **self.on_base,
        )
        scaling = experiment.merge.scaling
        points: dict[str, Source] = {}
        if isinstance(scaling, ScalingSearch) and METHODS[method].searches_scaling:
            for value in scaling.search:
                name = self.add(
                    f"score {method} at {value:.15g}",
                    "score_scaling",
                    {
                        "scaling": value,
                        "metric": scaling.metric,
                        "tasks": experiment.tasks,
                        "languages": experiment.languages,
                        **scales,
                        **experiment.evaluate.model_dump(),
                    },
                    inputs={
                        "combined": Source(combined),
                        **{f"corpus-{code}": _parquet(corpus, "validation") for code, corpus in corpora.items()},
                    },
                    **self.on_base,
                )
                points[f"{value:.15g}"] = Source(name)
            chosen: float | None = None
        elif isinstance(scaling, ScalingSearch) or not METHODS[method].searches_scaling:
            chosen = recipe.scaling
        else:
            chosen = scaling
        selected = self.add(
            f"select scaling {method}", "select_scaling", {"method": method, "scaling": chosen}, inputs=points
        )
        self.add(
            f"write {method}",
            "write_model",
            {"method": method, **scales},
            inputs={"combined": Source(combined), "scaling": Source(selected)},
            **self.on_base,
        )

    def _decoding(self, language: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        decoding = self.experiment.evaluate.model_dump(exclude={"normaliser"})
        return {"language": language, "tasks": tasks, "split": "test", **decoding}

    def evaluate(self, system: str, language: str, corpora: Mapping[str, Corpus]) -> str:
        inputs = {"corpus": _parquet(corpora[language], "test")}
        where: dict[str, Any] = self.on_base if system == "base" else {}
        if system != "base":
            inputs["model"] = Source(f"write {system}", ("*.safetensors", "*.json"))
        settings = self._decoding(language, self.experiment.tasks)
        name = f"evaluate {system} {language}"
        return self.add(name, "evaluate_model", settings, inputs=inputs, language=language, **where)

    def evaluate_expert(self, expert: Expert, corpora: Mapping[str, Corpus]) -> str:
        return self.add(
            f"evaluate expert {expert.id}",
            "evaluate_model",
            self._decoding(expert.language, (expert.task,)),
            inputs={
                "corpus": _parquet(corpora[expert.language], "test"),
                "model": Source(f"fine-tune {expert.id}", ("*.safetensors", "*.json")),
            },
            language=expert.language,
            task=expert.task,
        )


def plan(steps: Mapping[str, Step], store: Store) -> list[PlannedStep]:
    """What a run would do with each step: take it from the store, or compute it, and why."""
    found: dict[str, Artifact] = {}
    planned = []
    for step in steps.values():
        waiting = [source.step for source in step.inputs.values() if source.step not in found]
        if waiting:
            planned.append(PlannedStep(step, False, f"after {waiting[0]}", None))
            continue
        key = step.key({name: found[source.step] for name, source in step.inputs.items()})
        artifact = store.find(step.stage, key)
        if artifact is None:
            planned.append(PlannedStep(step, False, store.why(step.stage, key) or "not made yet", None))
        else:
            found[step.name] = artifact
            planned.append(PlannedStep(step, True, "", float(store.manifest(artifact)["seconds"])))
    return planned


# Each model and each training has its child to itself: its memory is given back, its crash is its own.
_OWN_PROCESS = {"fine_tune"}


def run_step(
    step: Step,
    artifacts: Mapping[str, Artifact],
    workspace: Workspace,
    on_event: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> tuple[Artifact, bool]:
    """The artifact of a step, and whether it was in the store already; else it is computed in a child process."""
    store = workspace.store
    digests = step.input_digests(artifacts)
    key = step_key(step.stage, VERSIONS[step.stage], step.settings, digests)
    with store.produce(
        step.stage,
        key,
        version=VERSIONS[step.stage],
        settings=step.settings,
        inputs=digests,
        on_wait=lambda message: on_event({"message": message}),
    ) as production:
        if production.hit is not None:
            return production.hit, True
        started = 0.0

        def start() -> None:
            nonlocal started
            started = time.monotonic()

        summary = workspace.slots.run(
            f"lors.stages:{step.stage}",
            {
                "settings": dict(step.settings),
                "inputs": {name: str(store.path(artifact)) for name, artifact in artifacts.items()},
                "places": dict(step.places),
                "digests": digests,
                "out": str(production.out),
                "work": str(production.work),
                "threads": workspace.threads,
            },
            on_event,
            start,
            fresh=step.stage in _OWN_PROCESS,
            log=production.work / "log.txt",
        )
        artifact = production.publish(summary, time.monotonic() - started)
        return artifact, False
