"""The pipeline as data: every step of an experiment, its key, and what is cached. No torch and no Prefect here.

    prepare (language, split) ──► fine-tune (expert) ──► extract (expert) ──► prune (expert)
                         │                                                       │
                         │    combine (system) ◄─────────────────────────────────┘
                         │        └──► score scaling (system, coefficient) ──► select ──► write model
                         └──► fine-tune (multitask, sequential)                               │
                                  └──► evaluate (system, language) ◄──────────────────────────┘ ──► score

A step's key is the hash of its own settings, the digests of its inputs and the version of its algorithm (`VERSIONS`).
Files that a step does not read are no part of its key, so a new test split, say, trains nothing again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors.config import Experiment, Expert, ScalingSearch
from lors.isolate import Slots
from lors.merging.recipe import Recipe
from lors.merging.registry import METHODS
from lors.model_folder import folder_digest, resolve_folder
from lors.prune_settings import PruneSettings
from lors.speech.base_model import check_base
from lors.speech.corpora.sources import describe
from lors.speech.corpus import SPLITS
from lors.starter import MODEL_FOLDER
from lors.store import Artifact, Memo, Store, file_digest, step_key

__all__ = [
    "VERSIONS",
    "PlannedStep",
    "Source",
    "Step",
    "Workspace",
    "build_steps",
    "plan",
    "prepare_step",
    "resolve_base",
    "run_step",
]

VERSIONS = {
    "prepare_split": 1,
    "fine_tune": 2,
    "extract_task_vector": 2,
    "prune_task_vector": 2,
    "combine_task_vectors": 2,
    "score_scaling": 2,
    "select_scaling": 1,
    "write_model": 2,
    "evaluate_model": 1,
    "score_systems": 2,
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
    processes: int = 1
    """That train one expert together."""


def resolve_base(name: str) -> Path:
    """The folder of `starter`, of a Hugging Face id or of a folder; raises CheckpointError."""
    return MODEL_FOLDER if name == "starter" else resolve_folder(name)


def build_steps(experiment: Experiment, store: Store) -> dict[str, Step]:
    """Every step by name, each after those it reads; reads the base's config and the sources' contents, no more.

    Raises InputError: the base is missing or not supported, it lacks a language, a corpus is missing.
    """
    base = resolve_base(experiment.base)
    native = check_base(base, experiment.base, experiment.spoken, experiment.tasks)
    builder = _Builder(experiment, str(base), _base_digest(base, store.memo), native, store)
    builder.build()
    store.memo.save()
    return builder.steps


# What `from_pretrained` reads beside the weights and config.json.
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


def prepare_step(experiment: Experiment, language: str, split: str, native: float, store: Store) -> Step:
    """The step that makes one split, for a base with a `native` window in seconds; raises InputError as the source."""
    corpora = experiment.speech_of(language)
    source = describe(corpora, language, split, store.memo)
    settings: dict[str, Any] = {
        "language": language,
        "split": split,
        "source": corpora.source,
        "min_seconds": corpora.min_seconds,
        "max_seconds": min(corpora.max_seconds, native),
        "max_rejected": corpora.max_rejected,
        **source.settings,
    }
    return Step(
        f"prepare {language} {split}",
        "prepare_split",
        settings,
        outside=source.outside,
        places=source.places,
        language=language,
    )


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
        guards = {language: {"test": self.prepare_split(language, "test")} for language in experiment.evaluate.guard}
        vectors = {expert: self.expert(expert, corpora) for expert in experiment.experts}
        evaluations: dict[str, str] = {}

        def evaluate(system: str, model: str | None) -> None:
            for language, corpus in {**corpora, **guards}.items():
                evaluations[f"{system}-{language}"] = self.evaluate(system, model, language, corpus)

        evaluate("base", None)
        for expert in experiment.experts:
            evaluations[f"experts-{expert.id}"] = self.evaluate_expert(expert, corpora)
        for baseline, model in self.baselines(corpora).items():
            evaluate(baseline, model)
        for method in experiment.systems:
            recipe = experiment.recipe(method)
            if settings := recipe.pruning:
                pruned = {expert: self.prune(expert, vector, method, settings) for expert, vector in vectors.items()}
                evaluate(method, self.merge(recipe, pruned, corpora))
            else:
                evaluate(method, self.merge(recipe, vectors, corpora))
        self.add(
            "score systems",
            "score_systems",
            {
                "normaliser": experiment.evaluate.normaliser,
                "guard": experiment.evaluate.guard,
                "order": list(evaluations),
            },
            inputs={role: Source(step, ("hypotheses.parquet",)) for role, step in evaluations.items()},
        )

    def prepare(self, language: str) -> Corpus:
        """The steps that make a language's splits."""
        return {split: self.prepare_split(language, split) for split in SPLITS}

    def prepare_split(self, language: str, split: str) -> str:
        step = prepare_step(self.experiment, language, split, self.native, self.store)
        self.steps[step.name] = step
        return step.name

    def train(
        self,
        name: str,
        parts: Sequence[Expert],
        corpora: Mapping[str, Corpus],
        updates: int = 1,  # as many as so many experts take together
        start: str | None = None,  # the training whose result this one starts from; None is the base
        **about: Any,
    ) -> str:
        """One training on the speech of one or more (language, task)s."""
        finetune = self.experiment.finetune
        longer: dict[str, Any] = {"steps": updates * finetune.steps}
        if finetune.max_hours is not None:
            longer["max_hours"] = updates * finetune.max_hours
        settings: dict[str, Any] = {
            "parts": [[part.language, part.task] for part in parts],
            "finetune": finetune.model_copy(update=longer).model_dump(mode="json"),
        }
        if finetune.validation is not None and finetune.validation.metric == "score":
            settings["evaluate"] = self.experiment.evaluate.model_dump(exclude={"guard"})
        inputs = {
            f"{split}-{language}": _parquet(corpora[language], split)
            for language in dict.fromkeys(part.language for part in parts)
            for split in ("train", "validation")
        }
        if start is not None:
            inputs["start"] = Source(start, ("*.safetensors", "*.json"))
        where: dict[str, Any] = self.on_base if start is None else {"places": {}}
        if (curves := self.experiment.resources.tensorboard) is not None:
            where["places"]["tensorboard"] = str((curves / name.removeprefix("fine-tune ")).absolute())
        return self.add(name, "fine_tune", settings, inputs=inputs, **where, **about)

    def expert(self, expert: Expert, corpora: Mapping[str, Corpus]) -> str:
        about: dict[str, Any] = {"language": expert.language, "task": expert.task}
        trained = self.train(f"fine-tune {expert.id}", [expert], corpora, **about)
        return self.add(
            f"extract {expert.id}",
            "extract_task_vector",
            {},
            inputs={"expert": Source(trained, ("*.safetensors", "*.json"))},
            **self.on_base,
            **about,
        )

    def baselines(self, corpora: Mapping[str, Corpus]) -> dict[str, str]:
        """The last step of the training of each baseline that trains one model for all languages."""
        experiment, found = self.experiment, {}
        if "multitask" in experiment.baselines:
            count = len(experiment.experts)
            found["multitask"] = self.train("fine-tune multitask", experiment.experts, corpora, updates=count)
        if "sequential" in experiment.baselines:
            last: str | None = None
            for language in experiment.order:
                parts = [expert for expert in experiment.experts if expert.language == language]
                name = f"fine-tune sequential {language}"
                last = self.train(name, parts, corpora, updates=len(parts), start=last, language=language)
            assert last is not None, "an experiment has languages"
            found["sequential"] = last
        return found

    def prune(self, expert: Expert, vector: str, method: str, settings: PruneSettings) -> str:
        return self.add(
            f"prune {expert.id}" if method == "lors" else f"prune {expert.id} as {method}",
            "prune_task_vector",
            settings.model_dump(mode="json"),
            inputs={"task_vector": Source(vector)},
            language=expert.language,
            task=expert.task,
        )

    def merge(self, recipe: Recipe, vectors: Mapping[Expert, str], corpora: Mapping[str, Corpus]) -> str:
        """The step that writes the merged model."""
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
                        **experiment.evaluate.model_dump(exclude={"guard"}),
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
        return self.add(
            f"write {method}",
            "write_model",
            {"method": method, **scales},
            inputs={"combined": Source(combined), "scaling": Source(selected)},
            **self.on_base,
        )

    def _decoding(self, language: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        decoding = self.experiment.evaluate.model_dump(exclude={"normaliser", "guard"})
        return {"language": language, "tasks": tasks, "split": "test", **decoding}

    def evaluate(self, system: str, model: str | None, language: str, corpus: Corpus) -> str:
        """All tasks of one language by the model that a step made; None is the base."""
        inputs = {"corpus": _parquet(corpus, "test")}
        where: dict[str, Any] = self.on_base if model is None else {}
        if model is not None:
            inputs["model"] = Source(model, ("*.safetensors", "*.json"))
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
                "processes": workspace.processes,
            },
            on_event,
            start,
            fresh=step.stage in _OWN_PROCESS,
            log=production.work / "log.txt",
        )
        artifact = production.publish(summary, time.monotonic() - started)
        return artifact, False
