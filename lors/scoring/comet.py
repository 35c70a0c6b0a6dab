"""COMET, a learned score of translations that correlates with people's judgements (Rei et al. 2020, 2022).

The package unbabel-comet needs a transformers before 5, so its regression metric is computed here, from a folder in
formats that run no code: hparams.yaml, model.safetensors, and encoder/ with XLM-R's configuration and tokenizer.
docs/evaluation.md says how to make it from a published model.

Shapes: B texts, L tokens, d the encoder's width, m its layers (the embeddings included).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lors.errors import InputError
from lors.files import file_digest

__all__ = ["comet_scores", "comet_signature"]

_NEEDED = ("hparams.yaml", "model.safetensors", "encoder/config.json")
_ENCODERS = ("XLM-RoBERTa", "XLM-RoBERTa-XL")


def comet_scores(
    model: Path,
    sources: Sequence[str],  # (n,), what is translated
    hypotheses: Sequence[str],  # (n,)
    references: Sequence[str],  # (n,)
    *,
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The score of each translation, about 0 to 1, by the model in a folder; on a GPU where there is one.

    `on_progress` is called with (texts encoded, all).

    Raises InputError where the folder lacks a file, or its model is not a regression metric on XLM-R, and for lists of
    different lengths.
    """
    if not len(sources) == len(hypotheses) == len(references):
        raise InputError(
            f"COMET was given {len(sources)} sources, {len(hypotheses)} translations and {len(references)} references; "
            "give as many of each"
        )
    metric = _load(model)
    texts = sorted({*sources, *hypotheses, *references}, key=lambda text: (-len(text), text))
    vectors: dict[str, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(texts), batch):
            own = texts[start : start + batch]
            vectors.update(zip(own, metric.embed(own), strict=True))
            if on_progress:
                on_progress(min(start + batch, len(texts)), len(texts))
        if not texts:
            return []
        stacked = [torch.stack([vectors[text] for text in part]) for part in (sources, hypotheses, references)]
        scores: list[float] = metric.estimate(*stacked).tolist()
    return scores


def comet_signature(model: Path) -> str:
    """What is needed to compute the same scores again. Errors as in `comet_scores`."""
    settings = _settings(model)
    digest = file_digest(model / "model.safetensors")[:12]
    return f"COMET|{settings['class_identifier']}|{settings['pretrained_model']}|sha256:{digest}|scale:100"


def _settings(model: Path) -> dict[str, Any]:
    missing = [name for name in _NEEDED if not (model / name).is_file()]
    if missing:
        raise InputError(
            f"the COMET model {model} has no {missing[0]}: docs/evaluation.md says how to make the folder from a "
            "published model (a .ckpt file runs code when it is read, so it is not taken)"
        )
    try:
        settings = yaml.safe_load((model / "hparams.yaml").read_text("utf-8"))
        found = {name: settings[name] for name in ("class_identifier", "encoder_model", "pretrained_model", "pool")}
        found |= {name: settings[name] for name in ("layer", "hidden_sizes", "activations", "final_activation")}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(f"{model / 'hparams.yaml'} is not the settings of a COMET model ({error!r})") from error
    found["layer_transformation"] = settings.get("layer_transformation", "softmax")
    if found["class_identifier"] != "regression_metric" or found["encoder_model"] not in _ENCODERS:
        raise InputError(
            f"the COMET model {model} is a {found['class_identifier']} on {found['encoder_model']}; take a "
            "regression_metric on XLM-RoBERTa, such as wmt22-comet-da"
        )
    if found["pool"] not in _POOLS or settings.get("layer_norm") or found["layer_transformation"] not in _MIXTURES:
        raise InputError(
            f"the COMET model {model} has pool {found['pool']}, layer_transformation {found['layer_transformation']} "
            f"and layer_norm {settings.get('layer_norm')}, which is not computed here; take wmt22-comet-da"
        )
    return found


def _sparsemax(weights: Tensor) -> Tensor:
    """(m,) to (m,): the nearest point of the probability simplex (Martins and Astudillo 2016, algorithm 1)."""
    ordered, _ = weights.sort(descending=True)
    counts = torch.arange(1, len(weights) + 1, device=weights.device)
    sums = ordered.cumsum(0)
    kept = int((1 + counts * ordered > sums).sum())
    return (weights - (sums[kept - 1] - 1) / kept).clamp(min=0)


_MIXTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda weights: weights.softmax(0),
    "sparsemax": _sparsemax,
}
# (B, L, d) and the mask (B, L) to (B, d)
_POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "avg": lambda hidden, mask: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "max": lambda hidden, mask: hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(1),
    "cls": lambda hidden, mask: hidden[:, 0],
}


@dataclass(frozen=True, slots=True)
class _Metric:
    tokenizer: Any
    encoder: Any
    mixture: Tensor
    """(m,), what each layer counts for."""
    pool: Callable[[Tensor, Tensor], Tensor]
    estimator: nn.Sequential
    longest: int

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(B, d)."""
        found = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.mixture.device)
        layers = self.encoder(
            input_ids=found.input_ids, attention_mask=found.attention_mask, output_hidden_states=True
        ).hidden_states
        mixed = sum(weight * layer for weight, layer in zip(self.mixture, layers, strict=True))
        assert isinstance(mixed, Tensor)
        return self.pool(mixed, found.attention_mask)

    def estimate(self, source: Tensor, hypothesis: Tensor, reference: Tensor) -> Tensor:
        """(n,) of (n, d) each (Rei et al. 2020, section 2.4)."""
        features = (
            hypothesis,
            reference,
            hypothesis * reference,
            (hypothesis - reference).abs(),
            hypothesis * source,
            (hypothesis - source).abs(),
        )
        scores: Tensor = self.estimator(torch.cat(features, dim=1)).squeeze(1)
        return scores


def _load(model: Path) -> _Metric:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    settings = _settings(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tensors = load_file(model / "model.safetensors")
        config = AutoConfig.from_pretrained(model / "encoder", local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(model / "encoder", local_files_only=True)
        encoder = AutoModel.from_config(config, add_pooling_layer=False)
        own = {name.removeprefix("encoder.model."): t for name, t in tensors.items() if name.startswith("encoder.")}
        lacking = encoder.load_state_dict(own, strict=False).missing_keys
        if lacking:
            raise KeyError(f"encoder.model.{lacking[0]}")
        estimator = _estimator(settings, 6 * config.hidden_size)
        estimator.load_state_dict(
            {name.removeprefix("estimator.ff."): t for name, t in tensors.items() if name.startswith("estimator.")}
        )
        mixture = _mixture(settings, tensors, config.num_hidden_layers + 1)
    except Exception as error:  # safetensors, torch and transformers each raise their own for what is cut off or odd
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the COMET model {model} cannot be loaded ({reason}): make the folder again") from error
    return _Metric(
        tokenizer,
        encoder.float().to(device).eval(),
        mixture.float().to(device),
        _POOLS[settings["pool"]],
        estimator.float().to(device).eval(),
        config.max_position_embeddings - 4,  # as unbabel-comet cuts
    )


def _estimator(settings: dict[str, Any], width: int) -> nn.Sequential:
    """The feed-forward head; the dropouts of training keep their places, which number the parameters."""
    parts: list[nn.Module] = []
    for size in settings["hidden_sizes"]:
        parts += [nn.Linear(width, size), getattr(nn, settings["activations"].title())(), nn.Identity()]
        width = size
    parts.append(nn.Linear(width, 1))
    if settings["final_activation"] is not None:
        parts.append(getattr(nn, settings["final_activation"].title())())
    return nn.Sequential(*parts)


def _mixture(settings: dict[str, Any], tensors: dict[str, Tensor], layers: int) -> Tensor:
    if settings["layer"] != "mix":
        return torch.eye(layers)[settings["layer"]]
    weights = torch.cat([tensors[f"layerwise_attention.scalar_parameters.{layer}"] for layer in range(layers)])
    return tensors["layerwise_attention.gamma"] * _MIXTURES[settings["layer_transformation"]](weights.float())
