"""LoRS-Merging for multilingual speech models: task vectors, low-rank and sparse pruning, merging, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lors.scoring.files import load_results

__all__ = ["load_results"]


def __getattr__(name: str) -> Any:
    if name == "load_results":  # pandas takes half a second, which no other part of the package should wait for
        from lors.scoring.files import load_results

        return load_results
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
