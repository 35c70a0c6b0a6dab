"""A base and experts of Whisper's shapes with random weights: `python benchmarks/models.py FOLDER SIZE EXPERTS`.

Names and shapes are those of transformers' Whisper. An expert's delta is 1 % of the weights' norm: a low-rank part
whose singular values fall as 1 / j, and dense noise. Each folder appears whole or not at all, and is reused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

__all__ = ["SIZES", "build"]

# d_model, layers of each side, heads, inner width, vocabulary, mel bins, dtype
SIZES: dict[str, tuple[int, int, int, int, int, int, torch.dtype]] = {
    "mini": (64, 2, 2, 256, 600, 80, torch.float32),
    "base": (512, 6, 8, 2048, 51865, 80, torch.float32),
    "small": (768, 12, 12, 3072, 51865, 80, torch.float32),
    "large-v3": (1280, 32, 20, 5120, 51866, 128, torch.bfloat16),
}
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
FIXED = "model.encoder.embed_positions.weight"  # sinusoids: fine-tuning leaves them
HEAD = "proj_out.weight"  # tied to the embedding, so not in the file


def config_for(size: str) -> Any:
    """The WhisperConfig of a size."""
    width, layers, heads, inner, vocabulary, mels, dtype = SIZES[size]
    return WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        vocab_size=vocabulary,
        num_mel_bins=mels,
        dtype=dtype,
        architectures=["WhisperForConditionalGeneration"],
        **({} if vocabulary > 50000 else dict.fromkeys(SPECIAL, 0)),
    )


def shapes_for(config: Any) -> dict[str, tuple[int, ...]]:
    """Each stored parameter's shape, by name."""
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != HEAD}


def seeded(*words: str) -> torch.Generator:
    """A generator that depends on the words alone."""
    digest = hashlib.sha256(" ".join(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def base_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of the base, float32: layer norms about 1, the rest about 0."""
    noise = torch.randn(shape, generator=seeded("base", name))
    return 1 + 0.1 * noise if "layer_norm.weight" in name else 0.03 * noise


def delta(
    expert: str,
    name: str,
    weight: torch.Tensor,  # the base's, any shape, float32
) -> torch.Tensor:
    """What fine-tuning adds to one weight, in its shape, float32."""
    if name == FIXED:
        return torch.zeros_like(weight)
    generator = seeded(expert, name)
    noise = torch.randn(weight.shape, generator=generator)
    if weight.ndim < 2:
        return noise.mul_(0.01 * float(weight.norm() / noise.norm()))
    rows, columns = weight.shape[0], weight[0].numel()
    rank = max(1, min(rows, columns) // 8)
    left = torch.randn(rows, rank, generator=generator) / torch.arange(1, rank + 1)
    change = (left @ torch.randn(rank, columns, generator=generator)).reshape(weight.shape).add_(noise, alpha=0.3)
    return change.mul_(0.01 * float(weight.norm() / change.norm()))


def build(folder: Path, size: str, experts: int) -> list[Path]:
    """Write what is missing of base, e0, e1, ... under folder/size; returns their folders, the base first.

    Raises OSError where the disk has no room for them and for two merged models.
    """
    config = config_for(size)
    shapes = shapes_for(config)
    dtype = SIZES[size][-1]
    each = sum(map(math.prod, shapes.values())) * dtype.itemsize
    paths = [folder / size / name for name in ("base", *(f"e{number}" for number in range(experts)))]
    missing = [path for path in paths if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = each * (len(missing) + 2), shutil.disk_usage(folder).free
    said = f"{size}: {len(missing)} of {len(paths)} models of {each / 1e9:.2f} GB to write, "
    print(f"{said}{needed / 1e9:.1f} GB wanted with the merged ones, {free / 1e9:.1f} GB free", flush=True)
    if free < needed:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free and {size} wants {needed / 1e9:.1f} GB")
    for path in missing:
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        config.save_pretrained(partial)
        GenerationConfig.from_model_config(config).save_pretrained(partial)
        WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(partial)
        write_tensors(partial / "model.safetensors", shapes, dtype, tensors(path, shapes))
        partial.rename(path)
    return paths


def tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[torch.Tensor]:
    """The weights of the model that `path` names, float32, in the order of `shapes`."""
    if path.name == "base":
        yield from (base_tensor(name, shape) for name, shape in shapes.items())
        return
    with safe_open(path.with_name("base") / "model.safetensors", framework="pt") as base:
        for name in shapes:
            weight = base.get_tensor(name).float()
            yield weight + delta(path.name, name, weight)


def write_tensors(
    file: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, values: Iterator[torch.Tensor]
) -> None:
    """A safetensors file written one tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            stream.write(value.to(dtype).contiguous().view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except OSError as error:
        sys.exit(str(error))
