"""Transcription and translation of many utterances: one encoder pass for both tasks, batches of similar length."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from lors.errors import InputError
from lors.speech.architecture import FeatureCache, architecture_of
from lors.speech.corpus import Utterance

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TASKS", "Hypothesis", "hypothesis_table", "token_limit", "transcribe"]

TASKS = ("transcribe", "translate")

# Speech is slower than this in the tokens of every script: Georgian, at 2.5 tokens a letter of Whisper's vocabulary,
# and some 12 letters a second, comes nearest. A model that repeats itself is stopped here, not after 448 tokens.
_TOKENS_PER_SECOND = 32
_TOKENS_AT_LEAST = 16

_TABLE = dict.fromkeys(("id", "language", "task", "split", "speaker"), "object") | {
    "seconds": "float64",
    "reference": "object",
    "hypothesis": "object",
    "window": "float64",
    "tokens": "int64",
    "truncated": "bool",
}


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What a model wrote for one utterance.

    `window` is the seconds its encoder saw; `tokens` counts those written before the end token; `truncated` says that
    there was no end token within the limit, which then equals `tokens`.
    """

    id: str
    task: str
    text: str
    seconds: float
    window: float
    tokens: int
    truncated: bool


def token_limit(seconds: float, model_limit: int) -> int:
    """The most tokens that speech of that many seconds can need, at most `model_limit`."""
    return min(model_limit, _TOKENS_AT_LEAST + ceil(_TOKENS_PER_SECOND * seconds))


def transcribe(
    model: Any,
    processor: Any,
    utterances: Sequence[Utterance],
    *,
    language: str,
    tasks: Sequence[str] = TASKS,
    window: str | float = "auto",
    beams: int = 1,
    batch_seconds: float = 160.0,
    max_new_tokens: int | None = None,
    cache: FeatureCache | None = None,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Hypothesis]:
    """What a `model` writes for each utterance and task: task by task, the utterances in their given order.

    The same inputs give the same result. Beside floating-point rounding, a hypothesis does not depend on the others
    of its batch, except through the window that the batch's longest utterance asks for.

    Args:
        language: code of the language spoken, also for `translate` (into English).
        window: seconds of the encoder window, or "auto"; Moonshine never hears more than the batch's longest utterance.
        beams: 1 decodes greedily.
        batch_seconds: the most padded seconds (rows times window) encoded at once; one row always is.
        max_new_tokens: the most tokens written; None takes `token_limit` of each utterance.
        cache: features kept from call to call.
        device: where the model is moved to; None leaves it where it is.
        on_progress: called with (utterances done, all).

    Raises:
        InputError: the model does not take the language or the task, or an utterance is longer than the window.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"the task {unknown[0]!r} is unknown; Whisper's tasks are {' and '.join(TASKS)}")
    architecture = architecture_of(model)
    start = model.config.decoder_start_token_id
    prompts = {task: [start, *architecture.prefix(processor.tokenizer, language, task)] for task in tasks}
    native = architecture.native_window(model.config)
    batches = _batches(
        utterances, lambda longest: architecture.window_for(model.config, longest, window), native, batch_seconds
    )
    cache = cache or FeatureCache(architecture, model.config, max_bytes=0)
    found: dict[tuple[str, int], Hypothesis] = {}
    if device is not None:
        model.to(device)
    done = 0
    with _decoding(model, beams) as config:
        for seconds, rows in batches:
            batch = [utterances[row] for row in rows]
            with torch.inference_mode(), architecture.windowed(model, seconds):
                encoded = _encode(model, architecture.collate(model.config, cache.features(batch), seconds))
                for task, prompt in prompts.items():
                    most = architecture.token_limit(model.config) - len(prompt)
                    limits = [
                        token_limit(utterance.seconds, most) if max_new_tokens is None else min(max_new_tokens, most)
                        for utterance in batch
                    ]
                    written = _decode(model, encoded, prompt, config, max(limits))
                    cut = [_until_end(tokens, config, limit) for tokens, limit in zip(written, limits, strict=True)]
                    texts = processor.tokenizer.batch_decode([tokens for tokens, _ in cut], skip_special_tokens=True)
                    for row, utterance, text, (tokens, ended) in zip(rows, batch, texts, cut, strict=True):
                        found[task, row] = Hypothesis(
                            utterance.id, task, text.strip(), utterance.seconds, seconds, len(tokens), not ended
                        )
            done += len(rows)
            if on_progress:
                on_progress(done, len(utterances))
    return [found[task, row] for task in prompts for row in range(len(utterances))]


def hypothesis_table(
    hypotheses: Sequence[Hypothesis], utterances: Sequence[Utterance], *, language: str, split: str
) -> pd.DataFrame:
    """Hypotheses beside their references, one row each; those without a reference (no translation known) are left out.

    Columns: id, language, task, split, speaker, seconds, reference, hypothesis, window, tokens, truncated.
    """
    import pandas as pd

    by_id = {utterance.id: utterance for utterance in utterances}
    rows = [
        {"id": h.id, "language": language, "task": h.task, "split": split, "speaker": by_id[h.id].speaker}
        | {"seconds": h.seconds, "reference": reference, "hypothesis": h.text}
        | {"window": h.window, "tokens": h.tokens, "truncated": h.truncated}
        for h in hypotheses
        if (reference := by_id[h.id].target(h.task)) is not None
    ]
    return pd.DataFrame(rows, columns=list(_TABLE), dtype=object).astype(_TABLE)


def _batches(
    utterances: Sequence[Utterance], window_for: Callable[[float], float], native: float, batch_seconds: float
) -> list[tuple[float, list[int]]]:
    """(window, rows) of every batch, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(utterances)), key=lambda row: (-utterances[row].seconds, row))
    batches: list[tuple[float, list[int]]] = []
    while order:
        longest = utterances[order[0]]
        window = window_for(longest.seconds)
        if longest.seconds > window:
            raise InputError(
                f"utterance {longest.id} lasts {longest.seconds:.1f} s, more than the window of {window:g} s (the "
                f"model takes {native:g} s at most); widen the window or lower the corpus' max_seconds"
            )
        # A row whose own window is much shorter starts a batch of its own: the encoder's time goes with the padding.
        size = 1
        while size < min(len(order), int(batch_seconds / window)):
            if window_for(utterances[order[size]].seconds) < 0.75 * window:
                break
            size += 1
        batches.append((window, order[:size]))
        order = order[size:]
    return batches


def _encode(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """The encoder's output, (B, positions, d) and what goes with it, of a batch."""
    moved = {n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in inputs.items()}
    return model.get_encoder()(moved.pop(model.main_input_name), **moved)


@contextlib.contextmanager
def _decoding(model: Any, beams: int) -> Iterator[Any]:
    """Evaluation mode, and a generation config of this call only; yields it."""
    training, own = model.training, model.generation_config
    # `generate` fills what is unset from the model's config, whose max_length would compete with max_new_tokens.
    config = model.generation_config = copy.deepcopy(own)
    config.update(num_beams=beams, do_sample=False, max_length=None, return_dict_in_generate=False)
    model.eval()
    try:
        yield config
    finally:
        model.generation_config = own
        model.train(training)


def _decode(model: Any, encoded: Any, prompt: list[int], config: Any, limit: int) -> list[list[int]]:
    """The tokens written after `prompt` for each row of the encoder's output, padding included."""
    from transformers import GenerationMixin

    hidden = encoded.last_hidden_state
    config.max_new_tokens = limit
    # Whisper's own `generate` splits what it gets at timestamp tokens, which a weak model may write, and then drops
    # the rest; the plain one keeps every token. It expands the encoder's output in place, hence one holder a call.
    written = GenerationMixin.generate(
        model,
        encoder_outputs=copy.copy(encoded),
        attention_mask=hidden.new_ones(hidden.shape[:2], dtype=torch.long),  # of the encoder; quiets a warning
        decoder_input_ids=torch.tensor([prompt], device=hidden.device).expand(len(hidden), -1),
        generation_config=config,
    )
    tokens: list[list[int]] = written[:, len(prompt) :].tolist()
    return tokens


def _until_end(tokens: list[int], config: Any, limit: int) -> tuple[list[int], bool]:
    """The tokens before the end token, and whether one came within `limit`."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for number, token in enumerate(tokens[:limit]):
        if token in ends:
            return tokens[:number], True
    return tokens[:limit], False
