"""Prune steps that decide entry by entry: by magnitude (TIES, breadcrumbs) or at random (DARE).

Each works in two phases, so that a tensor can be streamed: it walks the blocks of one tensor and returns a `Keep`,
which prunes any block of that tensor by itself. How a tensor is cut into blocks leaves no trace in what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lors.blocks import BLOCK
from lors.errors import InputError
from lors.merging.recipe import Breadcrumbs, Magnitude, Random

__all__ = [
    "Blocks",
    "Count",
    "Keep",
    "Rescale",
    "breadcrumbs",
    "magnitude",
    "magnitude_of_model",
    "random",
    "sparsify",
    "trim",
]

Blocks = Callable[[], Iterator[Tensor]]
"""Each call walks one tensor's flat float32 blocks, in order, anew."""
Keep = Callable[[Tensor, int], Tensor]
"""(flat float32 block, its flat start) -> a new block: 0 where not kept, else the entry, rescaled."""
Rescale = Literal["none", "density", "l1"]
"""What is kept is multiplied by 1, by 1 / density, or so that the tensor keeps its sum of magnitudes."""
Count = Literal["nearest", "down", "down_to_one", "threshold"]
"""How many entries a density keeps; see `recipe.Magnitude`."""

# The bits of a float32 but its sign, as an integer, have the order of the magnitudes. They are ranked in two passes:
# by the upper 15 of the 31, then by the lower 16 among the entries whose upper bits are those at the threshold.
_MAGNITUDE = 2**31 - 1
_UPPER, _LOWER = 2**15, 2**16


def magnitude(
    blocks: Blocks,
    size: int,  # entries of the tensor
    density: float,  # fraction kept, in (0, 1]
    rescale: Rescale = "none",
    count: Count = "nearest",
) -> Keep:
    """The entries of largest magnitude; among equal ones the lowest flat index first (TIES, arXiv 2306.01708, sec. 4).

    Walks the blocks twice, and once more, up to the cut, where there are more equal entries than places.
    """
    return magnitude_of_model({"": blocks}, size, density, rescale, count)[""]


def magnitude_of_model(
    tensors: Mapping[str, Blocks],  # in the order that decides among equal magnitudes, before the flat index
    size: int,  # entries of them all
    density: float,  # fraction kept, in (0, 1]
    rescale: Rescale = "none",  # each tensor by itself
    count: Count = "nearest",
) -> dict[str, Keep]:
    """As `magnitude`, over the entries of several tensors together; memory does not grow with them."""
    kept = _count(density, size, count)
    (tops,) = _tops(tensors, [kept], all_equal=count == "threshold")
    return {name: _rescaled(tops[name], blocks, density, rescale) for name, blocks in tensors.items()}


def breadcrumbs(
    blocks: Blocks,
    size: int,  # entries of the tensor
    density: float,  # fraction kept, in (0, 1]
    gamma: float,  # fraction dropped as too large, in [0, 1)
    rescale: Rescale = "none",
    count: Literal["nearest", "down"] = "nearest",
) -> Keep:
    """The entries of largest magnitude but for the very largest (Model Breadcrumbs, arXiv 2312.06795, sec. 3).

    In the order of falling magnitude, among equal ones of rising flat index, the first `gamma` are dropped, the next
    `density` kept and the others dropped: the paper's beta is 1 - gamma - density, its gamma 1 - `gamma`.
    Raises InputError where density + gamma > 1.
    """
    if density + gamma > 1 + 1e-9:
        raise InputError(
            f"breadcrumbs cannot keep a density of {density} after dropping {gamma} (gamma) of the entries; "
            f"choose values that sum to at most 1"
        )
    dropped = _count(gamma, size, count)
    outer, inner = _tops({"": blocks}, [min(dropped + _count(density, size, count), size), dropped])

    def keep(block: Tensor, start: int) -> Tensor:
        return outer[""](block, start).sub_(inner[""](block, start))  # an entry minus itself, or minus 0: exact

    return _rescaled(keep, blocks, density, rescale)


def random(
    blocks: Blocks,  # walked once for rescale "l1", else not at all
    density: float,  # probability of keeping an entry, in (0, 1]; 1 keeps all
    rescale: Rescale,
    seed: int,
    expert: str,  # its id
    name: str,  # the tensor's
) -> Keep:
    """Each entry kept with the same probability, independently (DARE, arXiv 2311.03099, sec. 3).

    The mask depends on seed, expert, name and flat index alone: entry i has the i-th 32-bit word of a Philox stream,
    whose key is the first 128 bits of sha256(JSON [seed, expert, name]), and is kept where it is below density * 2^32.
    """
    key = int.from_bytes(sha256(json.dumps([seed, expert, name]).encode()).digest()[:16], "little")
    bound = round(density * 2**32)

    def keep(block: Tensor, start: int) -> Tensor:
        if bound == 2**32:
            return block.clone()
        stream = np.random.Philox(key=key)
        stream.advance(start // 8)  # a step of the counter makes four words of 64 bits
        skip = start % 8
        words = stream.random_raw((skip + block.numel() + 1) // 2).astype("<u8", copy=False).view("<u4")
        mask = torch.from_numpy((words[skip : skip + block.numel()] < bound).view(np.int8)).neg_()  # all bits, or none
        return (block.view(torch.int32) & mask).view(torch.float32)

    return _rescaled(keep, blocks, density, rescale)


def trim(
    step: Magnitude | Random | Breadcrumbs,
    blocks: Blocks,
    size: int,  # entries of the tensor
    expert: str = "",
    name: str = "",
) -> Keep:
    """What a step keeps of one tensor; with scope "model" that tensor counts as the whole model.

    Raises InputError for settings that contradict each other.
    """
    if isinstance(step, Magnitude):
        return magnitude(blocks, size, step.density, step.rescale, step.count)
    if isinstance(step, Random):
        return random(blocks, step.density, step.rescale, step.seed, expert, name)
    return breadcrumbs(blocks, size, step.density, step.gamma, step.rescale, step.count)


def sparsify(
    delta: Tensor,  # any shape, float32 on the CPU, finite
    step: Magnitude | Random | Breadcrumbs,
    expert: str = "",  # for a random step: the expert's id
    name: str = "",  # and the parameter's name
) -> Tensor:  # the same shape, float32, new
    """One tensor pruned by one step. Raises as `trim` does."""
    flat = delta.reshape(-1)
    keep = trim(step, lambda: iter(torch.split(flat, BLOCK)), flat.numel(), expert, name)
    out = torch.empty_like(flat)
    for start in range(0, flat.numel(), BLOCK):
        out[start : start + BLOCK] = keep(flat[start : start + BLOCK], start)
    return out.reshape(delta.shape)


def _count(density: float, size: int, count: Count) -> int:
    if count == "nearest":
        return round(density * size)
    cut = int(density * size)
    return min(max(cut, 1) if count == "down_to_one" else cut + (count == "threshold"), size)


def _tops(
    tensors: Mapping[str, Blocks],
    counts: list[int],
    all_equal: bool = False,  # keep all entries that equal the last one, not only the first
) -> list[dict[str, Keep]]:
    """For each count, what keeps that many entries of largest magnitude over all tensors, by name.

    A radix selection on the bits: exact, and without a copy of the entries.
    """
    coarse = torch.zeros(_UPPER, dtype=torch.int64)
    for blocks in tensors.values():
        for block in blocks():
            _tally(coarse, _bits(block) >> 16)
    found = [_rank(coarse, count) for count in counts]
    fine = {upper: torch.zeros(_LOWER, dtype=torch.int64) for upper, _ in found}
    for blocks in tensors.values():
        for block in blocks():
            bits = _bits(block).numpy()
            for upper, histogram in fine.items():
                lower = bits[bits >> 16 == upper] & (_LOWER - 1)  # numpy picks three times as fast as torch
                _tally(histogram, torch.from_numpy(lower))
    result = []
    for upper, places in found:
        lower, places = _rank(fine[upper], places)
        level = np.int32(upper * _LOWER + lower).view(np.float32)
        below = float(np.nextafter(level, np.float32(-1)))
        result.append(_cuts(tensors, float(level), below, places, int(fine[upper][lower]), all_equal))
    return result


def _cuts(
    tensors: Mapping[str, Blocks],
    level: float,  # the magnitude at the threshold
    below: float,  # the next smaller float32: what is above it is at the threshold, or above
    places: int,  # how many entries at the threshold are kept
    ties: int,  # how many there are
    all_equal: bool,
) -> dict[str, Keep]:
    if places == ties or all_equal:
        return {name: partial(_above, below, below, 0) for name in tensors}
    keeps: dict[str, Keep] = {}
    left = places
    for name, blocks in tensors.items():
        cut = 0
        for block in blocks() if left else ():
            at = torch.nonzero(block.abs() == level).reshape(-1)
            if left <= at.numel():
                cut += int(at[left - 1]) + 1
                left = 0
                break
            cut += block.numel()
            left -= at.numel()
        keeps[name] = partial(_above, below, level, cut)
    return keeps


def _above(
    before: float,  # before the cut, what has a magnitude above this is kept
    after: float,  # from the cut on, above this
    cut: int,  # flat index
    block: Tensor,
    start: int,
) -> Tensor:
    out = torch.empty_like(block)
    split = min(max(cut - start, 0), block.numel())
    torch.hardshrink(block[:split], before, out=out[:split])
    torch.hardshrink(block[split:], after, out=out[split:])
    return out


def _bits(block: Tensor) -> Tensor:
    return block.view(torch.int32) & _MAGNITUDE


def _tally(histogram: Tensor, bins: Tensor) -> None:
    # A bincount takes as long on a large block, but on a small one the time of all the bins.
    histogram.index_add_(0, bins, torch.ones(1, dtype=torch.int64).expand(bins.numel()))


def _rank(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin of the count-th largest entry (of the largest for 0), and how many of that bin are among the `count`."""
    rows = histogram.view(256, -1)
    row, left = _from_the_top(rows.sum(1), count)
    column, left = _from_the_top(rows[row], left)
    return row * rows.shape[1] + column, left


def _from_the_top(sums: Tensor, count: int) -> tuple[int, int]:
    above = sums.sum() - sums.cumsum(0)  # entries in higher bins
    found = int((above >= max(count, 1)).sum())
    return found, count - int(above[found])


def _rescaled(keep: Keep, blocks: Blocks, density: float, rescale: Rescale) -> Keep:
    if rescale == "none":
        return keep
    factor = 1 / density
    if rescale == "l1":
        total = kept = 0.0
        start = 0
        for block in blocks():
            total += float(block.abs().sum(dtype=torch.float64))
            kept += float(keep(block, start).abs_().sum(dtype=torch.float64))
            start += block.numel()
        factor = total / kept if kept else 1.0
    if factor > torch.finfo(torch.float32).max:  # nothing but denormal entries is kept
        return lambda block, start: (keep(block, start).double() * factor).to(block.dtype)
    return lambda block, start: keep(block, start).mul_(factor)
