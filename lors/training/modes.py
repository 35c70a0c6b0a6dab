"""How a model computes while it is trained: activations computed twice, layers compiled."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lors.errors import ConfigError

__all__ = ["checkpointed", "compiled", "uncompiled"]


@contextlib.contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Inside, each layer's activations are computed again in the backward pass (Chen et al. 2016)."""
    layers = _layers(model)
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False


@contextlib.contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Inside, the layers of `model` run compiled; their names stay. ConfigError where torch.compile does not work.

    Each layer by itself: all of a kind share one program, whatever the window and the labels' length, where a whole
    model would be compiled anew for each window.
    """
    _try_compiler(model.device)
    layers = _layers(model)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def uncompiled() -> contextlib.AbstractContextManager[object]:
    """Inside, nothing is compiled: decoding would want a program of its own for each length."""
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _layers(model: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _try_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:  # each backend raises its own
        reason = " ".join(str(error).strip().split("\n", 1)[0].split()) or type(error).__name__
        raise ConfigError(
            f"finetune.compile: torch.compile does not work here ({reason[:300]}): install a C++ compiler, such as "
            "g++, or set compile to false"
        ) from error
