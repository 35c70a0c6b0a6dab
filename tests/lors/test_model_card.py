"""The results in a model card, read back by the library of the hub."""

from __future__ import annotations

import pandas as pd
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from lors.model_card import card_with_results
from lors.scoring.results import score_tables
from lors.scoring.summary import summarise
from lors.scoring.tables import markdown_table

CARD = """---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [lors, merge]
base_model: openai/whisper-base
---

# Merged by lors

`base + lambda * delta` with scaling coefficient 0.3.

## Provenance

```json
{"method": "lors"}
```
"""


def hypotheses(word: str) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"id": f"u{i}", "language": language, "task": task, "split": "test", "speaker": None, "window": 7.0}
            | {"reference": "uno dos tres cuatro", "hypothesis": f"uno dos tres {word}", "truncated": False}
            for i in range(4)
            for language in ("es", "ja")
            for task in ("transcribe", "translate")
        ]
    )


def test_the_hub_s_library_reads_the_results_back() -> None:
    tables = {"base": hypotheses("mal"), "lors": hypotheses("cuatro")}
    results = score_tables(tables, resamples=20)
    summary = summarise(results, tables, resamples=20)
    corpus = {"es": "google/fleurs", "ja": "/data/my speech"}
    text = card_with_results(CARD, summary, results, model_name="lors", corpus=corpus)
    card = ModelCard(text)
    assert card.data.base_model == "openai/whisper-base"
    assert (card.data.language, card.data.metrics) == (["es", "ja"], ["wer", "cer", "bleu", "chrf"])
    name, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "lors"
    assert found == card.data.eval_results
    assert len(found) == 2 * 4
    by = {(entry.dataset_config, entry.metric_type): entry for entry in found}
    assert by["es", "wer"].metric_value == 0
    assert by["es", "bleu"].metric_value == 100
    assert by["es", "wer"].dataset_type == "google/fleurs"
    assert by["ja", "cer"].dataset_type == "data-my-speech"
    assert by["ja", "cer"].task_type == "automatic-speech-recognition"
    assert by["ja", "bleu"].task_type == "translation"
    assert "normaliser:lors.1" in by["es", "wer"].metric_args["signature"]
    own = card.content.index("# Merged by lors")
    assert own < card.content.index(markdown_table(results, summary).strip()) < card.content.index("## Provenance")
    assert card.content.rstrip().endswith("```")
