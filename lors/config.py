"""The experiment: one YAML file, validated and frozen. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from lors.errors import ConfigError, InputError
from lors.merging.recipe import Group, Recipe
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


Counts = TypeVar("Counts", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Limits(_Section):
    """The most utterances of each split; None takes all (in an override: as many as in the other languages)."""

    train: PositiveInt | None = None
    validation: PositiveInt | None = None
    test: PositiveInt | None = None


def _known_columns(columns: dict[str, str]) -> dict[str, str]:
    known = ("audio", "text", "translation", "id", "speaker", "seconds")
    for name in columns:
        if name not in known:
            raise ValueError(f"{name!r} is no column of ours{_nearest(name, known)}: map {', '.join(known)}")
    return columns


Columns = Annotated[dict[str, str], AfterValidator(_known_columns)]


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
    columns: Columns | None = None
    limits: Limits | None = None


class ManifestCorpora(_Corpora):
    """Speech listed in JSONL, CSV or Parquet files, one a (language, split)."""

    source: Literal["manifest"]
    """Says that this is a manifest corpus."""
    path: str
    """With `{language}` and `{split}` (train, validation, test) in it, such as `data/{language}/{split}.jsonl`."""
    columns: Columns = {}
    """Our name to the file's: audio, text, translation, id, speaker, seconds."""
    limits: Limits = Limits()
    """The most utterances taken, in the file's order."""
    overrides: dict[Language, ManifestOverride] = {}
    """Other settings for single languages."""

    def of(self, language: str) -> ManifestCorpora:
        """These settings with the overrides of one language put in."""
        own = self.overrides.get(language, ManifestOverride())
        changes = {
            "path": own.path or self.path,
            "columns": {**self.columns, **(own.columns or {})},
            "limits": _updated(self.limits, own.limits or Limits()),
        }
        return self.model_copy(update=changes)


def _updated(counts: Counts, changes: Limits) -> Counts:
    return counts.model_copy(update=changes.model_dump(exclude_none=True))


class SyntheticCounts(_Section):
    """Utterances of each split, in each language."""

    train: PositiveInt = 400
    validation: PositiveInt = 60
    test: PositiveInt = 120


class SyntheticCorpora(_Corpora):
    """Parallel sentences spoken by eSpeak NG (the `synthesis` extra)."""

    source: Literal["synthetic"]
    """Says that this is a synthetic corpus."""
    utterances: SyntheticCounts = SyntheticCounts()
    """How many of each split."""
    seed: NonNegativeInt = 1
    """The starter base was trained on seed 0."""
    overrides: dict[Language, Limits] = {}
    """Other numbers of utterances for some languages."""

    def of(self, language: str) -> SyntheticCorpora:
        """These settings with the overrides of one language put in."""
        own = self.overrides.get(language, Limits())
        return self.model_copy(update={"utterances": _updated(self.utterances, own)})


class Finetune(_Section):
    """How each expert is trained (AdamW, linear warm-up, linear decay to 0)."""

    steps: PositiveInt = 500
    """Updates of the weights."""
    learning_rate: PositiveFloat | None = None
    """The peak. None: by the size of the base, 3.75e-5 (tiny) to 5e-6 (large)."""
    batch_seconds: PositiveFloat = 80.0
    """Utterances times window of a batch, in seconds of audio."""
    window: Literal["auto"] | PositiveFloat = "auto"
    """Seconds the encoder takes. auto: the longest utterance of the batch + 2 s, at least 7 s, for a 30 s base."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    clip: PositiveFloat = 1.0
    """The largest gradient norm."""
    freeze: tuple[str, ...] = ()
    """Glob patterns of parameters that are not trained, such as `model.encoder.*`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on GPUs that have it, fp32 elsewhere."""
    seed: NonNegativeInt = 0
    """Of the order of the batches; the same for all experts."""


class ScalingSearch(_Section):
    """The scaling coefficient is the one with the least error on the validation split."""

    search: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
    """The coefficients to try."""
    metric: Literal["score", "loss"] = "score"
    """score: mean of WER (CER where words are not spaced) and of 100 - BLEU over languages and tasks. loss: mean of
    the teacher-forced cross-entropies."""


class Merge(_Section):
    """How the task vectors become one."""

    method: str = "lors"
    """See `lors merge --list`."""
    scaling: Annotated[float, Field(ge=0)] | ScalingSearch = ScalingSearch()
    """The scaling coefficient: a number, or a search."""
    weights: dict[str, float] = {}
    """Merge weight by expert (`es-transcribe`) or language (`es`); 1 where none is given."""
    parameters: dict[str, dict[str, Any]] = {}
    """Parameters by method, as in `{ties: {density: 0.1}}`; also of the methods of `compare`."""
    groups: dict[str, Group] = {}
    """Other settings for named groups of parameters (`lors merge --list`) or glob patterns; a later group wins."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        return _known_method(name)

    @pydantic.model_validator(mode="after")
    def _known_parameters(self) -> Merge:
        from lors.merging.registry import make_recipe

        for method, values in self.parameters.items():
            try:
                make_recipe(_known_method(method), values)
            except InputError as error:
                raise ValueError(f"parameters: {error}") from error
        return self


def _known_method(name: str) -> str:
    from lors.merging.registry import METHODS

    if name not in METHODS:
        raise ValueError(f"{name!r} is not a merging method{_nearest(name, METHODS)}: choose from {', '.join(METHODS)}")
    return name


class Evaluate(_Section):
    """How every system is decoded and scored; the same for all that are compared."""

    beams: PositiveInt = 1
    """1 decodes greedily."""
    window: Literal["auto"] | PositiveFloat = "auto"
    """As in `finetune`; 30 for the figures that other papers report."""
    batch_seconds: PositiveFloat = 160.0
    """Utterances times window of a batch, in seconds of audio."""
    normaliser: Literal["lors", "whisper_basic", "none"] = "lors"
    """Of the text that WER and CER compare; BLEU and chrF2 compare raw text."""


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
    """Whisper's language codes."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = ("transcribe", "translate")
    """Whisper's tasks; translate is into English."""
    corpora: Annotated[ManifestCorpora | SyntheticCorpora, Field(discriminator="source")]
    """Where the speech comes from."""
    finetune: Finetune = Finetune()
    """How experts are trained."""
    prune: PruneSettings = PruneSettings()
    """LoRS."""
    merge: Merge = Merge()
    """How task vectors become one."""
    compare: tuple[str, ...] = ()
    """Other merging methods, run beside `merge.method` with the same scaling search."""
    evaluate: Evaluate = Evaluate()
    """How systems are scored."""
    resources: Resources = Resources()
    """What the run may use of this machine."""
    output: Path
    """The folder for the results."""
    store: Path = Path("store")
    """The folder for everything computed, shared by experiments and machines."""

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
            owners: dict[str, str] = {}
            for language in self.languages:
                path = self.corpora.of(language).path
                try:
                    train, test = (path.format(language=language, split=split) for split in ("train", "test"))
                except (AttributeError, IndexError, KeyError, ValueError) as error:
                    raise ValueError(
                        f"corpora.path {path!r} may have {{language}} and {{split}} in braces, nothing else"
                    ) from error
                if train == test:
                    raise ValueError(f"corpora.path {path!r} of {language} has no {{split}} in it")
                if owners.setdefault(train, language) != language:
                    raise ValueError(
                        f"corpora.path gives {language} the files of {owners[train]}: put {{language}} in it, or "
                        "override it"
                    )
        return self

    @property
    def experts(self) -> tuple[Expert, ...]:
        """One a (language, task), languages first."""
        return tuple(Expert(language=language, task=task) for language in self.languages for task in self.tasks)

    @property
    def systems(self) -> tuple[str, ...]:
        """The merged systems: the method of `merge`, then those of `compare`."""
        return tuple(dict.fromkeys((self.merge.method, *self.compare)))

    def recipe(self, method: str) -> Recipe:
        """How a method merges here: its parameters, LoRS as in `prune`, the groups of `merge`."""
        from lors.merging.registry import METHODS, make_recipe

        return make_recipe(
            method,
            self.merge.parameters.get(method),
            prune=self.prune if METHODS[method].prunes else None,
            groups=self.merge.groups,
        )

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
        raise ConfigError(f"{origin}: {_sentence(error.errors(), data)}") from error


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
        return f"unknown key {shown!r}{_nearest(place[-1], known)}; known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{shown!r} is missing: add it"
    if error["type"] == "union_tag_invalid":
        return f"{shown}.source must be manifest or synthetic, not {error['input'].get('source')!r}"
    if error["type"] == "union_tag_not_found":
        return f"{shown}.source is missing: say manifest or synthetic"
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


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
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
