"""The error of a model on validation splits, by `language-task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lors.stages.common import decoding

__all__ = ["mean_losses", "validation_error"]


def validation_error(
    model: Any, processor: Any, utterances: Sequence[Any], language: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Percent: WER (CER where words are not spaced) for transcribe, 100 - BLEU for translate, by `language-task`."""
    from lors.scoring.metrics import LOWER_IS_BETTER, main_metric, score
    from lors.speech.transcribe import transcribe

    hypotheses = transcribe(model, processor, utterances, language=language, **decoding(settings))
    errors = {}
    for task in settings["tasks"]:
        texts = {h.id: h.text for h in hypotheses if h.task == task}
        pairs = [(reference, texts[u.id]) for u in utterances if (reference := u.target(task)) is not None]
        if pairs:
            references, written = zip(*pairs, strict=True)
            metric, normaliser = main_metric(task, language), settings["normaliser"]
            value = score(metric, references, written, language=language, normaliser=normaliser).value
            errors[f"{language}-{task}"] = value if metric in LOWER_IS_BETTER else 100 - value
    return errors


def mean_losses(
    model: Any, processor: Any, utterances: Sequence[Any], language: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Cross-entropy a token with the right history, by `language-task`."""
    from lors.speech.architecture import architecture_of
    from lors.training.examples import examples_for
    from lors.training.finetune import validation_loss

    architecture, errors = architecture_of(model), {}
    limit = architecture.token_limit(model.config)
    for task in settings["tasks"]:
        examples = examples_for(utterances, processor.tokenizer, language, task, limit, architecture)
        if examples:
            errors[f"{language}-{task}"] = validation_loss(
                model, examples, batch_seconds=settings["batch_seconds"], window=settings["window"]
            )
    return errors
