"""Parameter groups: the named parts of a Whisper, or glob patterns, that may have settings of their own. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["GROUPS", "in_group", "overrides", "unmatched"]

Shape = tuple[int, ...]

GROUPS: dict[str, tuple[str, Callable[[str, Shape], bool]]] = {
    "encoder": ("everything under the encoder", lambda name, shape: ".encoder." in f".{name}"),
    "decoder": ("everything under the decoder", lambda name, shape: ".decoder." in f".{name}"),
    "embeddings": (
        "token embeddings and an output layer that is not tied to them",
        lambda name, shape: "embed_tokens." in name or name.startswith(("proj_out.", "lm_head.")),
    ),
    "positions": ("position embeddings", lambda name, shape: "embed_positions." in name),
    "convolutions": ("weights of three dimensions", lambda name, shape: len(shape) == 3),
    "vectors": ("tensors of fewer than two dimensions: biases, layer norms", lambda name, shape: len(shape) < 2),
}
"""Each named group: what it is, and whether the parameter of a name and a shape belongs to it."""


def in_group(group: str, name: str, shape: Shape) -> bool:
    """Whether a parameter belongs to a named group, or its name matches a glob pattern."""
    return GROUPS[group][1](name, shape) if group in GROUPS else fnmatchcase(name, group)


def overrides(groups: Mapping[str, Mapping[str, Any]], name: str, shape: Shape) -> dict[str, Any]:
    """The settings of every group that a parameter belongs to, in the order written: a later group wins."""
    found: dict[str, Any] = {}
    for group, settings in groups.items():
        if in_group(group, name, shape):
            found |= settings
    return found


def unmatched(groups: Iterable[str], parameters: Mapping[str, Shape]) -> list[str]:
    """The groups that no parameter belongs to: misspelt patterns, mostly."""
    return [group for group in groups if not any(in_group(group, n, s) for n, s in parameters.items())]
