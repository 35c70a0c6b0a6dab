"""Transcription and translation of many utterances: one encoder pass for both tasks, batches of similar length."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lors.errors import InputError
from lors.speech.corpus import Utterance
from lors.speech.features import MelCache, log_mel, native_window, pad_mels, window_for, windowed

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TASKS", "Hypothesis", "hypothesis_table", "require_language", "token_limit", "transcribe"]

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


def require_language(source: Any, language: str) -> int:
    """The id of `<|language|>` in a Whisper processor, tokenizer or generation config; InputError if it has none."""
    known: dict[str, int] | None = getattr(source, "lang_to_id", None)
    if known is None:
        known = getattr(source, "tokenizer", source).get_vocab()
    languages = {match[1]: number for t, number in known.items() if (match := re.fullmatch(r"<\|([a-z]{2,3})\|>", t))}
    if language not in languages:
        raise InputError(
            f"the model has no language {language!r}: its tokenizer has no token <|{language}|>, and languages come "
            f"from the base's tokenizer, which has {', '.join(sorted(languages)) or 'none'}; "
            "use one of those codes or another base"
        )
    return languages[language]


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
    mels: MelCache | None = None,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Hypothesis]:
    """What a Whisper `model` writes for each utterance and task: task by task, the utterances in their given order.

    The same inputs give the same result. Beside floating-point rounding, a hypothesis does not depend on the others
    of its batch, except through the window (`window_for` of the batch's longest utterance).

    Args:
        language: code of the language spoken, also for `translate` (into English).
        window: seconds of the encoder window, or "auto".
        beams: 1 decodes greedily.
        batch_seconds: the most padded seconds (rows times window) encoded at once; one row always is.
        max_new_tokens: the most tokens written; None takes `token_limit` of each utterance.
        mels: spectrograms kept from call to call.
        device: where the model is moved to; None leaves it where it is.
        on_progress: called with (utterances done, all).

    Raises:
        InputError: the tokenizer lacks the language, or an utterance is longer than the window.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"the task {unknown[0]!r} is unknown; Whisper's tasks are {' and '.join(TASKS)}")
    prompts = {task: _prompt(processor.tokenizer, model, language, task) for task in tasks}
    batches = _batches(utterances, native_window(model.config), window, batch_seconds)
    found: dict[tuple[str, int], Hypothesis] = {}
    if device is not None:
        model.to(device)
    done = 0
    with _decoding(model, beams) as config:
        for seconds, rows in batches:
            batch = [utterances[row] for row in rows]
            limits = [_limit(model, max_new_tokens, utterance.seconds) for utterance in batch]
            with torch.inference_mode(), windowed(model, seconds) as frames:
                encoded = _encode(model, batch, frames, mels)
                for task, prompt in prompts.items():
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
    utterances: Sequence[Utterance], native: float, setting: str | float, batch_seconds: float
) -> list[tuple[float, list[int]]]:
    """(window, rows) of every batch, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(utterances)), key=lambda row: (-utterances[row].seconds, row))
    batches: list[tuple[float, list[int]]] = []
    while order:
        longest = utterances[order[0]]
        window = window_for(longest.seconds, native, setting)
        if longest.seconds > window:
            raise InputError(
                f"utterance {longest.id} lasts {longest.seconds:.1f} s, more than the window of {window:g} s (the "
                f"model takes {native:g} s at most); widen the window or lower the corpus' max_seconds"
            )
        # A row whose own window is much shorter starts a batch of its own: the encoder's time goes with the padding.
        size = 1
        while size < min(len(order), int(batch_seconds / window)):
            if window_for(utterances[order[size]].seconds, native, setting) < 0.75 * window:
                break
            size += 1
        batches.append((window, order[:size]))
        order = order[size:]
    return batches


def _prompt(tokenizer: Any, model: Any, language: str, task: str) -> list[int]:
    if not getattr(model.generation_config, "is_multilingual", True):
        raise InputError("the model is an English-only Whisper, which takes no language; use a multilingual base")
    named = [f"<|{task}|>", "<|notimestamps|>"]
    vocabulary = tokenizer.get_vocab()
    if lacking := [token for token in named if token not in vocabulary]:
        raise InputError(f"the model's tokenizer has no token {lacking[0]}; use a multilingual Whisper as base")
    language_id = require_language(tokenizer, language)
    return [model.generation_config.decoder_start_token_id, language_id, *(vocabulary[token] for token in named)]


def _limit(model: Any, max_new_tokens: int | None, seconds: float) -> int:
    model_limit = model.config.max_target_positions - 4  # the prompt's tokens
    return token_limit(seconds, model_limit) if max_new_tokens is None else min(max_new_tokens, model_limit)


def _encode(model: Any, batch: Sequence[Utterance], frames: int, mels: MelCache | None) -> Tensor:
    """(B, frames / 2, d) of the batch."""
    n_mels = model.config.num_mel_bins
    features = mels.batch(batch, frames) if mels else pad_mels(log_mel([u.audio() for u in batch], n_mels), frames)
    encoded: Tensor = model.get_encoder()(features.to(model.device, model.dtype)).last_hidden_state
    return encoded


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


def _decode(model: Any, encoded: Tensor, prompt: list[int], config: Any, limit: int) -> list[list[int]]:
    """The tokens written after `prompt` for each of (B, positions, d), padding included."""
    from transformers import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    config.max_new_tokens = limit
    # Whisper's own `generate` splits what it gets at timestamp tokens, which a weak model may write, and then drops
    # the rest; the plain one keeps every token. It expands the encoder's output in place, hence one holder a call.
    written = GenerationMixin.generate(
        model,
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=encoded.new_ones(encoded.shape[:2], dtype=torch.long),  # of the encoder; quiets a warning
        decoder_input_ids=torch.tensor([prompt], device=encoded.device).expand(len(encoded), -1),
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
