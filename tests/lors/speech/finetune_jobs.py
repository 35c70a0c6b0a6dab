"""A tiny Whisper to fine-tune, and the fine-tuning as a job that a test can kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
from speech_sounds import sound
from transformers import WhisperConfig, WhisperForConditionalGeneration

from lors.speech import finetune
from lors.speech.corpus import SAMPLE_RATE, Utterance, encode_flac
from lors.speech.finetune import Example


def tiny_model(**options: Any) -> Any:
    """Random weights, a window of 2 s, a vocabulary of 40."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_target_positions": 20,
        "max_source_positions": 100, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    return WhisperForConditionalGeneration(WhisperConfig(**{**settings, **options})).eval()


def examples(count: int = 12) -> list[Example]:
    found = []
    for number in range(count):
        audio = sound(0.4 + 0.11 * number, seed=number)
        utterance = Utterance(f"u{number}", "text", None, None, len(audio) / SAMPLE_RATE, encode_flac(audio))
        found.append(Example(utterance, (2, 3, 4, *(5 + (number * step) % 30 for step in range(1, 2 + number % 4)), 0)))
    return found


def killed_stage(report: Callable[[Mapping[str, Any]], None], step: int, **arguments: Any) -> dict[str, Any]:
    """`lors.stages.fine_tune` with a checkpoint after each step, and `kill -9` in one of them."""
    from lors import stages

    def kill(event: Mapping[str, Any]) -> None:
        if event["done"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    finetune._CHECKPOINT_SECONDS, finetune._CHECKPOINT_SHARE = 0.0, float("inf")
    return stages.fine_tune(**arguments, report=kill)
