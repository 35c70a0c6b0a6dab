"""What differs between the speech-to-text models that LoRS trains and decodes: Whisper and Moonshine.

Shapes: B utterances, M mel bins, F frames of 10 ms, N samples at 16 kHz.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from lors.errors import InputError
from lors.speech.base_model import MOONSHINE_SECONDS, is_english_only, unsupported
from lors.speech.corpus import SAMPLE_RATE
from lors.speech.features import FRAMES_PER_SECOND, log_mel, native_window, pad_mels, window_for, windowed

__all__ = [
    "Architecture",
    "FeatureCache",
    "Moonshine",
    "Whisper",
    "architecture_of",
    "languages_of",
    "require_language",
]


class Architecture(Protocol):
    """One kind of model. `config` is its transformers config, `tokenizer` its tokenizer."""

    @property
    def name(self) -> str:
        """`config.model_type`."""

    @property
    def spectrogram(self) -> bool:
        """Whether features are log-mels, which SpecAugment masks."""

    def native_window(self, config: Any) -> float:
        """The most seconds heard at once."""

    def window_for(self, config: Any, longest: float, setting: float | str) -> float:
        """Seconds that a batch is padded to, whose longest utterance lasts `longest` seconds."""

    def token_limit(self, config: Any) -> int:
        """The most tokens of the decoder, the start token and `prefix` included."""

    def prefix(self, tokenizer: Any, language: str, task: str) -> tuple[int, ...]:
        """The tokens between the start token and the text.

        `language` is the spoken one for both tasks. Raises InputError where the model does not take it or the task.
        """

    def languages(self, tokenizer: Any) -> dict[str, int]:
        """The token of each language that the model can say it hears; empty where it cannot say any."""

    def text_tokens(self, tokenizer: Any, text: str) -> list[int]:
        """The tokens of a text as the model writes them, without `prefix` and the end token."""

    def features(self, config: Any, audios: Sequence[np.ndarray]) -> list[Tensor]:
        """(channels, frames) of each (N,) float32 audio, without padding: log-mels (M, F), or (1, N)."""

    def collate(self, config: Any, features: Sequence[Tensor], seconds: float) -> dict[str, Tensor]:
        """The encoder's inputs by name, copies of `features` padded with silence, or cut, to `seconds`."""

    def windowed(self, model: Any, seconds: float) -> AbstractContextManager[object]:
        """Inside, the encoder takes windows of `seconds`."""


@dataclass(frozen=True, slots=True)
class Whisper:
    """Whisper and Distil-Whisper (Radford et al. 2022; Gandhi et al. 2023)."""

    english_only: bool = False
    """OpenAI's `.en` models take no language and no task."""

    name: ClassVar[str] = "whisper"
    spectrogram: ClassVar[bool] = True

    def native_window(self, config: Any) -> float:
        return native_window(config)

    def window_for(self, config: Any, longest: float, setting: float | str) -> float:
        return window_for(longest, native_window(config), setting)

    def token_limit(self, config: Any) -> int:
        return int(config.max_target_positions)

    def prefix(self, tokenizer: Any, language: str, task: str) -> tuple[int, ...]:
        vocabulary = tokenizer.get_vocab()
        if self.english_only:
            if (language, task) != ("en", "transcribe"):
                raise InputError(
                    f"the model is an English-only Whisper, which cannot {task} {language!r}; use a multilingual base"
                )
            named = ["<|notimestamps|>"]
        else:
            named = [f"<|{task}|>", "<|notimestamps|>"]
        if lacking := [token for token in named if token not in vocabulary]:
            raise InputError(f"the model's tokenizer has no token {lacking[0]}; use a multilingual Whisper as base")
        spoken = () if self.english_only else (require_language(tokenizer, language),)
        return (*spoken, *(vocabulary[token] for token in named))

    def languages(self, tokenizer: Any) -> dict[str, int]:
        return {} if self.english_only else _languages(tokenizer.get_vocab())

    def text_tokens(self, tokenizer: Any, text: str) -> list[int]:
        # With a leading space, as in Whisper's own training.
        return list(tokenizer(" " + text.strip(), add_special_tokens=False).input_ids)

    def features(self, config: Any, audios: Sequence[np.ndarray]) -> list[Tensor]:
        return log_mel(audios, config.num_mel_bins)

    def collate(self, config: Any, features: Sequence[Tensor], seconds: float) -> dict[str, Tensor]:
        positions = min(config.max_source_positions, round(seconds * FRAMES_PER_SECOND / 2))
        return {"input_features": pad_mels(features, positions * 2)}

    def windowed(self, model: Any, seconds: float) -> AbstractContextManager[object]:
        return windowed(model, seconds)


@dataclass(frozen=True, slots=True)
class Moonshine:
    """Moonshine (Jeffries et al. 2024): raw audio of any length in, one language a model, no translation."""

    name: ClassVar[str] = "moonshine"
    spectrogram: ClassVar[bool] = False

    def native_window(self, config: Any) -> float:
        return MOONSHINE_SECONDS

    def window_for(self, config: Any, longest: float, setting: float | str) -> float:
        # Any padding changes the result: the group norm after the first convolution hears it, mask or not.
        return min(longest, MOONSHINE_SECONDS if isinstance(setting, str) else float(setting))

    def token_limit(self, config: Any) -> int:
        return int(config.max_position_embeddings)

    def prefix(self, tokenizer: Any, language: str, task: str) -> tuple[int, ...]:
        if task != "transcribe":
            raise InputError(f"the model is a Moonshine, which cannot {task}; use a multilingual Whisper as base")
        return ()

    def languages(self, tokenizer: Any) -> dict[str, int]:
        return {}

    def text_tokens(self, tokenizer: Any, text: str) -> list[int]:
        # Its tokenizer puts the leading space itself.
        return list(tokenizer(text.strip(), add_special_tokens=False).input_ids)

    def features(self, config: Any, audios: Sequence[np.ndarray]) -> list[Tensor]:
        return [torch.tensor(audio, dtype=torch.float32)[None] for audio in audios]

    def collate(self, config: Any, features: Sequence[Tensor], seconds: float) -> dict[str, Tensor]:
        # The three convolutions (kernels 127, 7, 3; strides 64, 3, 2) need this many samples for one position.
        samples = max(127 + 64 * (7 - 1 + 3 * (3 - 1)), round(seconds * SAMPLE_RATE))
        values, mask = torch.zeros(len(features), samples), torch.zeros(len(features), samples, dtype=torch.long)
        for row, heard, audio in zip(values, mask, features, strict=True):
            keep = min(samples, audio.shape[1])
            row[:keep] = audio[0, :keep]
            heard[:keep] = 1
        return {"input_values": values, "attention_mask": mask}

    def windowed(self, model: Any, seconds: float) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


def architecture_of(source: Any) -> Architecture:
    """The architecture of a model or of its config; raises InputError that names what is not supported.

    Give the model where there is one: its generation config says best whether a Whisper is English-only.
    """
    config = getattr(source, "config", source)
    if config.model_type == "moonshine":
        return Moonshine()
    if config.model_type != "whisper":
        raise unsupported("the model", config.model_type)
    generation = getattr(source, "generation_config", None)
    multilingual = getattr(generation, "is_multilingual", None)
    return Whisper(is_english_only({"vocab_size": config.vocab_size}, {"is_multilingual": multilingual}))


def languages_of(source: Any) -> dict[str, int]:
    """The id of `<|language|>` by code, in a Whisper processor, tokenizer or generation config; empty without any."""
    known: dict[str, int] | None = getattr(source, "lang_to_id", None)
    if known is None:
        known = getattr(source, "tokenizer", source).get_vocab()
    found = {match[1]: number for t, number in known.items() if (match := re.fullmatch(r"<\|([a-z]{2,3})\|>", t))}
    return dict(sorted(found.items()))


def require_language(source: Any, language: str) -> int:
    """The id of `<|language|>` in a Whisper processor, tokenizer or generation config; InputError if it has none."""
    languages = languages_of(source)
    if language not in languages:
        raise InputError(
            f"the model has no language {language!r}: its tokenizer has no token <|{language}|>, and languages come "
            f"from the base's tokenizer, which has {', '.join(sorted(languages)) or 'none'}; "
            "use one of those codes or another base"
        )
    return languages[language]


def _languages(tokens: Mapping[str, int]) -> dict[str, int]:
    """The id of each language among the tokens of a Whisper."""
    named = ((re.fullmatch(r"<\|([a-z]{2,3})\|>", token), number) for token, number in tokens.items())
    return {match[1]: number for match, number in named if match}


class FeatureCache:
    """Features by utterance, kept up to a budget of memory: epochs after the first compute none."""

    def __init__(self, architecture: Architecture, config: Any, max_bytes: int = 2 << 30) -> None:
        self._architecture, self._config, self._left = architecture, config, max_bytes
        self._kept: dict[str, Tensor] = {}

    def features(self, items: Sequence[Any]) -> list[Tensor]:
        """(channels, frames) of each utterance, which has `id` and `audio()`. They are the kept ones: do not change
        them in place."""
        missing = [item for item in items if item.id not in self._kept]
        found = self._architecture.features(self._config, [item.audio() for item in missing])
        fresh = dict(zip([item.id for item in missing], found, strict=True))
        for key, tensor in fresh.items():
            if self._left >= tensor.nbytes:
                self._left -= tensor.nbytes
                self._kept[key] = tensor
        return [fresh[item.id] if item.id in fresh else self._kept[item.id] for item in items]
