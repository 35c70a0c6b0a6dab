"""The settings of the sources of speech: the experiment's `corpora` section. No torch and no datasets here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from lors.settings import SPLITS, Language, Section, nearest

__all__ = [
    "PRESETS",
    "CommonVoiceCorpora",
    "Corpora",
    "DatasetsCorpora",
    "FolderCorpora",
    "Hours",
    "Limits",
    "ManifestCorpora",
    "RecordedCorpora",
    "SyntheticCorpora",
]

PRESETS = ("fleurs", "covost2", "mls", "voxpopuli")
_Counts = TypeVar("_Counts", bound=BaseModel)


class Limits(Section):
    """The most utterances of each split; None takes all (in an override: as many as in the other languages)."""

    train: PositiveInt | None = None
    validation: PositiveInt | None = None
    test: PositiveInt | None = None


class Hours(Section):
    """The most hours of each split; None takes all (in an override: as many as in the other languages)."""

    train: PositiveFloat | None = None
    validation: PositiveFloat | None = None
    test: PositiveFloat | None = None


def _known_columns(columns: dict[str, str]) -> dict[str, str]:
    known = ("audio", "text", "translation", "id", "speaker", "seconds")
    for name in columns:
        if name not in known:
            raise ValueError(f"{name!r} is no column of ours{nearest(name, known)}: map {', '.join(known)}")
    return columns


Columns = Annotated[dict[str, str], AfterValidator(_known_columns)]


class _Corpora(Section):
    min_seconds: Annotated[float, Field(ge=0)] = 0.1
    """Shorter recordings are rejected."""
    max_seconds: Annotated[float, Field(gt=0, le=30)] = 30.0
    """Longer recordings are rejected; never more than the base hears in one window."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The share of bad rows above which the preparation stops instead of going on."""


class Override(Section):
    """What one language does otherwise; what is left out is as for all."""

    path: str | None = None
    columns: Columns | None = None
    limits: Limits | None = None
    hours: Hours | None = None


class RecordedCorpora(_Corpora):
    """What all sources of recorded speech have."""

    columns: Columns = {}
    """Our name to the source's: audio, text, translation, id, speaker, seconds."""
    limits: Limits = Limits()
    """The most utterances taken, in the source's order."""
    hours: Hours = Hours()
    """The most hours taken, in the source's order."""

    def first(self, split: str, count: int) -> Self:
        """These settings with at most so many utterances of a split."""
        return self.model_copy(update={"limits": _at_most(self.limits, split, count)})


_Recorded = TypeVar("_Recorded", bound=RecordedCorpora)


def _overridden(corpora: _Recorded, own: Override) -> _Recorded:
    changes: dict[str, Any] = own.model_dump(exclude_none=True)
    if own.columns is not None:
        changes["columns"] = {**corpora.columns, **own.columns}
    changes |= {
        name: _updated(getattr(corpora, name), counts)
        for name in ("limits", "hours")
        if (counts := getattr(own, name)) is not None
    }
    return corpora.model_copy(update=changes)


def _updated(counts: _Counts, changes: BaseModel) -> _Counts:
    return counts.model_copy(update=changes.model_dump(exclude_none=True))


def _at_most(counts: _Counts, split: str, count: int) -> _Counts:
    return counts.model_copy(update={split: min(count, getattr(counts, split) or count)})


class ManifestCorpora(RecordedCorpora):
    """Speech listed in JSONL, CSV, TSV or Parquet files, one a (language, split)."""

    source: Literal["manifest"]
    """Says that this is a manifest corpus."""
    path: str
    """With `{language}` and `{split}` (train, validation, test) in it, such as `data/{language}/{split}.jsonl`."""
    overrides: dict[Language, Override] = {}
    """What single languages do otherwise: path, columns, limits, hours."""

    def of(self, language: str) -> ManifestCorpora:
        """These settings with the overrides of one language put in."""
        return _overridden(self, self.overrides.get(language, Override()))


class Shares(Section):
    """The shares of validation and test where a folder names no splits; the rest is for training."""

    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1


class FolderCorpora(RecordedCorpora):
    """A folder of audio files with a metadata.csv (or .tsv, .jsonl, .parquet), as `datasets` lays out an audiofolder:
    one table in each of train/, validation/ and test/, or one with a column `split`, or one that is split here."""

    source: Literal["folder"]
    """Says that this is a folder of audio."""
    path: str
    """With `{language}` in it, such as `data/{language}`."""
    shares: Shares = Shares()
    """Where nothing names the splits: a speaker's utterances (a sentence's where fewer than two speakers are named) all
    go to one split, drawn by a hash."""
    overrides: dict[Language, Override] = {}
    """What single languages do otherwise: path, columns, limits, hours."""

    def of(self, language: str) -> FolderCorpora:
        """These settings with the overrides of one language put in."""
        return _overridden(self, self.overrides.get(language, Override()))


class CommonVoiceOverride(Override):
    """What one language does otherwise; what is left out is as for all."""

    locale: str | None = None
    translations: str | None = None


class CommonVoiceCorpora(RecordedCorpora):
    """Common Voice as Mozilla Data Collective gives it, with the translations of CoVoST 2 where they are there."""

    source: Literal["common_voice"]
    """Says that this is Common Voice."""
    path: str
    """The folder that holds `cv-corpus-*/LOCALE`, or that folder, or `LOCALE` itself; may have `{language}` in it."""
    locale: str | None = None
    """Common Voice's code where it is not the language's, such as sv-SE; None finds it."""
    translations: str | None = None
    """CoVoST 2's table, such as `covost/covost_v2.{language}_en.tsv`, which then gives the splits too (its columns
    path, translation, split; the clips are Common Voice 4's)."""
    overrides: dict[Language, CommonVoiceOverride] = {}
    """What single languages do otherwise: path, columns, limits, hours, locale, translations."""

    def of(self, language: str) -> CommonVoiceCorpora:
        """These settings with the overrides of one language put in."""
        return _overridden(self, self.overrides.get(language, CommonVoiceOverride()))


def _known_splits(splits: dict[str, str]) -> dict[str, str]:
    for name in splits:
        if name not in SPLITS:
            raise ValueError(f"{name!r} is no split of ours{nearest(name, SPLITS)}: map {', '.join(SPLITS)}")
    return splits


Splits = Annotated[dict[str, str], AfterValidator(_known_splits)]


class DatasetsOverride(Override):
    """What one language does otherwise; what is left out is as for all."""

    name: str | None = None
    revision: str | None = None
    splits: Splits | None = None


class DatasetsCorpora(RecordedCorpora):
    """A data set of the Hugging Face hub, or a local copy of one: Parquet files with the audio in them."""

    source: Literal["datasets"]
    """Says that this is read by the `datasets` library."""
    preset: Literal["fleurs", "covost2", "mls", "voxpopuli"] | None = None
    """A known data set: gives path, name, revision, columns and splits; what is written here wins."""
    path: str | None = None
    """The hub's id (`google/fleurs`) or a folder; may have `{language}` in it. Required without a preset."""
    name: str | None = None
    """The data set's configuration, such as `{language}_en`."""
    revision: str | None = None
    """A branch, a tag or a commit of the hub."""
    splits: Splits = {}
    """Our split to the data set's, as in `{validation: dev}`; it may be a slice, as in `{test: "train[:200]"}`."""
    streaming: bool = True
    """Read from the hub only what the limits need, and keep no second copy; false downloads the whole data set into
    the hub's cache."""
    overrides: dict[Language, DatasetsOverride] = {}
    """What single languages do otherwise: path, columns, limits, hours, name, revision, splits."""

    @field_validator("preset", mode="before")
    @classmethod
    def _left_the_hub(cls, preset: object) -> object:
        if preset == "common_voice":
            raise ValueError(
                "Common Voice left the hub: download it from Mozilla Data Collective and set source: common_voice"
            )
        return preset

    @model_validator(mode="after")
    def _has_a_path(self) -> DatasetsCorpora:
        if self.preset is None and self.path is None:
            raise ValueError(f"give a path (a hub id or a folder) or a preset ({', '.join(PRESETS)})")
        return self

    def of(self, language: str) -> DatasetsCorpora:
        """These settings with the overrides of one language put in."""
        own = self.overrides.get(language, DatasetsOverride())
        merged = _overridden(self, own)
        return merged.model_copy(update={"splits": {**self.splits, **(own.splits or {})}})


class SyntheticCounts(Section):
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
    """Other numbers of utterances for single languages: train, validation, test."""

    def of(self, language: str) -> SyntheticCorpora:
        """These settings with the overrides of one language put in."""
        own = self.overrides.get(language, Limits())
        return self.model_copy(update={"utterances": _updated(self.utterances, own)})

    def first(self, split: str, count: int) -> SyntheticCorpora:
        """These settings with at most so many utterances of a split."""
        return self.model_copy(update={"utterances": _at_most(self.utterances, split, count)})


def _any_of(schema: dict[str, Any]) -> None:
    """As JSON Schema's `anyOf`: the Prefect UI draws no form for `oneOf`."""
    schema["anyOf"] = schema.pop("oneOf")
    del schema["discriminator"]


Corpora = Annotated[
    ManifestCorpora | FolderCorpora | CommonVoiceCorpora | DatasetsCorpora | SyntheticCorpora,
    Field(discriminator="source", json_schema_extra=_any_of),
]
