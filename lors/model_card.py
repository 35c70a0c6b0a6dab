"""The results in a model card: as a table, and as `model-index` metadata that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["card_with_results"]

_TASKS: Final = {
    "transcribe": ("automatic-speech-recognition", "Speech recognition"),
    "translate": ("translation", "Speech translation to English"),
}
_LABELS: Final = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF2", "comet": "COMET"}
_BEFORE: Final = "## Provenance"


def card_with_results(
    card: str,  # Markdown with a YAML head
    summary: Mapping[str, Any],  # of `lors.scoring.summary.summarise`
    results: pd.DataFrame,  # of `lors.scoring.results.score_tables`
    *,
    model_name: str,
    corpus: Mapping[str, str],  # the speech of each language, such as `synthetic` or a folder
) -> str:
    """The card with a section "Results" before its provenance and with the scores of the system `model_name` as
    `model-index` (one entry a language and task, with WER and CER or BLEU and chrF2, and COMET where it is known).

    A score without a finite value is left out: it has no form in the metadata.
    """
    from huggingface_hub import ModelCard

    from lors.scoring.tables import markdown_table

    table = f"## Results\n\n{markdown_table(results, summary).strip()}\n"
    before, provenance, after = card.partition(_BEFORE)
    made = ModelCard(f"{before.rstrip()}\n\n{table}\n{provenance}{after}".rstrip() + "\n")
    own = results[(results["system"] == model_name) & (results["split"] == summary["split"])]
    own = own[own["metric"].isin(_LABELS) & own["normaliser"].isin((summary["normaliser"], "none"))]
    own = own.drop_duplicates(["language", "task", "metric"])  # the run's own normaliser comes first
    entries = [_entry(row, corpus) for row in own.to_dict("records") if row["value"] == row["value"]]
    made.data.eval_results = entries
    made.data.model_name = model_name
    made.data.language = sorted(dict.fromkeys(own["language"]))
    made.data.metrics = [metric for metric in _LABELS if metric in set(own["metric"])]
    return str(made)


def _entry(row: Mapping[str, Any], corpus: Mapping[str, str]) -> Any:
    from huggingface_hub import EvalResult

    language, (task, said) = row["language"], _TASKS[row["task"]]
    source = corpus.get(language, "speech")
    return EvalResult(
        task_type=task,
        task_name=said,
        # A name of letters, digits and dashes, or a hub id: what the metadata takes, and no path of a machine.
        dataset_type=source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else re.sub(r"[^\w-]+", "-", source).strip("-"),
        dataset_name=f"{source} ({language})",
        dataset_config=language,
        dataset_split=row["split"],
        dataset_args={"utterances": int(row["utterances"])},
        metric_type=row["metric"],
        metric_name=_LABELS[row["metric"]],
        metric_value=round(float(row["value"]), 2),
        metric_args={"signature": row["signature"]},
    )
