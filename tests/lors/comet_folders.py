"""Small COMET models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

WORDS = "the house is small la casa es pequeña un perro a dog sleeps duerme".split()

HPARAMS: dict[str, Any] = {
    "class_identifier": "regression_metric",
    "encoder_model": "XLM-RoBERTa",
    "pretrained_model": "xlm-roberta-large",
    "pool": "avg",
    "layer": "mix",
    "layer_transformation": "sparsemax",
    "layer_norm": False,
    "hidden_sizes": [12, 6],
    "activations": "Tanh",
    "final_activation": None,
}


def comet_folder(folder: Path, **changes: Any) -> Path:
    """A small model whose parameters come from numpy's generator, the same on every machine."""
    config = XLMRobertaConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        pad_token_id=1,
        type_vocab_size=1,
    )
    config.save_pretrained(folder / "encoder")
    vocabulary = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder / "encoder")
    shapes = {
        f"encoder.model.{name}": tuple(tensor.shape)
        for name, tensor in XLMRobertaModel(config, add_pooling_layer=False).named_parameters()
    }
    shapes |= {f"layerwise_attention.scalar_parameters.{layer}": (1,) for layer in range(3)}
    shapes |= {"layerwise_attention.gamma": (1,), "estimator.ff.0.weight": (12, 48), "estimator.ff.0.bias": (12,)}
    shapes |= {"estimator.ff.3.weight": (6, 12), "estimator.ff.3.bias": (6,)}
    shapes |= {"estimator.ff.6.weight": (1, 6), "estimator.ff.6.bias": (1,)}
    generator = np.random.default_rng(0)
    tensors = {name: torch.from_numpy(generator.normal(0, 0.5, shapes[name]).astype("f4")) for name in sorted(shapes)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "hparams.yaml").write_text(yaml.safe_dump(HPARAMS | changes))
    return folder
