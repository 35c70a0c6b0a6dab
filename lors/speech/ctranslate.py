"""CTranslate2 as what encodes and decodes: the same tokens as transformers' greedy search in float32.

It takes encoder windows of any length, as Whisper's positions are fixed sinusoids. Needs the extra `ctranslate2`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lors.errors import ConfigError
from lors.speech.transcribe import Encoded

__all__ = ["CTranslate2Writer", "require_ctranslate2"]

_INSTEAD = "set evaluate.backend to transformers"


def require_ctranslate2(model_type: str, beams: int, *, fallback: bool = False) -> None:
    """Raises ConfigError where the package is missing, or cannot do what transformers does."""
    if importlib.util.find_spec("ctranslate2") is None:
        raise ConfigError(
            f"evaluate.backend: ctranslate2 is not installed: pip install 'lors[ctranslate2]', or {_INSTEAD}"
        )
    if model_type != "whisper":
        raise ConfigError(f"evaluate.backend: ctranslate2 cannot decode a model of type {model_type!r}: {_INSTEAD}")
    if beams != 1:
        raise ConfigError(
            f"evaluate.backend: the beam search of ctranslate2 is not that of transformers: {_INSTEAD}, or "
            "evaluate.beams to 1"
        )
    if fallback:
        raise ConfigError(
            f"evaluate.backend: what ctranslate2 draws cannot be had again from a seed: {_INSTEAD}, or "
            "evaluate.fallback to false"
        )


class CTranslate2Writer:
    """A `lors.speech.transcribe.Writer` of a Whisper `model`, in float32 and on the model's device.

    `source` is the model's folder, or that of its base: its config.json is read; `folder` takes the converted model.
    Raises ConfigError as `require_ctranslate2` does, and where the model's generation config asks for more than it has.
    """

    def __init__(self, model: Any, processor: Any, source: Path, folder: Path) -> None:
        require_ctranslate2(model.config.model_type, 1)
        from ctranslate2.converters import TransformersConverter
        from ctranslate2.models import Whisper

        class Converter(TransformersConverter):  # type: ignore[misc] # it has no types
            """Converts the model in memory: no folder has it where an expert was put into its base."""

            def load_model(self, *_: Any, **__: Any) -> Any:
                return model

            def load_tokenizer(self, *_: Any, **__: Any) -> Any:
                return processor.tokenizer

        own = model.generation_config
        for name, neutral in (("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0)):
            if (value := getattr(own, name, None)) not in (None, neutral):
                raise ConfigError(
                    f"evaluate.backend: the model's generation_config.json sets {name} to {value}, which ctranslate2 "
                    f"has in another way: {_INSTEAD}"
                )
        self._device = model.device
        ends = own.eos_token_id
        self._end = ends[0] if isinstance(ends, list) else ends
        self._suppressed, self._first = list(own.suppress_tokens or []), bool(own.begin_suppress_tokens)
        Converter(str(source)).convert(str(folder), force=True)
        self._whisper = Whisper(
            str(folder), device=model.device.type, compute_type="float32", intra_threads=torch.get_num_threads()
        )

    def encode(self, inputs: Mapping[str, Tensor]) -> Encoded:
        import ctranslate2
        from transformers.modeling_outputs import BaseModelOutput

        features = ctranslate2.StorageView.from_array(inputs["input_features"].float().cpu().numpy())
        hidden = torch.from_numpy(np.array(self._whisper.encode(features, to_cpu=True)))
        return Encoded(BaseModelOutput(last_hidden_state=hidden.to(self._device)))

    def write(self, encoded: Encoded, prompts: Tensor, limit: int, temperature: float = 0.0) -> list[list[int]]:
        assert not temperature, "require_ctranslate2 refuses it"
        import ctranslate2

        hidden = ctranslate2.StorageView.from_array(encoded.output.last_hidden_state.cpu().numpy())
        results = self._whisper.generate(
            hidden,
            prompts.tolist(),
            beam_size=1,
            # It writes at most half of this, and at most this less the prompt.
            max_length=limit + max(limit, prompts.shape[1]),
            suppress_tokens=self._suppressed,
            suppress_blank=self._first,
        )
        written = [result.sequences_ids[0] for result in results]
        return [tokens if len(tokens) >= limit else [*tokens, self._end] for tokens in written]
