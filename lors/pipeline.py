"""The pipeline as data: every step of an experiment, and what it reads. No torch and no Prefect here.

prepare (language, split) ──► fine-tune (expert) ──► extract (expert) ──► prune (expert)
                     │                                                       │
                     │    combine (system) ◄─────────────────────────────────┘
                     │        └──► score scaling (system, coefficient) ──► select ──► write model
                     └──► fine-tune (baselines)                                          │
                              └──► evaluate (system, language) ◄──────────────────────────┘ ──► score
evaluate takes the experts, and the base with each pruned one (switched), too; diagnose reads the extracted ones.
touch up goes on from what `write model` made, at its own coefficient where it has one, on the speech of all languages
(and keeps that at the searched one where it is better on validation), and is evaluated too; languages that came later
are each put on top of that (add) and touched up; a held expert reads `prepare held` of other languages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors.config import Evaluate, Experiment, Expert
from lors.errors import ConfigError, InputError
from lors.files import Memo, file_digest
from lors.groups import GROUPS, unmatched
from lors.merging.recipe import Recipe
from lors.merging.registry import METHODS
from lors.merging.settings import TOUCHED_UP, TouchUp
from lors.model_folder import folder_digest, parameter_shapes, resolve_folder
from lors.prune_settings import PruneSettings
from lors.scaling import schedule
from lors.settings import Section, nearest
from lors.speech.base_model import check_base
from lors.speech.corpora.sources import describe
from lors.speech.corpus import SPLITS
from lors.starter import MODEL_FOLDER
from lors.steps import Source, Step
from lors.store import Artifact, Store
from lors.training.settings import Finetune

__all__ = [
    "KnownSplit",
    "Sources",
    "build_steps",
    "comet_digest",
    "decoding_settings",
    "keep_base_step",
    "model_digest",
    "prepare_step",
    "product_step",
    "resolve_base",
    "scaling_step",
    "scoring_steps",
    "sources_of",
    "split_name",
]


class KnownSplit(Section):
    """What was read of the source of one split."""

    settings: dict[str, Any]
    outside: dict[str, str]


class Sources(Section):
    """What one machine has read of the base and the corpora, for another that has the store alone."""

    base: dict[str, Any] | None
    """The artifact of `keep base`; None: the starter, which every machine has."""
    splits: dict[str, KnownSplit]
    """By the name of the step that prepares it."""


def sources_of(steps: Mapping[str, Step], base: Artifact | None) -> Sources:
    """What `build_steps` read to make these steps, and the base as the store has it."""
    splits = {
        name: KnownSplit(settings=dict(step.settings), outside=dict(step.outside))
        for name, step in steps.items()
        if step.stage == "prepare_split"
    }
    return Sources(base=None if base is None else base.to_json(), splits=splits)


def keep_base_step(experiment: Experiment, store: Store) -> Step:
    """The step that copies the base into the store; raises CheckpointError."""
    folder = resolve_base(experiment.base)
    outside = {"base": model_digest(folder, store.memo)}
    return Step("keep base", "keep_base", {}, outside=outside, places={"base": str(folder)})


def resolve_base(name: str) -> Path:
    """The folder of `starter`, of a Hugging Face id or of a folder; raises CheckpointError."""
    return MODEL_FOLDER if name == "starter" else resolve_folder(name)


def build_steps(experiment: Experiment, store: Store, sources: Sources | None = None) -> dict[str, Step]:
    """Every step by name, each after those it reads; reads the base's config, the names of its parameters where
    `prune` has patterns, and the sources' contents, no more.

    With `sources`, the base is read from the store and the corpora not at all. Raises InputError: the base is missing
    or not supported, it lacks a language, a pattern of `prune` names no parameter of it, a corpus is missing.
    """
    kept = None if sources is None or sources.base is None else Artifact.from_json(sources.base)
    base = resolve_base(experiment.base) if kept is None else store.path(kept)
    native = check_base(base, experiment.base, experiment.heard, experiment.tasks)
    _check_patterns(experiment, base)
    splits = {} if sources is None else sources.splits
    builder = _Builder(experiment, str(base), model_digest(base, store.memo), native, store, splits)
    builder.build()
    store.memo.save()
    return builder.steps


def _check_patterns(experiment: Experiment, base: Path) -> None:
    """Raises ConfigError where a pattern of `prune` names no parameter of the base."""
    for key in ("include", "exclude", "groups"):
        patterns = [pattern for pattern in getattr(experiment.prune, key) if pattern != "*"]
        if patterns and (lost := unmatched(patterns, parameter_shapes(base))):
            raise ConfigError(
                f"prune.{key}: no parameter of the base {experiment.base} belongs to {lost[0]!r}"
                f"{nearest(lost[0], GROUPS)}: name a group of `lors merge --list` or write a pattern such as "
                "'*.fc1.weight'"
            )


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


def model_digest(folder: Path, memo: Memo) -> str:
    """Of all that shapes what a model writes: the weights, the tokenizer, the features and the way of decoding."""
    digests = [folder_digest(folder, memo)]
    digests += [f"{name} {file_digest(folder / name, memo)}" for name in _TEXT_SIDE if (folder / name).is_file()]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def split_name(language: str, split: str, first: int | None = None) -> str:
    """The name of the step that makes a split, or its first utterances, on which other languages' experts are held."""
    return f"prepare {language} {split}" if first is None else f"prepare {language} held"


def prepare_step(
    experiment: Experiment,
    language: str,
    split: str,
    native: float,  # the base's window in seconds
    store: Store,
    first: int | None = None,  # so many utterances alone
) -> Step:
    """The step that makes one split; raises InputError as the source."""
    corpora = experiment.speech_of(language)
    if first is not None:
        corpora = corpora.first(split, first)
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
        split_name(language, split, first),
        "prepare_split",
        settings,
        outside=source.outside,
        places=source.places,
        language=language,
    )


_FIRST = " first"
"""In the names of the steps of the merge that languages are added to."""
_START = " to touch up"
"""In those of what is made with the touch-up's own scaling coefficient."""


def product_step(experiment: Experiment) -> str:
    """The step that makes the model which is written (`Experiment.product`)."""
    merge = experiment.merge
    if merge.touch_up is None:
        return f"write {merge.method}"
    if not merge.added.languages:
        return "touch up"
    return f"{'touch up' if merge.added.steps else 'add'} {merge.added.languages[-1]}"


def scaling_step(experiment: Experiment, kept: bool = False) -> str:
    """The step that has the scaling coefficient of the merge which that model comes from.

    `kept`: touching up made it no better than the merge at its own coefficient, which was taken instead.
    """
    merge = experiment.merge
    which = _FIRST if merge.added.languages else ""
    own = "" if merge.touch_up is None or merge.touch_up.scaling is None or kept else _START
    return f"select scaling {merge.method}{which}{own}"


Corpus = Mapping[str, str]
"""The step that makes each split of a language."""


_MODEL = ("*.safetensors", "*.json")


def decoding_settings(evaluate: Evaluate, language: str, tasks: Sequence[str], split: str) -> dict[str, Any]:
    """The settings of an `evaluate_model` step."""
    own = evaluate.model_dump(include={"backend", "identify"})
    return {"language": language, "tasks": list(tasks), "split": split, **evaluate.decoding(), **own}


def comet_digest(folder: Path, memo: Memo) -> str:
    """Of a COMET model's files; raises ConfigError where there are none."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in _COMET) if folder.is_dir() else []
    if not files:
        raise ConfigError(
            f"evaluate.comet: the folder {folder} holds no COMET model: docs/evaluation.md says how to make one"
        )
    digests = [f"{path.relative_to(folder).as_posix()} {file_digest(path, memo)}" for path in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


_COMET = {".json", ".model", ".safetensors", ".txt", ".yaml"}


def scoring_steps(evaluations: Mapping[str, str], experiment: Experiment, memo: Memo) -> dict[str, Step]:
    """The step that scores all systems, after those that score COMET, one for each evaluation.

    `evaluations` has the names of steps by `SYSTEM/LANGUAGE` or `SYSTEM/LANGUAGE-TASK`, in the order of the table.
    """
    steps = {}
    inputs = {role: Source(step, ("hypotheses.parquet",)) for role, step in evaluations.items()}
    if (comet := experiment.evaluate.comet) is not None and "translate" in experiment.tasks:
        outside = {"comet": comet_digest(comet, memo)}
        for role, step in evaluations.items():
            if not role.endswith("-transcribe"):
                name = step.replace("evaluate", "score COMET of", 1)
                steps[name] = Step(
                    name,
                    "score_comet",
                    {},
                    inputs={"hypotheses": inputs[role]},
                    outside=outside,
                    places={"comet": str(comet.absolute())},
                )
                inputs[f"comet {role}"] = Source(name)
    settings = {
        "normaliser": experiment.evaluate.normaliser,
        "guard": experiment.evaluate.guard,
        "order": list(evaluations),
    }
    steps["score systems"] = Step("score systems", "score_systems", settings, inputs=inputs)
    return steps


def _parquet(corpus: Corpus, split: str) -> Source:
    return Source(corpus[split], (f"{split}.parquet",))


@dataclass
class _Builder:
    experiment: Experiment
    base: str
    base_digest: str
    native: float
    store: Store
    splits: Mapping[str, KnownSplit]
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
                evaluations[f"{system}/{language}"] = self.evaluate(system, model, language, corpus)

        evaluate("base", None)
        for expert in experiment.experts:
            name = f"evaluate expert {expert.id}"
            evaluations[f"experts/{expert.id}"] = self.evaluate_expert(
                name, expert, corpora, {"model": Source(f"fine-tune {expert.id}", _MODEL)}
            )
        if "switched" in experiment.baselines:
            for expert, vector in vectors.items():
                compact = self.prune(expert, vector, "lors", experiment.prune_for("lors"))
                name = f"evaluate switched {expert.id}"
                inputs = {"compact": Source(compact)}
                evaluations[f"switched/{expert.id}"] = self.evaluate_expert(
                    name, expert, corpora, inputs, **self.on_base
                )
        for baseline, model in self.baselines(corpora).items():
            evaluate(baseline, model)
        merged = {expert: vectors[expert] for expert in experiment.merged}
        for method in experiment.systems:
            evaluate(method, self.merge(method, merged, corpora))
        if experiment.merge.touch_up is not None:
            evaluate(TOUCHED_UP, self.touched_up(experiment.merge.touch_up, merged, corpora))
        self.steps |= scoring_steps(evaluations, experiment, self.store.memo)
        if experiment.diagnose:
            inputs = {expert.id: Source(vector) for expert, vector in merged.items()}
            self.add("diagnose experts", "diagnose_experts", {}, inputs=inputs, **self.on_base)

    def prepare(self, language: str) -> Corpus:
        """The steps that make a language's splits."""
        return {split: self.prepare_split(language, split) for split in SPLITS}

    def prepare_split(self, language: str, split: str, first: int | None = None) -> str:
        name = split_name(language, split, first)
        if (known := self.splits.get(name)) is not None:
            if (known.settings.get("language"), known.settings.get("split")) != (language, split):
                raise InputError(f"sources.splits: what {name!r} holds is of another language or split")
            step = Step(name, "prepare_split", known.settings, outside=known.outside, language=language)
        else:
            step = prepare_step(self.experiment, language, split, self.native, self.store, first)
        self.steps[step.name] = step
        return step.name

    def train(
        self,
        name: str,
        parts: Sequence[Expert],
        corpora: Mapping[str, Corpus],
        updates: int = 1,  # as many as so many experts take together
        start: str | None = None,  # the training whose result this one starts from; None is the base
        held: bool = True,
        **about: Any,
    ) -> str:
        """One training on the speech of one or more (language, task)s."""
        finetune = self.experiment.finetune
        longer: dict[str, Any] = {"steps": updates * finetune.steps}
        if not held:
            longer["preserve"] = None
        if finetune.max_hours is not None:
            longer["max_hours"] = updates * finetune.max_hours
        return self._train(name, "fine_tune", finetune.model_copy(update=longer), parts, corpora, start, **about)

    def touched_up(self, own: TouchUp, vectors: Mapping[Expert, str], corpora: Mapping[str, Corpus]) -> str:
        """The first languages' merged model, trained further on them; then each added language on top of that."""
        experiment, added = self.experiment, self.experiment.merge.added
        spoken = dict.fromkeys(expert.language for expert in experiment.first)
        method = experiment.merge.method
        first = {expert: vectors[expert] for expert in experiment.first}
        which, merged = _FIRST if added.languages else "", None
        if own.scaling is not None and own.validation is not None and own.validation.start:
            merged = self.merge(method, first, corpora, which)
        start = self.merge(method, first, corpora, which, own.scaling)
        model = self.touch_up("touch up", own, spoken, corpora, start, merged)
        peak = added.learning_rate or own.learning_rate
        later = own.model_copy(update={"steps": added.steps, "learning_rate": peak, "validation": None})
        for language in added.languages:
            spoken[language] = None
            new = {expert: vector for expert, vector in vectors.items() if expert.language == language}
            model = self.added(language, new, model)
            if added.steps:
                model = self.touch_up(f"touch up {language}", later, spoken, corpora, model)
        return model

    def touch_up(
        self,
        name: str,
        own: TouchUp,
        languages: Collection[str],
        corpora: Mapping[str, Corpus],
        start: str,
        merged: str | None = None,  # the model that is kept where the touched-up one is no better
    ) -> str:
        """A model of several languages, trained further on all of them and all tasks."""
        changes: dict[str, Any] = {"steps": own.steps, "freeze": own.freeze, "validation": own.validation}
        changes |= {"max_hours": None, "lora": None}
        if own.learning_rate is not None:
            changes["learning_rate"] = own.learning_rate
        if own.speech is not None and self.experiment.finetune.preserve is not None:
            changes["preserve"] = self.experiment.finetune.preserve.model_copy(update={"speech": own.speech})
        finetune = self.experiment.finetune.model_copy(update=changes)
        parts = [expert for expert in self.experiment.experts if expert.language in languages]
        return self._train(name, "touch_up", finetune, parts, corpora, start, merged)

    def added(self, language: str, vectors: Mapping[Expert, str], start: str) -> str:
        """A model with one more language's task vectors on top."""
        recipe = self.experiment.recipe(self.experiment.merge.method)
        settings = self._anew(recipe.model_dump(mode="json", exclude={"scaling"}), vectors)
        inputs = {f"vector-{expert.id}": Source(step) for expert, step in self.pruned(recipe, vectors).items()}
        return self.add(
            f"add {language}",
            "add_task_vectors",
            {**settings, "scaling": self.experiment.merge.added.scaling},
            inputs={"start": Source(start, _MODEL), **inputs},
            language=language,
            **self.on_base,
        )

    def _train(
        self,
        name: str,
        stage: str,
        finetune: Finetune,
        parts: Sequence[Expert],
        corpora: Mapping[str, Corpus],
        start: str | None,
        merged: str | None = None,
        **about: Any,
    ) -> str:
        settings: dict[str, Any] = {
            "parts": [[part.language, part.task] for part in parts],
            "finetune": finetune.identity(),
        }
        if finetune.validation is not None and finetune.validation.metric == "score":
            own = self.experiment.evaluate
            settings["evaluate"] = {"normaliser": own.normaliser, **own.decoding()}
        inputs = {
            f"{split}-{language}": _parquet(corpora[language], split)
            for language in dict.fromkeys(part.language for part in parts)
            for split in ("train", "validation")
        }
        if finetune.preserve is not None:
            # A step of their own: where a corpus grows, its first utterances, and so other languages' experts, stay.
            for language in finetune.preserve.speech:
                if all(part.language != language for part in parts):
                    step = self.prepare_split(language, "train", finetune.preserve.utterances)
                    inputs[f"held-{language}"] = _parquet({"train": step}, "train")
        if start is not None:
            inputs["start"] = Source(start, _MODEL)
        if merged is not None:
            inputs["merged"] = Source(merged, _MODEL)
        where: dict[str, Any] = self.on_base if start is None or finetune.preserve is not None else {"places": {}}
        if (curves := self.experiment.resources.tensorboard) is not None:
            where["places"]["tensorboard"] = str((curves / name.removeprefix("fine-tune ")).absolute())
        return self.add(name, stage, settings, inputs=inputs, **where, **about)

    def expert(self, expert: Expert, corpora: Mapping[str, Corpus]) -> str:
        about: dict[str, Any] = {"language": expert.language, "task": expert.task}
        parts = [expert]
        if self.experiment.finetune.tasks == "together":
            parts = [other for other in self.experiment.experts if other.language == expert.language]
        trained = self.train(f"fine-tune {expert.id}", parts, corpora, updates=len(parts), **about)
        return self.add(
            f"extract {expert.id}",
            "extract_task_vector",
            {},
            inputs={"expert": Source(trained, _MODEL)},
            **self.on_base,
            **about,
        )

    def baselines(self, corpora: Mapping[str, Corpus]) -> dict[str, str]:
        """The last step of the training of each baseline that trains one model for all languages."""
        experiment, found = self.experiment, dict[str, str]()
        for baseline, held in {"multitask": False, "multitask_held": True}.items():
            if baseline in experiment.baselines:
                name, count = f"fine-tune {baseline}", len(experiment.experts)
                found[baseline] = self.train(name, experiment.experts, corpora, updates=count, held=held)
        if "sequential" in experiment.baselines:
            last: str | None = None
            for language in experiment.order:
                parts = [expert for expert in experiment.experts if expert.language == language]
                name = f"fine-tune sequential {language}"
                last = self.train(name, parts, corpora, updates=len(parts), start=last, held=False, language=language)
            assert last is not None, "an experiment has languages"
            found["sequential"] = last
        return found

    def prune(self, expert: Expert, vector: str, method: str, settings: PruneSettings) -> str:
        budget = self.experiment.prune.bytes
        return self.add(
            f"prune {expert.id}" if method == "lors" else f"prune {expert.id} as {method}",
            "prune_task_vector",
            settings.model_dump(mode="json") | ({} if budget is None else {"budget": budget}),
            inputs={"task_vector": Source(vector)},
            language=expert.language,
            task=expert.task,
        )

    def pruned(self, recipe: Recipe, vectors: Mapping[Expert, str]) -> Mapping[Expert, str]:
        """What a recipe merges: the task vectors, pruned where it prunes."""
        if not (settings := recipe.pruning):
            return vectors
        return {expert: self.prune(expert, vector, recipe.method, settings) for expert, vector in vectors.items()}

    def merge(
        self,
        method: str,
        vectors: Mapping[Expert, str],
        corpora: Mapping[str, Corpus],
        which: str = "",  # of several merges by this method
        scaling: float | None = None,  # the touch-up's own
    ) -> str:
        """The step that writes the merged model."""
        experiment, recipe = self.experiment, self.experiment.recipe(method)
        vectors = self.pruned(recipe, vectors)
        combining = recipe.model_dump(mode="json", exclude={"scaling"})
        scales = {"groups": combining["groups"]}
        combined = self.add(
            f"combine {method}{which}",
            "combine_task_vectors",
            {"recipe": combining, "weights": {expert.id: experiment.weight(expert) for expert in vectors}},
            inputs={expert.id: Source(step) for expert, step in vectors.items()},
            **self.on_base,
        )
        if scaling is None:
            selected = self.search(recipe, combined, combining, vectors, corpora, which)
        else:
            which += _START
            selected = self.fix_scaling(method, which, scaling)
        settings: dict[str, Any] = {"method": method, **scales}
        inputs = {"scaling": Source(selected)}
        if (search := experiment.search(method)) is not None and search.per == "expert":
            settings |= self._anew(combining, vectors)
            inputs |= {f"vector-{expert.id}": Source(step) for expert, step in vectors.items()}
        else:
            inputs["combined"] = Source(combined)
        return self.add(f"write {method}{which}", "write_model", settings, inputs=inputs, **self.on_base)

    def _anew(self, combining: Mapping[str, Any], vectors: Mapping[Expert, str]) -> dict[str, Any]:
        """What a merge is made from, where the experts have factors of their own."""
        return {"recipe": combining, "weights": {expert.id: self.experiment.weight(expert) for expert in vectors}}

    def search(
        self,
        recipe: Recipe,
        combined: str,
        combining: Mapping[str, Any],
        vectors: Mapping[Expert, str],
        corpora: Mapping[str, Corpus],
        which: str,
    ) -> str:
        """The step that has the scaling coefficients: rounds of points and a choice after each (`lors.scaling`)."""
        experiment, method = self.experiment, recipe.method
        search, languages = experiment.search(method), dict.fromkeys(expert.language for expert in vectors)
        if search is None:
            given = experiment.merge.scaling if METHODS[method].searches_scaling else None
            chosen = given if isinstance(given, float | int) else recipe.scaling
            return self.fix_scaling(method, which, chosen)
        decoding = {
            "metric": search.metric,
            "tasks": experiment.tasks,
            "languages": list(languages),
            "groups": combining["groups"],
            "normaliser": experiment.evaluate.normaliser,
            **experiment.evaluate.decoding(),
        }
        validation = {f"corpus-{code}": _parquet(corpora[code], "validation") for code in languages}
        rounds = schedule(search, [expert.id for expert in vectors])
        best = ""
        for number, one in enumerate(rounds):
            settings, inputs = dict(decoding), dict(validation)
            if one.coordinate is not None:
                inputs["best"] = Source(best)
            if one.coordinate is not None and search.per == "expert":
                settings |= self._anew(combining, vectors)
                inputs |= {f"vector-{expert.id}": Source(step) for expert, step in vectors.items()}
            else:
                inputs["combined"] = Source(combined)
            again = f" ({number})" if sum(r.coordinate == one.coordinate for r in rounds[:number]) else ""
            chosen_from: dict[str, Source] = {} if one.coordinate is None else {"best": Source(best)}
            for place, value in enumerate(one.values):
                tried: dict[str, Any] = {"coordinate": one.coordinate, "factor": value}
                name = f"score {method}{which} {one.coordinate} x {value:.15g}{again}"
                if one.coordinate is None:
                    tried, name = {"scaling": value, "factors": {}}, f"score {method}{which} at {value:.15g}"
                self.add(name, "score_scaling", {**settings, **tried}, inputs=inputs, **self.on_base)
                chosen_from[f"point-{place:03d}"] = Source(name)
            best = self.add(
                f"select scaling {method}{which}" + (f" ({number + 1})" if number + 1 < len(rounds) else ""),
                "select_scaling",
                {"method": method, "metric": search.metric, "scaling": None},
                inputs=chosen_from,
            )
        return best

    def fix_scaling(self, method: str, which: str, chosen: float) -> str:
        fixed = {"method": method, "metric": None, "scaling": chosen}
        return self.add(f"select scaling {method}{which}", "select_scaling", fixed)

    def _decoding(self, language: str, tasks: tuple[str, ...]) -> dict[str, Any]:
        return decoding_settings(self.experiment.evaluate, language, tasks, "test")

    def evaluate(self, system: str, model: str | None, language: str, corpus: Corpus) -> str:
        """All tasks of one language by the model that a step made; None is the base."""
        inputs = {"corpus": _parquet(corpus, "test")}
        where: dict[str, Any] = self.on_base if model is None else {}
        if model is not None:
            inputs["model"] = Source(model, _MODEL)
        settings = self._decoding(language, self.experiment.tasks)
        name = f"evaluate {system} {language}"
        return self.add(name, "evaluate_model", settings, inputs=inputs, language=language, **where)

    def evaluate_expert(
        self, name: str, expert: Expert, corpora: Mapping[str, Corpus], model: Mapping[str, Source], **where: Any
    ) -> str:
        return self.add(
            name,
            "evaluate_model",
            self._decoding(expert.language, (expert.task,)),
            inputs={"corpus": _parquet(corpora[expert.language], "test"), **model},
            language=expert.language,
            task=expert.task,
            **where,
        )
