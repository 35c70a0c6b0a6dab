"""Every hypothesis of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lors.stages.common import HYPOTHESES, Report, decoding, load
from lors.stages.merging import load_merged

__all__ = ["evaluate_model"]


def evaluate_model(
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    places: Mapping[str, Any],
    out: str,
    work: str,
    threads: int,
    report: Report,
    **_: Any,
) -> dict[str, Any]:
    """Every hypothesis of one model on one language's split, beside its reference.

    The model is the input `model`, or the base with the expert of the input `compact` put in, or the base. A step that
    was interrupted goes on after its last batch.
    """
    from lors.speech.corpus import read_split
    from lors.speech.transcribe import hypothesis_table, transcribe

    folder, language, split = inputs.get("model") or places["base"], settings["language"], settings["split"]
    if "compact" in inputs:
        vector, whole = {"combined": inputs["compact"]}, {"scaling": 1.0, "factors": {}}
        model, processor = load_merged(folder, vector, {"groups": {}}, whole, threads, Path(work))
    else:
        model, processor = load(folder, threads)
    utterances = read_split(Path(inputs["corpus"]) / f"{split}.parquet")
    hypotheses = transcribe(
        model,
        processor,
        utterances,
        language=language,
        identify=settings["identify"],
        writer=_writer(settings, model, processor, folder, work),
        finished=Path(work) / "hypotheses.jsonl",
        on_progress=lambda done, total: report({"done": done, "total": total, "unit": "utterances"}),
        **decoding(settings),
    )
    table = hypothesis_table(hypotheses, utterances, language=language, split=split)
    table.to_parquet(Path(out) / HYPOTHESES, index=False)
    return {"hypotheses": len(table)}


def _writer(settings: Mapping[str, Any], model: Any, processor: Any, folder: str, work: str) -> Any:
    """What encodes and decodes in place of the model; None is the model itself."""
    if settings["backend"] == "transformers":
        return None
    from lors.speech.ctranslate import CTranslate2Writer, require_ctranslate2

    require_ctranslate2(model.config.model_type, settings["beams"], fallback=settings.get("fallback", False))
    return CTranslate2Writer(model, processor, Path(folder), Path(work) / "ctranslate2")
