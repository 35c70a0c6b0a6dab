"""What a model's metrics are on validation splits, by `language-task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lors.stages.common import decoding

__all__ = ["mean_losses", "validation_error", "validation_values"]


def validation_values(
    metric: str, model: Any, processor: Any, utterances: Sequence[Any], language: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """The `metric` of `lors.config.ScalingSearch`, of the tasks that it is defined for and that have references."""
    from lors.scoring.metrics import LOWER_IS_BETTER, METRICS_OF_TASK, main_metric, score
    from lors.speech.transcribe import transcribe

    if metric == "loss":
        return mean_losses(model, processor, utterances, language, settings)
    tasks = [task for task in settings["tasks"] if metric in ("score", *METRICS_OF_TASK[task])]
    if not tasks:
        return {}
    hypotheses = transcribe(model, processor, utterances, language=language, **decoding({**settings, "tasks": tasks}))
    values = {}
    for task in tasks:
        texts = {h.id: h.text for h in hypotheses if h.task == task}
        pairs = [(reference, texts[u.id]) for u in utterances if (reference := u.target(task)) is not None]
        if pairs:
            references, written = zip(*pairs, strict=True)
            own, normaliser = main_metric(task, language) if metric == "score" else metric, settings["normaliser"]
            # One resample: the interval is not used.
            value = score(own, references, written, language=language, normaliser=normaliser, resamples=1).value
            quality = metric == "score" and own not in LOWER_IS_BETTER
            values[f"{language}-{task}"] = 100 - value if quality else value
    return values


def validation_error(
    model: Any, processor: Any, utterances: Sequence[Any], language: str, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Percent: WER (CER where words are not spaced) for transcribe, 100 - BLEU for translate, by `language-task`."""
    return validation_values("score", model, processor, utterances, language, settings)


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
