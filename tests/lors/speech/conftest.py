"""A tiny Whisper with random weights and a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

LANGUAGES = ("es", "fr", "yue")


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that ends its text now and then: it may write only the letters a to h and the end token."""
    from tokenizers import pre_tokenizers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=alphabet, merges=[])
    names = ["<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES)]
    names += ["<|translate|>", "<|transcribe|>", "<|startofprev|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in [*names, "<|endoftext|>"]}
    end = ids["<|endoftext|>"]
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_target_positions=128,
            init_std=0.4,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
            decoder_start_token_id=ids["<|startoftranscript|>"],
        )
    )
    kept = {end, *(alphabet[letter] for letter in "abcdefgh")}
    model.generation_config = GenerationConfig(
        decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=end,
        max_length=128,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=[number for number in range(len(tokenizer)) if number not in kept],
    )
    folder = tmp_path_factory.mktemp("whisper") / "tiny"
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder
