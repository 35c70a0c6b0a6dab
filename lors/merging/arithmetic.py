"""Task arithmetic."""

from __future__ import annotations

from lors.merging.registry import Method, register, weighted_sum

__all__ = ["SCALING_WITHOUT_VALIDATION"]

# What TIES-Merging (Yadav et al. 2023, arXiv 2306.01708) uses for task arithmetic where there is no validation data.
SCALING_WITHOUT_VALIDATION = 0.4

register(
    Method(
        name="task_arithmetic",
        formula="base + lambda * sum_i(w_i * delta_i)",
        reference="Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089, sec. 2",
        combine=weighted_sum,
        prunes=False,
        scaling_default=SCALING_WITHOUT_VALIDATION,
        searches_scaling=True,
    )
)
