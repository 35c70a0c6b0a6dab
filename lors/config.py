"""The experiment: one YAML file, validated and frozen. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from lors.errors import ConfigError
from lors.prune_settings import PruneSettings

__all__ = [
    "Evaluate",
    "Experiment",
    "Expert",
    "Finetune",
    "Limits",
    "ManifestCorpora",
    "Merge",
    "Resources",
    "ScalingSearch",
    "SyntheticCorpora",
    "load_experiment",
    "parse_experiment",
]

Task = Literal["transcribe", "translate"]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Section):
    """The most utterances of each split; None takes all."""

    train: PositiveInt | None = None
    validation: PositiveInt | None = None
    test: PositiveInt | None = None


class _Corpora(_Section):
    min_seconds: Annotated[float, Field(ge=0)] = 0.1
    """Shorter recordings are rejected."""
    max_seconds: Annotated[float, Field(gt=0, le=30)] = 30.0
    """Longer recordings are rejected; never more than the base hears in one window."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The share of bad rows above which the preparation stops instead of going on."""


class ManifestOverride(_Section):
    """What one language does otherwise; what is left out is as for all."""

    path: str | None = None
    columns: dict[str, str] | None = None
    limits: Limits | None = None


class ManifestCorpora(_Corpora):
    """Speech listed in JSONL, CSV or Parquet files, one a (language, split)."""

    source: Literal["manifest"]
    path: str
    """With `{language}` and `{split}` (train, validation, test) in it, such as `data/{language}/{split}.jsonl`."""
    columns: dict[str, str] = {}
    """Our name to the file's: audio, text, translation, id, speaker, seconds."""
    limits: Limits = Limits()
    overrides: dict[Language, ManifestOverride] = {}

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        known = ("audio", "text", "translation", "id", "speaker", "seconds")
        for name in columns:
            if name not in known:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        return columns

    def of(self, language: str) -> ManifestCorpora:
        """These settings with the overrides of one language put in."""
        override = self.overrides.get(language)
        return self if override is None else self.model_copy(update=override.model_dump(exclude_none=True))


class SyntheticCounts(_Section):
    """Utterances of each split, in each language."""

    train: PositiveInt = 400
    validation: PositiveInt = 60
    test: PositiveInt = 120


class SyntheticCorpora(_Corpora):
    """Parallel sentences spoken by eSpeak NG (the `synthesis` extra)."""

    source: Literal["synthetic"]
    utterances: SyntheticCounts = SyntheticCounts()
    seed: NonNegativeInt = 1
    """The starter base was trained on seed 0."""
    overrides: dict[Language, SyntheticCounts] = {}


class Finetune(_Section):
    """How each expert is trained (AdamW, linear warm-up, linear decay to 0)."""

    steps: PositiveInt = 500
    learning_rate: PositiveFloat | None = None
    """The peak. None: by the size of the base, 3.75e-5 (tiny) to 5e-6 (large)."""
    batch_seconds: PositiveFloat = 80.0
    """Utterances times window of a batch, in seconds of audio."""
    window: Literal["auto"] | PositiveFloat = "auto"
    """Seconds the encoder takes. auto: the longest utterance of the batch + 2 s, at least 7 s, for a 30 s base."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: PositiveFloat = 1.0
    """The largest gradient norm."""
    freeze: tuple[str, ...] = ()
    """Glob patterns of parameters that are not trained, such as `model.encoder.*`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs that have it, fp32 elsewhere."""
    seed: NonNegativeInt = 0


class ScalingSearch(_Section):
    """The scaling coefficient is the one with the least error on the validation split."""

    search: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    metric: Literal["score", "loss"] = "score"
    """score: mean of WER (CER where words are not spaced) and of 100 - BLEU over languages and tasks. loss: mean of
    the teacher-forced cross-entropies."""


class Merge(_Section):
    """How the task vectors become one."""

    method: str = "lors"
    scaling: Annotated[float, Field(ge=0)] | ScalingSearch = ScalingSearch()
    weights: dict[str, float] = {}
    """Merge weight by expert (`es-transcribe`) or language (`es`); 1 where none is given."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return _known_method(name)


def _known_method(name: str) -> str:
    from lors.merging.registry import METHODS

    if name not in METHODS:
        raise ValueError(f"{name!r} is not a merging method{_nearest(name, METHODS)}: choose from {', '.join(METHODS)}")
    return name


class Evaluate(_Section):
    """How every system is decoded and scored; the same for all that are compared."""

    beams: PositiveInt = 1
    window: Literal["auto"] | PositiveFloat = "auto"
    batch_seconds: PositiveFloat = 160.0
    normaliser: Literal["lors", "whisper_basic", "none"] = "lors"


class Resources(_Section):
    """What the run may use of this machine; results do not depend on it but for the threads' rounding."""

    parallel: Literal["auto"] | PositiveInt = "auto"
    """Steps computed side by side. auto: one a GPU, else one a core up to the number of experts."""
    threads: Literal["auto"] | PositiveInt = "auto"
    """CPU threads of each step. auto: the cores shared out."""


class Expert(_Section):
    """One (language, task) pair."""

    language: str
    task: Task

    @property
    def id(self) -> str:
        """Such as `es-transcribe`."""
        return f"{self.language}-{self.task}"


class Experiment(_Section):
    """Everything a run depends on."""

    base: str
    """`starter`, a Hugging Face id or a folder."""
    languages: Annotated[tuple[Language, ...], Field(min_length=1)]
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = ("transcribe", "translate")
    corpora: Annotated[ManifestCorpora | SyntheticCorpora, Field(discriminator="source")]
    finetune: Finetune = Finetune()
    prune: PruneSettings = PruneSettings()
    merge: Merge = Merge()
    compare: tuple[str, ...] = ()
    """Other merging methods, run beside `merge.method` with the same scaling search."""
    evaluate: Evaluate = Evaluate()
    resources: Resources = Resources()
    output: Path
    store: Path = Path("store")

    @field_validator("compare")
    @classmethod
    def _known_methods(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_known_method(name) for name in names)

    @field_validator("languages", "tasks", "compare")
    @classmethod
    def _no_repeats(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{value} is listed twice")
        return values

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Experiment:
        known = {*self.languages, *(expert.id for expert in self.experts)}
        for name in self.merge.weights:
            if name not in known:
                raise ValueError(f"merge.weights names {name!r}, which is no expert{_nearest(name, known)}")
        for language in self.corpora.overrides:
            if language not in self.languages:
                raise ValueError(f"corpora.overrides names {language!r}, which is not among the languages")
        if isinstance(self.corpora, ManifestCorpora):
            for language in self.languages:
                path = self.corpora.of(language).path
                if "{split}" not in path:
                    raise ValueError(f"corpora.path {path!r} of {language} has no {{split}} in it")
        return self

    @property
    def experts(self) -> tuple[Expert, ...]:
        """One a (language, task), languages first."""
        return tuple(Expert(language=language, task=task) for language in self.languages for task in self.tasks)

    @property
    def systems(self) -> tuple[str, ...]:
        """The merged systems: the method of `merge`, then those of `compare`."""
        return tuple(dict.fromkeys((self.merge.method, *self.compare)))

    def weight(self, expert: Expert) -> float:
        """The merge weight of an expert."""
        return self.merge.weights.get(expert.id, self.merge.weights.get(expert.language, 1.0))


def load_experiment(path: Path, changes: Sequence[str] = ()) -> Experiment:
    """The experiment of a YAML file, with `key=value` changes (dotted keys) put in; raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the experiment file {path} does not exist: check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the experiment file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no settings: it must be a mapping that starts like `base: starter`")
    for change in changes:
        _put(data, change)
    return parse_experiment(data, str(path))


def parse_experiment(data: Mapping[str, Any], origin: str = "the experiment") -> Experiment:
    """The experiment of plain data; raises ConfigError that names the first wrong setting."""
    try:
        return Experiment.model_validate(data)
    except pydantic.ValidationError as error:
        unknown = [e for e in error.errors() if e["type"] == "extra_forbidden"]
        raise ConfigError(f"{origin}: {_sentence((unknown or error.errors())[0])}") from error


def _put(data: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {change!r} is not key=value, such as prune.rank_ratio=0.2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change!r}: the value is not valid YAML") from error
    *parents, last = key.strip().split(".")
    for parent in parents:
        if not isinstance(data.setdefault(parent, {}), dict):
            data[parent] = {}  # such as merge.scaling, a number, that becomes a search
        data = data[parent]
    data[last] = value


def _sentence(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    shown = ".".join(part for part in location if part not in ("manifest", "synthetic", "ScalingSearch"))
    if error["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"unknown key {shown!r}{_nearest(location[-1], known)}; known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{shown!r} is missing: add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        return f"{shown}.source must be manifest or synthetic, not {error['input'].get('source')!r}"
    if error["type"] == "union_tag_not_found":
        return f"{shown}.source is missing: say manifest or synthetic"
    given = "" if error["type"] == "value_error" else f", not {error['input']!r}"
    return f"{shown}: {message}{given}" if shown else message


def _nearest(name: str, known: Iterator[str] | Mapping[str, Any] | Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _fields_at(location: Sequence[str]) -> list[str]:
    """The known keys of the section that a pydantic error's location leads to."""
    tagged = {"manifest": ManifestCorpora, "synthetic": SyntheticCorpora, "ScalingSearch": ScalingSearch}
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
