"""A tiny Whisper to fine-tune, and trainings as jobs that a test can run in other processes, and kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from speech_sounds import sound
from transformers import WhisperConfig, WhisperForConditionalGeneration

from lors.errors import ConfigError
from lors.speech.corpus import SAMPLE_RATE, Utterance, encode_flac
from lors.training import checkpoint, distributed
from lors.training.examples import Example
from lors.training.finetune import LOG, fine_tune, stop_on_sigterm
from lors.training.settings import Finetune

Report = Callable[[Mapping[str, Any]], None]


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
        labels = (2, 3, 4, *(5 + (number * step) % 30 for step in range(1, 2 + number % 4)), 0)
        found.append(Example(utterance, labels, f"group {number % 3}"))
    return found


class OtherPrompts:
    """As `lors.training.preserve.Prompts`, for `examples`: another second token, and a text that the seed decides."""

    def labels(self, example: Example, seed: str) -> tuple[int, ...]:
        first, _, *text = example.labels
        return (first, 39, *text[: 2 + len(seed) % 3], 0)

    def elsewhere(self, seed: str, seconds: float) -> tuple[Utterance, tuple[int, ...]] | None:
        return None


class OtherSpeech(OtherPrompts):
    """With speech of another language, for every second utterance of `examples`."""

    def elsewhere(self, seed: str, seconds: float) -> tuple[Utterance, tuple[int, ...]] | None:
        number = int(seed.rpartition("u")[2])
        if number % 2:
            return None
        audio = sound(0.3 + 0.01 * number, seed=100 + number)
        flac = encode_flac(audio)
        return Utterance(f"it/u{number}", "text", None, None, len(audio) / SAMPLE_RATE, flac), (2, 38, 7 + number, 0)


def settings(**changes: Any) -> Finetune:
    return Finetune(**{"steps": 12, "learning_rate": 3e-3, "batch_seconds": 8.0, **changes})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """To the bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def log_of(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / LOG).read_text().splitlines()]


def steps_of(work: Path) -> list[dict[str, Any]]:
    return [entry for entry in log_of(work) if "loss" in entry]


class InterruptedTrainingError(Exception):
    pass


def interrupt_at(step: int, key: str = "loss") -> Report:
    """A report that raises at the event of a step's update, or of its validation."""

    def report(event: Mapping[str, Any]) -> None:
        if event.get("done") == step and key in event:
            raise InterruptedTrainingError

    return report


def often() -> None:
    """A checkpoint after each step."""
    checkpoint._SECONDS, checkpoint._SHARE = 0.0, float("inf")


def killed_stage(report: Report, step: int, **arguments: Any) -> dict[str, Any]:
    """`lors.stages.fine_tune` with a checkpoint after each step, and `kill -9` in one of them."""
    from lors import stages

    def kill(event: Mapping[str, Any]) -> None:
        if event["done"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    often()
    return stages.fine_tune(**arguments, report=kill)


def together(
    report: Report,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    work: str,
    out: str,
    die: int | None = None,  # the step after which the second process is killed
    refuse: int | None = None,  # the process that refuses to train
) -> dict[str, Any]:
    """One of several processes that train the tiny model; the first one writes the weights to `out`."""
    torch.set_num_threads(1)
    often()
    if distributed.rank() == refuse:
        raise ConfigError("this process wants other settings")
    model = tiny_model(**options)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if distributed.rank() == 1 and asked == die:
            os.kill(os.getpid(), signal.SIGKILL)
        return stopped()

    with stop_on_sigterm() as stopped:
        own = Finetune(**settings)
        result = fine_tune(
            model, examples(), examples(3), own, Path(work) / "training", report, prompts=OtherPrompts(), stop=stop
        )
    if distributed.rank() == 0:
        save_file({name: value.clone() for name, value in model.named_parameters()}, out)
    return result
