"""Every hypothesis of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lors.stages.common import HYPOTHESES, Report, decoding, load

__all__ = ["evaluate_model"]


def evaluate_model(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    threads: int,
    report: Report,
    **_: Any,
) -> dict[str, Any]:
    """Every hypothesis of one model on one language's split, beside its reference."""
    from lors.speech.corpus import read_split
    from lors.speech.transcribe import hypothesis_table, transcribe

    model, processor = load(inputs.get("model") or places["base"], threads)
    language, split = settings["language"], settings["split"]
    utterances = read_split(Path(inputs["corpus"]) / f"{split}.parquet")
    hypotheses = transcribe(
        model,
        processor,
        utterances,
        language=language,
        on_progress=lambda done, total: report({"done": done, "total": total, "unit": "utterances"}),
        **decoding(settings),
    )
    table = hypothesis_table(hypotheses, utterances, language=language, split=split)
    table.to_parquet(Path(out) / HYPOTHESES, index=False)
    return {"hypotheses": len(table)}
