"""Weight averaging."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import TYPE_CHECKING

from lors.errors import InputError
from lors.merging.registry import Method, register, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["weighted_mean"]


def weighted_mean(
    deltas: Sequence[Tensor],  # one shape, float32
    weights: Sequence[float],
) -> Tensor:
    """sum of w_i * delta_i over the sum of w_i. Raises InputError where the weights cancel out."""
    total = sum(weights)
    if isclose(total, 0, abs_tol=1e-12):
        raise InputError("the merge weights sum to 0, and an average divides by their sum; change a weight")
    return weighted_sum(deltas, [weight / total for weight in weights])


register(
    Method(
        name="weight_average",
        formula="base + sum_i(w_i * delta_i) / sum_i(w_i)",
        reference="Wortsman et al. 2022, Model soups, arXiv 2203.05482, sec. 2 (uniform soup)",
        combine=weighted_mean,
        prunes=False,
        scaling_default=1.0,
        searches_scaling=False,
    )
)
