"""The weights of a training: which are trained, and their moving average."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lors.errors import ConfigError
from lors.groups import GROUPS, in_group, unmatched
from lors.training.lora import add_lora, merge_lora
from lors.training.settings import Lora

__all__ = ["Parameters", "adamw", "swapped", "trained", "update_average"]

Parameters = Mapping[str, torch.nn.Parameter]


@contextlib.contextmanager
def trained(model: Any, freeze: Sequence[str], lora: Lora | None, seed: int) -> Iterator[Parameters]:
    """Inside, only the yielded parameters of `model` are trained: all but the frozen ones, or their LoRA updates.

    On leaving, LoRA updates are merged into the weights; after an error the model is of no use. Raises ConfigError
    where a pattern of `freeze` fits nothing, or nothing is left to train.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if unknown := unmatched(freeze, shapes):
        close = difflib.get_close_matches(unknown[0], [*GROUPS, *shapes], n=1, cutoff=0)
        raise ConfigError(f"finetune.freeze: {unknown[0]!r} fits no parameter of the base, such as {close[0]!r}")
    frozen = {name for name, shape in shapes.items() if any(in_group(group, name, shape) for group in freeze)}
    adapted = add_lora(model, lora, seed) if lora is not None else None
    parameters = {}
    for name, parameter in model.named_parameters():
        # An update belongs to the weight that it is added to.
        parameter.requires_grad_(parameter.requires_grad and _weight(name) not in frozen)
        if parameter.requires_grad:
            parameters[name] = parameter
    if not parameters:
        raise ConfigError(f"finetune.freeze {list(freeze)} leaves nothing to train: freeze fewer parameters")
    yield parameters
    if adapted is not None:
        merge_lora(adapted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])


def _weight(name: str) -> str:
    weight, lora, _ = name.partition(".lora_")
    return f"{weight}.weight" if lora else name


def adamw(parameters: Parameters, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (beta 0.9 and 0.98, as Whisper's own training) that decays no biases and layer norms."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.98), eps=1e-6, fused=True
    )


@torch.no_grad()
def update_average(
    averages: Mapping[str, Tensor],  # changed in place
    parameters: Parameters,
    decay: float,
    updates: int,  # before this one
) -> None:
    """Exponential moving average whose first updates weigh more, so that it forgets where it started from."""
    weight = 1 - min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(averages.values()), [parameters[name].detach() for name in averages], weight)


@contextlib.contextmanager
def swapped(parameters: Parameters, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters have other values; without a copy of either."""
    own = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value
