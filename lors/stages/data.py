"""Speech as every later stage reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lors.stages.common import Report

__all__ = ["prepare_split"]


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
