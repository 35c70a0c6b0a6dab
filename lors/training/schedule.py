"""The learning rate: its peak by the size of the model, its course by the progress."""

from __future__ import annotations

import math

__all__ = ["learning_rate_for", "rate_share"]


def learning_rate_for(parameters: int) -> float:
    """Pre-training's peak learning rate divided by 40, by the size of the Whisper model (OpenAI's recipe)."""
    for limit, rate in ((50e6, 3.75e-5), (100e6, 2.5e-5), (400e6, 1.25e-5), (1e9, 6.25e-6)):
        if parameters < limit:
            return rate
    return 5e-6


def rate_share(
    done: float,  # finished steps; a time budget that is further on counts as the steps of its share
    steps: int,
    warmup: float,  # the share of the steps in which the rate rises
    schedule: str,  # linear, cosine or constant
) -> float:
    """The learning rate of the next step as a share of its peak, in [0, 1]."""
    rising = max(1, round(warmup * steps))
    left = min(1.0, (steps - done) / max(1, steps - rising))
    falling = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule]
    return min((done + 1) / rising, falling)
