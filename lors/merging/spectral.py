"""Merging by singular vectors: STAR, TSV-M, Iso-C, Iso-CTS and KnOTS.

A delta is (m, n), or (l, k) once turned so that l >= k; there are N experts.

Every decomposition is of a Gram matrix of the short side, in float64, summed over blocks of the long side: its
eigenvectors are the right singular vectors of the turned matrix, and all the rest is products. Directions whose
singular value is at most NOISE of the largest are left out: float32 says nothing of them, and a null space has no
directions of its own (an SVD returns arbitrary ones, which the published code scales up like the others).

What is not a matrix becomes the mean of the experts' weighted deltas in TSV-M, Iso-C and Iso-CTS, as in the official
code of all three. That goes for convolutions too: as (out, in * k) matrices they would be another method than the one
that was published and measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lors.low_rank import rank_for
from lors.merging.combiners import Fold, Joint, State
from lors.merging.elementwise import Divisor, Election, ties, weighted_sum
from lors.merging.recipe import Magnitude
from lors.merging.sparsify import sparsify

__all__ = ["NOISE", "iso_c", "iso_cts", "knots", "star", "tsv_m"]

NOISE = 1e-6  # 8 times float32's epsilon, and 100 times what a Gram matrix resolves in float64
BLOCK = 4096  # rows of the long side taken to float64 at once

Array = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.floating]
Factors = tuple[Matrix, Array, Array]  # (l, r) left, (r,) singular values, (k, r) right


def star(
    delta: Tensor,  # any shape, float32; of three or more dimensions seen as (out, in * k)
    eta: float,  # share of the nuclear norm, in (0, 1]
) -> Tensor:  # same shape, float32
    """The first r singular directions, multiplied so that the nuclear norm is kept (STAR, arXiv 2502.10339, sec. 3).

    r is the least with s_1 + ... + s_r >= eta * (s_1 + ... + s_k). With eta 1, and of fewer than two dimensions, the
    delta itself.
    """
    if delta.ndim < 2 or eta == 1 or delta.numel() == 0:
        return delta
    matrix = delta.reshape(delta.shape[0], -1)
    tall = _turned(matrix)
    values, right = _directions(_gram([tall]))
    if not len(values):
        return torch.zeros_like(delta)
    sums = values.cumsum()
    rank = int(np.searchsorted(sums, eta * sums[-1])) + 1
    right = right[:, :rank]
    core = (right * (sums[-1] / sums[rank - 1])) @ right.T
    return _like(matrix, _product([tall], core, np.float32)).reshape(delta.shape)


def tsv_m(rank_ratio: float | None) -> Joint:
    """TSV-M: U_perp diag(S) Vh_perp (Gargiulo et al., arXiv 2412.00081, sec. 4).

    U, S and Vh hold the first r singular triplets of every expert side by side, r = max(1, min(m, n) // N), or by
    `rank_ratio`; U_perp and Vh_perp are the matrices nearest to U and Vh whose singular values are all 1 (0 where the
    experts' directions coincide). A merge weight multiplies its expert's S; an expert of weight 0 or of zeros takes no
    part. One expert returns itself, within 1e-6. Memory: the factors, at most twice the size of the tensor in float32.
    """

    def combine(deltas: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
        if base.ndim != 2 or base.numel() == 0:
            return _mean(deltas, weights, base)
        m, n = base.shape
        rank = max(1, min(m, n) // len(weights)) if rank_ratio is None else rank_for(rank_ratio, (m, n))
        factors = []
        for weight, delta in zip(weights, deltas, strict=True):
            left, values, right = _first(_turned(delta), rank if weight else 0)
            factors.append((left, weight * values, right))
        return _like(base, _merged(factors))

    return Joint(combine)


def iso_c() -> Fold:
    """Iso-C: the weighted sum, every singular value made their mean (Marczak et al., arXiv 2502.04959, sec. 4.1).

    The mean is over all min(m, n) of them, as in the official code; a null space stays one.
    """

    def finish(state: State, weights: Sequence[float], base: Tensor) -> Tensor:
        total = state["sum"]
        if total.ndim != 2 or total.numel() == 0:
            return (total / len(weights)).float()
        tall = _turned(total)
        values, right = _directions(_gram([tall]))
        mean = values.sum() / tall.shape[1]
        return _like(total, _product([tall], (right * (mean / values)) @ right.T, np.float32))

    return Fold(("sum",), weighted_sum().add, finish, elementwise=False)


def iso_cts(common: float) -> Joint:
    """Iso-CTS: Iso-C of a common and of task-specific subspaces (Marczak et al., arXiv 2502.04959, sec. 4.2).

    Of k = min(m, n) directions each expert has t = round((k - int(k * common)) / N), at most k // N: the first of
    (I - U_c U_c^T) w_i delta_i, where U_c are the c = k - N * t first left ones of the weighted sum. All of them are
    made orthogonal as in TSV-M, and every singular value their mean, over k. One expert returns what Iso-C does.
    """

    def combine(deltas: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
        if base.ndim != 2 or base.numel() == 0:
            return _mean(deltas, weights, base)
        k, experts = min(base.shape), len(weights)
        own = min(round((k - int(k * common)) / experts), k // experts)
        shared = _first(_turned(_sum(deltas, weights, base)), k - own * experts)
        first_off = _first_off_long if base.shape[0] >= base.shape[1] else _first_off_short
        factors = [shared]
        for index, weight in enumerate(weights):
            if own and weight:
                left, values, right = first_off(_turned(deltas[index]), shared, own)
                factors.append((left, abs(weight) * values, np.sign(weight) * right))
        mean = sum(values.sum() for _, values, _ in factors) / k
        return _like(base, _merged([(left, np.full(len(values), mean), right) for left, values, right in factors]))

    return Joint(combine)


def knots(density: float, election: Election, divisor: Divisor) -> Joint:
    """KnOTS-TIES: U ties(S Vh_1, ..., S Vh_N) (Stoica et al., arXiv 2410.19735, sec. 4).

    U, S and [Vh_1 ... Vh_N] are the SVD of the deltas side by side, (m, N * n), as in the official code. Each S Vh_i is
    trimmed to `density` by magnitude, by tensor (officially over the whole model), and they are merged by TIES with the
    merge weights. Convolutions are seen as (out, in * k), as officially; vectors are trimmed and merged as they are.
    Where m > N * n all deltas are in memory at once.
    """
    fold, trim = ties(election, divisor), Magnitude(density=density, scope="tensor")

    def merged(parts: Iterable[Tensor], shape: tuple[int, int], weights: Sequence[float]) -> Array:
        if 0 in shape:
            return np.zeros(shape)
        state = {name: torch.zeros(shape, dtype=torch.float64) for name in fold.arrays}
        for part, weight in zip(parts, weights, strict=True):
            fold.add(state, sparsify(part, trim), weight, 1)
        array: Array = fold.finish(state, weights, state[fold.arrays[0]]).numpy()
        return array

    def combine(deltas: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
        m, n = (base.shape[0], prod(base.shape[1:])) if base.ndim > 1 else (1, base.numel())
        if base.ndim < 2:
            flat = (delta.reshape(m, n) for delta in deltas)
            return torch.from_numpy(merged(flat, (m, n), weights)).float().reshape(base.shape)
        turned = (delta.reshape(m, n).numpy().T for delta in deltas)
        if m <= len(weights) * n:
            _, left = _directions(sum((_gram([matrix]) for matrix in turned), np.zeros((m, m))))
            again = (delta.reshape(m, n).numpy().T for delta in deltas)
            parts = (torch.from_numpy(_product([matrix], left, np.float32).T) for matrix in again)
            return _like(base, _product([left], merged(parts, (left.shape[1], n), weights), np.float32))
        held = [matrix.T for matrix in turned]
        values, right = _directions(_gram(held))
        parts = (torch.from_numpy(part.T) for part in np.split((right * values).astype(np.float32), len(weights)))
        core = (right / values) @ merged(parts, (len(values), n), weights)
        return torch.from_numpy(_product(held, core, np.float32)).reshape(base.shape)

    return Joint(combine)


def _sum(deltas: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:  # float64
    total = torch.zeros(base.shape, dtype=torch.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def _mean(deltas: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
    return _sum(deltas, weights, base).div_(len(weights)).float()


def _turned(matrix: Tensor) -> Matrix:  # (l, k), l >= k, a view
    array: Matrix = matrix.numpy()
    return array if array.shape[0] >= array.shape[1] else array.T


def _like(matrix: Tensor, turned: Matrix) -> Tensor:  # in the shape of `matrix`, contiguous
    rows = matrix.shape[0]
    return torch.from_numpy(np.ascontiguousarray(turned if len(turned) == rows else turned.T)).reshape(matrix.shape)


def _pieces(parts: Sequence[Matrix]) -> Iterator[tuple[slice, Array]]:  # rows of the parts side by side
    for start in range(0, len(parts[0]), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, np.hstack([part[rows].astype(np.float64, copy=False) for part in parts])


def _gram(parts: Sequence[Matrix]) -> Array:
    width = sum(part.shape[1] for part in parts)
    total = np.zeros((width, width))
    for _, block in _pieces(parts):
        total += block.T @ block
    return total


def _product(parts: Sequence[Matrix], core: Array, dtype: type[np.floating]) -> Matrix:
    out = np.empty((len(parts[0]), core.shape[1]), dtype)
    for rows, block in _pieces(parts):
        out[rows] = block @ core
    return out


def _directions(
    gram: Array,  # (k, k)
    count: int | None = None,  # at most so many
    scale: float | None = None,  # what NOISE is a share of: where None, the largest singular value
) -> tuple[Array, Array]:  # (r,) singular values, falling, above the noise; (k, r) right singular vectors
    squares, vectors = np.linalg.eigh(gram)  # scipy's would keep other threads waiting
    values = np.sqrt(squares.clip(min=0))[::-1][:count]
    kept = int((values > NOISE * (values[:1] if scale is None else scale)).sum())
    return values[:kept], vectors[:, ::-1][:, :kept]


def _first(tall: Matrix, rank: int) -> Factors:
    values, right = _directions(_gram([tall]), rank)
    return _product([tall], right / values, np.float64), values, right


def _first_off_long(tall: Matrix, shared: Factors, rank: int) -> Factors:  # of (I - U U^T) tall, U = shared's left
    gram, left = _gram([tall]), shared[0]
    cross = np.zeros((left.shape[1], tall.shape[1]))
    for rows, block in _pieces([tall]):
        cross += left[rows].T @ block
    values, right = _directions(gram - cross.T @ cross, rank, gram.trace() ** 0.5)
    own = right / values
    return _product([tall, left], np.vstack([own, -cross @ own]), np.float64), values, right


def _first_off_short(tall: Matrix, shared: Factors, rank: int) -> Factors:  # of tall (I - V V^T), V = shared's right
    gram, right = _gram([tall]), shared[2]
    off = np.eye(len(gram)) - right @ right.T
    values, right = _directions(off @ gram @ off, rank, gram.trace() ** 0.5)
    return _product([tall], right / values, np.float64), values, right


def _orthogonalised(
    parts: Sequence[Matrix],  # (l, R) side by side
    core: Array,  # (R, c)
    dtype: type[np.floating],
) -> Matrix:  # (l, c): the (l, R) matrix nearest to the parts whose singular values are all 1, times core
    if sum(part.shape[1] for part in parts) <= len(parts[0]):
        values, right = _directions(_gram(parts))
        return _product(parts, (right / values) @ (right.T @ core), dtype)
    wide = np.hstack(parts).astype(np.float64, copy=False)
    values, left = _directions(_gram([wide.T]))
    whole: Matrix = ((left / values) @ (left.T @ (wide @ core))).astype(dtype, copy=False)
    return whole


def _merged(factors: Sequence[Factors]) -> Matrix:  # (l, k) float32: U_perp diag(S) Vh_perp
    lefts, values, rights = ([factor[which] for factor in factors] for which in range(3))
    if not any(len(each) for each in values):
        return np.zeros((len(lefts[0]), len(rights[0])), np.float32)
    right = _orthogonalised(rights, np.diag(np.concatenate(values)), np.float64)
    return _orthogonalised(lefts, right.T.astype(np.float64, copy=False), np.float32)
