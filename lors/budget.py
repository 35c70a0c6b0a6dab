"""Ranks and densities for a size: every byte of a compact expert goes where it retains the most energy.

Water-filling on one price, energy per byte: over all tensors, a singular direction is kept where its squared singular
value is worth its m + n entries, an entry of the sparse part where its square is worth its index and value, and a whole
tensor where that is worth more than its parts. The price is bisected until the file fills the budget. For `sequential`
the mask costs no bytes, so the ranks alone are chosen and the density stays the settings'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import log, prod

import numpy as np
import numpy.typing as npt
import torch

from lors.delta_file import header_bytes
from lors.errors import InputError
from lors.low_rank import squared_norm, truncated_svd
from lors.prune import TORCH_DTYPES, Dtype, Plan, PruneSettings
from lors.sparse import count_for, packed_bytes

__all__ = ["dtype_for", "fit_budget", "room_to_prune"]

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Curve = npt.NDArray[np.float64]

PROVENANCE_BYTES = 4096  # left for what the caller writes into the metadata
SAMPLE = 2**18  # entries of a residual that are looked at, or an eighth of them where that is more
BIN_BITS = 20  # of a float32 that are dropped: 8 bins an octave
BISECTIONS = 24  # of 30 decades: to a part in 10^5
# Bytes a parameter: measured on Whisper-base, int8 factors keep more energy in the same bytes up to where they hold
# nearly all of it; from there on only wider numbers add anything.
INT8_BELOW = 1.7


def dtype_for(budget: int, parameters: int) -> Dtype:
    """What a compact expert is stored in, to keep most energy in the budget."""
    return "int8" if budget < INT8_BELOW * parameters else "bfloat16"


def fit_budget(
    deltas: Iterable[tuple[str, torch.Tensor]],  # (name, delta float32), read once
    budget: int,  # bytes of the file
    settings: PruneSettings,  # its ratios, densities and groups have no effect, but for the density of `sequential`
    dtype: Dtype = "bfloat16",
    on_progress: Callable[[int], None] | None = None,  # (parameters done)
) -> Plan:
    """The (rank, count) of each matrix with which the file is just below the budget; matrices not named stay whole.

    The file takes at least 97 % of a budget of some MB, unless every direction is stored already, when what is lost is
    the rounding of the factors. One tensor is in memory at a time; of each, its spectrum and histograms of its
    residuals are kept.
    Raises InputError, with the least size, where the budget does not hold what is not pruned.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    curves: dict[str, _Curves] = {}
    done = 0
    for name, delta in deltas:
        shape = shapes[name] = tuple(delta.shape)
        if len(shape) > 1 and delta.numel() and settings.prunes(name, shape):
            curves[name] = _curves(delta.reshape(shape[0], -1), settings, settings.of(name, shape)[1], dtype)
        done += delta.numel()
        if on_progress:
            on_progress(done)
    return _fill(curves, room_to_prune(shapes, budget, settings, dtype))


def room_to_prune(
    shapes: Mapping[str, tuple[int, ...]],  # of every parameter
    budget: int,  # bytes of the file
    settings: PruneSettings,
    dtype: Dtype = "bfloat16",
) -> int:
    """The bytes that a budget leaves for the matrices that are pruned. Raises InputError as `fit_budget` does."""
    layout: dict[str, tuple[tuple[int, ...], Parts]] = {}
    data, stored = 0, TORCH_DTYPES[dtype]
    for name, shape in shapes.items():
        prunes = settings.prunes(name, shape) and prod(shape) > 0
        if prunes and len(shape) > 1:
            layout[name] = shape, _all_parts(shape, dtype)
        elif prunes and settings.vectors == "drop":
            layout[name] = shape, {}
        else:
            layout[name] = shape, {"whole": (stored, shape)}
            data += prod(shape) * stored.itemsize
    least = data + header_bytes(layout, settings) + PROVENANCE_BYTES
    if least > budget:
        raise InputError(
            f"a budget of {budget} bytes does not hold the header and what is not pruned; "
            f"give at least {least} bytes, or drop the vectors"
        )
    return budget - least


def _all_parts(shape: tuple[int, ...], dtype: Dtype) -> Parts:
    """More parts, and larger ones, than any matrix is stored in."""
    stored, m, size = TORCH_DTYPES[dtype], shape[0], prod(shape)
    parts: Parts = {"us": (stored, (m, m)), "vh": (stored, (m, size)), "scale": (torch.float32, (m,))}
    return parts | dict.fromkeys(("values", "positions", "counts"), (torch.bfloat16, (size,)))


@dataclass(frozen=True, slots=True)
class _Residual:
    """How the squares of a residual's entries are distributed, from the largest on."""

    heights: Curve  # -log of a square, rising
    counts: Curve  # entries of at least that square
    energies: Curve  # their sum of squares

    def count(self, least: float) -> int:
        """Entries whose square is at least that."""
        return int(np.interp(-log(least), self.heights, self.counts, left=0.0))

    def energy(self, count: int) -> float:
        return float(np.interp(count, self.counts, self.energies))


@dataclass(frozen=True, slots=True)
class _Curves:
    """What the parts of one matrix retain and cost."""

    size: int
    energy: float
    direction: int  # bytes of a rank
    value: int  # bytes of an entry's value
    whole: int  # bytes of all of it
    density: float | None  # of the mask: `sequential`
    kept: Curve  # energy of the first r directions, from r = 0
    residuals: dict[int, _Residual]  # by the rank before it, at 0 and the powers of 2; none: no sparse part

    def count(self, rank: int) -> int:
        """Entries of a `sequential` mask, which cost nothing."""
        return count_for(self.density, self.size) if rank and self.density is not None else 0

    def entries(self, rank: int, least: float) -> int:
        """Entries of the residual at a rank whose square is at least that."""
        near, shrunk = self._near(rank)
        return near.count(least / shrunk) if shrunk > 0 else 0

    def _near(self, rank: int) -> tuple[_Residual, float]:
        """The residual before the rank that is known, and by what its energy has shrunk: its shape hardly changes."""
        known = 2 ** (rank.bit_length() - 1) if rank else 0
        left = self.energy - self.kept[known]
        return self.residuals[known], float((self.energy - self.kept[rank]) / left) if left > 0 else 0.0

    def bytes(self, rank: int, count: int) -> int:
        sparse = count * self.value + min(packed_bytes(count, self.size).values()) if count and self.residuals else 0
        return rank * self.direction + sparse

    def retained(self, rank: int, count: int) -> float:
        if not self.residuals:
            return float(self.kept[rank])
        near, shrunk = self._near(rank)
        return float(self.kept[rank]) + near.energy(count) * shrunk

    def at(self, price: float) -> tuple[int, int] | None:
        """The rank and the count that are worth a price, energy a byte; None where the whole matrix is."""
        if self.residuals:
            coarse = self._best(self.residuals, price)
            fine = {min(round(coarse[0] * 2 ** (step / 4)), len(self.kept) - 1) for step in range(-4, 5)}
            best = self._best(fine, price)
        else:
            rank = int(np.count_nonzero(np.diff(self.kept) >= price * self.direction))
            best = rank, self.count(rank)
        return None if self.energy - price * self.whole >= self._worth(best, price) else best

    def _best(self, ranks: Iterable[int], price: float) -> tuple[int, int]:
        # An entry's index takes 0, 1 or 2 bytes by its code; which code is the smallest depends on the count.
        options = {(rank, self.entries(rank, price * (self.value + cost))) for rank in ranks for cost in (0, 1, 2)}
        return max(sorted(options | {(rank, 0) for rank in ranks}), key=lambda sizes: self._worth(sizes, price))

    def _worth(self, sizes: tuple[int, int], price: float) -> float:
        return self.retained(*sizes) - price * self.bytes(*sizes)


def _curves(
    delta: torch.Tensor,  # (m, n) float32, not empty
    settings: PruneSettings,
    density: float,
    dtype: Dtype,
) -> _Curves:
    (m, n), item = delta.shape, TORCH_DTYPES[dtype].itemsize
    direction = m + n + 4 if dtype == "int8" else (m + n) * item  # with its scale
    kept, residuals = np.zeros(1), {}
    if settings.composition != "sparse":
        us, vh = truncated_svd(delta, min(m, n))
        ranks = min(min(m, n), m * n * item // direction)  # beyond it is dearer than the whole
        squares = torch.linalg.vector_norm(us[:, :ranks], dim=0, dtype=torch.float64).square().numpy()
        kept = np.concatenate([kept, squares.cumsum()])
    if settings.composition in ("additive", "sparse"):
        rows = torch.linspace(0, m - 1, min(m, max(SAMPLE, m * n // 8) // n + 1)).round().long()
        left, before = delta[rows], 0
        for rank in [0, *(2**power for power in range((len(kept) - 1).bit_length()))]:
            if rank:
                left = left - us[rows, before:rank] @ vh[before:rank]
            residuals[rank], before = _residual(left, m / len(rows)), rank
    return _Curves(
        m * n,
        squared_norm(delta),
        direction,
        item,
        m * n * item,
        density if settings.composition == "sequential" else None,
        kept,
        residuals,
    )


def _residual(left: torch.Tensor, scale: float) -> _Residual:
    """From a histogram over the leading bits of each magnitude; each of these entries stands for `scale` of all."""
    flat = left.reshape(-1).numpy()
    bins = (flat.view(np.int32) & 0x7FFFFFFF) >> BIN_BITS
    counts, energies = np.bincount(bins), np.bincount(bins, weights=np.square(flat, dtype=np.float64))
    filled = np.flatnonzero(counts[1:])[::-1] + 1  # not those that are nearly 0; the largest first
    edges = np.append(filled[:1] + 1, filled).astype(np.int32) << BIN_BITS
    heights = -2 * np.log(edges.view(np.float32).astype(np.float64))
    return _Residual(
        heights,
        np.append(0, counts[filled].cumsum() * scale),
        np.append(0, energies[filled].cumsum() * scale),
    )


def _fill(curves: dict[str, _Curves], room: int) -> Plan:
    """The plan of the most energy in `room` bytes."""
    energy = sum(own.energy for own in curves.values())
    if energy == 0 or sum(own.whole for own in curves.values()) <= room:
        return dict.fromkeys(curves, (0, 0)) if energy == 0 else {}

    def at(price: float) -> dict[str, tuple[int, int] | None]:
        return {name: own.at(price) for name, own in curves.items()}

    def cost(plan: Mapping[str, tuple[int, int] | None]) -> int:
        return sum(curves[name].whole if sizes is None else curves[name].bytes(*sizes) for name, sizes in plan.items())

    best = at(_lowest(lambda price: cost(at(price)) <= room, energy))
    plan = {name: sizes for name, sizes in best.items() if sizes is not None}
    room -= cost(best) - cost(plan)  # the whole ones are settled
    # Ranks come in large steps; what they leave is filled with what comes in small ones.
    if not any(own.residuals for own in curves.values()):
        return _with_directions(curves, plan, room - cost(plan))

    def counted(square: float) -> dict[str, tuple[int, int]]:
        return {name: (rank, curves[name].entries(rank, square)) for name, (rank, _) in plan.items()}

    return counted(_lowest(lambda square: cost(counted(square)) <= room, energy))


def _lowest(fits: Callable[[float], bool], high: float) -> float:
    """The lowest price that fits, by bisection of its logarithm; `high` fits."""
    low = high * 1e-30
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _with_directions(curves: dict[str, _Curves], plan: dict[str, tuple[int, int]], room: int) -> Plan:
    """The plan and what more there is room for: singular directions, those of most energy a byte first, then matrices
    that are stored whole instead, for the rounding of their factors."""
    ranks = {name: rank for name, (rank, _) in plan.items()}

    def entry(name: str) -> tuple[float, str]:
        own, rank = curves[name], ranks[name]
        return -float(own.kept[rank + 1] - own.kept[rank]) / own.direction, name

    queue = [entry(name) for name in plan if ranks[name] + 1 < len(curves[name].kept)]
    heapify(queue)
    while queue:
        name = heappop(queue)[1]
        if curves[name].direction <= room:
            room -= curves[name].direction
            ranks[name] += 1
            if ranks[name] + 1 < len(curves[name].kept):
                heappush(queue, entry(name))
    for name in sorted(ranks, key=lambda name: curves[name].whole - ranks[name] * curves[name].direction):
        more = curves[name].whole - ranks[name] * curves[name].direction
        if ranks[name] + 1 == len(curves[name].kept) and more <= room:
            room -= more
            del ranks[name]
    return {name: (rank, curves[name].count(rank)) for name, rank in ranks.items()}
