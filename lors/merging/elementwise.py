"""Combiners that decide entry by entry: sums, sign election (TIES), largest magnitude (MagMax), consensus (TALL masks).

A merge weight multiplies its expert's delta before anything else, so that a negative one turns its direction.
Sums are kept in float64. Adding an expert and removing it again restores the state wherever no sum had to be rounded:
with weights that are powers of two, where the last bits of an entry's deltas are at least 2^-52 of the sum of their
magnitudes. Elsewhere each addition and each removal leaves an error of at most 2^-53 of the sum at that time, which a
merged entry follows unless the experts cancel out to within it: then the elected sign may be the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isclose
from typing import Literal

import torch
from torch import Tensor

from lors.errors import InputError
from lors.merging.combiners import Fold, Joint, State

__all__ = ["Divisor", "Election", "Tie", "consensus", "linear", "magmax", "ties", "weighted_sum"]

Election = Literal["unweighted", "weighted", "count"]
Divisor = Literal["count", "weights", "none"]
Tie = Literal["drop", "positive", "negative"]

_NOTHING = 1e-9  # weights whose sum is below this cancel out, or are what removing all of them has left


def weighted_sum() -> Fold:
    """sum_i(w_i * delta_i) (task arithmetic, arXiv 2212.04089, sec. 2)."""

    def finish(state: State, weights: Sequence[float], base: Tensor) -> Tensor:
        return state["sum"].clone()

    return Fold(("sum",), _add_to_sum, finish)


def linear(normalize: bool) -> Fold:
    """The weighted mean of the models, as a delta; not normalised, their weighted sum (arXiv 2203.05482, sec. 2).

    Not normalised, the base enters: sum_i(w_i * (base + delta_i)) - base.
    Raises InputError (as it finishes) where a mean's weights sum to 0.
    """

    def finish(state: State, weights: Sequence[float], base: Tensor) -> Tensor:
        total = sum(weights)
        if not normalize:
            return base.to(torch.float64, copy=True).mul_(total - 1).add_(state["sum"])
        if isclose(total, 0, abs_tol=_NOTHING):
            raise InputError("the merge weights sum to 0, and an average divides by their sum; change a weight")
        return state["sum"] / total

    return Fold(("sum",), _add_to_sum, finish)


def ties(election: Election, divisor: Divisor, tie: Tie = "drop") -> Fold:
    """The mean, entry by entry, of the deltas that have the elected sign (TIES-Merging, arXiv 2306.01708, sec. 4).

    The sign is that of the sum of the deltas (unweighted), of the weighted deltas (weighted: then the weighted delta
    also says which side an expert is on), or of the number of positive less that of negative deltas (count). An entry
    of 0 is on neither side. Where the sum is exactly 0, `tie` says what comes out: 0, as in the paper's formula, or
    the mean of one side. The weighted deltas of the elected side are summed and divided by how many they are, by the
    sum of their weights (by 1 where that is 0), or not at all.
    """
    arrays = ["positive", "negative"]  # sums of the weighted deltas by side
    if divisor != "none":
        arrays += ["positive_share", "negative_share"]  # counts or weights by side
    if election == "unweighted" or (election == "count" and divisor != "count"):
        arrays.append("votes")

    def add(state: State, delta: Tensor, weight: float, sign: int) -> None:
        value = _weighted(delta, weight)
        voter = value if election == "weighted" else delta
        if divisor != "none":
            share = sign * (weight if divisor == "weights" else 1.0)
            state["positive_share"].add_(_flags(torch.gt, voter), alpha=share)
            state["negative_share"].add_(_flags(torch.lt, voter), alpha=share)
        if "votes" in arrays:
            state["votes"].add_(delta.sign() if election == "count" else delta, alpha=sign)
        sides = ["positive", "negative"]
        if weight < 0 and voter is delta:
            sides.reverse()
        state[sides[0]].add_(value.clamp(min=0), alpha=sign)
        state[sides[1]].add_(value.clamp_(max=0), alpha=sign)

    def finish(state: State, weights: Sequence[float], base: Tensor) -> Tensor:
        if "votes" in arrays:
            votes = state["votes"]
        elif election == "weighted":
            votes = state["positive"] + state["negative"]
        else:
            votes = state["positive_share"] - state["negative_share"]
        up = _flags(torch.ge if tie == "positive" else torch.gt, votes)
        down = _flags(torch.le if tie == "negative" else torch.lt, votes)
        merged = _chosen(state["positive"], up, state["negative"], down)
        if divisor != "none":
            share = _chosen(state["positive_share"], up, state["negative_share"], down)
            merged.div_(share.add_(share.abs() < _NOTHING))
        return merged

    return Fold(tuple(arrays), add, finish)


def magmax() -> Fold:
    """The weighted delta of largest magnitude; of two equal ones the positive (MagMax, arXiv 2407.06322, sec. 4).

    An expert that was added cannot be removed: what it outdid is not known any more.
    """

    def add(state: State, delta: Tensor, weight: float, sign: int) -> None:
        assert sign == 1, "no expert can be removed from a maximum"
        value = _weighted(delta, weight)
        torch.maximum(state["highest"], value, out=state["highest"])
        torch.minimum(state["lowest"], value, out=state["lowest"])

    def finish(state: State, weights: Sequence[float], base: Tensor) -> Tensor:
        margin = state["highest"] + state["lowest"]
        return _chosen(state["highest"], _flags(torch.ge, margin), state["lowest"], _flags(torch.lt, margin))

    return Fold(("highest", "lowest"), add, finish, removable=False)


def consensus(threshold: float, agreement: int) -> Joint:
    """The sum of the weighted deltas where TALL masks agree, else 0 (Consensus Merging, arXiv 2405.07813, sec. 4).

    An expert's mask is |w_i * delta_i| >= threshold * |sum - w_i * delta_i|; at least `agreement` masks, or all where
    there are fewer experts, must hold an entry. Reads every delta twice.
    """

    def combine(deltas: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
        total = torch.zeros_like(base, dtype=torch.float64)
        for number, weight in enumerate(weights):
            total.add_(_weighted(deltas[number], weight))
        held = torch.zeros_like(base, dtype=torch.int16)
        for number, weight in enumerate(weights):
            value = _weighted(deltas[number], weight)
            rest = (total - value).abs_().mul_(threshold)
            held.add_(value.abs_() >= rest)
        return total.mul_(held >= min(agreement, len(weights)))

    return Joint(combine, elementwise=True)


def _add_to_sum(state: State, delta: Tensor, weight: float, sign: int) -> None:
    state["sum"].add_(_weighted(delta, weight), alpha=sign)


def _weighted(delta: Tensor, weight: float) -> Tensor:
    """weight * delta as a new float64 tensor; the product is rounded by itself, so that adding undoes subtracting."""
    wide = delta.to(torch.float64, copy=True)
    return wide if weight == 1 else wide.mul_(weight)


def _flags(compare: Callable[..., Tensor], values: Tensor) -> Tensor:
    """1 where the comparison with 0 holds, else 0, as floats: arithmetic with them is faster than with booleans."""
    return compare(values, 0, out=torch.empty_like(values))


def _chosen(first: Tensor, by_first: Tensor, second: Tensor, by_second: Tensor) -> Tensor:
    """`first` or `second` where their flags are 1, else 0; several times as fast as torch.where."""
    return first.mul(by_first).addcmul_(second, by_second)
