"""Row blocks: how large tensors are walked, so that memory does not grow with them. No torch."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCK", "as_rows", "row_blocks"]

BLOCK = 2**18  # entries: as float64 it fits a core's second-level cache


def row_blocks(shape: tuple[int, ...], size: int = BLOCK) -> list[tuple[int, int]]:
    """(start, stop) ranges over the first dimension, each of at most `size` entries but at least one row.

    They depend on the shape alone, so what is computed block by block has the same bits wherever it is computed.
    A tensor of no dimensions counts as one of shape (1,); an empty one has no blocks.
    """
    rows, width = (shape[0], prod(shape[1:])) if shape else (1, 1)
    step = max(1, size // max(1, width))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)] if rows * width else []


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor itself; of one of no dimensions, a view of shape (1,)."""
    return tensor if tensor.ndim else tensor.reshape(1)
