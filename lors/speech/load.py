"""Whisper and Moonshine checkpoints from a local Hugging Face folder, safetensors only, never the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lors.errors import CheckpointError
from lors.speech.base_model import ARCHITECTURES, unsupported

__all__ = ["load_model"]


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The speech-to-text model in `folder`, in evaluation mode, and its processor.

    Raises CheckpointError, naming the folder, where it is missing, of an architecture that LoRS does not work on,
    without safetensors weights, or where its weights or its processor are incomplete.
    """
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json; give a Hugging Face folder")
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json is not a JSON object ({error}); copy the folder again") from error
    if model_type not in ARCHITECTURES:
        raise unsupported(f"the model in {folder}", model_type)
    if not any((folder / f"model.safetensors{suffix}").is_file() for suffix in ("", ".index.json")):
        raise CheckpointError(
            f"{folder} has no model.safetensors; save its weights with save_pretrained as safetensors"
        )
    try:
        model, info = AutoModelForSpeechSeq2Seq.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own for bad weights
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the weights in {folder} cannot be loaded ({reason}); copy or save them again"
        ) from error
    if lacking := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"the weights in {folder} lack {len(lacking)} tensors, {lacking[0]} the first; save again"
        )
    if model_type == "whisper":  # sinusoids, which modeling_whisper fixes and from_pretrained sets free again
        model.get_encoder().embed_positions.requires_grad_(False)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        processor.tokenizer, processor.feature_extractor  # noqa: B018 - it falls back on one of the two
    except (AttributeError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no complete processor (tokenizer and feature extractor); copy its base model's into it"
        ) from error
    return model.to(device).eval(), processor
