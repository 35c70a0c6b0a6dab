"""Targets: the tokens that a model is trained to write."""

from __future__ import annotations

from typing import Any

import pytest
from speech_sounds import utterance

from lors.errors import InputError
from lors.speech.architecture import Whisper
from lors.starter import MODEL_FOLDER
from lors.training.examples import examples_for


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import WhisperTokenizer

    return WhisperTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.mark.parametrize(("task", "text"), [("transcribe", "hola 1"), ("translate", "hello")])
def test_labels(tokenizer: Any, task: str, text: str) -> None:
    (example,) = examples_for([utterance(1, 0.5)], tokenizer, "es", task, 128, Whisper())
    # The token of the SPOKEN language for both tasks, and the leading space of Whisper's training texts.
    assert tokenizer.decode(example.labels) == f"<|es|><|{task}|><|notimestamps|> {text}<|endoftext|>"
    assert example.labels[-1] == tokenizer.eos_token_id
    assert example.labels.count(tokenizer.convert_tokens_to_ids("<|startoftranscript|>")) == 0
    assert example.group == f"es-{task}"


def test_utterances_without_a_usable_target_are_left_out(tokenizer: Any) -> None:
    utterances = [utterance(1, 0.5, None), utterance(2, 0.5, "qz" * 2), utterance(3, 0.5, "qz" * 40)]
    (short,) = examples_for(utterances[1:2], tokenizer, "es", "translate", 100, Whisper())
    found = examples_for(utterances, tokenizer, "es", "translate", len(short.labels), Whisper())
    assert [example.utterance.id for example in found] == ["u2"]
    assert examples_for(utterances, tokenizer, "es", "translate", len(short.labels) - 1, Whisper()) == []


def test_language_that_the_tokenizer_lacks(tokenizer: Any) -> None:
    """Its token would silently become the unknown token."""
    with pytest.raises(InputError, match=r"no language 'xx'"):
        examples_for([utterance(1, 0.5)], tokenizer, "xx", "transcribe", 100, Whisper())
