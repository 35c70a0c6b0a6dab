"""Tiny real models on disk for the engine's tests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def tiny_whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes, at each call, a folder with a real Whisper of random weights (1 + 1 layers, vocabulary 64)."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    numbers = itertools.count()

    def make(
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        tied: bool = True,
        sharded: bool = False,
        d_model: int = 16,
    ) -> Path:
        config = WhisperConfig(
            vocab_size=64, num_mel_bins=8, d_model=d_model, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_source_positions=20, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=3, begin_suppress_tokens=None, suppress_tokens=None, tie_word_embeddings=tied,
        )  # fmt: skip
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("models") / f"whisper-{next(numbers)}-seed{seed}"
        model = WhisperForConditionalGeneration(config).to(dtype)
        model.save_pretrained(folder, max_shard_size="8KB" if sharded else "5GB")
        WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
        (folder / "merges.txt").write_text("#version: 0.2\na b\n")
        return folder

    return make


@pytest.fixture
def tensor_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a model folder of just these tensors and this config."""

    def make(name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        content = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], **(config or {})}
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return make
