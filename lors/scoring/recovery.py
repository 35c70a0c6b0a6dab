"""Normalised performance: how much of the way from the base to its experts a system has come.

The definitions are ours. What the paper (arXiv 2502.17380) calls normalised performance was not at hand.
"""

from __future__ import annotations

from collections.abc import Iterable

from lors.scoring.metrics import LOWER_IS_BETTER

__all__ = ["complete_mean", "ratio_to_expert", "recovery", "relative_to_base"]


def recovery(base: float, system: float, expert: float) -> float | None:
    """(base - system) / (base - expert): 0 is the base, 1 the expert, above 1 beyond it, below 0 worse than the base.

    One formula for error rates and for BLEU, since the sign cancels. None where base and expert score the same.
    """
    return (base - system) / (base - expert) + 0.0 if base != expert else None  # + 0.0, since -0.0 is shown as "-0.00"


def ratio_to_expert(metric: str, system: float, expert: float) -> float | None:
    """The system's score over the expert's, turned round for error rates: 1 is the expert, above 1 is better.

    None where the ratio would divide by 0 (an error rate of 0, an expert's BLEU of 0).
    """
    better, other = (expert, system) if metric in LOWER_IS_BETTER else (system, expert)
    return better / other if other else None


def relative_to_base(metric: str, system: float, base: float) -> float | None:
    """The change from the base as a share of the base's score, above 0 where the system is better: of an error rate its
    relative reduction. None where the base's score is 0.
    """
    gain = base - system if metric in LOWER_IS_BETTER else system - base
    return gain / base if base else None


def complete_mean(values: Iterable[float | None]) -> float | None:
    """The mean; None where there are no values or one is None, since means over different languages do not compare."""
    listed = list(values)
    present = [value for value in listed if value is not None]
    return sum(present) / len(present) if present and len(present) == len(listed) else None
