"""The experiment: one YAML file, validated and frozen. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, field_validator

from lors.errors import ConfigError
from lors.merging.recipe import Recipe
from lors.merging.settings import TOUCHED_UP, Merge, ScalingSearch, known_method
from lors.prune_settings import Prune, PruneSettings
from lors.s3_bucket import check_url
from lors.secrets import secret_setting
from lors.settings import Language, Section, Task, nearest
from lors.speech.corpora.settings import (
    CommonVoiceCorpora,
    Corpora,
    DatasetsCorpora,
    FolderCorpora,
    ManifestCorpora,
    SyntheticCorpora,
)
from lors.training.settings import Finetune
from lors.yaml_text import read_yaml

__all__ = [
    "Evaluate",
    "Experiment",
    "Expert",
    "Resources",
    "load_experiment",
    "parse_experiment",
    "put",
]


_TASK_OF = {"wer": "transcribe", "cer": "transcribe", "bleu": "translate", "chrf": "translate"}
_SEARCHED = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


class Evaluate(Section):
    """How every system is decoded and scored; the same for all that are compared."""

    beams: PositiveInt = 1
    """1 decodes greedily."""
    fallback: bool = False
    """Where a model loops (its text compresses by more than 2.4), draw the tokens at a temperature of 0.2, 0.4, ... 1
    until it does not, as Whisper's own code does (arXiv 2212.04356, section 4.5). The same run draws the same ones."""
    window: Literal["auto"] | PositiveFloat = "auto"
    """Seconds the encoder takes. auto: the longest utterance of the batch + 2 s, at least 7 s, for a 30 s base; 30 for
    the figures that other papers report."""
    batch_seconds: PositiveFloat = 160.0
    """Utterances times window of a batch, in seconds of audio."""
    backend: Literal["transformers", "ctranslate2"] = "transformers"
    """ctranslate2 decodes the test split with the extra of that name: the same tokens, in float32."""
    identify: bool = True
    """Whether a multilingual model also says which language it hears, and transcribes as that one where it is not the
    language spoken: the columns `wrong language` and `free`."""
    comet: Path | None = None
    """A folder with a COMET model in safetensors (docs/evaluation.md); its scores then stand beside BLEU and chrF2."""
    normaliser: Literal["lors", "whisper_basic", "none"] = "lors"
    """Of the text that WER and CER compare; BLEU and chrF2 compare raw text."""
    guard: tuple[Language, ...] = ()
    """Languages that no expert is trained for; the base and every merged or trained-on-all system are scored on their
    test split, so that forgetting is seen."""

    def decoding(self) -> dict[str, Any]:
        """What decides the tokens of a model on a split."""
        own = self.model_dump(include={"beams", "window", "batch_seconds"})
        return own | ({"fallback": True} if self.fallback else {})  # without it the keys of earlier versions stay


class Resources(Section):
    """What the run may use of this machine; results do not depend on it but for the threads' rounding."""

    parallel: Literal["auto"] | PositiveInt = "auto"
    """Steps computed side by side. auto: one a GPU, else one a core up to the number of experts."""
    threads: Literal["auto"] | PositiveInt = "auto"
    """CPU threads of each step. auto: the cores shared out."""
    processes: PositiveInt = 1
    """GPUs that train one expert together (`torchrun`, DDP); without GPUs, CPU processes."""
    tensorboard: Path | None = None
    """A folder for TensorBoard's curves of every training (the `tensorboard` extra)."""
    stall_minutes: PositiveFloat | None = 60
    """A step whose process gives no sign for so long is ended and tried again; None waits for ever."""


Baseline = Literal["base", "experts", "switched", "multitask", "multitask_held", "sequential"]


class Expert(Section):
    """One (language, task) pair."""

    language: str
    task: Task

    @property
    def id(self) -> str:
        """Such as `es-transcribe`."""
        return f"{self.language}-{self.task}"


S3Url = Annotated[str, Field(pattern=r"^s3://")]


class Experiment(Section):
    """Everything a run depends on."""

    base: str
    """`starter`, a Hugging Face id or a folder."""
    languages: Annotated[tuple[Language, ...], Field(min_length=1)]
    """Whisper's language codes."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = ("transcribe", "translate")
    """Whisper's tasks; translate is into English."""
    corpora: Corpora
    """Where the speech comes from."""
    corpora_of: dict[Language, Corpora] = {}
    """Languages whose speech comes from another source altogether; each like `corpora`, without overrides."""
    finetune: Finetune = Finetune()
    """How experts are trained."""
    prune: Prune = Prune()
    """LoRS."""
    merge: Merge = Merge()
    """How task vectors become one."""
    compare: tuple[str, ...] = ()
    """Other merging methods, run beside `merge.method` with the same scaling search."""
    baselines: tuple[Baseline, ...] = ("base", "experts", "switched")
    """switched: the base with the compact expert of the language and task put in at run time. multitask: one model
    trained on all languages and tasks at once. multitask_held: the same, held to the base as experts are by
    `finetune.preserve`. sequential: one language after the other, each with all tasks. Each of the three with as many
    updates as all experts together. base and experts, which recovery lies between, are always scored."""
    sequence: tuple[Language, ...] | None = None
    """The order of the sequential baseline; None: as in `languages`."""
    evaluate: Evaluate = Evaluate()
    """How systems are scored."""
    diagnose: bool = True
    """Whether the spectra of the experts and their interference are measured, for the report."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """Train everything once with each of these in place of `finetune.seed`; the table then has means over them."""
    resources: Resources = Resources()
    """What the run may use of this machine."""
    dispatch: Literal["local", "workers"] = "local"
    """Where models are trained: in child processes of the run, or by Prefect workers that share the store."""
    output: Path
    """The folder for the results."""
    store: Path | S3Url = Path("store")
    """The folder for everything computed, shared by experiments and machines; or `s3://bucket/prefix`, with the extra
    `s3`, credentials by the AWS variables, and LORS_STAGING as the local folder (default: ~/.cache/lors/s3)."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, data: Any) -> Any:
        """Settings are written into manifests, results, reports and Prefect's database."""
        if isinstance(data, Mapping) and (place := secret_setting(data)) is not None:
            raise ValueError(
                f"{place} holds a secret (a token, or a URL with a password), which would be written into every "
                "result: credentials and the endpoint belong to the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, "
                "AWS_ENDPOINT_URL, ...)"
            )
        return data

    @field_validator("store", mode="before")
    @classmethod
    def _folder_or_url(cls, value: Any) -> Any:
        if isinstance(value, Path) and value.parts[:1] == ("s3:",):
            raise ValueError("an S3 URL is given as text: Path has changed its slashes")
        is_url = isinstance(value, str) and value.lower().startswith("s3:")
        return check_url(value) if is_url else value

    @field_validator("compare")
    @classmethod
    def _known_methods(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(known_method(name) for name in names)

    @field_validator("languages", "tasks", "compare", "baselines", "sequence", "seeds")
    @classmethod
    def _no_repeats(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        for value in (listed := values or ()):
            if listed.count(value) > 1:
                raise ValueError(f"{value} is listed twice")
        return values

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Experiment:
        self._check_weights()
        for guard in self.evaluate.guard:
            if guard in self.languages:
                raise ValueError(f"evaluate.guard names {guard!r}, which experts are trained for: name others")
        self._check_touch_up()
        if self.sequence is not None and sorted(self.sequence) != sorted(self.languages):
            raise ValueError(f"sequence must name each of the languages once: {', '.join(self.languages)}")
        for name, settings in (("corpora.overrides", self.corpora.overrides), ("corpora_of", self.corpora_of)):
            for language in settings:
                if language not in self.heard:
                    raise ValueError(f"{name} names {language!r}, which is not among the languages")
        for language, corpora in self.corpora_of.items():
            if corpora.overrides:
                raise ValueError(f"corpora_of.{language} is of one language: put its overrides beside its source")
        if self.finetune.preserve is None and "multitask_held" in self.baselines:
            raise ValueError("baselines: multitask_held is held to the base by finetune.preserve: set that too")
        self._check_searches()
        self._check_paths()
        return self

    def _check_weights(self) -> None:
        """That each merge weight is one's that is merged."""
        weights, known = self.merge.weights, {*self.languages, *(expert.id for expert in self.experts)}
        used = {expert.id if expert.id in weights else expert.language for expert in self.merged}
        for name in weights:
            if name not in known:
                raise ValueError(f"merge.weights names {name!r}, which is no expert{nearest(name, known)}")
            if name in self.languages and name not in used:
                raise ValueError(f"merge.weights: {name!r} has no effect, as its experts have their own: leave it out")
            if name not in used:
                raise ValueError(
                    f"merge.weights: {name!r} has no effect, as the tasks of a language are one training "
                    f"(finetune.tasks: together): name {name.rpartition('-')[0]!r}"
                )

    def _check_touch_up(self) -> None:
        added = self.merge.added.languages
        for language in added:
            if language not in self.languages or added.count(language) > 1:
                raise ValueError(f"merge.added.languages names {language!r}, which must be among the languages once")
        if self.finetune.preserve is None and self.merge.touch_up is not None and self.merge.touch_up.speech:
            raise ValueError("merge.touch_up.speech is what a model is held to the base on: set finetune.preserve too")
        if added and self.merge.touch_up is None:
            raise ValueError("merge.added.languages are added to a model that is touched up: set merge.touch_up too")
        if len(added) == len(self.languages):
            raise ValueError("merge.added.languages names all languages: leave out those to start with")

    def _check_searches(self) -> None:
        """That each search can decide, and that methods are compared at equal search budgets."""
        from lors.merging.registry import METHODS
        from lors.scaling import points

        counts: dict[str, int] = {}
        for method in self.systems:
            if (search := self.search(method)) is not None:
                task = _TASK_OF.get(search.metric)
                if task is not None and task not in self.tasks:
                    raise ValueError(
                        f"merge.scaling: the search of {method} by {search.metric} needs the task {task}: add it to "
                        "`tasks`, or search by score or loss"
                    )
                if search.per == "expert" and METHODS[method].combine.kind in ("slerp", "model_stock"):
                    raise ValueError(
                        f"merge.scaling: {method} gives the experts no merge weights, so it cannot be searched per "
                        "expert: search it per model or part"
                    )
                counts[method] = points(search, [expert.id for expert in self.merged])
        first = next(iter(counts), None)
        for method, count in counts.items():
            if first is not None and count != counts[first]:
                raise ValueError(
                    f"merge.searches: {method} is searched with {count} points and {first} with {counts[first]}: give "
                    "all that are compared as many, or a `budget`"
                )

    def _check_paths(self) -> None:
        """That each (language, split) has a place of its own."""
        owners: dict[tuple[object, ...], str] = {}
        for language in self.heard:
            corpora = self.speech_of(language)
            key = f"corpora_of.{language}.path" if language in self.corpora_of else "corpora.path"
            path = getattr(corpora, "path", None)
            if path is None:
                continue
            try:
                train, test = (path.format(language=language, split=split) for split in ("train", "test"))
            except (AttributeError, IndexError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{key} {path!r} may have {{language}} and {{split}} in braces, nothing else"
                ) from error
            if isinstance(corpora, ManifestCorpora) and train == test:
                raise ValueError(f"{key} {path!r} of {language} has no {{split}} in it")
            if not isinstance(corpora, ManifestCorpora) and train != test:
                raise ValueError(f"{key} {path!r} names all splits of {language}: leave {{split}} out")
            place: tuple[object, ...] = (corpora.source, train)
            if isinstance(corpora, DatasetsCorpora) and (corpora.preset is None or corpora.name is not None):
                name = (corpora.name or "").replace("{language}", language)
                place += (name, corpora.revision, corpora.columns.get("audio"), *sorted(corpora.splits.items()))
            elif not isinstance(corpora, ManifestCorpora | FolderCorpora):
                continue  # others find the language inside
            if owners.setdefault(place, language) != language:
                where = " or in corpora.name" if isinstance(corpora, DatasetsCorpora) else ""
                raise ValueError(
                    f"{key} gives {language} the files of {owners[place]}: put {{language}} in it{where}, or override "
                    "it"
                )

    @property
    def spoken(self) -> tuple[str, ...]:
        """All languages that are scored: those with experts, then the guards."""
        return (*self.languages, *self.evaluate.guard)

    @property
    def held(self) -> tuple[str, ...]:
        """The languages on whose speech models of others are held to the base."""
        if self.finetune.preserve is None:
            return ()
        touch_up = () if self.merge.touch_up is None else self.merge.touch_up.speech or ()
        return tuple(dict.fromkeys((*self.finetune.preserve.speech, *touch_up)))

    @property
    def heard(self) -> tuple[str, ...]:
        """All languages that speech is needed of."""
        return tuple(dict.fromkeys((*self.spoken, *self.held)))

    def speech_of(
        self, language: str
    ) -> ManifestCorpora | FolderCorpora | CommonVoiceCorpora | DatasetsCorpora | SyntheticCorpora:
        """Where the speech of a language comes from, with its overrides put in."""
        return self.corpora_of.get(language, self.corpora).of(language)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """One a (language, task), languages first."""
        return tuple(Expert(language=language, task=task) for language in self.languages for task in self.tasks)

    @property
    def merged(self) -> tuple[Expert, ...]:
        """The experts whose task vectors are merged: where those of a language are one training, its first."""
        together = self.finetune.tasks == "together"
        return tuple(expert for expert in self.experts if not together or expert.task == self.tasks[0])

    @property
    def order(self) -> tuple[str, ...]:
        """The languages as the sequential baseline takes them."""
        return self.sequence or self.languages

    @property
    def first(self) -> tuple[Expert, ...]:
        """The experts whose task vectors are merged before languages are added: all, where none is."""
        return tuple(expert for expert in self.merged if expert.language not in self.merge.added.languages)

    @property
    def systems(self) -> tuple[str, ...]:
        """The merged systems: the method of `merge`, then those of `compare`.

        Where languages are added, no model of all languages is merged by the method on the way; `compare` has it made.
        """
        own = () if self.merge.added.languages else (self.merge.method,)
        return tuple(dict.fromkeys((*own, *self.compare)))

    @property
    def product(self) -> str:
        """The system whose model is written."""
        return self.merge.method if self.merge.touch_up is None else TOUCHED_UP

    def recipe(self, method: str) -> Recipe:
        """How a method merges here: its parameters, LoRS as in `prune`, the groups of `merge`."""
        from lors.merging.registry import METHODS, make_recipe

        return make_recipe(
            method,
            self.merge.parameters.get(method),
            prune=self.prune.ratios if METHODS[method].prunes else None,
            groups=self.merge.groups,
        )

    def prune_for(self, method: str) -> PruneSettings:
        """What a method prunes by; of one that prunes nothing, `prune`."""
        return self.recipe(method).pruning or self.prune.ratios

    def search(self, method: str) -> ScalingSearch | None:
        """How the scaling coefficient of a method is searched; None where it is not."""
        from lors.merging.registry import METHODS

        found = self.merge.searches.get(method, self.merge.scaling)
        if not METHODS[method].searches_scaling or not isinstance(found, ScalingSearch):
            return None
        if found.search is None:
            default = METHODS[method].scaling_default
            return found.model_copy(update={"search": tuple(round(default * f, 12) for f in _SEARCHED)})
        return found

    def weight(self, expert: Expert) -> float:
        """The merge weight of an expert."""
        return self.merge.weights.get(expert.id, self.merge.weights.get(expert.language, 1.0))


def load_experiment(path: Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment of a YAML file, with `key=value` changes (dotted keys) put in; raises ConfigError."""
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the experiment file {path} does not exist: check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the experiment file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:  # ValueError: such as the 13th month
        # Without its cause, which would show the file's lines in a log.
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no settings: it must be a mapping that starts like `base: starter`")
    for change in changes:
        put(data, change)
    return parse_experiment(data, str(path))


def parse_experiment(data: Mapping[str, Any], origin: str = "the experiment") -> Experiment:
    """The experiment of plain data; raises ConfigError that names the first wrong setting."""
    try:
        return Experiment.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{origin}: {_sentence(error.errors(), data)}") from error


def put(data: dict[str, Any], change: str) -> None:
    """Put one `key=value` (a dotted key, a YAML value) into plain settings; raises ConfigError."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {change!r} is not key=value, such as prune.rank_ratio=0.2")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--set {change!r}: the value is not valid YAML: {reason}") from error
    *parents, last = key.strip().split(".")
    for parent in parents:
        if not isinstance(data.setdefault(parent, {}), dict):
            data[parent] = {}  # such as merge.scaling, a number, that becomes a search
        data = data[parent]
    data[last] = value


def _sentence(errors: Sequence[Any], data: Mapping[str, Any]) -> str:
    """The first unknown key, else the first wrong setting."""
    errors = [e for e in errors if e["type"] == "extra_forbidden"] or errors
    first = _place(errors[0], data)
    # Each branch of a union (a number or a search) complains: those that looked deepest understood what was meant.
    place = max((p for e in errors if (p := _place(e, data))[: len(first)] == first), key=len)
    error, *others = (e for e in errors if _place(e, data) == place)
    shown = ".".join(place)
    if error["type"] == "extra_forbidden":
        known = _fields_at([str(part) for part in error["loc"][:-1]])
        return f"unknown key {shown!r}{nearest(place[-1], known)}; known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{shown!r} is missing: add it"
    if error["type"] == "union_tag_invalid":
        return f"{shown}.source must be {_SOURCES}, not {error['input'].get('source')!r}"
    if error["type"] == "union_tag_not_found":
        return f"{shown}.source is missing: say {_SOURCES}"
    if error["type"] == "too_short":
        return f"{shown} is empty: list at least one value"
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{shown}: {message}" if shown else message
    messages = dict.fromkeys(
        _TYPES.sub(_yaml_type, e["msg"]).removeprefix("Input should be ") for e in (error, *others)
    )
    if error["type"] == "string_pattern_mismatch":
        messages = {"a language code of two or three small letters, such as 'es'": None}
    quote = isinstance(error["input"], bool) and " (YAML reads a bare no, off, yes or on so: put it in quotes)"
    return f"{shown} should be {' or '.join(messages)}, not {error['input']!r}{quote or ''}"


_SOURCES = "manifest, folder, common_voice, datasets or synthetic"


def _place(error: Any, data: Any) -> tuple[str, ...]:
    """Where in the data an error is: pydantic's location without the names of union branches."""
    place = []
    for part in error["loc"]:
        try:
            data = data[part]
        except (IndexError, KeyError, TypeError):
            if error["type"] != "missing" or part != error["loc"][-1]:
                continue
        place.append(str(part))
    return tuple(place)


_TYPES = re.compile(r"a valid (dictionary( or (instance of \w+|object to extract fields from))?|tuple)")


def _yaml_type(found: re.Match[str]) -> str:
    return "a list" if found[1] == "tuple" else "a mapping"


def _fields_at(location: Sequence[str]) -> list[str]:
    """The known keys of the section that a pydantic error's location leads to."""
    sources = (ManifestCorpora, FolderCorpora, CommonVoiceCorpora, DatasetsCorpora, SyntheticCorpora)
    tagged: dict[str, Any] = {model.model_fields["source"].annotation.__args__[0]: model for model in sources}  # type: ignore[union-attr]
    tagged["ScalingSearch"] = ScalingSearch
    section: Any = Experiment
    for part in location:
        if part in tagged:
            section = tagged[part]
        elif section is not None and part in section.model_fields:
            found = section.model_fields[part].annotation
            section = found if isinstance(found, type) and issubclass(found, BaseModel) else _valued(found)
    return list(section.model_fields) if section is not None else []


def _valued(annotation: Any) -> Any:
    """The section inside `dict[language, Section]` and `Section | None`."""
    for inner in getattr(annotation, "__args__", ()):
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner
    return None
