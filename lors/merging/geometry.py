"""Merging by angles: spherical interpolation and Model Stock, each tensor by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import acos, sin, sqrt
from typing import Literal

import torch
from torch import Tensor

from lors.blocks import BLOCK
from lors.errors import InputError
from lors.low_rank import squared_norm
from lors.merging.combiners import Joint

__all__ = ["Space", "model_stock", "slerp"]

Space = Literal["models", "deltas"]

PARALLEL = 0.9995  # mergekit's and fusion-bench's: above it the arc is a line, below it sin(angle) > 0.03


def slerp(
    t: float,  # in [0, 1]: 0 is the first expert, 1 the second
    space: Space,  # between base + delta of each, or between the deltas
) -> Joint:
    """sin((1 - t) a) / sin(a) * x_1 + sin(t a) / sin(a) * x_2, less the base where the x are the models.

    a is the angle between x_1 and x_2, each tensor one vector (Shoemake 1985, sec. 3). The line (1 - t) x_1 + t x_2
    where |cos(a)| > 0.9995, as nearly always between models of one base, or where either is all zeros. Raises
    InputError (as it combines) for another number of experts than two, and for merge weights that differ.
    """

    def combine(deltas: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
        if len(weights) != 2:
            raise InputError(f"slerp merges two experts, not {len(weights)}; leave the others out or use linear")
        _refuse_weights("slerp", weights, "t says how near the result is to the second expert")
        one, two = (delta.reshape(-1) for delta in (deltas[0], deltas[1]))
        start = base.reshape(-1)
        dot = first = second = 0.0
        for b, x, y in _blocks(start, one, two):
            if space == "models":
                x, y = x + b, y + b
            dot, first, second = dot + float(x @ y), first + float(x @ x), second + float(y @ y)
        c_1, c_2 = _coefficients(t, dot / sqrt(first) / sqrt(second) if first and second else 1.0)
        c_base = c_1 + c_2 - 1 if space == "models" else 0.0
        merged = [(c_1 * x + c_2 * y + c_base * b).float() for b, x, y in _blocks(start, one, two)]
        return torch.cat([*merged, torch.empty(0)]).reshape(base.shape)

    return Joint(combine)


def model_stock(clamp: bool = True) -> Joint:
    """t * mean(delta_i), t = N cos / (1 + (N - 1) cos) (Model Stock, Jang et al., arXiv 2403.19522, sec. 4).

    cos is the mean cosine over the pairs of deltas, 0 where one of a pair is all zeros. It is below 0 where the experts
    disagree on the whole; clamped, t is 0 then, the base, whereas the formula moves away from the experts, without
    bound as cos nears -1 / (N - 1), where t is 0 too. One expert returns itself. Raises InputError (as it combines) for
    merge weights that differ.
    """

    def combine(deltas: Sequence[Tensor], weights: Sequence[float], base: Tensor) -> Tensor:
        _refuse_weights("model_stock", weights, "its ratio is derived for experts of one weight")
        experts, present = len(weights), 0
        total, units = (torch.zeros(base.shape, dtype=torch.float64) for _ in range(2))
        for delta in deltas:
            total += delta
            if norm := sqrt(squared_norm(delta)):
                units.add_(delta, alpha=1 / norm)
                present += 1
        if experts > 1:
            pairs = squared_norm(units) - present  # |sum of unit vectors|^2 = their number + 2 * the sum of the cosines
            cosine = pairs / (experts * (experts - 1))
            cosine = max(0.0, cosine) if clamp else cosine
            divisor = 1 + (experts - 1) * cosine
            total *= experts * cosine / divisor if abs(divisor) > 1e-6 else 0.0
        return total.div_(experts).float()

    return Joint(combine)


def _refuse_weights(method: str, weights: Sequence[float], reason: str) -> None:
    if len(set(weights)) > 1:
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise InputError(f"{method} takes no merge weights ({given}): {reason}; leave them out")


def _blocks(*flat: Tensor) -> Iterator[list[Tensor]]:  # float64
    for start in range(0, flat[0].numel(), BLOCK):
        yield [tensor[start : start + BLOCK].double() for tensor in flat]


def _coefficients(t: float, cosine: float) -> tuple[float, float]:
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = acos(cosine)
    return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)
