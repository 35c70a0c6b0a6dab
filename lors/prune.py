"""LoRS: a delta pruned to a low-rank plus a sparse part (Zhao, Sun and Zhang, arXiv 2502.17380v3). The only definition.

For a delta D (m, n) in float32, rank r = max(1, round(rank_ratio * min(m, n))) and k = round(density * m * n):

    additive    L = svd_r(D), S = the k largest-magnitude entries of D - L, pruned = L + S
    sequential  pruned = the k largest-magnitude entries of L
    low_rank    pruned = L
    sparse      pruned = the k largest-magnitude entries of D

The paper's abstract leaves the composition open; additive is our reading of it, the other three are there to compare.
L is the product of the factors as they are stored, so S makes up for their rounding too, and energies are of what is
stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch

from lors.blocks import row_blocks
from lors.checkpoint import is_finite
from lors.errors import CheckpointError
from lors.low_rank import rank_for, squared_norm, truncated_svd
from lors.prune_settings import COMPOSITIONS, DTYPES, Composition, Dtype, PruneGroup, PruneSettings
from lors.sparse import PackedIndices, count_for, top_k

__all__ = [
    "COMPOSITIONS",
    "DTYPES",
    "Composition",
    "Dtype",
    "Plan",
    "PruneGroup",
    "PruneSettings",
    "PrunedDelta",
    "prune_delta",
    "prune_matrix",
    "prune_task_vector",
]

Plan = Mapping[str, tuple[int, int]]
"""(rank, count) by parameter, either may be 0; a matrix that is not named is kept whole."""

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.bfloat16}
INT8_MAX = 127
SMALLEST_THRESHOLD = 1e-30  # entries below are near float32's subnormals, where one that is kept could read as zero


@dataclass(frozen=True, slots=True, eq=False)
class PrunedDelta:
    """One parameter's pruned delta as its parts; those that are None are absent, and with none of them it is zero.

    A delta of three or more dimensions, (out, in, k), is factored and indexed as the matrix (out, in * k).
    """

    shape: tuple[int, ...]
    dtype: Dtype = "float32"
    us: torch.Tensor | None = None  # (m, r), U * S, in `dtype`
    vh: torch.Tensor | None = None  # (r, n), in `dtype`
    scale: torch.Tensor | None = None  # (r,) float32, for int8: what a direction's us * vh is multiplied by
    threshold: float | None = None  # sequential: only entries of us @ vh of at least this magnitude are kept
    count: int = 0  # how many that are
    indices: PackedIndices | None = None  # of k entries, flat
    values: torch.Tensor | None = None  # (k,), in `dtype`, bfloat16 for int8
    whole: torch.Tensor | None = None  # `shape`, in `dtype`, bfloat16 for int8: not pruned
    energy: float = 0.0  # |D|^2
    error: float = 0.0  # |D - pruned|^2

    @property
    def retained_energy(self) -> float:
        """1 - error / energy, 1 for a delta of zeros."""
        return 1.0 - self.error / self.energy if self.energy else 1.0

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors to store, by name."""
        own = {part: getattr(self, part) for part in ("us", "vh", "scale", "values", "whole")}
        return {part: tensor for part, tensor in own.items() if tensor is not None} | (
            self.indices.parts() if self.indices else {}
        )

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(m, r) and (r, n), whose product is the low-rank part, or None where there is none."""
        if self.us is None or self.vh is None:
            return None
        us, vh = self.us.to(dtype, copy=True), self.vh.to(dtype, copy=True)
        return us if self.scale is None else us * self.scale.to(dtype), vh

    def rows(self, start: int, stop: int) -> torch.Tensor:  # (stop - start, *shape[1:]) float32
        """The pruned delta in [start, stop) of its first dimension; a tensor of no dimensions has one row.

        Do not write into it: it may be `whole` itself.
        """
        if self.whole is not None:
            return self.whole.reshape(self.shape or (1,))[start:stop].float()
        width = prod(self.shape[1:])
        # Factors are copied, rows and all, as a BLAS may give other bits for memory that is aligned in another way.
        wide = torch.float32 if self.threshold is None else torch.float64
        own = self if self.us is None else replace(self, us=self.us[start:stop])
        if (factors := own.factors(wide)) is not None:
            flat = (factors[0] @ factors[1]).reshape(-1)
            if self.threshold is not None:
                flat = torch.where(flat.abs() >= self.threshold, flat, 0).float()
        else:
            flat = torch.zeros((stop - start) * width)
        if self.indices is not None and self.values is not None:
            at, which = self.indices.between(start * width, stop * width)
            flat.index_add_(0, at, self.values[which].float())
        return flat.reshape(stop - start, *self.shape[1:])

    def dense(self) -> torch.Tensor:
        """The pruned delta, `shape`, float32, with the bits of `rows` over `row_blocks(shape)`.

        Do not write into it: it may be `whole` itself. Raises CheckpointError as `check_count` does.
        """
        if self.whole is not None:
            return self.whole.float()
        dense = torch.zeros(self.shape or (1,))
        for start, stop in row_blocks(self.shape):
            dense[start:stop] = self.rows(start, stop)
        if self.threshold is not None:
            self.check_count(int(dense.count_nonzero()))
        return dense.reshape(self.shape)

    def check_count(
        self,
        found: int,  # entries that are not zero
    ) -> None:
        """Raises CheckpointError where a threshold does not keep as many entries as it did when it was chosen."""
        if self.threshold is not None and found != self.count:
            raise CheckpointError(
                f"its threshold keeps {found} entries, not the {self.count} that were stored, so the file is corrupt "
                f"or this machine's arithmetic differs; write it again with `lors prune`"
            )


def prune_matrix(
    delta: torch.Tensor,  # (m, n) float32 on the CPU, finite, not empty
    composition: Composition,
    rank: int,  # r; 0 for no low-rank part
    count: int,  # k, entries of the sparse part; 0 for none
    refinements: int = 0,
    dtype: Dtype = "float32",
    exact: bool = True,  # sequential: k entries even where some tie with the last, at the price of storing them
) -> PrunedDelta:
    """LoRS on one matrix, as the module says; `energy` and `error` are not filled in."""
    if composition == "sparse":
        return _with_sparse(PrunedDelta(tuple(delta.shape), dtype), delta, count)
    low = _low_rank(delta, rank, dtype)
    if composition == "low_rank":
        return low
    if composition == "sequential":
        return _masked(low, count, exact)
    pruned = _with_sparse(low, delta, count)
    for _ in range(refinements):
        sparse = PrunedDelta(low.shape, dtype, indices=pruned.indices, values=pruned.values)
        low = _low_rank(delta - sparse.dense(), rank, dtype)
        pruned = _with_sparse(low, delta, count)
    return pruned


def prune_delta(
    delta: torch.Tensor,  # any shape, float32 on the CPU
    settings: PruneSettings,
    name: str = "",  # the parameter's, for groups, include and exclude
    dtype: Dtype = "float32",  # what the parts are stored in
    plan: Plan | None = None,  # ranks and counts, instead of the settings' ratios and densities
) -> PrunedDelta:
    """LoRS on one parameter's delta.

    Tensors of fewer than two dimensions go by `vectors`; left-out and empty ones are kept whole.
    Raises CheckpointError, naming it, where the delta is not finite, or not in `dtype`.
    """
    if not is_finite(delta):
        raise CheckpointError(f"the delta of {name or 'a tensor'} holds NaN or infinity; check the expert's training")
    shape = tuple(delta.shape)
    if not settings.prunes(name, shape) or delta.numel() == 0 or (delta.ndim < 2 and settings.vectors == "keep"):
        pruned = PrunedDelta(shape, dtype, whole=delta.to(TORCH_DTYPES[dtype]))
    elif delta.ndim < 2:
        pruned = PrunedDelta(shape, dtype)
    elif plan is not None and name not in plan:
        pruned = PrunedDelta(shape, dtype, whole=delta.to(TORCH_DTYPES[dtype]))
    else:
        matrix = delta.reshape(shape[0], -1)
        rank_ratio, density = settings.of(name, shape)
        own = rank_for(rank_ratio, (shape[0], matrix.shape[1])), count_for(density, matrix.numel())
        rank, count = plan[name] if plan is not None else own
        pruned = prune_matrix(matrix, settings.composition, rank, count, settings.refinements, dtype, plan is None)
        pruned = replace(pruned, shape=shape)
    if not all(is_finite(part) for part in pruned.parts().values() if part.is_floating_point()):
        raise CheckpointError(f"the delta of {name or 'a tensor'} is too large for {dtype}; store it as bfloat16")
    error = pruned.error
    if pruned.indices is None or (pruned.vh is None and settings.composition == "sequential"):
        rows = delta.reshape(shape or (1,))
        error = sum(squared_norm(rows[start:stop] - pruned.rows(start, stop)) for start, stop in row_blocks(shape))
    return replace(pruned, energy=squared_norm(delta), error=error)


def prune_task_vector(
    deltas: Iterable[tuple[str, torch.Tensor]],
    settings: PruneSettings,
    dtype: Dtype = "float32",
    plan: Plan | None = None,
) -> Iterator[tuple[str, PrunedDelta]]:
    """LoRS on a task vector, tensor by tensor, in the order given."""
    return ((name, prune_delta(delta, settings, name, dtype, plan)) for name, delta in deltas)


def _low_rank(delta: torch.Tensor, rank: int, dtype: Dtype) -> PrunedDelta:
    """The truncated SVD of a matrix, rounded."""
    shape = tuple(delta.shape)
    if rank == 0:
        return PrunedDelta(shape, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    us, vh = (factor.cpu() for factor in truncated_svd(delta.to(device), rank))
    if dtype != "int8":
        return PrunedDelta(shape, dtype, us=us.to(TORCH_DTYPES[dtype]), vh=vh.to(TORCH_DTYPES[dtype]))
    steps = us.abs().amax(dim=0) / INT8_MAX, vh.abs().amax(dim=1) / INT8_MAX  # (r,), (r,): a unit of each side
    left, right = (torch.where(step > 0, step, 1) for step in steps)
    return PrunedDelta(
        shape,
        dtype,
        us=(us / left).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8),
        vh=(vh / right[:, None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8),
        scale=left * right,
    )


def _with_sparse(low: PrunedDelta, delta: torch.Tensor, count: int) -> PrunedDelta:
    """`low` and, beside it, the `count` largest entries of what it leaves of the delta; its error, too."""
    if count == 0:
        return low
    residual = delta.clone() if low.us is None else low.dense().neg_().add_(delta)
    indices, values = top_k(residual, count)
    stored = values.to(TORCH_DTYPES[low.dtype])
    residual.numpy().reshape(-1)[indices.numpy()] = (values - stored).numpy()
    packed = PackedIndices.pack(indices, delta.numel())
    return replace(low, indices=packed, values=stored, error=squared_norm(residual))


def _masked(low: PrunedDelta, count: int, exact: bool) -> PrunedDelta:
    """The `count` largest entries of a low-rank matrix, by one threshold where that names them on any machine.

    The threshold lies in the middle between the last magnitude kept and the first one left, computed in float64. Where
    it is nearer to them than the most that a sum of r products can be off, or they tie, the entries are stored, or, if
    the count need not be `exact`, those that tie are kept too: a mask costs nothing, the entries do.
    """
    if (factors := low.factors(torch.float64)) is None:
        return low
    us, vh = factors
    size = prod(low.shape)
    product = torch.empty(low.shape, dtype=torch.float64)
    for start, stop in row_blocks(low.shape):
        torch.mm(us[start:stop], vh, out=product[start:stop])
    count = min(count, int(product.count_nonzero()))
    if count == 0:
        return PrunedDelta(low.shape, low.dtype)
    magnitudes = product.abs_().reshape(-1).numpy()
    magnitudes.partition(size - count)
    norms = torch.linalg.vector_norm(us, dim=1).max() * torch.linalg.vector_norm(vh, dim=0).max()
    bound = 2 * us.shape[1] * np.finfo(np.float64).eps * float(norms)
    last, rest = magnitudes[size - count], magnitudes[: size - count]
    first = rest.max(initial=0.0)
    while not exact and first > 0 and last - first <= 2 * bound:
        last, rest = rest[rest >= last - 2 * bound].min(), rest[rest < last - 2 * bound]
        first = rest.max(initial=0.0)
    if last - first > 2 * bound and first + last > 2 * SMALLEST_THRESHOLD:
        return replace(low, threshold=float((first + last) / 2), count=size - len(rest))
    return _with_sparse(PrunedDelta(low.shape, low.dtype), low.dense(), count)
