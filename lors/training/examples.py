"""What a model is trained on: utterances and the tokens that it must write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lors.speech.corpus import Utterance

if TYPE_CHECKING:
    from lors.speech.architecture import Architecture

__all__ = ["Example", "examples_for"]


@dataclass(frozen=True, slots=True)
class Example:
    """One training target: an utterance and the tokens that the decoder must write after its start token."""

    utterance: Utterance
    labels: tuple[int, ...]
    group: str = ""
    """What temperature sampling draws from, such as `es-transcribe`."""


def examples_for(
    utterances: Sequence[Utterance],
    tokenizer: Any,
    language: str,
    task: str,
    limit: int,  # the most labels that the decoder has positions for
    architecture: Architecture,
) -> list[Example]:
    """Examples of one (language, task); for Whisper `<|language|><|task|><|notimestamps|> text <|endoftext|>`.

    `language` is the spoken one for both tasks. Utterances without a target (no translation) or with more than `limit`
    tokens are left out. Raises InputError where the architecture or its tokenizer lacks the language or the task.
    """
    prefix = architecture.prefix(tokenizer, language, task)
    out = []
    for utterance in utterances:
        text = utterance.target(task)
        if text is None:
            continue
        ids = architecture.text_tokens(tokenizer, text)
        if len(prefix) + len(ids) < limit:
            labels = (*prefix, *ids, tokenizer.eos_token_id)
            out.append(Example(utterance, labels, f"{language}-{task}"))
    return out
