"""LoRS-Merging: task arithmetic over deltas pruned to a low-rank plus a sparse part."""

from __future__ import annotations

from lors.merging.arithmetic import SCALING_WITHOUT_VALIDATION
from lors.merging.registry import Method, register, weighted_sum

__all__: list[str] = []

register(
    Method(
        name="lors",
        formula="base + lambda * sum_i(w_i * pruned_i)",
        reference="Zhao, Sun and Zhang 2025, Low-Rank and Sparse Model Merging, arXiv 2502.17380v3",
        combine=weighted_sum,
        prunes=True,
        # A choice of ours: pruning keeps most of the energy, so the value of task arithmetic is the nearest known one.
        scaling_default=SCALING_WITHOUT_VALIDATION,
        searches_scaling=True,
    )
)
