"""Speech as every later stage reads it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lors.stages.common import Report

__all__ = ["keep_base", "prepare_split"]


def prepare_split(
    settings: Mapping[str, Any], places: Mapping[str, Any], out: str, report: Report, **_: Any
) -> dict[str, Any]:
    """One validated split of a language, as Parquet with embedded 16 kHz FLAC, and its rejected rows."""
    from dataclasses import asdict

    from lors.speech.corpora.sources import candidates
    from lors.speech.corpus import write_split

    split = settings["split"]
    written = write_split(
        candidates(settings, places),
        Path(out) / f"{split}.parquet",
        language=settings["language"],
        min_seconds=settings["min_seconds"],
        max_seconds=settings["max_seconds"],
        max_rejected=settings["max_rejected"],
        limit=settings["limit"],
        hours=settings.get("hours"),
        on_progress=lambda done, total: report({"done": done, "total": total, "unit": "utterances"}),
    )
    return asdict(written)


_OF_A_MODEL = {".json", ".model", ".safetensors", ".txt"}


def keep_base(places: Mapping[str, Any], out: str, report: Report, **_: Any) -> dict[str, Any]:
    """The files of a base model, as they are."""
    files = sorted(path for path in Path(places["base"]).iterdir() if path.is_file() and path.suffix in _OF_A_MODEL)
    for done, path in enumerate(files):
        report({"done": done, "total": len(files), "unit": "files"})
        shutil.copyfile(path, Path(out) / path.name)
    return {"files": len(files)}
