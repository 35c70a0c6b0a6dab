"""The sparse component: the largest-magnitude entries of a tensor, exactly as many as asked for."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["count_for", "top_k"]


def count_for(density: float, size: int) -> int:
    """How many of `size` entries a density in (0, 1] keeps: round(density * size), halves to even."""
    return round(density * size)


def top_k(
    tensor: torch.Tensor,  # any shape, float32 on the CPU, fewer than 2^31 entries
    count: int,  # 0 to the number of entries
) -> tuple[torch.Tensor, torch.Tensor]:  # (count,) int32 flat indices, rising; (count,) their values
    """The `count` entries of largest magnitude; among equal ones the lowest flat index is kept first.

    By the threshold from a partition: an argsort takes a hundred times as long on an embedding.
    """
    flat = tensor.numpy().reshape(-1)
    assert 0 <= count <= flat.size < 2**31, f"{count} of {flat.size} entries"
    if count in (0, flat.size):
        indices = np.arange(count, dtype=np.int32)
    else:
        magnitude = np.abs(flat)
        threshold = np.partition(magnitude, flat.size - count)[flat.size - count]
        above = np.flatnonzero(magnitude > threshold)
        ties = np.flatnonzero(magnitude == threshold)[: count - above.size]
        indices = np.sort(np.concatenate([above, ties])).astype(np.int32)
    return torch.from_numpy(indices), torch.from_numpy(flat[indices])
