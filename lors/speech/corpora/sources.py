"""The sources of speech behind one door: what a split depends on, and its rows. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lors.errors import ConfigError
from lors.speech.corpora import common_voice, folder, hub, manifest, synthetic
from lors.speech.corpora.settings import (
    CommonVoiceCorpora,
    DatasetsCorpora,
    FolderCorpora,
    ManifestCorpora,
    SyntheticCorpora,
)
from lors.speech.corpus import Candidate

__all__ = ["SplitSource", "candidates", "describe"]

Corpora = ManifestCorpora | FolderCorpora | CommonVoiceCorpora | DatasetsCorpora | SyntheticCorpora
Memo = MutableMapping[str, str]


@dataclass(frozen=True)
class SplitSource:
    """What one split of one language is made from."""

    settings: dict[str, Any]
    """What shapes the rows: JSON values, part of the step's key."""
    outside: dict[str, str]
    """Digests, versions or the commit of what is read: part of the key too."""
    places: dict[str, Any] = field(default_factory=dict)
    """Where that lies, as JSON values: no part of the key, so that speech can be moved."""


def describe(corpora: Corpora, language: str, split: str, memo: Memo | None = None) -> SplitSource:
    """What a split depends on; `memo` is that of `lors.files.file_digest`, without which all audio is read.

    Raises CorpusError or ConfigError where the source is missing or does not have the language, the split or a column.
    """
    if isinstance(corpora, SyntheticCorpora):
        if language not in synthetic.LANGUAGES:
            raise ConfigError(
                f"the synthetic corpus does not speak {language!r}, choose from "
                f"{', '.join(synthetic.LANGUAGES)} or give a manifest"
            )
        settings = {"limit": getattr(corpora.utterances, split), "seed": corpora.seed}
        return SplitSource(settings, synthetic.generator_versions())
    limit, hours = getattr(corpora.limits, split), getattr(corpora.hours, split)
    own, outside, places = _recorded(corpora, language, split, manifest.rows_to_read(limit, corpora.max_rejected), memo)
    return SplitSource({"columns": corpora.columns, "limit": limit, "hours": hours, **own}, outside, places)


def _recorded(
    corpora: ManifestCorpora | FolderCorpora | CommonVoiceCorpora | DatasetsCorpora,
    language: str,
    split: str,
    count: int | None,  # of the rows that are read; None is all
    memo: Memo | None,
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """The settings, digests and places that only this source has."""
    if isinstance(corpora, DatasetsCorpora):
        return hub.describe(corpora, language, split, memo)
    path = Path(corpora.path.format(language=language, split=split)).absolute()
    if isinstance(corpora, ManifestCorpora):
        digest = manifest.content_digest(path, corpora.columns, memo, count)
        return {}, {"manifest": digest}, {"manifest": str(path)}
    if isinstance(corpora, FolderCorpora):
        shares = corpora.shares.model_dump()
        digest = folder.open_split(path, split, corpora.columns, shares, language).content_digest(memo, count)
        return {"shares": shares}, {"folder": digest}, {"folder": str(path)}
    place = common_voice.find_locale(path, language, corpora.locale)
    translations = common_voice.find_translations(corpora.translations, language, place.name)
    digest = common_voice.content_digest(place, split, corpora.columns, translations, memo, count)
    places = {"folder": str(place), "translations": translations and str(translations)}
    return {}, {"common voice": digest}, places


def candidates(settings: Mapping[str, Any], places: Mapping[str, Any]) -> Iterator[Candidate]:
    """The rows of a described split, for `write_split`; `settings` are with "source", "language" and "split"."""
    language, split = settings["language"], settings["split"]
    match settings["source"]:
        case "synthetic":
            return synthetic.candidates(language, split, settings["limit"], settings["seed"])
        case "manifest":
            return manifest.candidates(Path(places["manifest"]), settings["columns"])
        case "folder":
            own = folder.open_split(Path(places["folder"]), split, settings["columns"], settings["shares"], language)
            return own.candidates()
        case "common_voice":
            table = places["translations"]
            return common_voice.candidates(Path(places["folder"]), split, settings["columns"], table and Path(table))
        case source:
            assert source == "datasets", source
            return hub.candidates(settings, places)
