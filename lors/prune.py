"""LoRS: a delta pruned to a low-rank plus a sparse part (Zhao, Sun and Zhang, arXiv 2502.17380v3). The only definition.

For a delta D (m, n) in float32, rank r = max(1, round(rank_ratio * min(m, n))) and k = round(density * m * n):

    additive    L = svd_r(D), S = the k largest-magnitude entries of D - L, pruned = L + S
    sequential  pruned = the k largest-magnitude entries of L
    low_rank    pruned = L
    sparse      pruned = the k largest-magnitude entries of D

The paper's abstract leaves the composition open; additive is our reading of it, the other three are there to compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from lors.checkpoint import is_finite
from lors.errors import CheckpointError
from lors.low_rank import rank_for, squared_norm, truncated_svd
from lors.prune_settings import COMPOSITIONS, Composition, PruneSettings
from lors.sparse import count_for, top_k

__all__ = [
    "COMPOSITIONS",
    "Composition",
    "PruneSettings",
    "PrunedDelta",
    "prune_delta",
    "prune_matrix",
    "prune_task_vector",
]


@dataclass(frozen=True, slots=True, eq=False)
class PrunedDelta:
    """One parameter's pruned delta as its parts; those that are None are absent, and with none of them it is zero.

    A delta of three or more dimensions, (out, in, k), is factored and indexed as the matrix (out, in * k).
    """

    shape: tuple[int, ...]
    us: torch.Tensor | None = None  # (m, r) float32, U * S
    vh: torch.Tensor | None = None  # (r, n) float32
    indices: torch.Tensor | None = None  # (k,) int32, flat, rising
    values: torch.Tensor | None = None  # (k,) float32
    whole: torch.Tensor | None = None  # `shape`, float32: not pruned
    energy: float = 0.0  # |D|^2
    error: float = 0.0  # |D - pruned|^2

    @property
    def retained_energy(self) -> float:
        """1 - error / energy, 1 for a delta of zeros."""
        return 1.0 - self.error / self.energy if self.energy else 1.0

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name."""
        return {
            part: tensor
            for part in ("us", "vh", "indices", "values", "whole")
            if (tensor := getattr(self, part)) is not None
        }

    def dense(self) -> torch.Tensor:
        """The pruned delta, `shape`, float32. Do not write into it: it may be `whole` itself."""
        if self.whole is not None:
            return self.whole
        if self.us is not None and self.vh is not None:
            flat = (self.us @ self.vh).reshape(-1)
        else:
            flat = torch.zeros(torch.Size(self.shape).numel())
        if self.indices is not None and self.values is not None:
            flat.index_add_(0, self.indices, self.values)
        return flat.reshape(self.shape)


def prune_matrix(
    delta: torch.Tensor,  # (m, n) float32 on the CPU, finite, not empty
    composition: Composition,
    rank: int,  # r
    count: int,  # k, entries of the sparse part
    refinements: int = 0,
) -> PrunedDelta:
    """LoRS on one matrix, as the module says; `energy` and `error` are not filled in."""
    shape = tuple(delta.shape)
    if composition == "sparse":
        indices, values = top_k(delta, count)
        return PrunedDelta(shape, indices=indices, values=values)
    us, vh = truncated_svd(delta, rank)
    if composition == "low_rank":
        return PrunedDelta(shape, us=us, vh=vh)
    if composition == "sequential":
        indices, values = top_k(us @ vh, count)
        return PrunedDelta(shape, indices=indices, values=values)
    indices, values = top_k(delta - us @ vh, count)
    for _ in range(refinements):
        us, vh = truncated_svd(delta - PrunedDelta(shape, indices=indices, values=values).dense(), rank)
        indices, values = top_k(delta - us @ vh, count)
    return PrunedDelta(shape, us=us, vh=vh, indices=indices, values=values)


def prune_delta(
    delta: torch.Tensor,  # any shape, float32
    settings: PruneSettings,
    name: str = "",  # the parameter's, for include and exclude
) -> PrunedDelta:
    """LoRS on one parameter's delta. Raises CheckpointError, naming it, where the delta is not finite.

    Tensors of fewer than two dimensions go by `vectors`; left-out and empty ones are kept whole.
    """
    if not is_finite(delta):
        raise CheckpointError(f"the delta of {name or 'a tensor'} holds NaN or infinity; check the expert's training")
    shape, energy = tuple(delta.shape), squared_norm(delta)
    if not settings.prunes(name) or delta.numel() == 0 or (delta.ndim < 2 and settings.vectors == "keep"):
        return PrunedDelta(shape, whole=delta, energy=energy)
    if delta.ndim < 2:
        return PrunedDelta(shape, energy=energy, error=energy)
    matrix = delta.reshape(shape[0], -1)
    rank = rank_for(settings.rank_ratio, (matrix.shape[0], matrix.shape[1]))
    pruned = prune_matrix(
        matrix, settings.composition, rank, count_for(settings.density, matrix.numel()), settings.refinements
    )
    error = squared_norm(matrix - pruned.dense())
    return PrunedDelta(shape, **pruned.parts(), energy=energy, error=error)


def prune_task_vector(
    deltas: Iterable[tuple[str, torch.Tensor]], settings: PruneSettings
) -> Iterator[tuple[str, PrunedDelta]]:
    """LoRS on a task vector, tensor by tensor, in the order given."""
    return ((name, prune_delta(delta, settings, name)) for name, delta in deltas)
